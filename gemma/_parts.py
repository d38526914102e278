"""A model whose parameters are stored in parts, over axes that split tokens.

Each device holds a part of every weight (ZeRO-3), and a weight is gathered
before it is used.  Three things are said here that the compiler does not find
by itself.

The weights of the feed-forward are cast before they are gathered, not in the
kernel afterwards: half the bytes, and half of those of their gradients, which
are summed in the compute dtype, as those of the other weights are.

The compiler gathers them a layer ahead, if it is asked to
(`compiler_options`), so that attention covers it, forward and backward.  On few
devices two of the three gradients are exchanged, and summed afterwards: more
bytes than a reduce-scatter, but for that the core has to wait.  For a third
there would be nothing left to cover it.

The rows of the token table are looked up by all devices of an axis for all
their tokens, each in its own columns, and then exchanged, and so the other way
round for the gradient.  Left to itself the compiler adds what each device's
tokens contribute into a whole table, and sums these over the devices.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_FEW = 8  # devices of which each can reach all others in time


def compiler_options(mesh: Any) -> dict[str, str]:
  """What a TPU's compiler is told of programs of such a model over a mesh."""
  options = {
    # Gathers of a loop begin one turn ahead.
    "xla_tpu_enable_ici_ag_pipelining": "true",
    # Attention's products stay whole, for other collectives to go on behind
    # them.  In pieces between which their own weights move they wait for these.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
  }
  if mesh.size <= _FEW:  # larger slices cannot: the compiler refuses
    options["xla_tpu_enable_async_all_to_all"] = "true"
  return options


class _Parts(NamedTuple):
  """Where the parts are, as jit's caches see it."""

  mesh: Any
  rows: tuple[str, ...]  # axes that split rows of tokens
  length: tuple[str, ...]  # that split their length
  stored: tuple[str, ...]  # those of both over which weights are stored
  vocabulary: str | None  # the axis that splits the table's rows

  @property
  def of_tokens(self) -> PartitionSpec:
    """How an array [B, T, ...] is split."""
    return PartitionSpec(self.rows, self.length)

  def divide(self, weights: Sequence[Any]) -> bool:
    """Whether weights are parts of their first dimension, and split no more."""
    sizes = dict(self.mesh.shape)
    others = set(sizes) - {*self.rows, *self.length}
    count = math.prod(sizes[axis] for axis in self.stored)
    return all(sizes[axis] == 1 for axis in others) and all(
      w.shape[0] % count == 0 for w in weights
    )


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


def on_gathered(
  op: Callable[..., jax.Array], x: jax.Array, scale: Any, weights: Sequence[Any]
) -> jax.Array:
  """op(x, scale, *weights), the weights gathered if they are in parts.

  Args:
    op: of rows, to rows.
    x: [B, T, D].
    scale: [D], of the norm.
    weights: one layer's, float32.
  """
  parts = _PARTS.value
  if parts is None:
    return op(x, scale, *weights)
  # Of all layers at once, before the loop over them, the cast would make a
  # second copy of the weights.
  own = [jax.lax.optimization_barrier(jnp.asarray(w)) for w in weights]
  if not parts.divide(own):
    return op(x, scale, *(w.astype(x.dtype) for w in own))
  few = parts.mesh.size <= _FEW

  def run(x: jax.Array, scale: jax.Array, *own: jax.Array) -> jax.Array:
    whole = (
      _gathered(w, parts.stored, x.dtype, few and i != 1)
      for i, w in enumerate(own)
    )
    return op(x, scale, *whole)

  in_parts = (PartitionSpec(parts.stored),) * len(own)
  return jax.shard_map(
    run,
    mesh=parts.mesh,
    in_specs=(parts.of_tokens, PartitionSpec(), *in_parts),
    out_specs=parts.of_tokens,
  )(x, scale, *own)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(
  own: jax.Array, axes: Any, dtype: Any, exchanged: bool
) -> jax.Array:
  """All parts of a weight, cast."""
  del exchanged
  return jax.lax.all_gather(own.astype(dtype), axes, tiled=True)


def _gathered_fwd(
  own: jax.Array, axes: Any, dtype: Any, exchanged: bool
) -> Any:
  return _gathered(own, axes, dtype, exchanged), ()


def _gathered_bwd(
  axes: Any, dtype: Any, exchanged: bool, _: Any, d: jax.Array
) -> Any:
  """The sum of all devices' gradients of the own part, in float32."""
  del dtype
  if not exchanged:
    d = jax.lax.psum_scatter(d, axes, tiled=True)
    return (d.astype(jnp.float32),)
  d = d.reshape(jax.lax.axis_size(axes), -1, *d.shape[1:])
  d = jax.lax.all_to_all(d, axes, 0, 0)
  return (d.sum(0, dtype=jnp.float32),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def embedding_rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """table[tokens]: of [V, D] and [B, T] the rows [B, T, D]."""
  parts = _PARTS.value
  if parts is None or tokens.ndim != 2:
    return table[tokens]
  length, stored = parts.length, parts.stored

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
    in_specs=(PartitionSpec(parts.vocabulary, stored), parts.of_tokens),
    out_specs=parts.of_tokens,
  )(table, tokens)
