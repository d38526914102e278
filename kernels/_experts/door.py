"""What the public function is given: checked, and brought to the op."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._frame import tpu
from .._frame.check import (
  Implementation,
  as_array,
  as_floats,
  check_config,
  check_implementation,
  check_integers,
  check_seen_products,
  check_shape,
)
from .._gated.activation import ClampedSwiGLU, as_activation
from .._gated.config import FeedForwardConfig
from .._gated.layout import Layout
from .._gated.spec import Arrays, Problem
from .spec import ExpertBiases

_OP = "expert_feed_forward"
_NAMES = "w_gate", "w_up", "w_down"


def checked(
  x: Any,
  weights: tuple[Any, Any, Any],
  group_sizes: Any,
  biases: ExpertBiases | None,
  p: Problem,
) -> tuple[Problem, Arrays]:
  """What the op is called with; p's layout is not known yet."""
  check_implementation(_OP, p.implementation)
  check_config(_OP, p.config, FeedForwardConfig)
  p = dataclasses.replace(p, activation=as_activation(_OP, p.activation))
  if weights[0] is None and isinstance(p.activation, ClampedSwiGLU):
    raise ValueError(
      f"{_OP}: w_gate must be given for a ClampedSwiGLU, which has two "
      f"branches, got None"
    )
  check_seen_products(
    _OP, p.implementation, "x, the weights and the group sizes"
  )
  x, sizes, *settled = _arrays(x, weights, group_sizes)
  own = _biases(biases, settled)
  if not all(isinstance(n, int) for n in x.shape):
    p = dataclasses.replace(p, implementation=_without_kernel(p, x))
  return arranged(x, settled, sizes, own, p)


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
    layout, f = Layout("columns"), down.shape[1]
    if b_gate is not None:
      b_gate, b_up = b_gate[:, :f], b_gate[:, f:]
    if f % tpu.LANES:  # a tile may not have a part of either half
      layout, (gate, up) = Layout("apart"), layout.take(gate, None)
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


def _without_kernel(p: Problem, x: Any) -> Implementation:
  """For `jax.export` with an open number of rows: rows are no examples."""
  if p.implementation == "pallas":
    raise ValueError(
      f"{_OP}: x must have a known shape for implementation='pallas', which "
      f"takes its tiles by it, got {x.shape}"
    )
  return "xla"


def _arrays(x: Any, weights: Any, group_sizes: Any) -> tuple[Any, ...]:
  """x, the group sizes and the weights, as arrays."""
  (x,) = as_floats(_OP, x=x)
  if x.ndim != 2:
    raise ValueError(f"{_OP}: x must be [T, D], got {x.shape}")
  found = {n: w for n, w in zip(_NAMES, weights, strict=True) if w is not None}
  arrays = dict(zip(found, as_floats(_OP, **found), strict=True))
  gate, up, down = (arrays.get(name) for name in _NAMES)
  if down is None or (gate is None and up is None):
    raise ValueError(
      f"{_OP}: w_down, and w_gate or w_up, must be given, got None"
    )
  if down.ndim != 3 or down.shape[2] != x.shape[1]:
    raise ValueError(
      f"{_OP}: w_down must be [E, F, D] with D = {x.shape[1]}, the last "
      f"dimension of x, got {down.shape}"
    )
  experts, f, d = down.shape
  fused = gate is not None and up is None
  if gate is not None:
    width, why = (2 * f, "[E, D, 2F]") if fused else (f, "[E, D, F]")
    check_shape(_OP, "w_gate", gate, (experts, d, width), why)
  if up is not None:
    check_shape(_OP, "w_up", up, (experts, d, f), "[E, D, F]")
  sizes = as_array(_OP, "group_sizes", group_sizes)
  check_integers(_OP, "group_sizes", sizes)
  check_shape(_OP, "group_sizes", sizes, (experts,), "E")
  return x, sizes.astype(jnp.int32), gate, up, down


def _biases(given: ExpertBiases | None, weights: Any) -> ExpertBiases:
  """The biases as arrays, each of the weight of its name."""
  given = ExpertBiases() if given is None else given
  if not isinstance(given, ExpertBiases):
    raise ValueError(
      f"{_OP}: biases must be an ExpertBiases or None, got "
      f"{type(given).__name__}"
    )
  own: dict[str, jax.Array] = {}
  for name, bias, weight in zip(given._fields, given, weights, strict=True):
    if bias is not None and weight is None:
      raise ValueError(
        f"{_OP}: biases.{name} must be None where w_{name} is, got an array"
      )
    if bias is not None:
      (own[name],) = as_floats(_OP, **{f"biases.{name}": bias})
      shape = weight.shape[0], weight.shape[2]
      check_shape(_OP, f"biases.{name}", own[name], shape, f"that of w_{name}")
  return given._replace(**own)
