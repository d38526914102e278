"""What is computed, in plain jnp: the specification."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._frame import switches
from .._rope import Rope, apply_rope_reference, rotated_apart
from .arguments import Drop, Seen, Weights, problem_of
from .dropout import kept_of
from .positions import visible_pairs
from .ring_order import context_order
from .shapes import LayoutName, from_btnh, to_btnh
from .spec import (
  Arrays,
  Outs,
  Problem,
  SegmentIds,
  Window,
  default_scale,
  has_window,
)

# --- which keys ---------------------------------------------------------------


def visible(p: Problem, a: Arrays) -> jax.Array:
  """Which keys each query sees: [B, T, S] booleans; with a mask of an array,
  [B, N or 1, T, S].
  """
  (b, t), s, window = a.q.shape[:2], a.k.shape[1], p.window
  if a.window is not None:  # of each batch element, beside [T, S]
    window = a.window[:, 0, None, None], a.window[:, 1, None, None]
  # As traced arrays: of NumPy's the mask would be a constant of the program.
  q, k = (_order(n, p.context_parts) for n in (t, s))
  mask = visible_pairs(q + p.query_offset, k, p.is_causal, window)
  if a.segments is not None:
    of_q, of_k = a.segments.q[:, :, None], a.segments.k[:, None, :]
    mask = mask & (of_q == of_k) & (of_k != 0)
  mask = jnp.broadcast_to(mask, (b, t, s))
  return mask if a.mask is None else mask[:, None] & a.mask


def penalties(p: Problem, a: Arrays) -> jax.Array:
  """What ALiBi adds to the logits: [B or 1, N, T, S]."""
  q, k = (_order(n, p.context_parts) for n in (a.q.shape[1], a.k.shape[1]))
  first = p.first_position
  if a.first_position is not None:
    first += a.first_position[:, None, None, None]
  distance = jnp.abs(q[:, None] + first - k)
  return -a.alibi[..., None, None] * distance


def _order(length: int, parts: int) -> jax.Array:
  """The place of each token in the order of time."""
  if parts == 1:
    return jnp.arange(length)
  return jnp.asarray(context_order(length, parts))


# --- attention ----------------------------------------------------------------


class More(NamedTuple):
  """What attention may have beside q, k, v and a mask."""

  bias: Any = None  # [B, K, N / K, T, S], or 1 for some: added to the logits
  sinks: Any = None  # [N]: logits of one more key, of value 0, that all see
  kept: Any = None  # [B, N, T, S] booleans: the weights that are not dropped
  kept_scale: float = 1.0  # and what multiplies them


_NO_MORE = More()


def masked_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  scale: Any,
  logits_soft_cap: float | None,
  more: More = _NO_MORE,
) -> Outs:
  """Attention under a mask: out [B, T, N, H] and lse [B, N, T].

  The mask is [B, T, S], or [B, N or 1, T, S].
  """
  bias, sinks = more.bias, more.sinks
  batch, t, n, h = q.shape
  kv_heads = k.shape[2]
  at_least_float32 = jnp.promote_types(q.dtype, jnp.float32)
  # Heads first, as the products give them: else XLA transposes logits and
  # weights, [T, S] for each head, in place of [T, H].
  grouped = q.reshape(batch, t, kv_heads, n // max(kv_heads, 1), h)
  grouped = grouped.transpose(0, 2, 3, 1, 4)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  mask = by_kv_head(mask[:, None] if mask.ndim == 3 else mask, kv_heads)
  logits = jnp.einsum(
    "bkgth,bksh->bkgts", grouped, k, preferred_element_type=at_least_float32
  )
  logits *= default_scale(q) if scale is None else scale
  if logits_soft_cap is not None:
    logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
  if bias is not None:
    logits += bias
  logits = jnp.where(mask, logits, -jnp.inf)
  # A row that sees nothing has lse = -inf, and its weights are 0.  There is no
  # NaN on the way, in the value or in the gradient: `jax_debug_nans` looks.
  of_logits = mask.any(axis=-1, keepdims=True)
  top = jax.lax.stop_gradient(
    logits.max(axis=-1, keepdims=True, initial=-jnp.inf)
  )
  if sinks is not None:
    sinks = sinks.astype(at_least_float32).reshape(kv_heads, -1, 1, 1)
    top = jnp.maximum(top, jax.lax.stop_gradient(sinks))
    of_logits = jnp.ones_like(of_logits)
  top = jnp.where(of_logits, top, 0.0)
  total = jnp.exp(logits - top).sum(axis=-1, keepdims=True)
  if sinks is not None:
    total += jnp.exp(sinks - top)
  finite_lse = top + jnp.log(jnp.where(of_logits, total, 1.0))
  # Of a row whose lse is NaN, too, the hidden weights are 0.
  weights = jnp.exp(logits - finite_lse)
  weights = jnp.where(mask, weights, 0.0)
  if more.kept is not None:
    kept = by_kv_head(more.kept, kv_heads)
    weights = jnp.where(kept, weights * more.kept_scale, 0.0)
  out = jnp.einsum(
    "bkgts,bksh->bkgth",
    weights.astype(v.dtype),
    v,
    preferred_element_type=at_least_float32,
  )
  out = jnp.where(of_logits, out, 0.0).transpose(0, 3, 1, 2, 4)
  lse = jnp.where(of_logits, finite_lse, -jnp.inf).reshape(batch, n, t)
  out = out.reshape(*q.shape[:3], v.shape[3])
  return Outs(out.astype(q.dtype), lse)


def by_kv_head(x: jax.Array, kv_heads: int) -> jax.Array:
  """[B, N or 1, T, S] as [B, K or 1, N / K or 1, T, S]."""
  if x.shape[1] == 1:
    return x[:, None]
  return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def attention(p: Problem, a: Arrays) -> Outs:
  """The maths of the room's docstring in plain jnp."""
  q, k = a.q, a.k
  if a.positions is not None:
    q, k = (_rotated(p, a, x) for x in (q, k))
  v, bias, scale = a.v, None, p.scale
  if a.scale is not None:
    scale *= a.scale[:, None, None, None, None]
  if a.segments is not None:
    bias = nan_by_finiteness(q, k, v)
    q, k, v = (jnp.where(jnp.isfinite(x), x, 0) for x in (q, k, v))
  given = None if a.alibi is None else penalties(p, a)
  for added in (a.bias, given):
    if added is not None:
      added = by_kv_head(added, k.shape[2])
      bias = added if bias is None else bias + added
  mask = visible(p, a)
  more = More(bias, a.sinks)
  if a.dropout is not None:
    kept = kept_of(p.dropout_rate, a.dropout)
    more = more._replace(kept=kept, kept_scale=p.kept_scale)
  outs = masked_attention(q, k, v, mask, scale, p.soft_cap, more)
  if may_see_nothing(p, a):
    outs = mean_of_nothing(p, a, outs)
  return outs if p.return_lse else outs._replace(lse=None)


def with_sinks(outs: Outs, sinks: jax.Array) -> Outs:
  """The results with one more key of value 0, from those without, by lse."""
  sinks = sinks[:, None]
  seen = outs.lse != -jnp.inf
  lse = jnp.where(seen, outs.lse, 0.0)
  part = jnp.where(seen, jax.nn.sigmoid(lse - sinks), 0.0)
  lse = jnp.where(seen, jnp.logaddexp(lse, sinks), sinks)
  out = outs.out * part.swapaxes(1, 2)[..., None]
  return Outs(out.astype(outs.out.dtype), lse)


def may_see_nothing(p: Problem, a: Arrays) -> bool:
  """Whether there may be a query that sees no key."""
  if a.mask is not None or a.segments is not None:
    return True
  by_position = p.is_causal or has_window(p, a)
  if p.query_offset and by_position:
    return True
  return has_window(p, a) and a.q.shape[1] > a.k.shape[1]


def mean_of_nothing(p: Problem, a: Arrays, outs: Outs) -> Outs:
  """The results with the mean of all values for queries that see no key, if
  the problem wants it; there lse is -inf.
  """
  if not p.gives_mean:
    return outs

  def with_mean(out: jax.Array) -> jax.Array:
    mean = mean_of_values(a.v)
    mean = jnp.repeat(mean, out.shape[2] // mean.shape[2], axis=2)
    return jnp.where(rows_of_nothing(outs.lse), mean.astype(out.dtype), out)

  some = jnp.isneginf(outs.lse).any()
  out = jax.lax.cond(some, with_mean, lambda out: out, outs.out)
  return outs._replace(out=out)


def mean_of_values(v: jax.Array) -> jax.Array:
  """[B, 1, K, H], at least float32."""
  at_least_float32 = jnp.promote_types(v.dtype, jnp.float32)
  return v.mean(axis=1, keepdims=True, dtype=at_least_float32)


def rows_of_nothing(lse: jax.Array) -> jax.Array:
  """Of lse [B, N, T], which queries see no key: [B, T, N, 1] booleans."""
  return jnp.isneginf(lse).swapaxes(1, 2)[..., None]


def nan_by_finiteness(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """NaN for queries and keys of which an element is not finite, 0 for others.

  What the mask hides must not be a factor, as 0 times NaN is NaN; who sees it
  is to get NaN through the logits.
  """
  (b, t), kv_heads = q.shape[:2], k.shape[2]
  good_q = jnp.isfinite(q).all(axis=-1).reshape(b, t, kv_heads, -1)
  good_k = jnp.isfinite(k).all(axis=-1) & jnp.isfinite(v).all(axis=-1)

  def nan_or_0(good: jax.Array) -> jax.Array:
    return jnp.where(good, 0.0, jnp.nan).astype(jnp.float32)

  # A sum of the two, not a selection by both, which a CPU takes one by one.
  of_q = nan_or_0(good_q).transpose(0, 2, 3, 1)[..., None]
  return of_q + nan_or_0(good_k).transpose(0, 2, 1)[:, :, None, None, :]


def _rotated(p: Problem, a: Arrays, x: jax.Array) -> jax.Array:
  if a.base is None:
    base = p.base_frequency
    return apply_rope_reference(x, a.positions, base_frequency=base)

  def one(x: jax.Array, positions: jax.Array, base: jax.Array) -> jax.Array:
    x, positions = x[None], positions[None]
    return apply_rope_reference(x, positions, base_frequency=base)[0]

  return jax.vmap(one)(x, a.positions, a.base)


# --- the public function ------------------------------------------------------


@switches.plain
def flash_attention_reference(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float | None = None,
  is_causal: bool = False,
  segment_ids: SegmentIds = None,
  local_window_size: Window = None,
  logits_soft_cap: float | None = None,
  rope: Rope | None = None,
  return_lse: bool = False,
  layout: LayoutName | None = None,
  head_size: int | None = None,
  context_parts: int = 1,
  mask: jax.Array | None = None,
  bias: jax.Array | None = None,
  sinks: jax.Array | None = None,
  query_offset: int | jax.Array = 0,
  prefix_lengths: jax.Array | None = None,
  chunk_size: int | None = None,
  alibi_slopes: jax.Array | None = None,
  dropout_rate: float = 0.0,
  dropout_seed: int | jax.Array | None = None,
  deterministic: bool = False,
) -> Any:
  """The maths of the room's docstring in plain jnp.  The specification."""
  q, k, v = (to_btnh(x, layout, head_size) for x in (q, k, v))
  rope, q, k = rotated_apart(rope, apply_rope_reference, q, k)
  problem, arrays = problem_of(
    q,
    k,
    v,
    Seen(
      is_causal,
      segment_ids,
      local_window_size,
      mask,
      query_offset,
      prefix_lengths,
      chunk_size,
    ),
    Weights(
      *(scale, logits_soft_cap, rope, bias, sinks, alibi_slopes),
      drop=Drop() if deterministic else Drop(dropout_rate, dropout_seed),
    ),
    return_lse=return_lse,
    context_parts=context_parts,
  )
  outs = attention(problem, arrays)
  out = from_btnh(outs.out, layout)
  return (out, outs.lse) if return_lse else out
