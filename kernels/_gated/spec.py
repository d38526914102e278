"""What geglu and feed_forward compute, in plain jnp, and their records.

Both ops share everything: geglu is the op without a w_down.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from .._frame import switches
from .._frame.check import Implementation
from .._frame.kernel import Saved
from .._rms_norm import rms_norm_reference
from .._row_norm import Norm, RowNorm
from .activation import ACTIVATIONS, Activation

if TYPE_CHECKING:  # the next page
  from .tiles import FeedForwardConfig

# --- specification ------------------------------------------------------------


@switches.plain
def geglu_reference(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  *,
  activation: Activation = "gelu_tanh",
  norm: Norm | None = None,
) -> jax.Array:
  """Two matmuls, the activation of one times the other.  The specification."""
  gate, up = _gate_and_up(_norm(x, norm), w_gate, w_up)
  return _gated(gate, up, activation, x.dtype)


@switches.plain
def feed_forward_reference(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  w_down: jax.Array,
  *,
  activation: Activation = "gelu_tanh",
  norm: Norm | None = None,
  residual: bool = False,
) -> jax.Array:
  """The gated unit and the projection back to D.  The specification."""
  h = geglu_reference(x, w_gate, w_up, activation=activation, norm=norm)
  y = _down(h, w_down)
  return x + y if residual else y


def _norm(x: jax.Array, norm: Norm | None) -> jax.Array:
  """x, or its RMSNorm."""
  if norm is None:
    return x
  return rms_norm_reference(
    x, norm.scale, epsilon=norm.epsilon, scale_offset=norm.scale_offset
  )


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """A product in a's dtype, summed in at least float32."""
  sum_dtype = jnp.promote_types(a.dtype, jnp.float32)
  return jnp.matmul(a, b.astype(a.dtype), preferred_element_type=sum_dtype)


def _gate_and_up(
  x: jax.Array, w_gate: jax.Array, w_up: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The two products, as they are summed: at least float32."""
  return _matmul(x, w_gate), _matmul(x, w_up)


def _gated(
  gate: jax.Array, up: jax.Array, activation: Activation, dtype: Any
) -> jax.Array:
  """h, from the two products."""
  return (ACTIVATIONS[activation](gate) * up).astype(dtype)


def _down(h: jax.Array, w_down: jax.Array) -> jax.Array:
  """y without the residual."""
  return _matmul(h, w_down).astype(h.dtype)


# --- records ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
  """Everything that is not an array.

  Attributes:
    activation: the activation.
    norm: the RMSNorm taken of x, None for none; its scale is an array.
    residual: whether x is added to the result.
    implementation: as the caller gave it.
    config: the caller's, or the default.
  """

  activation: Activation
  norm: RowNorm | None
  residual: bool
  implementation: Implementation
  config: FeedForwardConfig

  @property
  def keeps_products(self) -> bool:
    """Whether `Kept` goes from the forward to the backward pass."""
    return self.config.residuals == "gate_up"

  def norm_of(
    self, x: jax.Array, scale: jax.Array | None, epsilon: jax.Array | None
  ) -> jax.Array:
    """The specification's norm of x; x itself if there is none."""
    if self.norm is None or scale is None:
      return x
    epsilon = self.norm.epsilon if epsilon is None else epsilon
    return _norm(x, Norm(scale, epsilon, self.norm.scale_offset))


class Arrays(NamedTuple):
  """What an op is given."""

  x: Any  # [..., D]; for all but the public functions [N, D]
  w_gate: Any  # [D, F]
  w_up: Any  # [D, F]
  w_down: Any  # [F, D], None for geglu
  scale: Any  # [D], None without a norm
  epsilon: Any = None  # [] float32 of the norm, if it is traced


class Outs(NamedTuple):
  """What an op gives."""

  y: Any  # [..., D]; the h of geglu, [..., F]


class Kept(NamedTuple):
  """What the forward pass keeps for the backward pass, in x's dtype."""

  gate: Any  # [N, F], x w_gate
  up: Any  # [N, F], x w_up
  normed: Any  # [N, D], the norm of x, None without one


# --- in place of the kernels, off TPU -----------------------------------------


def reference(p: Problem, a: Arrays) -> Outs:
  """The specification."""
  return plain_forward(p, a, keep=False)[0]


def plain_forward(
  p: Problem, a: Arrays, *, keep: bool
) -> tuple[Outs, Kept | None]:
  """The specification, and what it keeps of its way."""
  x = p.norm_of(a.x, a.scale, a.epsilon)
  gate, up = _gate_and_up(x, a.w_gate, a.w_up)
  y = _finish(p, a.x.dtype, gate, up, a.w_down)
  outs = Outs(a.x + y if p.residual else y)
  if not (keep and p.keeps_products):
    return outs, None
  normed = None if p.norm is None else x
  return outs, Kept(gate.astype(y.dtype), up.astype(y.dtype), normed)


def plain_backward(p: Problem, saved: Saved, d: Outs) -> Arrays:
  """The specification's gradients, by JAX, in two halves around the products.

  What is kept of these serves if it is the specification's own numbers, which
  are float32 at least; rounded to bfloat16 it does not, and the products are
  computed again.
  """
  a: Arrays = saved.arrays
  kept: Kept | None = saved.kept

  def products(x, w_gate, w_up, scale, epsilon):
    return _gate_and_up(p.norm_of(x, scale, epsilon), w_gate, w_up)

  (gate, up), through_products = jax.vjp(
    products, a.x, a.w_gate, a.w_up, a.scale, a.epsilon
  )
  if kept is not None and kept.gate.dtype == gate.dtype:
    gate, up = kept.gate, kept.up
  finish = functools.partial(_finish, p, a.x.dtype)
  dgate, dup, dw_down = jax.vjp(finish, gate, up, a.w_down)[1](d.y)
  dx, dw_gate, dw_up, dscale, depsilon = through_products((dgate, dup))
  dx = dx + d.y if p.residual else dx
  return Arrays(dx, dw_gate, dw_up, dw_down, dscale, depsilon)


def _finish(
  p: Problem,
  dtype: Any,
  gate: jax.Array,
  up: jax.Array,
  w_down: jax.Array | None,
) -> jax.Array:
  """The result without the residual, from the two products."""
  h = _gated(gate, up, p.activation, dtype)
  return h if w_down is None else _down(h, w_down)
