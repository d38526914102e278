"""Which keys a query sees by position; what comes down to simpler masks.

Llama 4's chunks are segments.  A prefix whose tokens all see each other, and a
position of the first query that differs from row to row, are masks of arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from .spec import Segments, Window, sides

if TYPE_CHECKING:
  from .arguments import Seen


def visible_pairs(
  q_index: Any,
  k_index: Any,
  is_causal: bool,
  local_window_size: Window,
) -> jax.Array:
  """Which keys each query sees by position: [..., T, S] booleans.

  A side of the window is a number, or an array that broadcasts with them.

  Six queries and keys, causal with a window of (2, 0); x marks the visible:

        k 0 1 2 3 4 5
    q 0   x
      1   x x
      2   x x x
      3     x x x
      4       x x x
      5         x x x
  """
  q, k = q_index[..., :, None], k_index[..., None, :]
  mask = jnp.broadcast_to(True, jnp.broadcast_shapes(q.shape, k.shape))
  if is_causal:
    mask &= k <= q
  window = sides(local_window_size)
  if window is not None:
    left, right = window
    if left is not None:
      mask &= k >= q - left
    if right is not None:
      mask &= k <= q + right
  return mask


def by_simpler(q: Any, k: Any, seen: Seen) -> Seen:
  """The same without what is new: with segments, or with a mask."""
  is_plain = isinstance(seen.query_offset, int) and seen.prefix_lengths is None
  if is_plain and seen.chunk_size is None:
    return seen
  if is_plain and seen.segment_ids is None:
    return seen._replace(segment_ids=_chunks(q, k, seen), chunk_size=None)
  mask = _by_position(q, k, seen)
  return seen._replace(
    is_causal=False,
    local_window_size=None,
    mask=mask if seen.mask is None else mask & seen.mask,
    query_offset=0,
    prefix_lengths=None,
    chunk_size=None,
  )


def _chunks(q: Any, k: Any, seen: Seen) -> Segments:
  size = seen.chunk_size
  assert size is not None

  def ids(x: Any, first: int) -> jax.Array:
    # From 1 on, also where positions start before the first key.
    chunk = (jnp.arange(x.shape[1]) + first) // size
    chunk = jnp.where(chunk < 0, 0, chunk + 1).astype(jnp.int32)
    return jnp.broadcast_to(chunk, x.shape[:2])

  return Segments(ids(q, seen.query_offset), ids(k, 0))


def _by_position(q: Any, k: Any, seen: Seen) -> jax.Array:
  """[B or 1, 1, T, S] booleans."""
  offset = jnp.asarray(seen.query_offset)[..., None]
  i, j = jnp.arange(q.shape[1]) + offset, jnp.arange(k.shape[1])
  mask = visible_pairs(i, j, seen.is_causal, None)
  if seen.prefix_lengths is not None:
    mask = mask | (j < seen.prefix_lengths[:, None, None])
  mask = mask & visible_pairs(i, j, False, seen.local_window_size)
  if seen.chunk_size is not None:
    same = i[..., :, None] // seen.chunk_size == j // seen.chunk_size
    mask = mask & same
  return mask.reshape(-1, 1, *mask.shape[-2:])
