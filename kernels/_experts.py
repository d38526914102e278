"""The feed-forward of a mixture of experts, of rows sorted by their experts.

Maths: group_sizes [E] says how many of the rows x [T, D] are each expert's, one
expert's after the other's.  For a row of expert e, activation a:

    gate = x Wg_e + bg_e,   up = x Wu_e + bu_e
    y    = (a(gate) * up) Wd_e + bd_e

Shazeer et al., arXiv 1701.06538; sorted rows without a capacity that could drop
any: Gale et al., MegaBlocks, arXiv 2211.15841.

There is no kernel of it: its products, forward and backward, are XLA's ragged
ones, `jax.lax.ragged_dot`.  Beside x, y and the weights, gate, up and h are in
HBM, [T, F] each.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._frame import switches
from ._frame.check import (
  Implementation,
  as_array,
  as_floats,
  check_implementation,
  check_integers,
  check_shape,
)
from ._frame.derivative import is_perturbed, linear
from ._frame.manual import partitioned
from ._frame.mapped import in_turns
from ._gated.activation import Activation, ClampedSwiGLU, as_activation, gated

_OP = "expert_feed_forward"


class ExpertBiases(NamedTuple):
  """Of `expert_feed_forward`; any of them may be None.

  Attributes:
    gate: [E, F]; with gate and up in one weight both, [E, 2F].
    up: [E, F].
    down: [E, D].
  """

  gate: Any = None
  up: Any = None
  down: Any = None


@switches.plain
def expert_feed_forward(
  x: jax.Array,
  w_gate: jax.Array | None,
  w_up: jax.Array | None,
  w_down: jax.Array,
  group_sizes: jax.Array,
  *,
  biases: ExpertBiases | None = None,
  activation: Activation = "silu",
  implementation: Implementation = None,
) -> jax.Array:
  """Each row through the feed-forward of its expert; rows sorted by expert.

  Which expert a row goes to, with which weight its result comes back, and the
  sorting are the caller's.  XLA computes it on all platforms.

  Args:
    x: [T, D] float32, bfloat16 or float16, the dtype of the products: first the
      rows of expert 0, then those of expert 1, and so on.
    w_gate: [E, D, F] float32 or bfloat16, computed with in x's dtype.  With
      w_up None it has both branches, [E, D, 2F], gate first.  None for experts
      without a gate.
    w_up: [E, D, F].
    w_down: [E, F, D].
    group_sizes: [E] integers, not negative, how many rows are each expert's.
      Rows past their sum are no expert's, and give 0.  (What a sum above T
      gives is not defined.)
    biases: added in float32; None for none.
    activation: as in `feed_forward`: a name, an elementwise function, or
      gpt-oss's `ClampedSwiGLU`.
    implementation: None or "xla".

  Returns:
    [T, D] of x's dtype; sums and activation in float32.

  Raises:
    ValueError: on a wrong shape or dtype, or an unknown activation.
    NotImplementedError: on "pallas", of which there is no kernel.
  """
  check_implementation(_OP, implementation, pallas=False)
  activation = as_activation(_OP, activation)
  given = biases if biases is not None else ExpertBiases()
  x, sizes, weights = _checked(x, (w_gate, w_up, w_down), group_sizes)
  if weights[0] is None and isinstance(activation, ClampedSwiGLU):
    raise ValueError(
      f"{_OP}: w_gate must be given for a ClampedSwiGLU, which has two "
      f"branches, got None"
    )
  run = functools.partial(_feed_forward, activation=activation)
  spec = jax.typeof(x).sharding.spec
  return partitioned(run, spec)(x, weights, sizes, _biases(given, weights))


def _feed_forward(
  x: Any, weights: Any, sizes: Any, own: Any, activation: Any
) -> jax.Array:
  """[T, D], of arrays that are checked."""
  gate_weight, up_weight, down_weight = weights
  expert = _expert_of_row(sizes, x.shape[0])
  first = gate_weight if gate_weight is not None else up_weight
  gate = _product(x, first, sizes, own.gate, expert)
  up = None
  if gate_weight is not None and up_weight is not None:
    up = _product(x, up_weight, sizes, own.up, expert)
  elif gate_weight is not None:
    gate, up = jnp.split(gate, 2, axis=1)
  h = gated(activation, gate, up).astype(x.dtype)
  y = _product(h, down_weight, sizes, own.down, expert)
  # What a product has past its groups is not defined on all platforms.
  is_some = expert < sizes.shape[0]
  return jnp.where(is_some[:, None], y, 0).astype(x.dtype)


def _expert_of_row(sizes: jax.Array, rows: int) -> jax.Array:
  """[T] int32, E for rows of none."""
  ends = jnp.cumsum(sizes)
  return jnp.searchsorted(ends, jnp.arange(rows), side="right").astype(
    jnp.int32
  )


def _product(
  x: jax.Array, w: jax.Array, sizes: jax.Array, bias: Any, expert: jax.Array
) -> jax.Array:
  """Each row with its expert's weight, float32 at least; 0 for rows of none."""
  is_some = (expert < sizes.shape[0])[:, None]
  # So that no gradient has what a row of none holds.
  x = jnp.where(is_some, x, jnp.zeros_like(x))
  y = _grouped(x, w.astype(x.dtype), sizes)
  if bias is not None:
    y += bias.astype(y.dtype)[jnp.minimum(expert, sizes.shape[0] - 1)]
  return jnp.where(is_some, y, 0)


def _ragged(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  sum_dtype = jnp.promote_types(x.dtype, jnp.float32)
  return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=sum_dtype)


# JAX maps some ragged products, and not those of their derivatives.  Here each
# direction is a function of its own, of which examples take turns.


@jax.custom_jvp
def _grouped(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """Each group of rows with its weight, in float32 at least."""
  return in_turns(_ragged)(x, w, sizes)


@functools.partial(_grouped.defjvp, symbolic_zeros=True)
def _grouped_jvp(primals: Any, tangents: Any) -> Any:
  x, w, sizes = primals
  dx, dw, _ = tangents
  y = _grouped(x, w, sizes)

  def by_rows(kept: Any, d: Any) -> Any:
    return (in_turns(_ragged)(d[0], *kept),)

  def by_weights(kept: Any, d: Any) -> Any:
    return (in_turns(_ragged)(kept[0], d[0], kept[1]),)

  @in_turns
  def to_rows(w: Any, sizes: Any, dy: Any) -> Any:
    return jax.linear_transpose(lambda d: _ragged(d, w, sizes), x)(dy)

  @in_turns
  def to_weights(x: Any, sizes: Any, dy: Any) -> Any:
    return jax.linear_transpose(lambda d: _ragged(x, d, sizes), w)(dy)

  def back(transpose: Any) -> Any:
    return lambda kept, dy: transpose(*kept, dy[0])

  parts: list[Any] = []
  if is_perturbed(dx):
    parts += linear(by_rows, back(to_rows), (w, sizes), (dx,), (y,))
  if is_perturbed(dw):
    parts += linear(by_weights, back(to_weights), (x, sizes), (dw,), (y,))
  return y, functools.reduce(jnp.add, parts)


def _checked(x: Any, weights: Any, group_sizes: Any) -> tuple[Any, Any, Any]:
  """x, the group sizes and the weights, as arrays."""
  (x,) = as_floats(_OP, x=x)
  if x.ndim != 2:
    raise ValueError(f"{_OP}: x must be [T, D], got {x.shape}")
  names = "w_gate", "w_up", "w_down"
  found = {n: w for n, w in zip(names, weights, strict=True) if w is not None}
  arrays = dict(zip(found, as_floats(_OP, **found), strict=True))
  gate, up, down = (arrays.get(name) for name in names)
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
  return x, sizes.astype(jnp.int32), (gate, up, down)


def _biases(given: ExpertBiases, weights: Any) -> ExpertBiases:
  """The biases as arrays; `gate` is that of the activated branch."""
  if not isinstance(given, ExpertBiases):
    raise ValueError(
      f"{_OP}: biases must be an ExpertBiases or None, got "
      f"{type(given).__name__}"
    )
  for name, bias, weight in zip(given._fields, given, weights, strict=True):
    if bias is not None and weight is None:
      raise ValueError(
        f"{_OP}: biases.{name} must be None where w_{name} is, got an array"
      )
    if bias is not None:
      (array,) = as_floats(_OP, **{f"biases.{name}": bias})
      shape = weight.shape[0], weight.shape[2]
      check_shape(_OP, f"biases.{name}", array, shape, f"that of w_{name}")
      given = given._replace(**{name: array})
  return given._replace(gate=given.up) if weights[0] is None else given
