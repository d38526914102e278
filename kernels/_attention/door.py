"""What the public functions are given, as the kernels take it, or refused.

Read it when an error message brings you here: nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _rope
from .._frame.check import (
  as_array,
  as_floats,
  as_integers,
  as_number,
  as_scalar,
  as_segment_ids,
  as_switch,
  as_whole_number,
  check_integers,
  check_positive,
  check_shape,
  is_one_of,
  is_traced,
)
from .arguments import Drop, Seen, Weights
from .ring_order import check_parts
from .shapes import LayoutName, to_btnh
from .spec import Segments, default_scale

_LETTERS = {  # of queries and of keys
  "BTNH": ("[B, T, N, H]", "[B, S, K, H]"),
  "BNTH": ("[B, N, T, H]", "[B, K, S, H]"),
  "BT(NH)": ("[B, T, N H]", "[B, S, K H]"),
}


# Beyond it and a sequence's length, positions of 32 bits would wrap around.
_FAR = 1 << 30


def check_layout(op: str, layout: Any, head_size: Any) -> None:
  """Whether it is one of the names, and H is given where shapes lack it."""
  if not is_one_of(layout, (None, *_LETTERS)):
    names = ", ".join(map(repr, _LETTERS))
    raise ValueError(f"{op}: layout must be one of {names}, got {layout!r}")
  if layout == "BT(NH)":
    size = head_size
    is_whole = isinstance(size, int) and not isinstance(size, bool)
    if not is_whole or size < 1:
      raise ValueError(
        f"{op}: head_size must be a positive integer with layout 'BT(NH)', "
        f"got {head_size!r}"
      )
  elif head_size is not None:
    raise ValueError(
      f"{op}: head_size must be None with layout {layout}, whose shapes "
      f"have it, got {head_size!r}"
    )


def as_qkv(
  op: str,
  q: Any,
  k: Any,
  v: Any,
  layout: LayoutName | None = None,
  head_size: int | None = None,
  any_values: bool = False,
) -> tuple[jax.Array, ...]:
  """Arrays [B, T, N, H] that fit, of one dtype: the widest of the three.

  With `any_values`, values may be of a head size of their own.
  """
  q, k, v = as_floats(op, q=q, k=k, v=v)
  of_queries, of_keys = _LETTERS[layout or "BTNH"]
  for name, array in dict(q=q, k=k, v=v).items():
    if array.ndim != (3 if layout == "BT(NH)" else 4):
      letters = of_queries if name == "q" else of_keys
      raise ValueError(
        f"{op}: {name} must be {letters}, got shape {array.shape}"
      )
    if head_size is not None and array.shape[2] % head_size:
      raise ValueError(
        f"{op}: the last dimension of {name} must be a multiple of head_size = "
        f"{head_size}, got shape {array.shape}"
      )
  of_values = k.shape
  if any_values and layout != "BT(NH)":
    of_values = (*k.shape[:3], v.shape[3])
  check_shape(op, "v", v, of_values, "the shape of k")
  given = k.shape
  q, k, v = (to_btnh(x, layout, head_size) for x in (q, k, v))
  batch, _, n, h = q.shape
  kv_heads = k.shape[2]
  if (k.shape[0], k.shape[3]) != (batch, h):
    raise ValueError(
      f"{op}: k must be {of_keys} with q's B = {batch} and H = {h}, got {given}"
    )
  if n % kv_heads if kv_heads else n:
    raise ValueError(
      f"{op}: query heads N must be a multiple of kv heads K, "
      f"got N = {n}, K = {kv_heads}"
    )
  dtype = jnp.promote_types(q.dtype, jnp.promote_types(k.dtype, v.dtype))
  return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def as_cap(op: str, cap: Any) -> float | None:
  """A positive number, or None for no soft cap."""
  cap = None if cap is None else as_number(op, "logits_soft_cap", cap)
  check_positive(op, logits_soft_cap=cap)
  return cap


def as_window(op: str, window: Any) -> tuple[Any, Any] | None:
  """(left, right), each an integer, traced, or None for no limit.

  One integer is that of both sides, as `jax.nn.dot_product_attention` has it.
  """
  if window is None:
    return None
  sides = window
  if not isinstance(window, Sequence) or isinstance(window, str):
    sides = (window, window)
  if len(sides) != 2:
    raise ValueError(
      f"{op}: local_window_size must be one integer or (left, right), got "
      f"{window!r}"
    )
  sides = tuple(_as_side(op, window, side) for side in sides)
  return None if sides == (None, None) else sides


def _as_side(op: str, window: Any, side: Any) -> Any:
  if side is None:
    return None
  if is_traced(side):
    side = as_integers(op, "local_window_size", side)
    check_shape(op, "local_window_size", side, (), "a single number")
    return side
  side = as_whole_number(op, "local_window_size", side)
  if side < 0:
    raise ValueError(
      f"{op}: local_window_size must be (left, right), both >= 0, got {window}"
    )
  return side


def as_segments(op: str, segment_ids: Any, q: Any, k: Any) -> Segments | None:
  """From one array, or a pair: int32 ids of queries and of keys."""
  if segment_ids is None:
    return None
  pair = segment_ids
  if not isinstance(segment_ids, tuple | list):
    pair = (segment_ids, segment_ids)
  if len(pair) != 2:
    raise ValueError(
      f"{op}: segment_ids must be one array or a pair, got {len(pair)}"
    )
  segments = Segments(*as_segment_ids(op, *pair))
  for name, ids, array in (("query", segments.q, q), ("key", segments.k, k)):
    check_shape(
      op, f"{name} segment_ids", ids, array.shape[:2], f"[B, length] of {name}s"
    )
  return segments


def as_parts(op: str, context_parts: Any, q: Any, k: Any) -> int:
  """Of how many parts the tokens' order is."""
  check_parts(op, q.shape[1], context_parts)
  if context_parts > 1:
    check_shape(op, "k", k, (k.shape[0], q.shape[1], *k.shape[2:]), "q's T")
  return context_parts


def as_rope(op: str, rope: Any, q: Any, k: Any) -> _rope.Rope | None:
  """From a Rope, or positions alone: int32 positions, a number or traced."""
  if rope is None:
    return None
  if q.shape[1] != k.shape[1]:
    raise ValueError(
      f"{op}: rope needs as many keys as queries, "
      f"got T = {q.shape[1]}, S = {k.shape[1]}"
    )
  return _rope.as_rope(op, rope, q.shape)


def as_mask(op: str, mask: Any, q: Any, k: Any) -> jax.Array | None:
  """[B or 1, N or 1, T or 1, S or 1] booleans."""
  if mask is None:
    return None
  mask = as_array(op, "mask", mask)
  if mask.dtype != bool:
    raise ValueError(
      f"{op}: mask must be booleans, True where a query sees a key, got "
      f"{mask.dtype}; what is to be added to the logits is a bias"
    )
  _check_scores(op, "mask", mask, q, k)
  return mask


def as_bias(op: str, bias: Any, q: Any, k: Any) -> jax.Array | None:
  """[B or 1, N or 1, T or 1, S or 1] floats."""
  if bias is None:
    return None
  (bias,) = as_floats(op, bias=bias)
  _check_scores(op, "bias", bias, q, k)
  return bias


def _check_scores(op: str, name: str, x: jax.Array, q: Any, k: Any) -> None:
  """Whether it broadcasts to the scores [B, N, T, S]."""
  whole = (*q.shape[:1], q.shape[2], q.shape[1], k.shape[1])
  fits = x.ndim == 4 and all(
    have in (1, want) for have, want in zip(x.shape, whole, strict=True)
  )
  if not fits:
    raise ValueError(
      f"{op}: {name} must be [B, N, T, S] = {list(whole)}, or 1 in place of "
      f"some, got shape {x.shape}"
    )


def as_seen(op: str, q: Any, k: Any, given: Seen, parts: int) -> Seen:
  """What says which keys a query sees, checked."""
  is_causal = as_switch(op, "is_causal", given.is_causal)
  offset, prefix = given.query_offset, given.prefix_lengths
  if isinstance(offset, int | np.integer) and not isinstance(offset, bool):
    offset = int(offset)
    if abs(offset) > _FAR:
      raise ValueError(
        f"{op}: query_offset must be from -2^30 to 2^30, as positions are of "
        f"32 bits, got {offset}"
      )
  else:
    offset = as_integers(op, "query_offset", offset)
    if offset.shape not in ((), q.shape[:1]):
      raise ValueError(
        f"{op}: query_offset must be an integer or [B], got {offset.shape}"
      )
    offset = jnp.clip(offset, -_FAR, _FAR)
  if prefix is not None:
    prefix = as_integers(op, "prefix_lengths", prefix)
    check_shape(op, "prefix_lengths", prefix, q.shape[:1], "[B]")
    if not is_causal:
      raise ValueError(f"{op}: prefix_lengths need is_causal, got False")
  chunk = given.chunk_size
  if chunk is not None:
    chunk = as_whole_number(op, "chunk_size", chunk)
    if chunk < 1:
      raise ValueError(f"{op}: chunk_size must be at least 1, got {chunk}")
    chunk = min(chunk, 2 * _FAR - 1)
  is_new = not isinstance(offset, int) or offset != 0 or prefix is not None
  if parts > 1 and (is_new or chunk is not None):
    raise ValueError(
      f"{op}: query_offset, prefix_lengths and chunk_size must be absent with "
      f"context_parts > 1, got {parts}"
    )
  return Seen(
    is_causal,
    as_segments(op, given.segment_ids, q, k),
    as_window(op, given.local_window_size),
    as_mask(op, given.mask, q, k),
    offset,
    prefix,
    chunk,
  )


def as_weights(op: str, q: Any, k: Any, given: Weights) -> Weights:
  """What makes weights of products, checked; the rotation is already."""
  scale = given.scale
  return Weights(
    default_scale(q) if scale is None else as_scalar(op, "scale", scale),
    as_cap(op, given.soft_cap),
    given.rope,
    as_bias(op, given.bias, q, k),
    as_sinks(op, given.sinks, q),
    as_slopes(op, given.alibi_slopes, q),
    given.drop,
  )


def as_drop(op: str, rate: Any, seed: Any, is_shared: bool = False) -> Drop:
  """A rate from 0 to below 1, and the 32 bits of a seed."""
  rate = as_number(op, "dropout_rate", rate)
  if not 0 <= rate < 1:
    raise ValueError(
      f"{op}: dropout_rate must be at least 0 and below 1, got {rate}"
    )
  if not rate:
    return Drop()
  if isinstance(seed, int) and not isinstance(seed, bool):
    seed = np.uint32(seed % 2**32)
  if seed is None or jnp.shape(seed):
    raise ValueError(
      f"{op}: dropout_seed must be an integer scalar with dropout_rate {rate}, "
      f"got {'None' if seed is None else jnp.shape(seed)}; modules of flax, "
      "which have none, drop weights by dot_product_attention"
    )
  seed = as_array(op, "dropout_seed", seed)
  check_integers(op, "dropout_seed", seed)
  return Drop(rate, seed, is_shared)


def as_sinks(op: str, sinks: Any, q: Any) -> jax.Array | None:
  """[N] float32."""
  if sinks is None:
    return None
  (sinks,) = as_floats(op, sinks=sinks)
  check_shape(op, "sinks", sinks, q.shape[2:3], "[N]")
  return sinks.astype(jnp.float32)


def as_slopes(op: str, slopes: Any, q: Any) -> jax.Array | None:
  """[N] float32."""
  if slopes is None:
    return None
  (slopes,) = as_floats(op, alibi_slopes=slopes)
  check_shape(op, "alibi_slopes", slopes, q.shape[2:3], "[N]")
  return slopes.astype(jnp.float32)


def of_one_head_size(
  q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The same with zeros where queries and keys, or values, have fewer."""
  size = max(q.shape[3], v.shape[3])

  def widened(x: jax.Array) -> jax.Array:
    more = size - x.shape[3]
    return jnp.pad(x, [(0, 0)] * 3 + [(0, more)]) if more else x

  return widened(q), widened(k), widened(v)
