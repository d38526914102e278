"""A product with one layer's weight, of XLA's making."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._frame.check import as_array
from .._frame.derivative import linear
from .._frame.room import current
from .._frame.rule import is_perturbed, with_rule
from .._frame.sharding import rules_are_given
from .._quantized import QuantizedWeight, quantized_einsum
from .turns import take
from .weight import LayerOf, cast_here

# What makes x of a layer's part of the store in which it lies, if it does.
Back = Callable[[Any], Any] | None


def layer_einsum(
  subscripts: str, x: jax.Array, weight: jax.Array | LayerOf | QuantizedWeight
) -> jax.Array:
  """`jnp.einsum(subscripts, x, weight)`, the weight cast to x's dtype.

  Of a `LayerOf` of `scan_layers` the backward pass reads the weight in its
  stack, where a scan would save it, cast, in another; and an x that
  `flash_attention` gave, in the store where attention's own backward pass
  reads it.

  Args:
    subscripts: as for `jnp.einsum`.
    x: an array.
    weight: an array, one layer's, or one in int8.

  Raises:
    ValueError: if the layer's weight has been used before, or a scale of one in
      int8 is along a dimension that the product sums over; or if x is no array
      of floats, in whose dtype a weight would be nothing.
  """
  x = x if isinstance(x, jax.Array) else as_array("layer_einsum", "x", x)
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    raise ValueError(f"layer_einsum: x must be floats, got {x.dtype}")
  if isinstance(weight, QuantizedWeight):
    return quantized_einsum(subscripts, x, weight).astype(x.dtype)
  if not isinstance(weight, LayerOf):
    if not isinstance(weight, jax.Array):
      weight = as_array("layer_einsum", "weight", weight)
    return jnp.einsum(subscripts, x, weight.astype(x.dtype))
  room = current()
  lying = None if room is None else room.find(x)
  back, store = (None, None) if lying is None else (lying.back, lying.store)
  port = weight.use_port()
  y, port, store = _einsum(
    subscripts, back, x, weight.stack, port, weight.index, store
  )
  weight.return_port(port)
  if room is not None and lying is not None:
    room.stores[lying.place] = store
  return y


def _of(subscripts: str, x: Any, own: Any) -> Any:
  # On one device the product reads the weight as it is, and casts what it has
  # read; over several it is cast, and gathered.
  is_split = rules_are_given() or not jax.sharding.get_abstract_mesh().empty
  own = cast_here(own, x.dtype) if is_split else own.astype(x.dtype)
  return jnp.einsum(subscripts, x, own)


def _layer(stack: Any, index: Any) -> Any:
  return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


def _einsum(subscripts: str, back: Back, *arrays: Any) -> tuple[Any, Any, Any]:
  """The product; the port, and the store in which x lies, as they are.

  Args:
    subscripts: as for `layer_einsum`.
    back: of the x that lies in the store.
    *arrays: x, stack, port, index, store.
  """

  def function(x: Any, stack: Any, port: Any, index: Any, store: Any) -> Any:
    return _of(subscripts, x, _layer(stack, index)), port, store

  rule = functools.partial(_einsum_jvp, subscripts, back)
  mapped = functools.partial(_of_examples, subscripts)
  return with_rule(function, rule, mapped)(*arrays)


def _of_examples(subscripts: str, size: int, batched: Any, *arrays: Any) -> Any:
  """Of examples that share the weight, if they do: it is taken first."""
  if any(batched[1:4]) or not batched[0]:
    return None
  x, stack, port, index, store = arrays
  own, port = take(stack, port, index)
  of = functools.partial(_of, subscripts)
  y = jax.vmap(of, (0, None), axis_size=size)(x, own)
  return (y, port, store), (True, False, batched[4])


def _einsum_jvp(
  subscripts: str, back: Back, primals: Any, tangents: Any
) -> Any:
  x, stack, port, index, store = primals
  d = tangents[0], tangents[2], tangents[4]
  moves = [t is not None and is_perturbed(t) for t in d]
  # Not by `_einsum`: so a remat policy can tell that it is a product.
  outs = _of(subscripts, x, _layer(stack, index)), port, store

  def forward(residuals: Any, tangents: Any) -> Any:
    x, stack, index = residuals
    rest = iter(tangents)
    dx, dport, dstore = (next(rest) if m else None for m in moves)
    dy = jnp.zeros_like(outs[0])
    if dx is not None:
      dy += _of(subscripts, dx, _layer(stack, index))
    if dport is not None:
      dy += _of(subscripts, x, _layer(dport, index))
    dport = jnp.zeros_like(port) if dport is None else dport
    if store is None:
      return [dy, dport]
    return [dy, dport, jnp.zeros_like(store) if dstore is None else dstore]

  def transpose(residuals: Any, cotangents: Any) -> Any:
    x, stack, index = residuals
    dy, dport, *full = cotangents
    if back is not None:  # the cotangent of a store is the store
      x = back(_layer(full[0], index))
    own = _layer(stack, index)
    _, vjp = jax.vjp(functools.partial(_of, subscripts), x, own)
    dx, down = vjp(dy)
    put = jax.lax.dynamic_update_index_in_dim
    grads = [dx, put(dport, down, index, 0) if moves[1] else None, *full]
    return [g for g, m in zip(grads, moves, strict=False) if m]

  d_outs = linear(
    forward,
    transpose,
    [x, stack, index],
    [t for t, m in zip(d, moves, strict=True) if m],
    [y for y in outs if y is not None],
  )
  return outs, (d_outs[0], d_outs[1], d_outs[2] if store is not None else None)
