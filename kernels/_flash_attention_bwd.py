"""Backward pass of flash attention: dq, dk and dv in one kernel.

Works on transposed scores, keys in sublanes and rows in lanes:

    s^T = K q^T,  p^T = exp(s^T - lse),  dp^T = V do^T,  ds^T = p^T (dp^T - di)
    dV += p^T do,  dK += ds^T q,  dq^T += K^T ds^T

so that lse and di lie as stored, one lane per row, and ds^T is never
transposed: K is, a block at a time, beside the matmuls.  dK and dV of a kv head
stay in VMEM, float32, over all its q blocks and heads; dq^T over a q block's
keys.  Nothing is summed outside, and the order of the sums is fixed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._flash_attention_tiles import (
  LANES,
  VMEM_BYTES,
  Ids,
  Problem,
  Turns,
  as_column,
  dot,
  for_blocks,
  from_keys,
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


def _kernel(*refs, p: Problem, block_kv: int, kv_heads: int, ragged: bool):
  """Refs, in order:

  bounds [2 B n_q] in SMEM                         with segment ids
  q [R, H], k [S, H], v [S, H], o [R, H], do [R, H]
  lse, dlse [1, R] in `Problem.unit`s
  q_ids [1, R], k_ids [S / LANES, 1, LANES]       with segment ids
  positions [1, block_q], timescale [1, H / 2]    with RoPE
  dq [R, H], dk [S, H], dv [S, H]: outputs
  lse, di [1, R] float32
  dq^T [H, R], dk [S, H], dv [S, H]: float32 accumulators
  q [R, H]: rotated, no rows past the end     with RoPE, or where T is ragged
  do [R, H]: no rows past the end             where T is ragged
  k [S, H]: rotated; sin, cos [S, H / 2]      with RoPE
  """
  take = taker(refs)
  (bounds_ref,) = take(1, p.segmented)
  q_ref, k_ref, v_ref, o_ref, do_ref, lse_in_ref, dlse_ref = take(7)
  q_ids_ref, k_ids_ref = take(2, p.segmented)
  positions_ref, timescale_ref = take(2, p.rotated)
  dq_ref, dk_ref, dv_ref, lse_ref, di_ref = take(5)
  dq_acc_ref, dk_acc_ref, dv_acc_ref = take(3)
  (q_own_ref,) = take(1, ragged or p.rotated)
  (do_own_ref,) = take(1, ragged)
  k_own_ref, sin_ref, cos_ref = take(3, p.rotated)
  rows = q_ref.shape[0]
  block_q = rows // p.group
  b, i = pl.program_id(0), pl.program_id(1)
  q0 = i * block_q

  diagonal = has_diagonal(p, block_q, block_kv)
  # Where the diagonal comes by every key, it does so before any other row.
  fresh = diagonal and p.t >= p.s
  if not fresh:

    @pl.when(i == 0)
    def _():
      dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
      dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

  columns = []
  for r in range(0, rows, LANES):
    part = pl.ds(r, LANES)
    o, do = (x[part, :].astype(jnp.float32) for x in (o_ref, do_ref))
    di = jnp.sum(o * do, axis=1, keepdims=True)
    columns.append(jnp.broadcast_to(di, (LANES, LANES)))
  store_lanes(di_ref, to_lanes(columns))
  # An infinite lse gives weights of 0: to a row that sees nothing, and below to
  # those past the end.
  lse = lse_in_ref[...]
  lse_ref[...] = jnp.where(lse == -jnp.inf, jnp.inf, lse)
  di_ref[...] -= dlse_ref[...] * (1 / p.unit)
  if ragged:
    left = p.t * p.group - i * rows
    inside = jax.lax.broadcasted_iota(jnp.int32, lse.shape, 1) < left
    lse_ref[...] = jnp.where(inside, lse_ref[...], jnp.inf)
    di_ref[...] = jnp.where(inside, di_ref[...], 0.0)
    inside = jax.lax.broadcasted_iota(jnp.int32, q_ref.shape, 0) < left
    for own_ref, ref in ((q_own_ref, q_ref), (do_own_ref, do_ref)):
      own_ref[...] = jnp.where(inside, ref[...], jnp.zeros_like(ref))
    q_ref, do_ref = q_own_ref, do_own_ref
  here = pl.ds(pl.multiple_of(q0, block_q), block_q)
  if p.rotated:
    sin_ref[here, :], cos_ref[here, :] = phases(positions_ref, timescale_ref)
    turn = sin_ref[here, :], cos_ref[here, :]
    q_own_ref[...] = turned(q_ref[...], *turn)
    k_own_ref[here, :] = turned(k_ref[here, :], *turn)
    q_ref, k_ref = q_own_ref, k_own_ref
  bounds = None
  if p.segmented:
    place = 2 * (jax.lax.div(b, kv_heads) * pl.num_programs(1) + i)
    bounds = bounds_ref[place], bounds_ref[place + 1]

  def attend(
    key0: Any, width: int, row0: int, masked: bool, first: bool, fresh: bool
  ) -> None:
    """Rows from row0 on against `width` keys.

    first: these rows' dq starts here.  fresh: so do these keys' dk and dv.
    """
    keys, here = pl.ds(key0, width), pl.ds(row0, rows - row0)
    k, v, q, do = (
      k_ref[keys, :],
      v_ref[keys, :],
      q_ref[here, :],
      do_ref[here, :],
    )
    s = raw_logits(p, dot(k, q, 1, 1))
    weights = jnp.exp2((s - lse_ref[:, here]) * p.base2)
    if masked:
      ids = None
      if p.segmented:
        column = as_column(key_ids(k_ids_ref, key0, width))
        ids = q_ids_ref[:, here], wide(column, s.shape[1])
      mask = visible(p, s.shape, 1, row0, key0, q0, ids)
      weights = jnp.where(mask, weights, 0.0)
    dv = dot(weights.astype(do.dtype), do, 1, 0)
    ds = weights * (dot(v, do, 1, 1) - di_ref[:, here])
    if p.soft_cap is not None:
      ds *= 1.0 - s * s  # s is the tanh
    ds = ds.astype(q.dtype)
    dk = dot(ds, q, 1, 0)
    dq = dot(k, ds, 0, 0)
    for ref, at, new, assign in (
      (dv_acc_ref, (keys, slice(None)), dv, fresh),
      (dk_acc_ref, (keys, slice(None)), dk, fresh),
      (dq_acc_ref, (slice(None), here), dq, first),
    ):
      ref[at] = new if assign else ref[at] + new

  def start() -> None:
    dq_acc_ref[...] = jnp.zeros_like(dq_acc_ref)

  def start_on_diagonal() -> None:
    for c in range(0, block_q, LANES):
      key0 = pl.multiple_of(q0 + c, LANES)
      attend(key0, LANES, c * p.group, True, c == 0, fresh)

  if not diagonal:
    start()
  elif p.t <= p.s:
    start_on_diagonal()
  else:
    pl.when(q0 < p.s)(start_on_diagonal)
    pl.when(q0 >= p.s)(start)

  def attend_block(block: Any, masked: bool) -> None:
    key0 = pl.multiple_of(block * block_kv, block_kv)
    attend(key0, block_kv, 0, masked, False, False)

  for_blocks(p, bounds, q0, block_q, block_kv, attend_block)

  dq = dq_acc_ref[...] * p.scale
  if p.rotated:
    dq_ref[...] = turned(dq.T, -sin_ref[here, :], cos_ref[here, :]).astype(
      dq_ref.dtype
    )
  else:
    dq_ref[...] = dq.astype(dq_ref.dtype).T

  @pl.when(i == pl.num_programs(1) - 1)
  def _():
    dk = dk_acc_ref[...] * p.scale
    if p.rotated:
      dk = turned(dk, -sin_ref[...], cos_ref[...])
    dk_ref[...] = dk.astype(dk_ref.dtype)
    dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)


def flash_bwd(
  p: Problem,
  config: Any,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  o: jax.Array,
  do: jax.Array,
  lse: jax.Array,
  dlse: jax.Array,
  ids: Ids,
  turns: Turns = (),
  dq_dtype: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dq, dk and dv, each of its argument's shape."""
  bk, tg, h = q.shape
  s = k.shape[1]
  block_q, block_kv = config.block_q_bwd, config.block_kv_bwd
  rows = block_q * p.group
  ragged = tg % rows != 0
  tile, whole, lane = tiles(bk, rows, s, h)
  scalars, id_args, id_specs = segment_operands(p, block_q, block_kv, bk, ids)
  turn_scratch = [
    pltpu.VMEM((s, h), k.dtype),
    *[pltpu.VMEM((s, h // 2), jnp.float32)] * 2,
  ] * p.rotated
  turn_args, turn_specs = rope_operands(turns, block_q, bk)
  kernel = functools.partial(
    _kernel,
    p=p,
    block_kv=block_kv,
    kv_heads=bk // ids[0].shape[0] if ids else 1,
    ragged=ragged,
  )
  return pl.pallas_call(
    kernel,
    name="flash_attention_bwd",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(bk, pl.cdiv(tg, rows)),
      in_specs=[
        tile,
        whole,
        whole,
        tile,
        tile,
        lane,
        lane,
        *id_specs,
        *turn_specs,
      ],
      out_specs=[tile, whole, whole],
      scratch_shapes=[
        pltpu.VMEM((1, rows), jnp.float32),
        pltpu.VMEM((1, rows), jnp.float32),
        pltpu.VMEM((h, rows), jnp.float32),
        pltpu.VMEM((s, h), jnp.float32),
        pltpu.VMEM((s, h), jnp.float32),
        *[pltpu.VMEM((rows, h), q.dtype)] * (ragged or p.rotated),
        *[pltpu.VMEM((rows, h), q.dtype)] * ragged,
        *turn_scratch,
      ],
    ),
    out_shape=[
      like(q.shape, dq_dtype or q.dtype, q),
      like(k.shape, k.dtype, q),
      like(v.shape, v.dtype, q),
    ],
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
  )(*scalars, q, k, v, o, do, lse, dlse, *id_args, *turn_args)


# --- the pass -----------------------------------------------------------------


def _over_spans(
  p: Problem, config: Any, q, k, v, ids: Ids, turns: Turns, out, lse, dout, dlse
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dq in rows, dk and dv in keys."""
  kv_heads = k.shape[2]
  q, out, dout = (to_rows(x, kv_heads) for x in (q, out, dout))
  k, v = to_keys(k), to_keys(v)
  unit = key_unit(p, config.block_q_bwd, config.block_kv_bwd)
  spans = spans_of(p, config.keys_bwd(q, p.group, unit))
  if len(spans) == 1 and spans[0].problem == p:
    dq, dk, dv = flash_bwd(
      p,
      config,
      q,
      pad_keys(k, unit),
      pad_keys(v, unit),
      out,
      dout,
      lse,
      dlse,
      ids,
      turns,
    )
    return dq, dk[:, : p.s], dv[:, : p.s]
  dq = jnp.zeros(q.shape, jnp.float32)
  dk, dv = jnp.zeros_like(k), jnp.zeros_like(v)
  for span in spans:
    rows, keys = span.rows, span.keys
    new_dq, new_dk, new_dv = flash_bwd(
      span.problem,
      config,
      q[:, rows],
      pad_keys(k[:, keys], unit),
      pad_keys(v[:, keys], unit),
      out[:, rows],
      dout[:, rows],
      lse[:, :, rows],
      dlse[:, :, rows],
      span.ids(ids),
      dq_dtype=jnp.float32,
    )
    dq = dq.at[:, rows].add(new_dq)
    dk = dk.at[:, keys].set(new_dk[:, : span.problem.s])
    dv = dv.at[:, keys].set(new_dv[:, : span.problem.s])
  return dq.astype(q.dtype), dk, dv


def backward(
  p: Problem, config: Any, q, k, v, ids: Ids, turns: Turns, out, lse, dout, dlse
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dq, dk and dv, from the arguments and results of `forward` and the
  cotangents of the latter.
  """

  def run(q, k, v, ids, positions, *rest):
    turned_by = (*positions, *turns[1:])
    dq, dk, dv = _over_spans(p, config, q, k, v, ids, turned_by, *rest)
    return (
      from_rows(dq, q.shape),
      from_keys(dk, k.shape),
      from_keys(dv, v.shape),
    )

  return over_batch(run)(q, k, v, ids, turns[:1], out, lse, dout, dlse)
