"""Where ports and stores begin, turn back and end.

Each function here does nothing to the values that it is given.  What it does is
to their cotangents, see the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._frame.derivative import linear
from .._frame.lowering import unset
from .._frame.rule import is_perturbed, with_rule


def _take(stack: Any, port: Any, index: Any) -> Any:
  """A layer of the stack, and the port."""
  return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), port


def _take_jvp(primals: Any, tangents: Any) -> Any:
  stack, port, index = primals
  # Without the port, so that under `jax.checkpoint` it is not kept to compute
  # this again.
  own = jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
  outs = own, port

  def of_layer(residuals: Any, tangents: Any) -> Any:
    (index,), (dport,) = residuals, tangents
    return jax.lax.dynamic_index_in_dim(dport, index, keepdims=False), dport

  def into_stack(residuals: Any, cotangents: Any) -> Any:
    (index,), (d, dport) = residuals, cotangents
    return [jax.lax.dynamic_update_index_in_dim(dport, d, index, 0)]

  d_outs = linear(of_layer, into_stack, [index], [tangents[1]], outs)
  return outs, tuple(d_outs)


take = with_rule(_take, _take_jvp)


def _skip(port: Any, index: Any) -> Any:
  """The port past a layer that is not used, whose gradient is zero."""
  del index
  return port


def _skip_jvp(primals: Any, tangents: Any) -> Any:
  port, index = primals

  def cleared(residuals: Any, cotangents: Any) -> Any:
    (index,), (dport,) = residuals, cotangents
    zero = jnp.zeros_like(dport, shape=dport.shape[1:])
    return [jax.lax.dynamic_update_index_in_dim(dport, zero, index, 0)]

  (d,) = linear(lambda _, d: d, cleared, [index], [tangents[0]], [port])
  return port, d


skip = with_rule(_skip, _skip_jvp)


def open_stores(init: Any, length: int, asked: Any) -> tuple[Any, Any]:
  """The first carry, and stores that are not set."""
  stores = jax.tree.map(
    lambda s: s.update(shape=(length, *s.shape), sharding=None), asked
  )
  leaf, filled = _first_float(init)
  if leaf is None:
    return init, [[] for _ in asked]
  specs, structure = jax.tree.flatten(stores)
  leaf, *empty = _opened(leaf, tuple(specs))
  return filled(leaf), jax.tree.unflatten(structure, empty)


def _opened(x: Any, specs: Any) -> Any:
  """x and stores, whose cotangents are dropped."""

  def function(x: Any) -> Any:
    return x, *map(unset, specs)

  def rule(primals: Any, tangents: Any) -> Any:
    outs = _opened(primals[0], specs)

    def opened(_: Any, tangents: Any) -> Any:
      return [*tangents, *map(jnp.zeros_like, outs[1:])]

    d = linear(opened, lambda _, d: d[:1], [], tangents, outs)
    return outs, tuple(d)

  def mapped(_: int, batched: Any, x: Any) -> Any:
    outs = _opened(x, specs)
    return outs, (batched[0], *[False] * len(specs))

  return with_rule(function, rule, mapped)(x)


def _first_float(carry: Any) -> tuple[Any, Callable[[Any], Any]]:
  """The first float of a carry, None if there is none, and what replaces it."""
  leaves, tree = jax.tree.flatten(carry)

  place = next((i for i, x in enumerate(leaves) if _is_float(x)), len(leaves))

  def filled(leaf: Any) -> Any:
    return jax.tree.unflatten(
      tree, [*leaves[:place], leaf, *leaves[place + 1 :]]
    )

  return (leaves[place] if place < len(leaves) else None), filled


def turn(outs: Any, ports: Any, stores: Any) -> Any:
  """The outs of the last layer: a carry, and results.

  Backwards, the ports begin here, not as zeros: those of a scan's last carry
  that nothing reads would be written, as much as the gradient itself.  And here
  the stores turn back.  That hangs on all floats among the outs: JAX goes
  backwards only from what a gradient comes to.
  """
  stores = jax.tree.leaves(stores)
  leaves, tree = jax.tree.flatten(outs)
  floats = [x for x in leaves if _is_float(x)]
  if not floats or not (ports or stores):
    return outs
  turned = iter(_turned(floats, ports, stores))
  return jax.tree.unflatten(
    tree, [next(turned) if _is_float(x) else x for x in leaves]
  )


def _is_float(x: Any) -> bool:
  return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _unturned(xs: Any, ports: Any, stores: Any) -> Any:
  """xs; backwards, the ports too, not set, and the stores as they are."""
  del ports, stores
  return xs


def _turned_jvp(primals: Any, tangents: Any) -> Any:
  (xs, ports, stores), (dxs, dports, dstores) = primals, tangents

  def moving(arrays: Any, tangents: Any) -> list[Any]:
    pairs = zip(arrays, tangents, strict=True)
    return [x for x, d in pairs if is_perturbed(d)]

  outs, full = moving(xs, dxs), moving(stores, dstores)
  if not outs:
    return xs, dxs
  kinds = [jax.typeof(port) for port in moving(ports, dports)]
  tangents = list(filter(is_perturbed, [*dxs, *dports, *dstores]))

  def turn_back(stores: Any, cotangents: Any) -> Any:
    return [*cotangents, *map(unset, kinds), *stores]

  count = len(outs)
  d = iter(linear(lambda _, d: d[:count], turn_back, full, tangents, outs))
  return xs, [next(d) if is_perturbed(dx) else dx for dx in dxs]


def _turned_of_examples(_: int, batched: Any, *args: Any) -> Any:
  """The same: stores are not of each example if they were not before."""
  return _turned(*args), batched[0]


_turned = with_rule(_unturned, _turned_jvp, _turned_of_examples)
