"""What the public functions are given, as the op takes it, or refused.

Read it when an error message brings you here: nothing is computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._attention.door import as_window
from .._attention.spec import default_scale, sides
from .._frame.check import (
  as_array,
  as_floats,
  as_integers,
  as_layer,
  as_number,
  as_scalar,
  check_positive,
  check_shape,
  is_traced,
)
from .._rope import apply_rope_reference, as_rope, phases_of, rotated_apart
from .cache import CacheArray, QuantizedCache
from .spec import Arrays, Outs, Problem

_OP = "decode_attention"


class Given(NamedTuple):
  """What the public functions are given, by its name there."""

  q: Any
  k_cache: Any
  v_cache: Any
  lengths: Any
  new: Any
  layer: Any
  page_table: Any
  rope: Any
  scale: Any
  local_window_size: Any
  logits_soft_cap: Any


def checked_arguments(given: Given) -> Given:
  """Of the types and shapes that `problem_of` wants."""
  q, k_cache, v_cache, lengths, new, layer, page_table = given[:7]
  (q,) = as_floats(_OP, q=q)
  if q.ndim != 4:
    raise ValueError(f"{_OP}: q must be [B, T, N, H], got shape {q.shape}")
  is_stack, in_pages = layer is not None, page_table is not None
  letters = "[P, page, K, H]" if in_pages else "[B, S, K, H]"
  letters = f"[L, {letters[1:]}" if is_stack else letters
  k = _as_cache("k_cache", k_cache, q, letters, 4 + is_stack)
  v = _as_cache("v_cache", v_cache, q, letters, 4 + is_stack)
  _check_alike(k, v)
  values = _values(k)
  if not in_pages and values.shape[-4] != q.shape[0]:
    raise ValueError(
      f"{_OP}: k_cache must be {letters} with q's B = {q.shape[0]}, got shape "
      f"{values.shape}"
    )
  if not isinstance(k, QuantizedCache) and not isinstance(v, QuantizedCache):
    # As attention does: all of the widest dtype.
    dtype = jnp.promote_types(q.dtype, jnp.promote_types(k.dtype, v.dtype))
    q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)
  if is_stack:
    layer = as_layer(_OP, layer, values.shape[0])
  if in_pages:
    page_table = as_integers(_OP, "page_table", page_table)
    if page_table.ndim != 2 or page_table.shape[0] != q.shape[0]:
      raise ValueError(
        f"{_OP}: page_table must be [B, pages of a row] with q's B = "
        f"{q.shape[0]}, got shape {page_table.shape}"
      )
  lengths = as_integers(_OP, "lengths", lengths)
  check_shape(_OP, "lengths", lengths, q.shape[:1], "[B]")
  cap = given.logits_soft_cap
  cap = None if cap is None else as_number(_OP, "logits_soft_cap", cap)
  check_positive(_OP, logits_soft_cap=cap)
  rope, scale = given.rope, given.scale
  return Given(
    q=q,
    k_cache=k,
    v_cache=v,
    lengths=lengths,
    new=None if new is None else _as_new(new, q, values),
    layer=layer,
    page_table=page_table,
    rope=None if rope is None else as_rope(_OP, rope, q.shape),
    scale=None if scale is None else as_scalar(_OP, "scale", scale),
    local_window_size=as_window(_OP, given.local_window_size),
    logits_soft_cap=cap,
  )


def _values(cache: CacheArray) -> jax.Array:
  return cache.values if isinstance(cache, QuantizedCache) else cache


def _as_cache(
  name: str, cache: Any, q: jax.Array, letters: str, ndim: int
) -> CacheArray:
  if isinstance(cache, QuantizedCache):
    values = as_array(_OP, f"{name}.values", cache.values)
    (scale,) = as_floats(_OP, **{f"{name}.scale": cache.scale})
    if values.dtype != jnp.int8:
      raise ValueError(f"{_OP}: {name}.values must be int8, got {values.dtype}")
    _check_cache(f"{name}.values", values, q, letters, ndim)
    *lead, s, kv_heads, _ = values.shape
    groups = scale.shape[-3] if scale.ndim > 2 else 1
    if groups < 1 or kv_heads % groups:
      groups = 1
    wanted = (*lead, groups, 1, s * kv_heads // groups)
    check_shape(_OP, f"{name}.scale", scale, wanted, "[..., G, 1, S K / G]")
    return QuantizedCache(values, scale.astype(jnp.float32))
  (values,) = as_floats(_OP, **{name: cache})
  _check_cache(name, values, q, letters, ndim)
  return values


def _check_cache(
  name: str, values: jax.Array, q: jax.Array, letters: str, ndim: int
) -> None:
  if values.ndim != ndim or values.shape[-1] != q.shape[3]:
    raise ValueError(
      f"{_OP}: {name} must be {letters} with q's H = {q.shape[3]}, got shape "
      f"{values.shape}"
    )
  n, kv_heads = q.shape[2], values.shape[-2]
  if n % kv_heads if kv_heads else n:
    raise ValueError(
      f"{_OP}: query heads N must be a multiple of kv heads K, "
      f"got N = {n}, K = {kv_heads}"
    )


def _check_alike(k: CacheArray, v: CacheArray) -> None:
  if isinstance(k, QuantizedCache) != isinstance(v, QuantizedCache):
    raise ValueError(
      f"{_OP}: k_cache and v_cache must both be a QuantizedCache, or neither"
    )
  check_shape(_OP, "v_cache", _values(v), _values(k).shape, "that of k_cache")


def _as_new(new: Any, q: jax.Array, values: jax.Array) -> tuple[Any, Any]:
  if not isinstance(new, tuple | list) or len(new) != 2:
    raise ValueError(f"{_OP}: new must be a pair (k, v), got {type(new)}")
  wanted = (*q.shape[:2], *values.shape[-2:])
  pair = as_floats(_OP, **{"new[0]": new[0], "new[1]": new[1]})
  for i, x in enumerate(pair):
    check_shape(_OP, f"new[{i}]", x, wanted, "[B, T, K, H]")
  return pair[0], pair[1]


# --- problems -----------------------------------------------------------------


def problem_of(given: Given, **static: Any) -> tuple[Problem, Arrays]:
  """A problem and its arrays, from the arguments of the public functions."""
  q, k_cache, v_cache, lengths, new, layer, page_table = given[:7]
  rope, new_k = given.rope, None if new is None else new[0]
  if rope is not None and not rope.is_of_halves(q.shape[-1]):
    # Such rotations are XLA's: of few tokens, they cost little.
    rope, q, new_k = rotated_apart(rope, apply_rope_reference, q, new_k)
  scale = given.scale
  (batch, t), wide = q.shape[:2], jnp.promote_types(q.dtype, jnp.float32)

  def of_batch(value: Any, dtype: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value, dtype), (batch,))

  (k, k_scale), (v, v_scale) = map(_parts, (k_cache, v_cache))
  size = k.shape[-3] * (1 if page_table is None else page_table.shape[1])
  a = Arrays(
    *(q, k, v, k_scale, v_scale),
    lengths=lengths.astype(jnp.int32),
    layer=layer,
    table=None if page_table is None else page_table.astype(jnp.int32),
  )
  if new is not None:
    a = a._replace(new_k=new_k, new_v=new[1])
  if is_traced(scale):
    a, scale = a._replace(scale=of_batch(scale, wide)), 1.0
  static["scale"] = default_scale(q) if scale is None else float(scale)
  if rope is not None:
    sin, cos = phases_of(rope, q.shape[-1], wide)
    a = a._replace(sin=sin, cos=cos)
  window = sides(given.local_window_size)
  left = None if window is None else window[0]
  if is_traced(left):
    a = a._replace(left=jnp.clip(of_batch(left, jnp.int32), 0, size + t))
  elif left is not None and left < size - 1:
    static["left"] = int(left)
  return Problem(**static, soft_cap=given.logits_soft_cap), a


def _parts(cache: CacheArray) -> tuple[jax.Array, jax.Array | None]:
  """Values, and their scale if they have one."""
  return cache if isinstance(cache, QuantizedCache) else (cache, None)


def results_of(outs: Outs, return_lse: bool, appends: bool) -> Any:
  """What the public functions return."""
  results: list[Any] = [outs.out]
  if return_lse:
    results.append(outs.lse)
  if appends:
    for values, scale in ((outs.k, outs.k_scale), (outs.v, outs.v_scale)):
      plain = scale is None
      results.append(values if plain else QuantizedCache(values, scale))
  return results[0] if len(results) == 1 else tuple(results)
