"""Page 2: rows and keys in memory.

The kernels see rows: the G = N / K query heads of a kv head lie side by side
under their token, row r = t G + g, so that one matmul serves all of them.
"""

from __future__ import annotations

import jax

from .spec import Arrays, Outs


def to_rows(x: jax.Array, kv_heads: int) -> jax.Array:
  """[B, T, N, H] to [B K, T G, H]; for one kv head and G = 8 or more, free."""
  b, t, n, h = x.shape
  x = x.reshape(b, t, kv_heads, n // kv_heads, h).swapaxes(1, 2)
  return x.reshape(b * kv_heads, t * (n // kv_heads), h)


def from_rows(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B K, T G, H] to shape [B, T, N, H]."""
  b, t, n, h = shape
  group = rows.shape[1] // t
  return rows.reshape(b, n // group, t, group, h).swapaxes(1, 2).reshape(shape)


def to_keys(x: jax.Array) -> jax.Array:
  """[B, S, K, H] to [B K, S, H]; for one kv head, free."""
  b, s, kv_heads, h = x.shape
  return x.swapaxes(1, 2).reshape(b * kv_heads, s, h)


def from_keys(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B K, S, H] to shape [B, S, K, H]."""
  b, s, kv_heads, h = shape
  return keys.reshape(b, kv_heads, s, h).swapaxes(1, 2)


def lse_to_rows(lse: jax.Array, kv_heads: int) -> jax.Array:
  """[B, N, T] to [B K, 1, T G]."""
  b, n, t = lse.shape
  rows = lse.reshape(b * kv_heads, n // kv_heads, t).swapaxes(1, 2)
  return rows.reshape(b * kv_heads, 1, t * (n // kv_heads))


def lse_from_rows(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B K, 1, T G] to [B, N, T], given q's shape."""
  b, t, n, _ = shape
  return (
    rows.reshape(b, -1, t, rows.shape[2] // t).swapaxes(2, 3).reshape(b, n, t)
  )


def of_arrays(a: Arrays) -> Arrays:
  """With q in rows, and k and v in keys."""
  kv_heads = a.k.shape[2]
  return a._replace(q=to_rows(a.q, kv_heads), k=to_keys(a.k), v=to_keys(a.v))


def of_outs(outs: Outs, kv_heads: int) -> Outs:
  """With out in rows, as lse is between the passes."""
  return outs._replace(out=to_rows(outs.out, kv_heads))
