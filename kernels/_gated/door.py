"""What the public functions are given: checked, and brought to the op.

A weight may be an array, one layer of a stack, or a `LayerOf` of `scan_layers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._frame.check import (
  Implementation,
  as_array,
  as_floats,
  as_whole_number,
  check_config,
  check_implementation,
  check_seen_products,
  check_shape,
)
from .._frame.kernel import kernel_op
from .._layers import LayerOf
from .._quantized import QuantizedWeight, check_quantized
from .._row_norm import Norm, as_norm
from .activation import ACTIVATIONS, Activation
from .spec import Arrays, Problem
from .tiles import FeedForwardConfig

# --- to the op ----------------------------------------------------------------


class Given(NamedTuple):
  """The weights as the caller gave them."""

  w_gate: Any
  w_up: Any
  w_down: Any  # None for geglu
  layer: Any  # None, or which of a stack

  def named(self) -> Mapping[str, Any]:
    """The weights by their names."""
    weights = self._replace(layer=None)._asdict().items()
    return {name: w for name, w in weights if w is not None}

  def in_place(self) -> list[LayerOf]:
    """Those that stay in the stack that a scan goes over."""
    return [w for w in self.named().values() if isinstance(w, LayerOf)]


def run(
  op: kernel_op, p: Problem, x: Any, given: Given, norm: Norm | None
) -> jax.Array:
  """The op of what the caller gave it."""
  p, arrays = _checked(op.name, p, x, given, norm)
  if arrays.layer is None:
    return op(p, arrays).y
  weights = given.in_place()
  stacks = arrays.w_gate, arrays.w_up, arrays.w_down
  if not op.leaves_alone(p, arrays, stacks):
    # A layer of its own is what is split over the devices, or cast.
    own = arrays.of_one_layer()
    if weights:
      taken = (w.take() for w in weights)
      own = own._replace(**dict(zip(given.named(), taken, strict=True)))
    return op(p, own).y
  if not weights:
    return op(p, arrays).y
  return _in_scan(op, p, arrays, weights)


def _in_scan(
  op: kernel_op, p: Problem, arrays: Arrays, weights: list[LayerOf]
) -> jax.Array:
  """The op of weights that stay in their stacks, which go through it."""
  names = ("port_gate", "port_up", "port_down")[: len(weights)]
  by_name = dict(zip(names, weights, strict=True))
  through = {name: w.use_port() for name, w in by_name.items()}
  stores = weights[0].stores(_kept_shapes(p, arrays))
  through |= dict(zip(_STORES, stores, strict=False))
  outs = op(p, arrays._replace(**through))
  for name, weight in by_name.items():
    weight.return_port(getattr(outs, name))
  weights[0].return_stores([getattr(outs, name) for name in _STORES])
  return outs.y


_STORES = ("store_gate", "store_up", "store_normed")


def _kept_shapes(p: Problem, a: Arrays) -> list[jax.ShapeDtypeStruct]:
  """Of what is kept, in the order of `Kept`."""
  if not p.keeps_products:
    return []
  d, f = a.w_gate.shape[-2:]
  widths = [f, f] if p.norm is None else [f, f, d]
  return [
    jax.ShapeDtypeStruct((a.x.size // d, width), a.x.dtype) for width in widths
  ]


# --- checks -------------------------------------------------------------------


def problem_of(
  activation: Activation,
  residual: bool,
  implementation: Implementation,
  config: FeedForwardConfig | None,
) -> Problem:
  """The problem, without a norm as yet."""
  config = FeedForwardConfig() if config is None else config
  return Problem(activation, None, residual, implementation, config)


def _checked(
  op: str, p: Problem, x: Any, given: Given, norm: Norm | None
) -> tuple[Problem, Arrays]:
  """What either op is given, checked, and the whole problem."""
  check_implementation(op, p.implementation)
  check_config(op, p.config, FeedForwardConfig)
  if p.activation not in ACTIVATIONS:
    raise ValueError(
      f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, "
      f"got {p.activation!r}"
    )
  (x,) = as_floats(op, x=x)
  if x.ndim == 0:
    raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
  p = _without_kernel(op, p, given)
  arrays = _weights(op, x, given)
  check_seen_products(op, p.implementation, ", ".join(given.named()))
  if norm is None:
    return p, arrays
  if not isinstance(norm, Norm):
    raise ValueError(
      f"{op}: norm must be a pallas_gemma.kernels.Norm(scale) or None, "
      f"got {type(norm).__name__}"
    )
  row_norm, scale, epsilon = as_norm(op, x, norm, "norm.")
  if scale is None:  # the kernels have one
    scale = jnp.ones(x.shape[-1:], jnp.float32)
  p = dataclasses.replace(p, norm=row_norm)
  return p, arrays._replace(scale=scale, epsilon=epsilon)


def _without_kernel(op: str, p: Problem, given: Given) -> Problem:
  """The problem of int8 weights, which is XLA's."""
  weights = given.named().values()
  are_quantized = [isinstance(w, QuantizedWeight) for w in weights]
  if not any(are_quantized):
    return p
  if not all(are_quantized):
    raise ValueError(
      f"{op}: all weights must be QuantizedWeight, or none, got "
      f"{sum(are_quantized)} of {len(are_quantized)}"
    )
  if p.implementation == "pallas":
    raise ValueError(
      f"{op}: implementation must be None or 'xla' for a QuantizedWeight, "
      "which XLA reads at the bandwidth of HBM and no kernel does; got 'pallas'"
    )
  return dataclasses.replace(p, implementation="xla")


def _as_weights(op: str, weights: Mapping[str, Any]) -> list[Any]:
  """Arrays of floats, or what is quantised."""
  if not any(isinstance(w, QuantizedWeight) for w in weights.values()):
    return list(as_floats(op, **weights))
  settled = {name: w.of_arrays() for name, w in weights.items()}
  for name, weight in settled.items():
    if weight.ndim >= 2:  # else its shape is refused
      check_quantized(op, name, weight, (-2,))
  return list(settled.values())


def _weights(op: str, x: jax.Array, given: Given) -> Arrays:
  """The arrays without a norm."""
  weights, in_place, layer = given.named(), given.in_place(), given.layer
  if in_place:
    if len(in_place) < len(weights) or layer is not None:
      raise ValueError(
        f"{op}: all weights must stay in their stacks, or none, and layer must "
        f"be None with them; got {len(in_place)} of {len(weights)}, and layer "
        f"{layer!r}"
      )
    weights = {name: w.stack for name, w in weights.items()}
    layer = in_place[0].index
  gate, up, *down = _as_weights(op, weights)
  wanted = "[D, F]" if layer is None else "[L, D, F], with layer,"
  if gate.ndim != (2 if layer is None else 3) or gate.shape[-2] != x.shape[-1]:
    raise ValueError(
      f"{op}: w_gate must be {wanted} with D = {x.shape[-1]}, the last "
      f"dimension of x, got {gate.shape}"
    )
  check_shape(op, "w_up", up, gate.shape, "the shape of w_gate")
  *stack, d, f = gate.shape
  if down:
    letters = "[F, D]" if layer is None else "[L, F, D]"
    check_shape(op, "w_down", down[0], (*stack, f, d), letters)
  if layer is not None:
    layer = _as_layer(op, layer, stack[0])
  return Arrays(x, gate, up, down[0] if down else None, None, layer=layer)


def _as_layer(op: str, layer: Any, count: int) -> jax.Array:
  """[] int32, which of `count` layers."""
  if not isinstance(layer, jax.Array | np.ndarray):
    layer = as_whole_number(op, "layer", layer)
    if not 0 <= layer < count:
      raise ValueError(
        f"{op}: layer must be from 0 to {count - 1}, the last of the stack, "
        f"got {layer}"
      )
  index = as_array(op, "layer", layer)
  if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
    raise ValueError(
      f"{op}: layer must be a single integer, got {index.dtype} {index.shape}"
    )
  return jnp.clip(index, 0, count - 1).astype(jnp.int32)
