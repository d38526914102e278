"""Forward pass of flash attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._flash_attention_tiles import (
  LANES,
  MASKED,
  VMEM_BYTES,
  Ids,
  Problem,
  Turns,
  as_column,
  dot,
  for_blocks,
  from_rows,
  has_diagonal,
  key_ids,
  key_unit,
  over_batch,
  pad_keys,
  phases,
  raw_logits,
  rope_operands,
  segment_operands,
  spans_of,
  store_lanes,
  taker,
  tiles,
  to_keys,
  to_lanes,
  to_rows,
  turned,
  visible,
  wide,
)
from ._sharding import like

# --- the kernel ---------------------------------------------------------------


def _kernel(
  *refs,
  p: Problem,
  block_kv: int,
  group_rows: int,
  kv_heads: int,
):
  """Refs, in order:

  bounds [2 B n_q] in SMEM: see `for_blocks`      with segment ids
  q [R, H], k [S, H], v [S, H]
  q_ids [1, R], k_ids [S / LANES, 1, LANES]       with segment ids
  positions [1, block_q], timescale [1, H / 2]    with RoPE
  o [R, H], lse [1, R]: outputs
  m [R, LANES]: running maximum of the logits
  l [R, LANES]: running sum, by lane
  acc [R, H] float32
  ids [R, LANES]                                  with segment ids
  q [R, H], k [S, H]: rotated                     with RoPE

  The diagonal's keys have the q block's own positions: they are rotated with
  its queries, and those before them have been.
  """
  take = taker(refs)
  (bounds_ref,) = take(1, p.segmented)
  q_ref, k_ref, v_ref = take(3)
  q_ids_ref, k_ids_ref = take(2, p.segmented)
  positions_ref, timescale_ref = take(2, p.rotated)
  o_ref, lse_ref, m_ref, l_ref, acc_ref = take(5)
  (ids_ref,) = take(1, p.segmented)
  q_turned_ref, k_turned_ref = take(2, p.rotated)
  rows = q_ref.shape[0]
  block_q = rows // p.group
  b, i = pl.program_id(0), pl.program_id(1)
  q0 = i * block_q
  groups = [pl.ds(r, group_rows) for r in range(0, rows, group_rows)]
  bounds = None
  if p.segmented:
    ids_ref[...] = as_column(q_ids_ref[...])
    place = 2 * (jax.lax.div(b, kv_heads) * pl.num_programs(1) + i)
    bounds = bounds_ref[place], bounds_ref[place + 1]
  if p.rotated:
    sin, cos = phases(positions_ref, timescale_ref)
    here = pl.ds(pl.multiple_of(q0, block_q), block_q)
    q_turned_ref[...] = turned(q_ref[...], sin, cos)
    k_turned_ref[here, :] = turned(k_ref[here, :], sin, cos)
    q_ref, k_ref = q_turned_ref, k_turned_ref

  def attend(
    key0: Any, widths: Sequence[int], masked: bool, first: bool
  ) -> None:
    """Each group of rows sees as many keys from key0 on as its width says."""
    # All groups' products before any softmax: the matrix unit works on one
    # group while the vector unit works on another.
    products = [
      dot(q_ref[g, :], k_ref[pl.ds(key0, width), :], 1, 1)
      for g, width in zip(groups, widths, strict=True)
    ]
    for g, s in zip(groups, products, strict=True):
      width = s.shape[1]
      v = v_ref[pl.ds(key0, width), :]
      s = raw_logits(p, s)
      if masked:
        ids = None
        if p.segmented:
          ids = wide(ids_ref[g, :], width), key_ids(k_ids_ref, key0, width)
        mask = visible(p, s.shape, 0, g.start, key0, q0, ids)
        s = jnp.where(mask, s, MASKED)
      m_old = None if first else m_ref[g, :]
      m = jnp.broadcast_to(
        jnp.max(s, axis=1, keepdims=True), (s.shape[0], LANES)
      )
      if m_old is not None:
        m = jnp.maximum(m_old, m)
      m_ref[g, :] = m
      weights = jnp.exp2((s - wide(m, width)) * p.base2)
      total = sum(weights[:, c : c + LANES] for c in range(0, width, LANES))
      out = dot(weights.astype(v.dtype), v, 1, 0)
      if m_old is not None:
        alpha = jnp.exp2((m_old - m) * p.base2)
        total += alpha * l_ref[g, :]
        out += wide(alpha, out.shape[1]) * acc_ref[g, :]
      l_ref[g, :] = total
      acc_ref[g, :] = out

  def start() -> None:
    m_ref[...] = jnp.full_like(m_ref, MASKED)
    l_ref[...] = jnp.zeros_like(l_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  def start_on_diagonal() -> None:
    # Up to each group's last query, in whole registers.
    ends = range(group_rows, rows + 1, group_rows)
    widths = [-(-end // (p.group * LANES)) * LANES for end in ends]
    attend(pl.multiple_of(q0, block_q), widths, True, True)

  if not has_diagonal(p, block_q, block_kv):
    start()
  elif p.t <= p.s:
    start_on_diagonal()
  else:
    pl.when(q0 < p.s)(start_on_diagonal)
    pl.when(q0 >= p.s)(start)

  def attend_block(block: Any, masked: bool) -> None:
    key0 = pl.multiple_of(block * block_kv, block_kv)
    attend(key0, [block_kv] * len(groups), masked, False)

  for_blocks(p, bounds, q0, block_q, block_kv, attend_block)

  parts = [pl.ds(r, LANES) for r in range(0, rows, LANES)]
  totals = [jnp.sum(l_ref[r, :], axis=1, keepdims=True) for r in parts]
  for r, total in zip(parts, totals, strict=True):
    inverse = _reciprocal(total, o_ref.dtype)
    if not p.sees_itself:  # a row may have seen nothing
      inverse = jnp.where(m_ref[r, :1] > MASKED / 2, inverse, 0.0)
    o_ref[r, :] = (acc_ref[r, :] * inverse).astype(o_ref.dtype)
  columns = [jnp.broadcast_to(total, (LANES, LANES)) for total in totals]
  m, total = jnp.split(to_lanes([m_ref[r, :] for r in parts] + columns), 2)
  lse = m + jnp.log2(total) * (1 / p.base2)
  if not p.sees_itself:
    lse = jnp.where(m > MASKED / 2, lse, -jnp.inf)
  store_lanes(lse_ref, lse)


# In `pl` up to JAX 0.10, deprecated there since.
_approximate_reciprocal = getattr(pltpu, "reciprocal", None) or pl.reciprocal


def _reciprocal(x: jax.Array, dtype: Any) -> jax.Array:
  """1 / x, well within dtype's precision."""
  if dtype == jnp.float32:
    return 1.0 / x
  guess = _approximate_reciprocal(x, approx=True)
  return guess * (2.0 - x * guess)


def flash_fwd(
  p: Problem,
  config: Any,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  ids: Ids,
  turns: Turns = (),
  out_dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """out [BK, T G, H], and lse [BK, 1, T G] in `Problem.unit`s."""
  bk, tg, h = q.shape
  rows = config.block_q * p.group
  tile, whole, lane = tiles(bk, rows, k.shape[1], h)
  scalars, id_args, id_specs = segment_operands(
    p, config.block_q, config.block_kv, bk, ids
  )
  id_scratch = [pltpu.VMEM((rows, LANES), jnp.int32)] * p.segmented
  turn_args, turn_specs = rope_operands(turns, config.block_q, bk)
  turn_scratch = [
    pltpu.VMEM((rows, h), q.dtype),
    pltpu.VMEM(k.shape[1:], k.dtype),
  ] * p.rotated
  kernel = functools.partial(
    _kernel,
    p=p,
    block_kv=config.block_kv,
    group_rows=math.gcd(rows, config.rows),
    kv_heads=bk // ids[0].shape[0] if ids else 1,
  )
  return pl.pallas_call(
    kernel,
    name="flash_attention_fwd",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(bk, pl.cdiv(tg, rows)),
      in_specs=[tile, whole, whole, *id_specs, *turn_specs],
      out_specs=[tile, lane],
      scratch_shapes=[
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, h), jnp.float32),
        *id_scratch,
        *turn_scratch,
      ],
    ),
    out_shape=[
      like(q.shape, out_dtype or q.dtype, q),
      like((bk, 1, tg), jnp.float32, q),
    ],
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
  )(*scalars, q, k, v, *id_args, *turn_args)


# --- the pass -----------------------------------------------------------------


def _over_spans(
  p: Problem, config: Any, q, k, v, ids: Ids, turns: Turns
) -> tuple[jax.Array, jax.Array]:
  """out in rows, and lse, of q [B, T, N, H] and k, v [B, S, K, H]."""
  q, k, v = to_rows(q, k.shape[2]), to_keys(k), to_keys(v)
  unit = key_unit(p, config.block_q, config.block_kv)
  spans = spans_of(p, config.keys_fwd(q, p.group, unit))
  if len(spans) == 1 and spans[0].problem == p:
    out, lse = flash_fwd(
      p, config, q, pad_keys(k, unit), pad_keys(v, unit), ids, turns
    )
    return out, lse
  out = jnp.zeros(q.shape, jnp.float32)
  lse = jnp.full((q.shape[0], 1, q.shape[1]), -jnp.inf)
  for span in spans:
    rows, keys = span.rows, span.keys
    new_out, new_lse = flash_fwd(
      span.problem,
      config,
      q[:, rows],
      pad_keys(k[:, keys], unit),
      pad_keys(v[:, keys], unit),
      span.ids(ids),
      out_dtype=jnp.float32,
    )
    new_out, new_lse = _merge(
      p, out[:, rows], lse[:, :, rows], new_out, new_lse
    )
    out, lse = out.at[:, rows].set(new_out), lse.at[:, :, rows].set(new_lse)
  return out.astype(q.dtype), lse


def _merge(p: Problem, out, lse, new_out, new_lse):
  """Attention over two sets of keys, from that over each."""
  top = jnp.maximum(lse, new_lse)
  top = jnp.where(top > -jnp.inf, top, 0.0)
  a, b = (jnp.exp2((x - top) * p.base2) for x in (lse, new_lse))
  total = a + b
  scale = jnp.where(total > 0, 1 / total, 0.0)
  a, b = (jnp.swapaxes(x * scale, 1, 2) for x in (a, b))
  return out * a + new_out * b, top + jnp.log2(total) / p.base2


def forward(
  p: Problem, config: Any, q, k, v, ids: Ids, turns: Turns
) -> tuple[jax.Array, jax.Array]:
  """Attention of q [B, T, N, H] over k, v [B, S, K, H].

  Args:
    p: what to compute.
    config: the tiles, a `FlashAttentionConfig`.
    q: queries.
    k: keys.
    v: values.
    ids: segment ids, or nothing.
    turns: positions and timescale for RoPE, or nothing.

  Returns:
    out [B, T, N, H], and lse [B K, 1, T G] in units of `Problem.unit`.
  """

  def run(q, k, v, ids, positions):
    turned_by = (*positions, *turns[1:])
    out, lse = _over_spans(p, config, q, k, v, ids, turned_by)
    return from_rows(out, q.shape), lse

  return over_batch(run)(q, k, v, ids, turns[:1])
