"""A kernel under `jax.vmap`, and an op of a batch that is not known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap, sequential_vmap

from . import switches

# One more axis of its grid, as Pallas does it; a larger first dimension of all
# its arrays; or one example after the other.
Vmap = Literal["grid", "batch", "loop"]


def mapped_kernel(vmap: Vmap, kernel: Callable[..., Any]) -> Callable[..., Any]:
  """`kernel`, as the op says that it is mapped."""
  kernel = switches.kernel(kernel)
  match vmap:
    case "grid":
      return kernel
    case "loop":
      return in_turns(kernel)
    case "batch":
      return _as_batch(kernel)


def in_turns(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function`, of which examples take turns under vmap."""
  return sequential_vmap(function)


def _as_batch(kernel: Callable[..., Any]) -> Callable[..., Any]:
  """`kernel` of arrays [B, ...] that vmap maps by a larger B."""
  mapped = custom_vmap(kernel)

  @mapped.def_vmap
  def rule(axis_size: int, in_batched: Any, *args: Any) -> Any:
    def merged(x: jax.Array, batched: bool) -> jax.Array:
      if not batched:
        x = jnp.broadcast_to(x, (axis_size, *x.shape))
      return x.reshape(-1, *x.shape[2:])

    outs = mapped(*jax.tree.map(merged, args, tuple(in_batched)))
    outs = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), outs)
    return outs, jax.tree.map(lambda _: True, outs)

  return mapped


def unless_mapped(
  kernel: Callable[..., Any], mapped: Callable[..., Any]
) -> Callable[..., Any]:
  """`kernel`, of which there is nothing under vmap; there, `mapped`."""
  one = custom_vmap(switches.kernel(kernel))

  @one.def_vmap
  def rule(axis_size: int, in_batched: Any, *args: Any) -> Any:
    axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
    outs = jax.vmap(mapped, tuple(axes), axis_size=axis_size)(*args)
    return outs, jax.tree.map(lambda _: True, outs)

  return one


@switches.plain
def one_by_one(
  name: str, op: Callable[[Any], Any], arrays: Any, letters: Any
) -> Any:
  """The op where `jax.export` leaves the batch open: examples take turns.

  Tiles are chosen by sizes that are known.

  Args:
    name: of the op, for errors.
    op: maps a record of arrays to that of the results.
    arrays: the record.
    letters: the letters of each array's dimensions, in its place.
  """
  leaves, tree = jax.tree.flatten(arrays)
  is_mapped = [dims.startswith("B") for dims in jax.tree.leaves(letters)]
  for array, mapped in zip(leaves, is_mapped, strict=True):
    if not all(isinstance(n, int) for n in array.shape[mapped:]):
      raise ValueError(
        f"{name}: only the batch, the first dimension, may be symbolic, "
        f"got {array.shape}"
      )

  def of_one(examples: Any) -> Any:
    supply = iter(examples)
    filled = [
      next(supply) if mapped else array
      for array, mapped in zip(leaves, is_mapped, strict=True)
    ]
    return op(jax.tree.unflatten(tree, filled))

  # Examples keep a batch of one.
  examples = [
    jnp.expand_dims(x, 1)
    for x, mapped in zip(leaves, is_mapped, strict=True)
    if mapped
  ]
  outs = jax.lax.map(of_one, examples)
  return jax.tree.map(lambda x: jnp.squeeze(x, 1), outs)
