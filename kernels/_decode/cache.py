"""Page 2: caches, and where a row's tokens lie in them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._frame import switches
from .._quantized import to_int8


class QuantizedCache(NamedTuple):
  """Keys or values of a cache in int8, with a scale per token and head.

  The number is value * scale.

  Attributes:
    values: [B, S, K, H] int8; with more leading dimensions where the cache is
      a stack of layers, [P, page, K, H] where it is in pages.
    scale: [B, 1, S K] float32, of the heads of a token side by side, as the
      kernel reads them.
  """

  values: jax.Array
  scale: jax.Array

  @classmethod
  def empty(cls, shape: tuple[int, ...]) -> QuantizedCache:
    """Zeros of shape [..., S, K, H]."""
    *lead, s, k, _ = shape
    scale = jnp.zeros((*lead, 1, s * k), jnp.float32)
    return cls(jnp.zeros(shape, jnp.int8), scale)

  @classmethod
  def quantize(cls, x: jax.Array) -> QuantizedCache:
    """Of keys or values [..., S, K, H], rounded to the nearest."""
    values, scale = quantized(x)
    *lead, s, k, _ = x.shape
    return cls(values, scale.reshape(*lead, 1, s * k))

  def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
    """[..., S, K, H] of a dtype."""
    scale = self.scale.reshape(*self.values.shape[:-1], 1)
    return (self.values.astype(scale.dtype) * scale).astype(dtype)


CacheArray = jax.Array | QuantizedCache


def quantized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """int8 values of x's shape, and the scale of each last row, [..., 1]."""
  return to_int8(x, (-1,))


class Cache(NamedTuple):
  """A cache of keys and values as the op has it.

  Attributes:
    k: [X, S, K, H], flat: X is B; L B of a stack; P or L P of pages of size S.
    v: likewise.
    k_scale: [X, 1, S K] float32 of an int8 cache, else None.
    v_scale: likewise.
  """

  k: Any
  v: Any
  k_scale: Any = None
  v_scale: Any = None

  @classmethod
  def of(cls, record: Any) -> Cache:
    """The fields of a record that are a cache's."""
    return cls(*(getattr(record, name) for name in cls._fields))


def tokens_of(
  x: jax.Array, table: jax.Array | None, kv_heads: int
) -> jax.Array:
  """What each row has, in one piece.

  Args:
    x: [B, S, ...], [P, page, ...]; or [.., 1, S K] of scales.
    table: [B, pages of a row] of a cache in pages, else None.
    kv_heads: K.

  Returns:
    [B, S, ...], or [B, S, K] of scales.
  """
  if x.ndim == 3:
    x = x.reshape(x.shape[0], x.shape[2] // max(kv_heads, 1), kv_heads)
  if table is None:
    return x
  taken = jnp.take(x, table, axis=0, mode="clip")
  batch, pages = table.shape
  return taken.reshape(batch, pages * x.shape[1], *x.shape[2:])


@switches.plain
def written(
  cache: jax.Array,
  new: jax.Array,
  table: jax.Array,
  first: jax.Array,
  end: jax.Array,
) -> jax.Array:
  """A cache [X, S, ...] with new tokens [B, T, ...] in their places.

  Args:
    cache: as above.
    new: of its dtype.
    table: [B, P], where each row's tokens are.
    first: [B], the first new token's place in its row; may be negative.
    end: [B], places from here on are not written.
  """
  size, t = cache.shape[1], new.shape[1]
  place = first[:, None] + jnp.arange(t)
  page = jnp.take_along_axis(
    table, jnp.clip(place // size, 0, table.shape[1] - 1), axis=1
  )
  is_there = (place >= 0) & (place < end[:, None])
  # JAX drops an update whose index is out of bounds.
  page = jnp.where(is_there, page, cache.shape[0])
  return cache.at[page, place % size].set(new, mode="drop")
