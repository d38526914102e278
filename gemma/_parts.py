"""A model whose parameters are stored in parts, over axes that split tokens.

Each device holds a part of every weight (ZeRO-3), and a weight is gathered
before it is used.  Two things are said here that the compiler does not find by
itself.

The weights of the feed-forward are cast before they are gathered, not in the
kernel afterwards: half the bytes, and half of those of their gradients, which
are summed in the compute dtype, as those of the other weights are.

The rows of the token table are looked up by all devices of an axis for all
their tokens, each in its own columns, and then exchanged, and so the other way
round for the gradient.  Left to itself the compiler adds what each device's
tokens contribute into a whole table, and sums these over the devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


class _Parts(NamedTuple):
  """Where the parts are, as jit's caches see it."""

  mesh: Any
  rows: tuple[str, ...]  # axes that split rows of tokens
  length: tuple[str, ...]  # that split their length
  stored: tuple[str, ...]  # those of both over which weights are stored
  vocabulary: str | None  # the axis that splits the table's rows


_PARTS = jax.make_user_context(None)


@contextlib.contextmanager
def stored_in_parts(
  mesh: Any,
  *,
  rows: Sequence[str],
  length: Sequence[str] = (),
  stored: Sequence[str],
  vocabulary: str | None,
) -> Iterator[None]:
  """Says so of the models that are traced inside.

  Args:
    mesh: of Auto axes.
    rows: its axes that split rows of tokens.
    length: those that split tokens of a row.
    stored: the axes of both over which weights are stored, the table by its
      columns.
    vocabulary: the axis over which the table is split by its rows too.
  """
  of_tokens = tuple(rows), tuple(length)
  with _PARTS(_Parts(mesh, *of_tokens, tuple(stored), vocabulary)):
    yield


def cast_in_parts(weight: Any, dtype: Any) -> Any:
  """A layer's weight, cast if that halves what is gathered of it."""
  if _PARTS.value is None or weight.dtype == dtype:
    return weight
  # Of all layers at once, before the loop over them, the cast would make a
  # second copy of the weights.
  own = jax.lax.optimization_barrier(jnp.asarray(weight))
  return own.astype(dtype)


def embedding_rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """table[tokens]: of [V, D] and [B, T] the rows [B, T, D]."""
  parts = _PARTS.value
  if parts is None or tokens.ndim != 2:
    return table[tokens]
  rows, length, stored = parts.rows, parts.length, parts.stored

  def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    for axis in stored:
      dim = int(axis in length)
      tokens = jax.lax.all_gather(tokens, axis, axis=dim, tiled=True)
    if parts.vocabulary is None:
      x = table[tokens]
    else:
      first = jax.lax.axis_index(parts.vocabulary) * table.shape[0]
      own = tokens - first
      is_here = (own >= 0) & (own < table.shape[0])
      x = jnp.where(is_here[..., None], table[jnp.where(is_here, own, 0)], 0)
      x = jax.lax.psum(x, parts.vocabulary)
    for axis in reversed(stored):  # columns of the last lie together
      dim = int(axis in length)
      x = jax.lax.all_to_all(x, axis, dim, 2, tiled=True)
    return x

  return jax.shard_map(
    look_up,
    mesh=parts.mesh,
    in_specs=(
      PartitionSpec(parts.vocabulary, stored),
      PartitionSpec(rows, length),
    ),
    out_specs=PartitionSpec(rows, length),
  )(table, tokens)
