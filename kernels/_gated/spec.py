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
from .activation import Activation, as_activation, gated
from .layout import Layout

if TYPE_CHECKING:  # the next page, and a type
  from .._layers import LayerOf
  from .config import FeedForwardConfig

# --- specification ------------------------------------------------------------


@switches.plain
def geglu_reference(
  x: jax.Array,
  w_gate: jax.Array | LayerOf | QuantizedWeight | None,
  w_up: jax.Array | LayerOf | QuantizedWeight | None = None,
  *,
  b_gate: jax.Array | None = None,
  b_up: jax.Array | None = None,
  transposed: bool = False,
  layer: jax.Array | int | None = None,
  activation: Activation = "gelu_tanh",
  norm: Norm | None = None,
) -> jax.Array:
  """Two matmuls, the activation of one times the other.  The specification."""
  activation = as_activation("geglu", activation)
  given = w_gate, w_up, b_gate, b_up
  own = [None if w is None else of_layer(w, layer) for w in given]
  weights = _branches(own[0], own[1], transposed)
  biases = _branches_of_bias(own[2], own[3], weights, transposed)
  gate, up = _gate_and_up(_norm(x, norm), weights, biases, transposed)
  return gated(activation, gate, up).astype(x.dtype)


@switches.plain
def feed_forward_reference(
  x: jax.Array,
  w_gate: jax.Array | LayerOf | QuantizedWeight | None,
  w_up: jax.Array | LayerOf | QuantizedWeight | None,
  w_down: jax.Array | LayerOf | QuantizedWeight,
  *,
  b_gate: jax.Array | None = None,
  b_up: jax.Array | None = None,
  b_down: jax.Array | None = None,
  transposed: bool = False,
  layer: jax.Array | int | None = None,
  activation: Activation = "gelu_tanh",
  norm: Norm | None = None,
  residual: bool = False,
) -> jax.Array:
  """The gated unit and the projection back to D.  The specification."""
  h = geglu_reference(
    x,
    w_gate,
    w_up,
    b_gate=b_gate,
    b_up=b_up,
    transposed=transposed,
    layer=layer,
    activation=activation,
    norm=norm,
  )
  bias = None if b_down is None else of_layer(b_down, layer)
  y = _down(h, of_layer(w_down, layer), bias, transposed)
  return x + y if residual else y


def _branches(w_gate: Any, w_up: Any, transposed: bool) -> tuple[Any, Any]:
  """The weights of the activated branch and of the other, None for none."""
  if w_gate is None:
    return w_up, None
  if w_up is not None:
    return w_gate, w_up
  if w_gate.ndim == 3:
    return w_gate[0], w_gate[1]
  f = w_gate.shape[0 if transposed else 1] // 2
  if transposed:
    return w_gate[:f], w_gate[f:]
  return w_gate[:, :f], w_gate[:, f:]


def _branches_of_bias(
  b_gate: Any, b_up: Any, weights: Any, transposed: bool
) -> tuple[Any, Any]:
  """Likewise; both biases may be in one array, one after the other."""
  if weights[1] is None:
    return b_up, None
  f = weights[0].shape[0 if transposed else 1]
  if b_gate is not None and b_gate.size == 2 * f:
    return tuple(b_gate.reshape(2, f))
  return b_gate, b_up


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


def _matmul(
  a: jax.Array, b: jax.Array | QuantizedWeight, transposed: bool
) -> jax.Array:
  """A product in a's dtype, summed in at least float32."""
  if isinstance(b, QuantizedWeight):
    return quantized_einsum(
      "...i,ji->...j" if transposed else "...i,ij->...j", a, b
    )
  sum_dtype = jnp.promote_types(a.dtype, jnp.float32)
  b = b.astype(a.dtype)
  b = b.T if transposed else b
  return jnp.matmul(a, b, preferred_element_type=sum_dtype)


def _gate_and_up(
  x: jax.Array, weights: Any, biases: Any, transposed: bool
) -> tuple[jax.Array, jax.Array | None]:
  """The two products, as they are summed: at least float32."""
  gate, up = (
    None if w is None else _plus(_matmul(x, w, transposed), b)
    for w, b in zip(weights, biases, strict=True)
  )
  assert gate is not None
  return gate, up


def _plus(product: jax.Array, bias: jax.Array | None) -> jax.Array:
  return product if bias is None else product + bias.astype(product.dtype)


def _down(
  h: jax.Array, w_down: Any, b_down: jax.Array | None, transposed: bool
) -> jax.Array:
  """y without the residual."""
  return _plus(_matmul(h, w_down, transposed), b_down).astype(h.dtype)


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
    layout: how the weights lie.
  """

  activation: Activation
  norm: RowNorm | None
  residual: bool
  implementation: Implementation
  config: FeedForwardConfig
  layout: Layout = Layout()

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

  Weights of a stack are [L, D, F] and [L, F, D], of experts [L, E, D, F].  In a
  scan over it, what is written goes into stacks as well: gradients through
  ports, and what is kept into stores, see `_layers/`.
  """

  x: Any  # [..., D]; for all but the public functions [N, D]
  w_gate: Any  # [D, F], or a QuantizedWeight, as the others then; see `Layout`
  w_up: Any  # [D, F], None if w_gate has both, or there is no such branch
  w_down: Any  # [F, D], None for geglu
  scale: Any  # [D], None without a norm
  epsilon: Any = None  # [] float32 of the norm, if it is traced
  b_gate: Any = None  # [F], as the other biases None if there is none
  b_up: Any = None  # [F]
  b_down: Any = None  # [D]
  layer: Any = None  # [] int32, which of a stack; None if it is none
  group_sizes: Any = None  # [E] int32, rows of each expert, whose weights and
  # biases are stacked, [E, ...]; None if all rows have the same
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
    own = Arrays(self.x, gate, up, down, self.scale, self.epsilon)
    return own._replace(
      b_gate=self.b_gate,
      b_up=self.b_up,
      b_down=self.b_down,
      group_sizes=self.group_sizes,
    )


class Kept(NamedTuple):
  """What the forward pass keeps for the backward pass, in x's dtype."""

  gate: Any  # [N, F], x w_gate
  up: Any  # [N, F], x w_up, None if there is no such branch
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
  gate, up = _products(p, x, own)
  y = _finish(p, a.x.dtype, gate, up, own.w_down, own.b_down)
  outs = Outs.of(a.x + y if p.residual else y, a)
  if not (keep and p.keeps_products):
    return outs, None
  normed = None if p.norm is None else x
  kept = Kept(gate.astype(y.dtype), None, normed)
  if up is not None:
    kept = kept._replace(up=up.astype(y.dtype))
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

  def products(a: Arrays) -> tuple[jax.Array, jax.Array | None]:
    return _products(p, p.norm_of(a.x, a.scale, a.epsilon), a)

  (gate, up), through_products = jax.vjp(
    products, a._replace(w_down=None, b_down=None, layer=None)
  )
  if kept is not None and kept.gate.dtype == gate.dtype:
    gate, up = kept.gate, kept.up
  finish = functools.partial(_finish, p, a.x.dtype)
  through_finish = jax.vjp(finish, gate, up, a.w_down, a.b_down)[1]
  dgate, dup, dw_down, db_down = through_finish(d.y)
  (grads,) = through_products((dgate, dup))
  dx = grads.x + d.y if p.residual else grads.x
  grads = grads._replace(x=dx, w_down=dw_down, b_down=db_down)
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


def _products(
  p: Problem, x: jax.Array, a: Arrays
) -> tuple[jax.Array, jax.Array | None]:
  """gate and up, of x or of its norm."""
  weights = p.layout.take(a.w_gate, a.w_up)
  return _gate_and_up(x, weights, (a.b_gate, a.b_up), p.layout.transposed)


def _finish(
  p: Problem,
  dtype: Any,
  gate: jax.Array,
  up: jax.Array | None,
  w_down: jax.Array | None,
  b_down: jax.Array | None,
) -> jax.Array:
  """The result without the residual, from the two products."""
  h = gated(p.activation, gate, up).astype(dtype)
  return h if w_down is None else _down(h, w_down, b_down, p.layout.transposed)


def as_row(vector: Any) -> Any:
  """[F] as [1, F], an operand of a kernel; so are experts', None stays None."""
  return None if vector is None else vector[..., None, :]
