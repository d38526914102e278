"""Page 8: what XLA takes apart first: many queries of several kv heads, pages.

Where rows are few, the queries of all heads meet the keys of all kv heads,
which costs K times the work of the matrix unit and no time, as HBM takes longer
than both.  Of many rows it would be the time.  Then XLA takes the heads of the
rows' keys and values apart, and each kv head is a row of the batch of its own.
The copy is of what one layer has room for: a fraction of the time of so many
queries.

Pages of so few tokens that they are no whole tiles become rows likewise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .cache import Cache
from .spec import Arrays, Outs, in_rows

# Rows of queries and heads from which on the matrix unit would take longer than
# HBM does, whatever K is.
_MANY_ROWS = 256


def is_better(a: Arrays) -> bool:
  """Whether heads are to be taken apart."""
  _, t, n, _ = a.q.shape
  return a.k.shape[-2] > 1 and t * n > _MANY_ROWS


def pages_joined(a: Arrays) -> Arrays:
  """Of pages that cannot be copied in chunks: a cache of rows, which XLA makes.

  That of scales is flat again, as the kernel reads it.
  """
  k, v, *scales = in_rows(a)
  k_scale, v_scale = (
    None if x is None else x.reshape(x.shape[0], 1, -1) for x in scales
  )
  cache = Cache(k, v, k_scale, v_scale)
  return a._replace(**cache._asdict(), layer=None, table=None)


def by_head(a: Arrays) -> Arrays:
  """Each kv head as a row of the batch: one kv head, and no table."""
  (b, t, n, h), kv_heads = a.q.shape, a.k.shape[-2]
  k, v, k_scale, v_scale = (
    None if x is None else x.swapaxes(1, 2) for x in in_rows(a)
  )

  def cache(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else x.reshape(b * kv_heads, -1, 1, h)

  def scale(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else x.reshape(b * kv_heads, 1, -1)

  def each(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else jnp.repeat(x, kv_heads, axis=0)

  q = a.q.reshape(b, t, kv_heads, n // kv_heads, h).swapaxes(1, 2)
  return a._replace(
    q=q.reshape(b * kv_heads, t, n // kv_heads, h),
    k=cache(k),
    v=cache(v),
    k_scale=scale(k_scale),
    v_scale=scale(v_scale),
    lengths=each(a.lengths),
    shift=each(a.shift),
    layer=None,
    table=None,
    scale=each(a.scale),
    left=each(a.left),
  )


def together(outs: Outs, a: Arrays) -> Outs:
  """The results of `by_head` as those of all heads."""
  b, t, n, h = a.q.shape
  out = outs.out.reshape(b, -1, t, n // a.k.shape[-2], h).swapaxes(1, 2)
  lse = None if outs.lse is None else outs.lse.reshape(b, n, t)
  return Outs(out.reshape(a.q.shape), lse)
