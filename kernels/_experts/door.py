"""What the public function is given: checked, and brought to the op.

A weight may be an array, one layer of a stack, or a `LayerOf` of `scan_layers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._frame import tpu
from .._frame.check import (
  Implementation,
  as_array,
  as_floats,
  as_layer,
  check_config,
  check_implementation,
  check_integers,
  check_seen_products,
  check_shape,
)
from .._frame.kernel import kernel_op
from .._frame.sharding import is_split_over
from .._gated.activation import ClampedSwiGLU, as_activation
from .._gated.config import FeedForwardConfig
from .._gated.door import (
  WEIGHTS,
  Given,
  own_layer,
  run_in_stack,
  stacks_of,
)
from .._gated.layout import Layout
from .._gated.spec import Arrays, Problem, of_layer
from .._layers import LayerOf
from .spec import ExpertBiases

_OP = "expert_feed_forward"

# --- to the op ----------------------------------------------------------------


def run(
  op: kernel_op,
  p: Problem,
  x: Any,
  given: Given,
  group_sizes: Any,
  biases: ExpertBiases | None,
) -> jax.Array:
  """The op of what the caller gave it; p's layout is not known yet."""
  p, arrays = _checked(x, given, group_sizes, biases, p)
  weights = given.in_place()
  if p.layout.form == "ungated" and weights:  # as `Arrays` has them
    weights = dict(w_gate=weights["w_up"], w_down=weights["w_down"])
  if p.layout.form == "columns" and not _is_cut_by_tiles(op, p, arrays):
    # Of the layer's own: every layer would cut the whole stack anew.
    own = own_layer(arrays, weights)
    w_gate, w_up = p.layout.take(own.w_gate, None)
    p = dataclasses.replace(p, layout=Layout("apart"))
    arrays, weights = own._replace(w_gate=w_gate, w_up=w_up), {}
  return run_in_stack(op, p, arrays, weights)


def arranged(
  x: Any, weights: Any, group_sizes: Any, biases: ExpertBiases, p: Problem
) -> tuple[Problem, Arrays]:
  """The problem with its layout, and the arrays in their places."""
  gate, up, down = weights
  b_gate, b_up, b_down = biases
  layout = Layout("apart")
  if gate is None:
    layout, gate, up, b_gate, b_up = Layout("ungated"), up, None, b_up, None
  elif up is None:
    layout, f = Layout("columns"), down.shape[-2]
    if b_gate is not None:
      b_gate, b_up = b_gate[:, :f], b_gate[:, f:]
  arrays = Arrays(
    x=x,
    w_gate=gate,
    w_up=up,
    w_down=down,
    scale=None,
    b_gate=b_gate,
    b_up=b_up,
    b_down=b_down,
    group_sizes=group_sizes,
  )
  return dataclasses.replace(p, layout=layout), arrays


def _is_cut_by_tiles(op: kernel_op, p: Problem, a: Arrays) -> bool:
  """Whether no tile, and no device, would have parts of both halves."""
  if p.layout.width(a.w_gate) % tpu.LANES:
    return False
  if p.implementation == "xla":
    return True
  return not is_split_over("F", op.name, a, op.split(p, a))


# --- checks -------------------------------------------------------------------


def _checked(
  x: Any,
  given: Given,
  group_sizes: Any,
  biases: ExpertBiases | None,
  p: Problem,
) -> tuple[Problem, Arrays]:
  """The problem and its arrays, with the layer of a stack if there is one."""
  check_implementation(_OP, p.implementation)
  check_config(_OP, p.config, FeedForwardConfig)
  p = dataclasses.replace(p, activation=as_activation(_OP, p.activation))
  if given.w_gate is None and isinstance(p.activation, ClampedSwiGLU):
    raise ValueError(
      f"{_OP}: w_gate must be given for a ClampedSwiGLU, which has two "
      f"branches, got None"
    )
  check_seen_products(
    _OP, p.implementation, "x, the weights and the group sizes"
  )
  (x,) = as_floats(_OP, x=x)
  if x.ndim != 2:
    raise ValueError(f"{_OP}: x must be [T, D], got {x.shape}")
  weights, layer = stacks_of(_OP, given)
  weights = dict(zip(weights, as_floats(_OP, **weights), strict=True))
  stack, experts = _check_weights(weights, x.shape[1], layer)
  if layer is not None:
    layer = as_layer(_OP, layer, *stack)
  sizes = as_array(_OP, "group_sizes", group_sizes)
  check_integers(_OP, "group_sizes", sizes)
  check_shape(_OP, "group_sizes", sizes, (experts,), "E")
  # Beside a `LayerOf`, arrays are a layer's own, as the scan gives them.
  own = _biases(biases, weights, None if given.in_place() else layer)
  if not all(isinstance(n, int) for n in x.shape):
    p = dataclasses.replace(p, implementation=_without_kernel(p, x))
  settled = tuple(weights.get(name) for name in WEIGHTS)
  p, arrays = arranged(x, settled, sizes.astype(jnp.int32), own, p)
  return p, arrays._replace(layer=layer)


def _without_kernel(p: Problem, x: Any) -> Implementation:
  """For `jax.export` with an open number of rows: rows are no examples."""
  if p.implementation == "pallas":
    raise ValueError(
      f"{_OP}: x must have a known shape for implementation='pallas', which "
      f"takes its tiles by it, got {x.shape}"
    )
  return "xla"


def _check_weights(
  weights: Mapping[str, Any], d: int, layer: Any
) -> tuple[tuple[int, ...], int]:
  """Refuses wrong ones; returns how many layers there are, and experts."""
  gate, up, down = (weights.get(name) for name in WEIGHTS)
  if down is None or (gate is None and up is None):
    raise ValueError(
      f"{_OP}: w_down, and w_gate or w_up, must be given, got None"
    )
  stacked = layer is not None
  of_stack = "L, " if stacked else ""
  if down.ndim != 3 + stacked or down.shape[-1] != d:
    with_layer = ", with layer," if stacked else ""
    raise ValueError(
      f"{_OP}: w_down must be [{of_stack}E, F, D]{with_layer} with D = {d}, "
      f"the last dimension of x, got {down.shape}"
    )
  *stack, experts, f, _ = down.shape
  if gate is not None:
    width, why = (2 * f, "2F") if up is None else (f, "F")
    shape, why = (*stack, experts, d, width), f"[{of_stack}E, D, {why}]"
    check_shape(_OP, "w_gate", gate, shape, why)
  if up is not None:
    shape = *stack, experts, d, f
    check_shape(_OP, "w_up", up, shape, f"[{of_stack}E, D, F]")
  return tuple(stack), experts


def _biases(
  given: ExpertBiases | None, weights: Mapping[str, Any], layer: Any
) -> ExpertBiases:
  """The biases as arrays, each of the weight of its name, of one layer."""
  given = ExpertBiases() if given is None else given
  if not isinstance(given, ExpertBiases):
    raise ValueError(
      f"{_OP}: biases must be an ExpertBiases or None, got "
      f"{type(given).__name__}"
    )
  own: dict[str, jax.Array] = {}
  for name, bias in zip(given._fields, given, strict=True):
    weight = weights.get(f"w_{name}")
    if bias is not None and weight is None:
      raise ValueError(
        f"{_OP}: biases.{name} must be None where w_{name} is, got an array"
      )
    if bias is None or weight is None:
      continue
    in_place = isinstance(bias, LayerOf)
    bias = bias.take() if in_place else bias
    (bias,) = as_floats(_OP, **{f"biases.{name}": bias})
    *stack, experts, _, width = weight.shape
    stack = [] if layer is None or in_place else stack
    shape, why = (*stack, experts, width), f"that of w_{name}"
    check_shape(_OP, f"biases.{name}", bias, shape, why)
    own[name] = of_layer(bias, layer if stack else None)
  return given._replace(**own)
