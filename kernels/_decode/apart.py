"""Page 9: heads beside each other, or apart, as the kernel takes them.

That is as they lie (`layout_of`):

  * beside each other: a row of the cache is read as K keys a token.  The
    queries of all heads meet the keys of all kv heads, which costs K times the
    work of the matrix unit and no time, as HBM takes longer than both.
  * apart: each kv head is a row of the batch of its own, with its query heads.
    Heads that are no whole registers [S, H] come turned, [H, S].

Of many rows of queries the work of the matrix unit would be the time.  Then
heads that lie beside each other are taken apart by XLA.  The copy is of what
one layer has room for: a fraction of the time of so many queries.

Pages of so few tokens that they are no whole tiles become rows likewise.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .cache import Cache, Layout, by_token, in_groups
from .spec import Arrays, Outs, in_rows

# Rows of queries and heads from which on the matrix unit would take longer than
# HBM does, whatever K is.
_MANY_ROWS = 256


def is_better(a: Arrays) -> bool:
  """Whether heads that lie beside each other are to be taken apart."""
  _, t, n, _ = a.q.shape
  return a.k.shape[-2] > 1 and t * n > _MANY_ROWS


def in_own_rows(a: Arrays) -> Arrays:
  """The layer's cache as [B, S, K, H], which XLA copies, without a table."""
  k, v, k_scale, v_scale = in_rows(a)
  if k_scale is not None:
    k_scale, v_scale = (in_groups(x, x.shape[-1]) for x in (k_scale, v_scale))
  cache = Cache(k, v, k_scale, v_scale)
  return a._replace(**cache._asdict(), layer=None, table=None)


# --- as the kernel takes them -------------------------------------------------


def beside(a: Arrays) -> Arrays:
  """Heads beside each other: scales [..., 1, S K]."""
  return _with_scales(a, 1, a.k.shape[:-3])


def by_head(a: Arrays, layout: Layout) -> Arrays:
  """Heads apart: K rows of the batch for each, of one kv head.

  The cache becomes [..., X K, S, 1, H], or turned [..., X K, 1, H, S].
  """
  (b, t, n, h), (*lead, rows, s, kv_heads, _) = a.q.shape, a.k.shape
  lead = (*lead, rows * kv_heads)

  def values(x: jax.Array) -> jax.Array:
    x = x.swapaxes(-3, -2)
    if layout.is_turned:
      return x.swapaxes(-2, -1).reshape(*lead, 1, h, s)
    return x.reshape(*lead, s, 1, h)

  def new(x: jax.Array | None) -> jax.Array | None:
    if x is None:
      return None
    return x.swapaxes(1, 2).reshape(b * kv_heads, t, 1, h)

  def each(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else jnp.repeat(x, kv_heads, axis=0)

  table = a.table
  if table is not None:
    page = jnp.clip(table, 0, rows - 1)[:, None] * kv_heads
    page += jnp.arange(kv_heads, dtype=page.dtype)[:, None]
    table = page.reshape(b * kv_heads, -1)
  q = a.q.reshape(b, t, kv_heads, n // kv_heads, h).swapaxes(1, 2)
  return _with_scales(a, kv_heads, lead)._replace(
    q=q.reshape(b * kv_heads, t, n // kv_heads, h),
    k=values(a.k),
    v=values(a.v),
    lengths=each(a.lengths),
    shift=each(a.shift),
    new_k=new(a.new_k),
    new_v=new(a.new_v),
    table=table,
    scale=each(a.scale),
    left=each(a.left),
  )


def _with_scales(a: Arrays, groups: int, lead: tuple[int, ...]) -> Arrays:
  """The arrays with scales in so many groups, each a row of the cache."""
  if a.k_scale is None:
    return a

  def one(x: jax.Array) -> jax.Array:
    if x.shape[-3] != groups:
      x = in_groups(by_token(x, *a.k.shape[-3:-1]), groups)
    return x.reshape(*lead, 1, x.shape[-1])

  return a._replace(k_scale=one(a.k_scale), v_scale=one(a.v_scale))


# --- and back -----------------------------------------------------------------


def from_beside(outs: Outs, a: Arrays) -> Outs:
  """The results of the arrays' `beside`, as they have them."""
  return _with_given_scales(outs, a, 1)


def from_heads(outs: Outs, a: Arrays, layout: Layout) -> Outs:
  """The results of the arrays' `by_head`, likewise."""
  (b, t, n, _), (*lead, s, kv_heads, h) = a.q.shape, a.k.shape
  out = outs.out.reshape(b, kv_heads, t, n // kv_heads, h).swapaxes(1, 2)
  lse = None if outs.lse is None else outs.lse.reshape(b, n, t)

  def values(x: Any) -> Any:
    if x is None:
      return None
    if layout.is_turned:
      x = x.reshape(*lead, kv_heads, h, s).swapaxes(-2, -1)
    return x.reshape(*lead, kv_heads, s, h).swapaxes(-3, -2)

  outs = outs._replace(out=out.reshape(a.q.shape), lse=lse)
  outs = outs._replace(k=values(outs.k), v=values(outs.v))
  return _with_given_scales(outs, a, kv_heads)


def _with_given_scales(outs: Outs, a: Arrays, groups: int) -> Outs:
  """Results whose scales are in groups, each a row; as the arrays have them."""
  if outs.k_scale is None:
    return outs
  *lead, s, kv_heads, _ = a.k.shape

  def one(x: Any) -> jax.Array:
    x = x.reshape(*lead, groups, 1, s * kv_heads // groups)
    if a.k_scale.shape[-3] != groups:
      x = in_groups(by_token(x, s, kv_heads), a.k_scale.shape[-3])
    return x

  return outs._replace(k_scale=one(outs.k_scale), v_scale=one(outs.v_scale))
