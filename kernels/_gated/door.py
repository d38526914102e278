"""What the public functions are given: checked, and brought to the op.

A weight may be an array, one layer of a stack, or a `LayerOf` of `scan_layers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._frame import tpu
from .._frame.check import (
  Implementation,
  as_floats,
  as_layer,
  as_switch,
  check_config,
  check_implementation,
  check_seen_products,
  check_shape,
)
from .._frame.kernel import kernel_op
from .._frame.manual import varying_like
from .._layers import LayerOf
from .._quantized import QuantizedWeight, check_quantized
from .._row_norm import Norm, as_norm
from .activation import Activation, ClampedSwiGLU, as_activation
from .config import FeedForwardConfig
from .forms import biases, formed
from .layout import Layout
from .spec import Arrays, Problem

# --- to the op ----------------------------------------------------------------


class Given(NamedTuple):
  """The weights and biases as the caller gave them."""

  w_gate: Any
  w_up: Any
  w_down: Any  # None for geglu
  layer: Any  # None, or which of a stack
  b_gate: Any = None
  b_up: Any = None
  b_down: Any = None

  def named(self) -> Mapping[str, Any]:
    """The weights by their names."""
    weights = zip(WEIGHTS, self[: len(WEIGHTS)], strict=True)
    return {name: w for name, w in weights if w is not None}

  def in_place(self) -> Mapping[str, LayerOf]:
    """Those that stay in the stack that a scan goes over."""
    return {n: w for n, w in self.named().items() if isinstance(w, LayerOf)}


WEIGHTS = "w_gate", "w_up", "w_down"


def run(
  op: kernel_op, p: Problem, x: Any, given: Given, norm: Norm | None
) -> jax.Array:
  """The op of what the caller gave it.

  Of p's layout it is known whether it is transposed.
  """
  p, x, given = _checked(op.name, p, x, given)
  p, arrays = _with_norm(op.name, p, _arrays(op.name, p, x, given), norm)
  if p.layout.form == "columns" and not _is_cut_by_tiles(op, p, arrays):
    w_gate, w_up = p.layout.take(arrays.w_gate, None)
    p = dataclasses.replace(p, layout=Layout())
    arrays = arrays._replace(w_gate=w_gate, w_up=w_up)
  return run_in_stack(op, p, arrays, given.in_place())


def run_in_stack(
  op: kernel_op, p: Problem, arrays: Arrays, weights: Mapping[str, LayerOf]
) -> jax.Array:
  """The op of arrays, whose weights may be in a stack of all layers'.

  Args:
    op: the op.
    p: its problem.
    arrays: its arrays.
    weights: those that stay in the stack that a scan goes over, by their names.
  """
  if arrays.layer is None:
    return op(p, arrays).y
  stacks = arrays.w_gate, arrays.w_up, arrays.w_down
  if not op.leaves_alone(p, arrays, stacks):
    # A layer of its own is what is split over the devices, or cast.
    return op(p, own_layer(arrays, weights)).y
  if not weights:
    return op(p, arrays).y
  return _in_scan(op, p, arrays, weights)


def own_layer(arrays: Arrays, weights: Mapping[str, LayerOf]) -> Arrays:
  """With weights of the layer's own; `weights` as for `run_in_stack`."""
  own = arrays.of_one_layer()
  return own._replace(**{name: w.take() for name, w in weights.items()})


def _is_cut_by_tiles(op: kernel_op, p: Problem, a: Arrays) -> bool:
  """Whether [D, 2F] can stay as it is, and its halves need no cut."""
  f = p.layout.width(a.w_gate)
  return f % tpu.LANES == 0 and op.leaves_alone(p, a, (a.w_gate,))


def _in_scan(
  op: kernel_op, p: Problem, arrays: Arrays, weights: Mapping[str, LayerOf]
) -> jax.Array:
  """The op of weights that stay in their stacks, which go through it."""
  by_name = {f"port_{name[2:]}": w for name, w in weights.items()}
  through = {name: w.use_port() for name, w in by_name.items()}
  first, kept = weights["w_gate"], _kept_shapes(p, arrays)
  stores = first.stores(list(kept.values()))
  through |= dict(zip(kept, stores, strict=False))
  outs = op(p, arrays._replace(**through))
  for name, weight in by_name.items():
    weight.return_port(getattr(outs, name))
  first.return_stores([getattr(outs, name) for name in kept])
  return outs.y


def _kept_shapes(p: Problem, a: Arrays) -> Mapping[str, jax.ShapeDtypeStruct]:
  """Of what is kept, by the names of the stores."""
  if not p.keeps_products:
    return {}
  d, f = a.x.shape[-1], p.layout.width(a.w_gate)
  widths = {"store_gate": f, "store_up": f, "store_normed": d}
  if p.layout.branches == 1:
    del widths["store_up"]
  if p.norm is None:
    del widths["store_normed"]
  return {
    name: varying_like(a.w_gate, (a.x.size // d, width), a.x.dtype)
    for name, width in widths.items()
  }


# --- checks -------------------------------------------------------------------


def problem_of(
  activation: Activation,
  residual: bool,
  transposed: bool,
  implementation: Implementation,
  config: FeedForwardConfig | None,
) -> Problem:
  """The problem, without a norm as yet, and of a layout that is not whole."""
  config = FeedForwardConfig() if config is None else config
  layout = Layout(transposed=transposed)
  return Problem(activation, None, residual, implementation, config, layout)


def _checked(
  op: str, p: Problem, x: Any, given: Given
) -> tuple[Problem, jax.Array, Given]:
  """What either op is given, but for the shapes of weights."""
  check_implementation(op, p.implementation)
  check_config(op, p.config, FeedForwardConfig)
  p = dataclasses.replace(
    p,
    activation=as_activation(op, p.activation),
    residual=as_switch(op, "residual", p.residual),
  )
  transposed = as_switch(op, "transposed", p.layout.transposed)
  (x,) = as_floats(op, x=x)
  if x.ndim == 0:
    raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
  p = _without_kernel(op, p, given)
  check_seen_products(op, p.implementation, ", ".join(given.named()))
  given, layout = formed(op, given, transposed)
  if layout.branches == 1 and isinstance(p.activation, ClampedSwiGLU):
    raise ValueError(
      f"{op}: w_gate must be given for a ClampedSwiGLU, which has two "
      f"branches, got None"
    )
  return dataclasses.replace(p, layout=layout), x, given


def _with_norm(
  op: str, p: Problem, arrays: Arrays, norm: Norm | None
) -> tuple[Problem, Arrays]:
  """The whole problem."""
  if norm is None:
    return p, arrays
  if not isinstance(norm, Norm):
    raise ValueError(
      f"{op}: norm must be a pallas_gemma.kernels.Norm(scale) or None, "
      f"got {type(norm).__name__}"
    )
  row_norm, scale, epsilon = as_norm(op, arrays.x, norm, "norm.")
  if scale is None:  # the kernels have one
    scale = jnp.ones(arrays.x.shape[-1:], jnp.float32)
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


def _as_weights(
  op: str, weights: Mapping[str, Any], transposed: bool
) -> dict[str, Any]:
  """Arrays of floats, or what is quantised."""
  if not any(isinstance(w, QuantizedWeight) for w in weights.values()):
    arrays = as_floats(op, **weights)
    return dict(zip(weights, arrays, strict=True))
  settled = {name: w.of_arrays() for name, w in weights.items()}
  for name, weight in settled.items():
    if weight.ndim >= 2:  # else its shape is refused
      check_quantized(op, name, weight, (-1 if transposed else -2,))
  return settled


def _arrays(op: str, p: Problem, x: jax.Array, given: Given) -> Arrays:
  """The arrays without a norm."""
  weights, layer = stacks_of(op, given)
  settled = _as_weights(op, weights, p.layout.transposed)
  stack = _check_weights(op, p.layout, settled, x.shape[-1], layer)
  if layer is not None:
    layer = as_layer(op, layer, *stack)
  gate, up, down = (settled.get(name) for name in WEIGHTS)
  arrays = Arrays(x, gate, up, down, None, layer=layer)
  return arrays._replace(**biases(op, p.layout, arrays, given))


def stacks_of(op: str, given: Given) -> tuple[Mapping[str, Any], Any]:
  """The weights by their names, in their stacks, and the layer if there is."""
  weights, in_place, layer = given.named(), given.in_place(), given.layer
  if not in_place:
    return weights, layer
  if len(in_place) < len(weights) or layer is not None:
    raise ValueError(
      f"{op}: all weights must stay in their stacks, or none, and layer must "
      f"be None with them; got {len(in_place)} of {len(weights)}, and layer "
      f"{layer!r}"
    )
  stacks = {name: w.stack for name, w in in_place.items()}
  return stacks, next(iter(in_place.values())).index


def _check_weights(
  op: str, layout: Layout, weights: Mapping[str, Any], d: int, layer: Any
) -> tuple[int, ...]:
  """Refuses weights of wrong shapes; returns how many layers there are."""
  gate, up, down = (weights.get(name) for name in WEIGHTS)
  assert gate is not None
  name = "w_up" if layout.form == "ungated" else "w_gate"
  wanted, t = layout.describe(), layout.transposed
  of_stack = () if layer is None else gate.shape[:1]
  ndim = len(of_stack) + (3 if layout.form == "fused" else 2)
  is_wrong = gate.ndim != ndim or gate.shape[-1 if t else -2] != d
  is_odd = layout.form == "columns" and gate.shape[-1] % 2 != 0
  if is_wrong or is_odd or (layout.form == "fused" and gate.shape[-3] != 2):
    wanted = f"[{wanted}]" if layer is None else f"[L, {wanted}], with layer,"
    raise ValueError(
      f"{op}: {name} must be {wanted} with D = {d}, the last dimension of x, "
      f"got {gate.shape}"
    )
  if up is not None:
    check_shape(op, "w_up", up, gate.shape, "the shape of w_gate")
  if down is not None:
    f = layout.width(gate)
    letters = "D, F" if t else "F, D"
    letters = f"[{letters}]" if layer is None else f"[L, {letters}]"
    shape = (*of_stack, d, f) if t else (*of_stack, f, d)
    check_shape(op, "w_down", down, shape, letters)
  return of_stack
