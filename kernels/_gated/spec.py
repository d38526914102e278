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
from .._quantized import QuantizedWeight, quantized_einsum
from .._rms_norm import rms_norm_reference
from .._row_norm import Norm, RowNorm
from . import stack
from .activation import ACTIVATIONS, Activation

if TYPE_CHECKING:  # the next page, and a type
  from .._layers import LayerOf
  from .tiles import FeedForwardConfig

# --- specification ------------------------------------------------------------


@switches.plain
def geglu_reference(
  x: jax.Array,
  w_gate: jax.Array | LayerOf | QuantizedWeight,
  w_up: jax.Array | LayerOf | QuantizedWeight,
  *,
  layer: jax.Array | int | None = None,
  activation: Activation = "gelu_tanh",
  norm: Norm | None = None,
) -> jax.Array:
  """Two matmuls, the activation of one times the other.  The specification."""
  w_gate, w_up = (of_layer(w, layer) for w in (w_gate, w_up))
  gate, up = _gate_and_up(_norm(x, norm), w_gate, w_up)
  return _gated(gate, up, activation, x.dtype)


@switches.plain
def feed_forward_reference(
  x: jax.Array,
  w_gate: jax.Array | LayerOf | QuantizedWeight,
  w_up: jax.Array | LayerOf | QuantizedWeight,
  w_down: jax.Array | LayerOf | QuantizedWeight,
  *,
  layer: jax.Array | int | None = None,
  activation: Activation = "gelu_tanh",
  norm: Norm | None = None,
  residual: bool = False,
) -> jax.Array:
  """The gated unit and the projection back to D.  The specification."""
  h = geglu_reference(
    x, w_gate, w_up, layer=layer, activation=activation, norm=norm
  )
  y = _down(h, of_layer(w_down, layer))
  return x + y if residual else y


def of_layer(weight: Any, layer: jax.Array | int | None) -> jax.Array:
  """A layer's own weight; the array itself if it is not a stack."""
  if layer is None:
    return weight
  return jax.tree.map(
    lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), weight
  )


def _norm(x: jax.Array, norm: Norm | None) -> jax.Array:
  """x, or its RMSNorm."""
  if norm is None:
    return x
  return rms_norm_reference(
    x, norm.scale, epsilon=norm.epsilon, scale_offset=norm.scale_offset
  )


def _matmul(a: jax.Array, b: jax.Array | QuantizedWeight) -> jax.Array:
  """A product in a's dtype, summed in at least float32."""
  if isinstance(b, QuantizedWeight):
    return quantized_einsum("...i,ij->...j", a, b)
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
  """What an op is given.

  Weights of a stack are [L, D, F] and [L, F, D].  In a scan over it, what is
  written goes into stacks as well: gradients through ports, and what is kept
  into stores, see `_layers/`.
  """

  x: Any  # [..., D]; for all but the public functions [N, D]
  w_gate: Any  # [D, F], or a QuantizedWeight, as the others then
  w_up: Any  # [D, F]
  w_down: Any  # [F, D], None for geglu
  scale: Any  # [D], None without a norm
  epsilon: Any = None  # [] float32 of the norm, if it is traced
  layer: Any = None  # [] int32, which of a stack; None if it is none
  port_gate: Any = None  # as w_gate, None without ports
  port_up: Any = None  # as w_up
  port_down: Any = None  # as w_down
  store_gate: Any = None  # [L, N, F] of x's dtype, None without stores
  store_up: Any = None  # [L, N, F]
  store_normed: Any = None  # [L, N, D], None without a norm

  def of_one_layer(self) -> Arrays:
    """With the layer's own weights, and no stacks."""
    if self.layer is None:
      return self
    gate, up, down = (
      None if w is None else of_layer(w, self.layer)
      for w in (self.w_gate, self.w_up, self.w_down)
    )
    return Arrays(self.x, gate, up, down, self.scale, self.epsilon)


class Kept(NamedTuple):
  """What the forward pass keeps for the backward pass, in x's dtype."""

  gate: Any  # [N, F], x w_gate
  up: Any  # [N, F], x w_up
  normed: Any  # [N, D], the norm of x, None without one


class Outs(NamedTuple):
  """What an op gives."""

  y: Any  # [..., D]; the h of geglu, [..., F]
  port_gate: Any = None  # the ports, as they came
  port_up: Any = None
  port_down: Any = None
  store_gate: Any = None  # the stores, with what this layer keeps
  store_up: Any = None
  store_normed: Any = None

  @classmethod
  def of(cls, y: Any, a: Arrays, stores: Kept | None = None) -> Outs:
    """The result of an op on `a`, whose stores go on; ports pass by it."""
    gate, up, normed = Kept(*a[-3:]) if stores is None else stores
    return cls(y, store_gate=gate, store_up=up, store_normed=normed)


# --- in place of the kernels, off TPU -----------------------------------------


def reference(p: Problem, a: Arrays) -> Outs:
  """The specification."""
  return plain_forward(p, a, keep=False)[0]


def plain_forward(
  p: Problem, a: Arrays, *, keep: bool
) -> tuple[Outs, Kept | None]:
  """The specification, and what it keeps of its way."""
  own = a.of_one_layer()
  x = p.norm_of(a.x, a.scale, a.epsilon)
  gate, up = _gate_and_up(x, own.w_gate, own.w_up)
  y = _finish(p, a.x.dtype, gate, up, own.w_down)
  outs = Outs.of(a.x + y if p.residual else y, a)
  if not (keep and p.keeps_products):
    return outs, None
  normed = None if p.norm is None else x
  kept = Kept(gate.astype(y.dtype), up.astype(y.dtype), normed)
  if a.store_gate is None:
    return outs, kept
  stores = stack.put_all(a.layer, stack.stores_of(a), kept)
  return Outs.of(outs.y, a, Kept(*stores)), None


def plain_backward(p: Problem, saved: Saved, d: Outs) -> Arrays:
  """The specification's gradients, by JAX, in two halves around the products.

  What is kept of these serves if it is the specification's own numbers, which
  are float32 at least; rounded to bfloat16 it does not, and the products are
  computed again.
  """
  a: Arrays = saved.arrays.of_one_layer()
  kept = _kept_of(saved, d)

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
  grads = Arrays(dx, dw_gate, dw_up, dw_down, dscale, depsilon)
  if saved.arrays.layer is not None:
    ports = stack.ports_of(saved.arrays, d)
    grads = stack.put_gradients(grads, saved.arrays, ports)
  return stack.onward(grads, d)


def _kept_of(saved: Saved, d: Outs) -> Kept | None:
  """What the layer kept; where it is in stores, it comes as their cotangent."""
  if d.store_gate is None:
    return saved.kept
  return Kept(*stack.take_all(saved.arrays.layer, stack.stores_of(d)))


def plain_linear(p: Problem, saved: Saved, d: Outs) -> Arrays:
  """The same, linear in the cotangents: those of stores are what is kept."""
  own = d._replace(store_gate=None, store_up=None, store_normed=None)
  grads = plain_backward(p, saved._replace(kept=None), own)
  return stack.with_stores(grads, d)


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
