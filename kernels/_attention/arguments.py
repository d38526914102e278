"""From the arguments of the public functions to a problem and its arrays."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._frame.check import is_traced
from .._rope import Rope
from . import dropout, positions
from .spec import (
  Arrays,
  Problem,
  SegmentIds,
  Segments,
  Window,
  default_scale,
  has_window,
  segments_of,
  sides,
)


class Seen(NamedTuple):
  """What says which keys a query sees, as the public functions name it."""

  is_causal: bool = False
  segment_ids: SegmentIds = None
  local_window_size: Window = None
  mask: Any = None  # [B or 1, N or 1, T or 1, S or 1] booleans
  query_offset: Any = 0  # a number, or [B] int32
  prefix_lengths: Any = None  # [B] int32
  chunk_size: int | None = None


class Drop(NamedTuple):
  """Dropout of weights; none at rate 0."""

  rate: float = 0.0
  seed: Any = None  # an integer scalar
  is_shared: bool = False  # by the batch and the heads


class Weights(NamedTuple):
  """What makes weights of products, likewise."""

  scale: Any = None
  soft_cap: float | None = None
  rope: Rope | None = None
  bias: Any = None  # [B or 1, N or 1, T or 1, S or 1]
  sinks: Any = None  # [N] float32
  alibi_slopes: Any = None  # [N] float32
  drop: Drop = Drop()


def problem_of(
  q: Any, k: Any, v: Any, seen: Seen, weights: Weights, **static: Any
) -> tuple[Problem, Arrays]:
  """A problem and its arrays; `static` are other fields of the problem."""
  wide = jnp.promote_types(q.dtype, jnp.float32)
  alibi = first = None
  if weights.alibi_slopes is not None:
    alibi = jax.lax.stop_gradient(jnp.asarray(weights.alibi_slopes, wide))[None]
    if isinstance(seen.query_offset, int):
      static["first_position"] = seen.query_offset
    else:
      first = jnp.asarray(seen.query_offset, jnp.int32)
      first = jnp.broadcast_to(first, q.shape[:1])
  seen = positions.by_simpler(q, k, seen)
  ids, bias = segments_of(seen.segment_ids), weights.bias
  arrays = Arrays(q, k, v, ids, sinks=weights.sinks, alibi=alibi)
  arrays = arrays._replace(first_position=first)
  if bias is not None:
    whole = (*bias.shape[:2], q.shape[1], k.shape[1])
    arrays = arrays._replace(bias=jnp.broadcast_to(bias, whole))
    static["has_bias"] = True
  rate, seed, is_shared = weights.drop
  if rate:
    words = dropout.words(seed, q, k, is_shared)
    arrays, static["dropout_rate"] = arrays._replace(dropout=words), rate
  static |= {"is_causal": seen.is_causal, "soft_cap": weights.soft_cap}
  scale, rope = weights.scale, weights.rope
  if is_traced(scale):
    arrays = arrays._replace(scale=_of_batch(scale, q, wide))
    scale = 1.0
  static["scale"] = default_scale(q) if scale is None else float(scale)
  if rope is not None:
    arrays = arrays._replace(positions=rope.positions)
    if is_traced(rope.base_frequency):
      arrays = arrays._replace(base=_of_batch(rope.base_frequency, q, wide))
    else:
      static["base_frequency"] = float(rope.base_frequency)
  window = sides(seen.local_window_size)
  if window is not None:
    # More than all keys is no more than all, and sums of it do not overflow.
    offset = seen.query_offset
    most = max(q.shape[1], k.shape[1]) + abs(offset)
    window = tuple(most if side is None else side for side in window)
    if any(map(is_traced, window)):
      both = jnp.stack([_clipped(side, most) for side in window])
      arrays = arrays._replace(window=_of_batch(both, q, jnp.int32))
    else:
      left, right = (min(int(side), most) for side in window)
      hides = left < q.shape[1] - 1 + offset
      hides |= right < k.shape[1] - 1 - offset and not seen.is_causal
      static["window"] = (left, right) if hides else None
  problem = Problem(query_offset=seen.query_offset, **static)
  by_position = problem.is_causal or has_window(problem, arrays)
  if not by_position and alibi is None:
    problem = dataclasses.replace(problem, context_parts=1)
  return problem, _with_mask(arrays, seen.mask)


def _with_mask(a: Arrays, mask: Any) -> Arrays:
  """One of keys alone goes by segment ids, whose blocks need no mask."""
  if mask is None:
    return a
  (b, t), s = a.q.shape[:2], a.k.shape[1]
  if mask.shape[1:3] != (1, 1):
    return a._replace(mask=jnp.broadcast_to(mask, (*mask.shape[:2], t, s)))
  keys = jnp.broadcast_to(mask[:, 0, 0, :], (b, s))
  if a.segments is None:
    segments = Segments(jnp.ones((b, t), jnp.int32), keys.astype(jnp.int32))
  else:
    segments = a.segments._replace(k=jnp.where(keys, a.segments.k, 0))
  return a._replace(segments=segments)


def _of_batch(value: Any, q: Any, dtype: Any) -> jax.Array:
  """The same for every element of the batch."""
  value = jnp.asarray(value, dtype)
  return jnp.broadcast_to(value, (q.shape[0], *value.shape))


def _clipped(side: Any, most: int) -> jax.Array:
  side = jnp.asarray(side) if is_traced(side) else jnp.int32(min(side, most))
  if side.dtype.itemsize < 4:  # `most` might not be one of these
    side = side.astype(jnp.int32)
  return jnp.clip(side, 0, most).astype(jnp.int32)
