"""Page 11: the forward kernel.

One grid step is a block of queries, with all G heads of its kv head, against
every key that it sees:

  1. take      segment ids to where rows are; rotate q and its own keys, if RoPE
               is inside
  2. diagonal  the keys of the queries' own indices: they start the maximum m,
               the sum and the weighted sum acc of every row; where there is no
               diagonal, these start as nothing seen; where all have one id, as
               if there were no ids
  3. others    the keys before and after, block by block, masked at the ends
  4. finish    out = acc / sum,   lse = m + log2 sum
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .._frame.manual import varying_like
from .._sincos import rotate
from . import (
  alibi,
  bias,
  blocks,
  dropout,
  finite,
  masks,
  memory,
  nothing,
  operands,
  pairs,
  rotation,
  spans,
  tiles,
)
from .softmax import MASKED, lse_of, reciprocal, row_maximum, sum_by_lane
from .spec import Arrays, Outs, Problem
from .tiles import Call


class Inputs(NamedTuple):
  """Refs, in the kernel; R = block_q G rows; None where a problem has none."""

  q: Any  # R rows of H, as the layout has them
  k: Any  # [S, H], the same for all blocks of queries
  v: Any  # [S, H]
  segments: operands.SegmentRefs | None
  rope: operands.RopeRefs | None
  mask: Any  # [S / 4096, block_q or R, LANES] int32, see `masks`
  alibi: alibi.Refs | None
  dropout: dropout.Refs | None
  bias: Any  # [G or 1, block_q, S]
  mean: Any  # [1, H] float32: of all values, for rows that see none of them


class Outputs(NamedTuple):
  """Refs, in the kernel."""

  out: Any  # as q
  lse: Any  # [1, R] float32, in units of `Problem.unit`


class State(NamedTuple):
  """Scratch: the online softmax of every row, and what `_take` makes."""

  m: Any  # [R, LANES] maximum of the logits so far, equal in all lanes
  total: Any  # [R, LANES] sum of the weights so far, a part in every lane
  acc: Any  # [R, H] sum of the weighted values so far
  ids: Any  # [R, LANES] segment ids by row, equal in all lanes; or None
  words: Any  # [R, LANES] of dropout, likewise; or None
  q: Any  # [R, H] rotated; or None
  k: Any  # [S, H] rotated as far as the grid has come; or None; of pairs two
  phases: operands.Phases | None  # [S, W], if several kv heads share them
  pairs: pairs.Scratch | None


# --- the kernel ---------------------------------------------------------------


def _kernel(
  scalars: blocks.Scalars, i: Inputs, o: Outputs, s: State, *, call: Call
):
  block = blocks.Block.of_step(call, scalars)
  visit, i, o, s = _of_pair(call, i, o, s)
  if visit is not None:
    visit.begin()
  if i.segments is not None:
    finite.clear_unseen_keys(block, i, mark=True)

  def on_diagonal(i: Inputs) -> None:
    # Each group of rows up to its last query, in whole registers.
    ends = range(call.softmax_rows, call.rows + 1, call.softmax_rows)
    widths = [tpu.lanes(call.layout.last_token(end)) for end in ends]
    key0 = block.own_keys.start
    _attend(block, i, s, Keys(key0, widths, masked=True, starts=True))

  def begin(segments: Any) -> None:
    own = i._replace(segments=segments)
    _take(block, own, s)
    block.start(
      functools.partial(on_diagonal, own), functools.partial(_start, s)
    )

  def finish(segments: Any) -> None:
    _finish(block, i._replace(segments=segments), o, s)

  def on_others(key0: Any, masked: bool) -> None:
    widths = [call.block_kv] * (call.rows // call.softmax_rows)
    _attend(block, i, s, Keys(key0, widths, masked))

  block.with_ids_if_needed(begin, i.segments)
  block.for_other_keys(on_others, functools.partial(_take_ids, i, s))
  block.with_ids_if_needed(finish, i.segments)
  if visit is not None:
    visit.end()


def _of_pair(
  call: Call, i: Inputs, o: Outputs, s: State
) -> tuple[pairs.Visit | None, Inputs, Outputs, State]:
  """The refs of this step's kv head, where two come together."""
  if s.pairs is None:
    return None, i, o, s
  keys = [i.k, i.v]
  visit = pairs.Visit(call, s.pairs, [i.q], keys, o.out, i.segments)
  (q,), (k, v) = visit.queries, visit.keys
  s = s._replace(k=visit.own(s.k))
  return visit, i._replace(q=q, k=k, v=v), o._replace(out=visit.result), s


def _take(block: blocks.Block, i: Inputs, s: State) -> None:
  """The ids to where the rows are; q and its own keys rotated."""
  if i.segments is not None:
    _take_ids(i, s)
  if i.dropout is not None:
    s.words[...] = tpu.lanes_to_column(i.dropout.rows[...])
  if i.rope is not None:
    # Keys before the queries' own have been rotated by earlier grid steps.
    own = block.own_keys
    sin, cos = i.rope.phases(block.call, own, s.phases)
    s.q[...] = _rotated_q(block.call, i, sin, cos)
    s.k[own, :] = _rotated_k(i, own, sin, cos)


def _take_ids(i: Inputs, s: State) -> None:
  assert i.segments is not None
  s.ids[...] = tpu.lanes_to_column(i.segments.rows[...])


def _rotated_q(
  call: Call, i: Inputs, sin: jax.Array, cos: jax.Array
) -> jax.Array:
  q = call.layout.by_rows(i.q).load(0, call.rows)
  return rotate(q, call.layout.by_row(sin), call.layout.by_row(cos))


def _rotated_k(
  i: Inputs, own: Any, sin: jax.Array, cos: jax.Array
) -> jax.Array:
  return rotate(i.k[own, :], sin, cos)


def _start(s: State) -> None:
  """No key seen."""
  s.m[...] = jnp.full_like(s.m, MASKED)
  s.total[...] = jnp.zeros_like(s.total)
  s.acc[...] = jnp.zeros_like(s.acc)


class Keys(NamedTuple):
  """Keys that the rows of a block meet in one turn of a loop.

  Attributes:
    key0: the first.
    widths: how many of them each group of `softmax_rows` rows sees.
    masked: whether some of them may be hidden.
    starts: whether they are the rows' first, and the state holds nothing yet.
  """

  key0: Any
  widths: Sequence[int]
  masked: bool
  starts: bool = False


def _attend(block: blocks.Block, i: Inputs, s: State, keys: Keys) -> None:
  """The online softmax over some keys.

  m'   = max(m, max_j s_j),    w_j = 2^(s_j - m'),    a = 2^(m - m')
  sum' = a sum + sum_j w_j
  acc' = a acc + sum_j w_j v_j
  """
  call, p = block.call, block.call.problem
  k = i.k if i.rope is None else s.k
  starts = range(0, call.rows, call.softmax_rows)
  groups = [pl.ds(start, call.softmax_rows) for start in starts]

  def product_of(n: int) -> jax.Array:
    q, width = _q(call, i, s, groups[n]), keys.widths[n]
    return tpu.dot(q, k[pl.ds(keys.key0, width), :], tpu.NT)

  # Products before the softmax of the groups before them: the matrix unit works
  # on one group while the vector unit works on another.  One ahead is enough;
  # where segments cut the keys short, all of them take a tenth less time.
  ahead = len(groups) if i.segments is not None and keys.masked else 1
  coming = [product_of(n) for n in range(ahead)]
  for n, g in enumerate(groups):
    product = coming.pop(0)
    if n + ahead < len(groups):
      coming.append(product_of(n + ahead))
    width = product.shape[1]
    v = i.v[pl.ds(keys.key0, width), :]
    logits = block.logits(product)
    if i.bias is not None:
      place = g.start, pl.ds(keys.key0, width)
      logits = bias.added_below(call, i.bias, logits, *place)
    if i.alibi is not None:
      logits += alibi.of_rows_below(block, i.alibi, g, keys.key0, width)
    if keys.masked:
      mask = _mask(block, i, s, g, keys.key0, logits.shape)
      logits = jnp.where(mask, logits, MASKED)
    before = None if keys.starts else s.m[g, :]
    m = row_maximum(logits)
    if before is not None:
      m = jnp.maximum(before, m)
    s.m[g, :] = m
    weights = jnp.exp2((logits - tpu.across(m, width)) * p.to_base_2)
    total = sum_by_lane(weights)
    if i.dropout is not None:
      at = s.words[g, :], keys.key0, width
      kept = dropout.of_rows_below(call, i.dropout, *at)
      weights = jnp.where(kept, weights, 0.0)
    acc = tpu.dot(weights.astype(v.dtype), v, tpu.NN)
    if before is not None:
      decay = jnp.exp2((before - m) * p.to_base_2)
      total, acc = _add_decayed(s, g, decay, total, acc)
    s.total[g, :] = total
    s.acc[g, :] = acc


def _q(call: Call, i: Inputs, s: State, g: Any) -> jax.Array:
  if i.rope is not None:
    return s.q[g, :]
  return call.layout.by_rows(i.q).load(g.start, g.size)


def _mask(
  block: blocks.Block, i: Inputs, s: State, g: Any, key0: Any, shape: Any
) -> jax.Array:
  if i.mask is not None:
    words = masks.by_rows(block.call, i.mask, key0, g.start, g.size)
    return masks.visible(words, shape[1], 1)
  ids = None
  if i.segments is not None:
    rows = tpu.across(s.ids[g, :], shape[1])
    ids = blocks.TileIds(rows, i.segments.of_keys(key0, shape[1]))
  return blocks.visible(block, shape, 0, g.start, key0, ids)


def _add_decayed(
  s: State, g: Any, decay: jax.Array, total: jax.Array, acc: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The sums with what rows g had before, relative to the new maximum."""
  total += decay * s.total[g, :]
  acc += tpu.across(decay, acc.shape[1]) * s.acc[g, :]
  return total, acc


def _finish(block: blocks.Block, i: Inputs, o: Outputs, s: State) -> None:
  """out = acc / sum and lse = m + log2 sum, 128 rows at a time."""
  call, p = block.call, block.call.problem
  may_see_nothing = not call.sees_itself or i.segments is not None
  parts = [pl.ds(r, tpu.LANES) for r in range(0, call.rows, tpu.LANES)]
  out = call.layout.by_rows(o.out)
  totals = [jnp.sum(s.total[r, :], axis=1, keepdims=True) for r in parts]
  for r, total in zip(parts, totals, strict=True):
    inverse = reciprocal(total, o.out.dtype)
    if p.dropout_rate:
      inverse *= p.kept_scale
    if may_see_nothing:
      inverse = jnp.where(s.m[r, :1] <= MASKED / 2, 0.0, inverse)
    result = s.acc[r, :] * inverse
    if i.mean is not None:
      saw_nothing = nothing.is_nothing(s.m[r, :1], total)
      result = jnp.where(saw_nothing, i.mean[...], result)
    out.store(int(r.start), result)
  columns = [jnp.broadcast_to(t, (tpu.LANES, tpu.LANES)) for t in totals]
  m, total = jnp.split(
    tpu.columns_to_lanes([s.m[r, :] for r in parts] + columns), 2
  )
  lse = lse_of(m, total, p)
  if may_see_nothing:
    lse = jnp.where(nothing.is_nothing(m, total), -jnp.inf, lse)
  tpu.store_lanes(o.lse, lse)


# --- the call -----------------------------------------------------------------


def _run(
  call: Call, arrays: Arrays, out_dtype: Any, mean: jax.Array | None = None
) -> Outs:
  """out [B, T, N, H], and lse by row, [B K, 1, rows]."""
  (q, k, v), specs = tiles.operands(call, arrays)
  batch = arrays.q.shape[0]
  bounds, ids, id_specs = operands.segment_operands(call, arrays.segments)
  rope, rope_specs = operands.rope_operands(call, arrays)
  words, word_spec = masks.operands_of(call, arrays.masks)
  slopes, slope_specs = alibi.operands_of(call, arrays, False)
  drop, drop_specs = dropout.operands_of(call, arrays.dropout)
  added = arrays.bias, mean
  inputs = Inputs(q, k, v, ids, rope, words, slopes, drop, *added)
  of_bias = bias.spec_of(call, arrays.bias, batch)
  of_added = slope_specs, drop_specs, of_bias, nothing.spec_of(call, mean)
  others = id_specs, rope_specs, word_spec, *of_added
  plan = masks.plan_of(call, arrays.masks and arrays.masks.forward)
  (outs,) = pl.pallas_call(
    functools.partial(_kernel, call=call),
    name="flash_attention_fwd",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=call.layout.grid(batch, pl.cdiv(call.t, call.block_q)),
      in_specs=[Inputs(specs.q, specs.k, specs.k, *others)],
      out_specs=[Outputs(specs.q, specs.lanes)],
      scratch_shapes=[_state(call, inputs, out_dtype)],
    ),
    out_shape=[
      Outputs(
        varying_like(q, q.shape, out_dtype),
        varying_like(
          q,
          (batch * call.kv_heads, 1, call.layout.rows(call.t)),
          jnp.float32,
        ),
      )
    ],
    compiler_params=tpu.compiler_params(memory.VMEM_BYTES),
  )(blocks.Scalars.of(bounds, arrays, plan), inputs)
  return Outs(call.layout.to_queries(outs.out, arrays.q.shape), outs.lse)


def _state(call: Call, i: Inputs, out_dtype: Any) -> State:
  """Types of the scratch for these operands."""
  h = call.layout.head_size
  by_row = pltpu.VMEM((call.rows, tpu.LANES), jnp.float32)
  ids = pltpu.VMEM((call.rows, tpu.LANES), jnp.int32)
  keys = call.layout.of_each_head((call.padded_keys, h))
  has_shared = i.rope is not None and call.kv_heads > 1
  return State(
    m=by_row,
    total=by_row,
    acc=pltpu.VMEM((call.rows, h), jnp.float32),
    ids=None if i.segments is None else ids,
    words=None if i.dropout is None else ids,
    q=None if i.rope is None else pltpu.VMEM((call.rows, h), i.q.dtype),
    k=None if i.rope is None else pltpu.VMEM(keys, i.k.dtype),
    phases=operands.phases_scratch(call) if has_shared else None,
    pairs=pairs.scratch(call, 1, i.q.dtype, out_dtype),
  )


# --- the pass -----------------------------------------------------------------


def forward(p: Problem, a: Arrays) -> Outs:
  """Attention by one call if VMEM holds all keys, else by several, merged.

  Args:
    p: the problem, with a config and a positive scale.
    a: the arrays; positions if q and k are still to be rotated.

  Returns:
    out [B, T, N, H], and lse by row, [B K, 1, rows], in units of
    `Problem.unit`.
  """
  a = masks.prepared(p, rotation.before(p, a))
  sizes = memory.Sizes.of_problem(p, a)
  whole = tiles.forward_call(p, sizes)
  keys = tiles.forward_keys(whole, sizes)
  calls = spans.of_call(whole, keys)
  if calls == [whole]:
    # A ring's first part starts float32 sums; to write them costs no time here.
    starts = p.is_partial and p.is_causal
    dtype = jnp.float32 if starts else a.q.dtype
    return _run(whole, a, dtype, nothing.mean_for_rows(p, a))
  outs = nothing.given(p, a, spans.merged(_run, calls, a))
  return outs._replace(lse=whole.layout.of_lse(outs.lse))
