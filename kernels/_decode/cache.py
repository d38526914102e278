"""Page 2: caches, and where a row's tokens lie in them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._frame import switches, tpu
from .._frame.check import as_floats, as_whole_number
from .._quantized import to_int8


class QuantizedCache(NamedTuple):
  """Keys or values of a cache in int8, with a scale per token and head.

  The number is value * scale.

  Attributes:
    values: [B, S, K, H] int8; with more leading dimensions where the cache is
      a stack of layers, [P, page, K, H] where it is in pages.
    scale: [B, G, 1, S K / G] float32: the kv heads in G groups of neighbours,
      in each the heads of a token side by side.  Split K of values over a mesh
      as G of scale.
  """

  values: jax.Array
  scale: jax.Array

  @classmethod
  def empty(
    cls, shape: tuple[int, ...], *, head_groups: int | None = None
  ) -> QuantizedCache:
    """Zeros.

    Args:
      shape: [..., S, K, H], of the values.
      head_groups: G, a divisor of K.  None is how the kernel reads scales of K
        heads on one device: 1 if K is 1, 4 or a multiple of 8 and H one of 128,
        else K.  Where the heads are split over D devices it reads D groups, or
        K if K / D is another number than those; others are copied at every
        call.

    Raises:
      ValueError: if G does not divide K, or on another shape.
    """
    shapes = quantized_shapes(shape, head_groups)
    return cls(*(jnp.zeros(x.shape, x.dtype) for x in shapes))

  @classmethod
  def quantize(
    cls, x: jax.Array, *, head_groups: int | None = None
  ) -> QuantizedCache:
    """Of keys or values [..., S, K, H], rounded to the nearest.

    Args:
      x: the keys or values.
      head_groups: as for `empty`.

    Raises:
      ValueError: if G does not divide K, or on another shape or dtype.
    """
    (x,) = as_floats("QuantizedCache", x=x)
    groups = _as_groups(head_groups, *_as_shape(x.shape)[-2:])
    values, scale = quantized(x)
    return cls(values, in_groups(scale[..., 0], groups))

  def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
    """[..., S, K, H] of a dtype."""
    scale = by_token(self.scale, *self.values.shape[-3:-1])[..., None]
    return (self.values.astype(scale.dtype) * scale).astype(dtype)


def _as_shape(shape: Any) -> tuple[int, ...]:
  """[..., S, K, H] with heads of something."""
  if not isinstance(shape, tuple | list) or len(shape) < 3 or not shape[-1]:
    raise ValueError(
      f"QuantizedCache: shape must be [..., S, K, H] with H > 0, got {shape!r}"
    )
  return tuple(shape)


def _as_groups(groups: Any, kv_heads: int, head_size: int) -> int:
  if groups is None:
    layout = layout_of((1, kv_heads, head_size), jnp.dtype(jnp.int8))
    return kv_heads if layout.is_by_head else 1
  known = as_whole_number("QuantizedCache", "head_groups", groups)
  if known < 1 or kv_heads % known:
    raise ValueError(
      f"QuantizedCache: head_groups must divide the kv heads K = {kv_heads}, "
      f"got {known}"
    )
  return known


class Layout(NamedTuple):
  """How XLA lays a cache [..., S, K, H] in HBM, and so the kernel takes it.

  What is asked for in another order XLA copies, all of it, at every call.

  Attributes:
    is_by_head: all tokens of a head lie beside each other, not all heads of a
      token.
    is_turned: the tokens of each element of a head do, in lanes.
  """

  is_by_head: bool = False
  is_turned: bool = False


def layout_of(shape: tuple[int, ...], dtype: Any) -> Layout:
  """That of a cache's values, by the last two dimensions of their shape.

  Heads that are no whole registers would be filled up to some, so XLA has
  tokens in lanes.  Else a token's heads lie beside each other, if K fills a
  tile of memory, or is as many rows as one can be cut to.
  """
  kv_heads, h = shape[-2:]
  if h % tpu.LANES and h % tpu.SUBLANES == 0:
    return Layout(is_by_head=True, is_turned=True)
  few = kv_heads in (2, 4) and kv_heads * dtype.itemsize >= 4
  fills = kv_heads <= 1 or kv_heads % tpu.SUBLANES == 0 or few
  return Layout(is_by_head=not fills)


def in_groups(scale: jax.Array, groups: int) -> jax.Array:
  """[..., G, 1, S K / G] of scales [..., S, K]."""
  *lead, s, k = scale.shape
  if groups > 1:
    scale = scale.reshape(*lead, s, groups, k // groups)
    scale = jnp.moveaxis(scale, -2, -3)
  return scale.reshape(*lead, groups, 1, s * k // groups)


def by_token(scale: jax.Array, s: int, kv_heads: int) -> jax.Array:
  """[..., S, K] of scales [..., G, 1, S K / G]."""
  *lead, groups, _, _ = scale.shape
  if groups > 1:
    scale = scale.reshape(*lead, groups, s, kv_heads // groups)
    scale = jnp.moveaxis(scale, -3, -2)
  return scale.reshape(*lead, s, kv_heads)


def quantized_shapes(
  shape: tuple[int, ...], head_groups: int | None = None
) -> QuantizedCache:
  """Of `QuantizedCache.empty`, without its arrays and without a trace."""
  *lead, s, k, h = _as_shape(shape)
  groups = _as_groups(head_groups, k, h)
  array: Any = jax.ShapeDtypeStruct
  scale = (*lead, groups, 1, s * k // groups)
  return QuantizedCache(array(shape, jnp.int8), array(scale, jnp.float32))


CacheArray = jax.Array | QuantizedCache


def quantized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """int8 values of x's shape, and the scale of each last row, [..., 1]."""
  return to_int8(x, (-1,))


class Cache(NamedTuple):
  """A cache of keys and values as the op has it.

  Attributes:
    k: [X, S, K, H], flat: X is B; L B of a stack; P or L P of pages of size S.
    v: likewise.
    k_scale: [X, S, K] float32 of an int8 cache, else None.
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


def tokens_of(x: jax.Array, table: jax.Array | None) -> jax.Array:
  """What each row has, in one piece, [B, S, ...].

  Args:
    x: [B, S, ...], or [P, page, ...].
    table: [B, pages of a row] of a cache in pages, else None.
  """
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
