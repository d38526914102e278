"""The feed-forward of experts in plain jnp, and the parts of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from .._frame.derivative import linear
from .._frame.kernel import Saved
from .._frame.mapped import in_turns
from .._frame.rule import is_perturbed, with_rule
from .._gated import stack
from .._gated.activation import gated
from .._gated.spec import Arrays, Kept, Outs, Problem

# --- specification ------------------------------------------------------------


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


def reference(p: Problem, a: Arrays) -> Outs:
  """The specification; its products are XLA's ragged ones."""
  return plain_forward(p, a, keep=False)[0]


def plain_forward(
  p: Problem, a: Arrays, *, keep: bool
) -> tuple[Outs, Kept | None]:
  """The specification, and what it keeps of its way.

  Stores pass by it as they are: its gradient reads none.
  """
  given, a = a, a.of_one_layer()
  expert = expert_of_row(a.group_sizes, a.x.shape[0])
  product = functools.partial(_product, sizes=a.group_sizes, expert=expert)
  gate = product(a.x, a.w_gate, bias=_gate_bias(p, a))
  up = None
  if p.layout.form == "columns":
    gate, up = jnp.split(gate, 2, axis=1)
  elif a.w_up is not None:
    up = product(a.x, a.w_up, bias=a.b_up)
  h = gated(p.activation, gate, up).astype(a.x.dtype)
  y = product(h, a.w_down, bias=a.b_down).astype(a.x.dtype)
  outs = Outs.of(y, given)
  if not (keep and p.keeps_products) or given.store_gate is not None:
    return outs, None
  kept = Kept(gate.astype(y.dtype), None, None)
  return outs, kept if up is None else kept._replace(up=up.astype(y.dtype))


def plain_backward(p: Problem, saved: Saved, d: Outs) -> Arrays:
  """The specification's gradients, by JAX; of a stack, in the layer's place."""
  own: Arrays = saved.arrays.of_one_layer()
  floats = own._replace(layer=None, group_sizes=None)

  def of_floats(floats: Arrays) -> jax.Array:
    a = floats._replace(group_sizes=own.group_sizes)
    return plain_forward(p, a, keep=False)[0].y

  (grads,) = jax.vjp(of_floats, floats)[1](d.y)
  ports = stack.ports_of(saved.arrays, d)
  return stack.onward(stack.put_gradients(grads, saved.arrays, ports), d)


def _gate_bias(p: Problem, a: Arrays) -> Any:
  """That of what w_gate gives, which may be both branches."""
  if p.layout.form != "columns" or a.b_gate is None:
    return a.b_gate
  return jnp.concatenate([a.b_gate, a.b_up], axis=1)


def expert_of_row(sizes: jax.Array, rows: int) -> jax.Array:
  """[T] int32, E for rows of none."""
  ends = jnp.cumsum(sizes)
  return jnp.searchsorted(ends, jnp.arange(rows), side="right").astype(
    jnp.int32
  )


def _product(
  x: jax.Array, w: jax.Array, *, bias: Any, sizes: jax.Array, expert: jax.Array
) -> jax.Array:
  """Each row with its expert's weight, float32 at least; 0 for rows of none."""
  is_some = (expert < sizes.shape[0])[:, None]
  # So that no gradient has what a row of none holds.
  x = jnp.where(is_some, x, jnp.zeros_like(x))
  y = _grouped(x, w.astype(x.dtype), sizes)
  if bias is not None:
    y += bias_of_rows(bias, expert, y.dtype)
  return jnp.where(is_some, y, 0)


def bias_of_rows(bias: jax.Array, expert: jax.Array, dtype: Any) -> jax.Array:
  """Each row's expert's bias; 0 for rows of none."""
  experts = bias.shape[0]
  own = bias.astype(dtype)[jnp.minimum(expert, experts - 1)]
  return jnp.where((expert < experts)[:, None], own, 0)


# --- ragged products ----------------------------------------------------------

# Of x [T, D], w [E, D, F] and y [T, F], rows of an expert together, each is
# bilinear in the other two, and the derivatives of each are the others:
#
#     y = x w_e,   x = y w_e^T,   w_e = sum over the expert's rows of x^T y
#
# JAX differentiates its ragged product once, and does not map that; so each is
# a function of its own, of which examples take turns.

_Of = Literal["x", "w", "y"]
_FACTORS: Mapping[_Of, tuple[_Of, _Of]] = {
  "y": ("x", "w"),
  "x": ("y", "w"),
  "w": ("x", "y"),
}


def _grouped(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """Each group of rows with its weight, in float32 at least."""
  return _product_function("y", x.dtype)(x, w, sizes)


def _ragged(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  sum_dtype = jnp.promote_types(x.dtype, jnp.float32)
  return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=sum_dtype)


def _plain_product(
  of: _Of, dtype: Any, first: jax.Array, second: jax.Array, sizes: jax.Array
) -> jax.Array:
  """One of the three; x and w are of `dtype`, y of that of sums."""
  if of == "y":
    return _ragged(first, second, sizes)
  if of == "x":
    w = jnp.swapaxes(second, 1, 2).astype(first.dtype)
    return _ragged(first, w, sizes).astype(dtype)
  x, y = first.astype(second.dtype), second
  return jax.lax.ragged_dot_general(
    x, y, sizes, _OVER_ROWS, preferred_element_type=y.dtype
  ).astype(dtype)


_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[],
)


@functools.cache
def _product_function(of: _Of, dtype: Any) -> Callable[..., jax.Array]:
  """One of the three, with its derivatives."""
  plain = in_turns(functools.partial(_plain_product, of, dtype))

  def rule(primals: Any, tangents: Any) -> Any:
    *factors, sizes = primals
    result = product(*primals)
    parts = [
      _as_linear(of, own, dtype, (other, sizes), d, jax.typeof(result))
      for own, other, d in zip(
        _FACTORS[of], reversed(factors), tangents, strict=False
      )
      if is_perturbed(d)
    ]
    return result, functools.reduce(jnp.add, parts)

  product = with_rule(plain, rule)
  return product


def _as_linear(
  of: _Of, own: _Of, dtype: Any, kept: Any, d: jax.Array, result: Any
) -> jax.Array:
  """A product as a linear function of one factor, which can be transposed.

  Args:
    of: which product.
    own: of which factor.
    dtype: of x and w.
    kept: the other factor, and the group sizes.
    d: in place of the factor.
    result: the type of the product.
  """
  is_first, argument = _FACTORS[of][0] == own, jax.typeof(d)

  def function(kept: Any, d: Any) -> Any:
    other, sizes = kept
    factors = (d[0], other) if is_first else (other, d[0])
    return (_product_function(of, dtype)(*factors, sizes),)

  def transpose(kept: Any, d: Any) -> Any:
    return (_as_linear(own, of, dtype, kept, d[0], argument),)

  return linear(function, transpose, kept, (d,), (result,))[0]
