"""The token table of a model that is stored in parts.

A device has some columns of every word.  Rows of tokens are looked up by all
devices of an axis for all their tokens, each in its own columns, and then
exchanged; their gradients go back as they came.

The logits of the loss need whole words.  Of fewer tokens than words it is less
to exchange the tokens: each device takes all tokens' rows, and a part of the
vocabulary, to which its columns of all words are exchanged (`on_vocabulary`).
Nobody has the whole table then, nor its gradient.

Of more tokens, each device gathers the table: a copy [V, D] each, [devices, V,
D] in all.  What a device's rows and its logits give for the gradient goes into
one array, which is summed over the devices as a last thing, in the compute
dtype as those of the other weights are.  On many devices the rows are taken
from the copy: to exchange them takes longer the more there are.

Where the model axis splits the vocabulary, the loss's kernels know.  Left to
itself the compiler adds what each device's tokens contribute to the gradient of
their rows into a whole table, and sums these.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ._parts import Parts, current, gathered
from .ops import cast_here, sharding


def embedding_rows(
  table: jax.Array, tokens: jax.Array, dtype: Any
) -> jax.Array:
  """table[tokens]: of [V, D] and [B, T] the rows [B, T, D], of a dtype."""
  parts = current()
  if parts is None or tokens.ndim != 2:
    return table[tokens].astype(dtype)
  return jax.shard_map(
    functools.partial(_exchanged_rows, parts, dtype),
    mesh=parts.mesh,
    in_specs=(PartitionSpec(parts.vocabulary, parts.stored), parts.of_tokens),
    out_specs=parts.of_tokens,
  )(table, tokens)


def _exchanged_rows(
  parts: Parts, dtype: Any, own: jax.Array, tokens: jax.Array
) -> jax.Array:
  """A device's rows, each part of them from the device that has it.

  They are cast before they are exchanged, and so are their gradients; these are
  summed in the table's own dtype.
  """
  length, stored = parts.length, parts.stored
  for axis in stored:
    dim = int(axis in length)
    tokens = jax.lax.all_gather(tokens, axis, axis=dim, tiled=True)
  if parts.vocabulary is None:
    x = own[tokens].astype(dtype)
  else:
    place = tokens - jax.lax.axis_index(parts.vocabulary) * own.shape[0]
    is_here = (place >= 0) & (place < own.shape[0])
    x = jnp.where(is_here[..., None], own[jnp.where(is_here, place, 0)], 0)
    x = jax.lax.psum(x.astype(dtype), parts.vocabulary)
  for axis in reversed(stored):  # columns of the last lie together
    dim = int(axis in length)
    x = jax.lax.all_to_all(x, axis, dim, 2, tiled=True)
  return x


# --- the vocabulary in parts --------------------------------------------------


def _takes_vocabulary(parts: Parts, table: Any, tokens: int) -> bool:
  """Whether it is less to exchange the tokens than the table.

  Args:
    parts: of the model.
    table: [V, D].
    tokens: of all devices.
  """
  count = parts.count(parts.stored)
  divides = all(size % count == 0 for size in table.shape)
  if count == 1 or not divides or parts.vocabulary is not None:
    return False
  return tokens < table.shape[0] * parts.count(parts.apart)


def on_vocabulary(
  table: Any, dtype: Any, *arrays: jax.Array
) -> Callable[[Callable[..., jax.Array]], jax.Array]:
  """What calls an op of the table and the arrays, by words if that pays.

  Then each device has a part of the words, of all tokens; they are exchanged
  here, for all ops that are called.

  Args:
    table: [V, D], stored by its columns.
    dtype: of the table that ops are given.
    *arrays: [B, T, ...], split over rows, and over tokens of a row.

  Returns:
    A function of an op, which is called as op(table, *arrays, split=(m, n))
    where m devices split the tokens and n the words, or without the split.  Its
    kernels go by `sharding`; what it returns is split as tokens are.
  """
  parts = current()
  tokens = math.prod(arrays[0].shape[:2])
  if parts is None or not _takes_vocabulary(parts, table, tokens):
    return lambda op: op(table, *arrays)

  def lies(x: Any, *axes: Any) -> Any:
    where = NamedSharding(parts.mesh, PartitionSpec(*axes))
    return jax.lax.with_sharding_constraint(x, where)

  rows = tuple(a for a in parts.rows if a in parts.apart)
  length = tuple(a for a in parts.length if a in parts.apart)
  columns = lies(cast_here(table, dtype), None, parts.stored)
  words = lies(columns, parts.stored, None)
  everywhere = [lies(x, rows, length) for x in arrays]
  split = parts.count(parts.apart), parts.count(parts.stored)

  def call(op: Callable[..., jax.Array]) -> jax.Array:
    rules = {"B": rows, "T": length, "V": parts.stored}
    with sharding(parts.mesh, rules):
      of_each = op(words, *everywhere, split=split)
    return lies(of_each, *parts.of_tokens)

  return call


# --- a copy for each device ---------------------------------------------------


def rows_and_copies(
  table: Any, tokens: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array] | None:
  """table[tokens], and the table as `with_copies` takes it.

  Args:
    table: [V, D].
    tokens: [B, T].
    dtype: of the rows, and of the copies.

  Returns:
    [B, T, D] and [devices, V, D]; None if each device is to have no copy.
  """
  parts = current()
  if parts is None or not parts.divide([table], dim=1):
    return None
  if _takes_vocabulary(parts, table, tokens.size):
    return None

  def look_up(own: jax.Array, tokens: jax.Array) -> Any:
    own = parts.each(own)
    whole: Any = gathered(own, parts.stored, dtype, dim=1)
    if parts.are_few:
      rows = _exchanged_rows(parts, dtype, own, tokens)
    else:
      rows = whole[tokens]
    rows, whole = _joined(jax.lax.stop_gradient(rows), whole, tokens)
    return rows, whole[None]

  return jax.shard_map(
    look_up,
    mesh=parts.mesh,
    in_specs=(PartitionSpec(None, parts.stored), parts.of_tokens),
    out_specs=(parts.of_tokens, _of_copies(parts)),
  )(table, tokens)


def with_copies(
  op: Callable[..., jax.Array], copies: jax.Array, arrays: Sequence[jax.Array]
) -> jax.Array:
  """op(table, *arrays), each device with its copy of the table.

  Args:
    op: of a table and arrays [B, T, ...] to one that is split as they are.
    copies: of `rows_and_copies`.
    arrays: split over rows, and over tokens of a row.
  """
  parts = current()
  assert parts is not None

  def run(table: jax.Array, *arrays: jax.Array) -> jax.Array:
    # Backwards it is a barrier too: before it goes on, the gradient is in the
    # compute dtype.  In float32 it would stay until the end, twice as large.
    together = jax.lax.optimization_barrier((table[0], *arrays))
    return op(*together)

  return jax.shard_map(
    run,
    mesh=parts.mesh,
    in_specs=(_of_copies(parts), *(parts.of_tokens,) * len(arrays)),
    out_specs=parts.of_tokens,
  )(copies, *arrays)


def _of_copies(parts: Parts) -> PartitionSpec:
  return PartitionSpec(parts.devices)


@jax.custom_vjp
def _joined(
  rows: jax.Array, table: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The rows table[tokens], and the table, as of one function of the table.

  What is computed from the second result gives a gradient of the table, to
  which that of the rows is added where it lies.  Of two uses of one array JAX
  would make two gradients, and add them.
  """
  del tokens
  return rows, table


def _joined_fwd(rows: jax.Array, table: jax.Array, tokens: jax.Array) -> Any:
  return (rows, table), tokens


def _joined_bwd(tokens: jax.Array, d: Any) -> Any:
  d_rows, d_table = d
  return None, _added(d_table, tokens.reshape(-1), d_rows), None


_joined.defvjp(_joined_fwd, _joined_bwd)


def _added(table: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
  """table.at[ids].add(rows), those of an id summed in float32 before."""
  rows = rows.reshape(ids.size, -1)
  order = jnp.argsort(ids)
  ids = ids[order]
  is_first = jnp.diff(ids, prepend=-1) != 0
  place = jnp.cumsum(is_first) - 1  # of each among the ids that there are
  add = functools.partial(
    jax.ops.segment_sum, num_segments=ids.size, indices_are_sorted=True
  )
  sums = add(rows[order].astype(jnp.float32), place)
  # Places past the last id have one that is none, and are dropped.
  found = jnp.full_like(ids, table.shape[0]).at[place].set(ids)
  return table.at[found].add(sums.astype(table.dtype), mode="drop")
