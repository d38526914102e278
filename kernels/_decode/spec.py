"""Page 1: the arrays and the problem, and what is computed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from .._attention.positions import visible_pairs
from .._attention.reference import masked_attention
from .._attention.spec import Logits
from .._frame.check import Implementation
from .._rope import apply_rope_reference
from .cache import Cache, by_token, in_groups, quantized, tokens_of, written

if TYPE_CHECKING:
  from .tiles import DecodeAttentionConfig


class Arrays(NamedTuple):
  """What decode attention is given; None for what a problem does not have.

  The caller's cache is [B, S, K, H]; with the layer, [L, B, S, K, H]; in pages,
  [P, page, K, H] or [L, P, page, K, H].  `flattened` makes it [X, S, K, H], and
  says in a table where the rows are.
  """

  q: Any  # [B, T, N, H]
  k: Any  # as above
  v: Any  # likewise
  k_scale: Any  # [..., G, 1, S K / G] float32, of an int8 cache
  v_scale: Any  # likewise
  lengths: Any  # [B] int32: valid keys of each row, the new ones included
  shift: Any = None  # [B] int32: position of the cache's first key, if not 0
  new_k: Any = None  # [B, T, K, H]: to be written at the queries' positions
  new_v: Any = None  # [B, T, K, H]
  layer: Any = None  # [] int32
  table: Any = None  # [B, pages of a row] int32: indices of P, or of X
  sin: Any = None  # [B, T, H / 2] float32: q and new_k are to be rotated
  cos: Any = None  # [B, T, H / 2] float32
  scale: Any = None  # [B] float32, where it is traced
  left: Any = None  # [B] int32: the window, where it is traced


class Outs(NamedTuple):
  """What it gives; the cache if there were new keys."""

  out: Any  # [B, T, N, H]
  lse: Any = None  # [B, N, T]
  k: Any = None  # as in Arrays; likewise the others
  v: Any = None
  k_scale: Any = None
  v_scale: Any = None


@dataclasses.dataclass(frozen=True)
class Problem(Logits):
  """Everything that is not an array.

  Attributes:
    left: how far before itself a query sees, or None.
    return_lse: whether the log of the sum of exponentials is a result.
    implementation: as the caller gave it.
    config: tile sizes, None for the op's own choice.
  """

  left: int | None = None
  return_lse: bool = False
  implementation: Implementation = None
  config: DecodeAttentionConfig | None = None


# --- the reference ------------------------------------------------------------


def reference(p: Problem, a: Arrays) -> Outs:
  """The maths of the room's docstring in plain jnp."""
  a, cache = with_new_keys(rotated(a))
  outs = _attention(p, a)
  return cache._replace(out=outs.out, lse=outs.lse if p.return_lse else None)


def with_new_keys(a: Arrays) -> tuple[Arrays, Outs]:
  """The arrays with the new keys in the cache, and it as a result."""
  if a.new_k is None:
    return a, Outs(None)
  cache = appended(flattened(a))
  k_scale, v_scale = (
    None if x is None else in_groups(x, a.k_scale.shape[-3])
    for x in (cache.k_scale, cache.v_scale)
  )
  cache = cache._replace(k_scale=k_scale, v_scale=v_scale)
  outs = unflattened(Outs(None, **cache._asdict()), a)
  a = a._replace(**Cache.of(outs)._asdict(), new_k=None, new_v=None)
  return a, outs


def in_rows(a: Arrays) -> Cache:
  """The layer's keys and values as each row has them; scales [B, S, K]."""

  def of_rows(x: jax.Array) -> jax.Array:
    if a.layer is not None:
      x = jax.lax.dynamic_index_in_dim(x, a.layer, keepdims=False)
    return tokens_of(x, a.table)

  cache = Cache.of(by_tokens(a))
  return Cache(*(None if x is None else of_rows(x) for x in cache))


def _attention(p: Problem, a: Arrays) -> Outs:
  t = a.q.shape[1]
  k, v, k_scale, v_scale = in_rows(a)
  s = k.shape[1]
  first, end = first_and_end(a, s)
  valid = (jnp.arange(s) < end[:, None])[:, :, None, None]

  def floats(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    if scale is not None:
      x = x.astype(scale.dtype) * scale[..., None]
    return jnp.where(valid, x, 0)

  index = first[:, None] + jnp.arange(t)
  left = p.left if a.left is None else a.left[:, None, None]
  window = None if left is None else (left, None)
  mask = visible_pairs(index, jnp.arange(s), True, window)
  mask &= jnp.arange(s) < end[:, None, None]
  scale = p.scale
  if a.scale is not None:
    scale *= a.scale[:, None, None, None, None]
  q = a.q
  if k_scale is not None:  # numbers that bfloat16 would round
    q = q.astype(jnp.promote_types(q.dtype, jnp.float32))
  both = floats(k, k_scale), floats(v, v_scale)
  outs = masked_attention(q, *both, mask, scale, p.soft_cap)
  return Outs(outs.out.astype(a.q.dtype), outs.lse)


def appended(a: Arrays) -> Cache:
  """The cache with the new keys and values at the queries' positions."""
  k, v, k_scale, v_scale = Cache.of(a)
  new_k, new_v, rows = a.new_k, a.new_v, rows_of(a)
  first, end = first_and_end(a, k.shape[1] * rows.shape[1])

  def put(x: jax.Array, new: jax.Array) -> jax.Array:
    return written(x, new, rows, first, end)

  def put_scale(x: jax.Array, new: jax.Array) -> jax.Array:
    return put(x, new[..., 0].astype(x.dtype))

  if k_scale is None:
    return Cache(put(k, new_k.astype(k.dtype)), put(v, new_v.astype(v.dtype)))
  (new_k, of_k), (new_v, of_v) = quantized(new_k), quantized(new_v)
  scales = put_scale(k_scale, of_k), put_scale(v_scale, of_v)
  return Cache(put(k, new_k), put(v, new_v), *scales)


def first_and_end(a: Arrays, size: int) -> tuple[jax.Array, jax.Array]:
  """[B], [B]: the first query's place in a row of the cache; its valid keys.

  Args:
    a: the arrays.
    size: keys that there is room for in a row.
  """
  end = a.lengths if a.shift is None else a.lengths - a.shift
  return end - a.q.shape[1], jnp.clip(end, 0, size)


# --- stacks and pages ---


def flattened(a: Arrays) -> Arrays:
  """The arrays with a cache [X, S, K, H]; a table if its rows are not B."""
  a = by_tokens(a)
  if a.layer is None:
    return a
  batch, size = a.q.shape[0], a.k.shape[1]
  table = jnp.arange(batch, dtype=jnp.int32)[:, None]
  if a.table is not None:
    table = a.table
  flat = Cache(*(_merged(x) for x in Cache.of(a)))
  table = table + a.layer * size
  return a._replace(**flat._asdict(), layer=None, table=table)


def by_tokens(a: Arrays) -> Arrays:
  """The arrays with scales [..., S, K]."""
  if a.k_scale is None:
    return a
  k_scale, v_scale = (
    by_token(x, *a.k.shape[-3:-1]) for x in (a.k_scale, a.v_scale)
  )
  return a._replace(k_scale=k_scale, v_scale=v_scale)


def unflattened(outs: Outs, a: Arrays) -> Outs:
  """The results, with the cache as the arrays have it."""
  given = Cache.of(a)._asdict()
  return outs._replace(
    **{
      name: None if x is None else x.reshape(given[name].shape)
      for name, x in Cache.of(outs)._asdict().items()
    }
  )


def rows_of(a: Arrays) -> jax.Array:
  """[B, pages of a row]: where the tokens of a row are in a flat cache."""
  if a.table is not None:
    return a.table
  return jnp.arange(a.q.shape[0], dtype=jnp.int32)[:, None]


def _merged(x: jax.Array | None) -> jax.Array | None:
  """The first two dimensions as one."""
  return None if x is None else x.reshape(-1, *x.shape[2:])


# --- rotation ---


def rotated(a: Arrays) -> Arrays:
  """The arrays with q and the new keys rotated, if they are to be."""
  if a.sin is None:
    return a

  def one(x: jax.Array | None) -> jax.Array | None:
    if x is None:
      return None
    return apply_rope_reference(x, phases=(a.sin, a.cos))

  return a._replace(q=one(a.q), new_k=one(a.new_k), sin=None, cos=None)
