"""Page 13: the backward kernel, dq, dk and dv in one.

It works on transposed scores, keys in sublanes and rows in lanes:

    s^T = K q^T,  p^T = exp(s^T - lse),  dp^T = V do^T,  ds^T = p^T (dp^T - di)
    dV += p^T do,  dK += ds^T q,  dq^T += K^T ds^T

so that lse and di lie as stored, one lane per row, and ds^T is never
transposed: K is, a block at a time, beside the matmuls.  dK and dV of a kv head
stay in VMEM, float32, over all its q blocks and heads; dq^T over a q block's
keys.  Nothing is summed outside, and the order of the sums is fixed.

One grid step is a block of queries, with all G heads of its kv head, against
every key that it sees:

  1. clear     dk and dv, at the first q block, where no diagonal starts them
  2. take      di = do . o - dlse, and lse, for every row; q and do without what
               lies past the end; q and its own keys rotated, if RoPE is inside
  3. diagonal  the keys of the queries' own indices: they start dq
  4. others    the keys before and after, block by block, masked at the ends
  5. finish    dq, rotated back; after the last q block dk and dv
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .._frame.kernel import Saved
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
  stores,
  tiles,
)
from .backward_refs import Inputs, Outputs, State, state_of
from .departure import Departure
from .spec import Arrays, Outs, Problem
from .tiles import Call

# --- the kernel ---------------------------------------------------------------


def _kernel(
  scalars: blocks.Scalars, i: Inputs, o: Outputs, s: State, *, call: Call
):
  block = blocks.Block.of_step(call, scalars)
  keys_leave = Departure(call, s.departure, o.dk, o.dv)
  of_all_heads = s
  visit, i, o, s = _of_pair(call, i, o, s)
  if visit is not None:
    visit.begin()
  keys_leave.begin()
  if not _diagonal_starts_dk(call):
    pl.when(pl.program_id(1) == 0)(functools.partial(_clear, s))
  if i.segments is not None:
    finite.clear_unseen(block, i)
  _take_statistics(call, i, s)
  finite.clear_past_end(call, i, s)
  if i.rope is not None:
    _rotate(block, i, s)

  def on_diagonal() -> None:
    starts_dk = _diagonal_starts_dk(call)
    for c in range(0, call.block_q, tpu.LANES):
      key0, row0 = pl.multiple_of(block.q0 + c, tpu.LANES), c * call.group
      tile = Tile(key0, tpu.LANES, row0, True, c == 0, starts_dk)
      _attend(block, i, o, s, tile)

  def on_others(key0: Any, masked: bool) -> None:
    if masked and s.mask is not None:
      masks.load_column(call, i.mask, key0, s.mask)
    _attend(block, i, o, s, Tile(key0, call.block_kv, 0, masked))

  if s.mask is not None:
    s.mask.column[0] = -1
  if o.bias is not None:  # of what nobody sees
    o.bias[...] = jnp.zeros_like(o.bias)
  block.start(on_diagonal, functools.partial(_start_dq, s))
  block.for_other_keys(on_others)
  _finish_dq(block, i, o, s)
  if visit is not None:
    visit.end()
  keys_leave.end(functools.partial(_dk_and_dv, block, of_all_heads))


def _of_pair(
  call: Call, i: Inputs, o: Outputs, s: State
) -> tuple[pairs.Visit | None, Inputs, Outputs, State]:
  """The refs of this step's kv head, where two come together."""
  if s.pairs is None:
    return None, i, o, s
  queries, keys = [i.q, i.out, i.dout], [i.k, i.v]
  visit = pairs.Visit(call, s.pairs, queries, keys, o.dq, i.segments)
  (q, out, dout), (k, v) = visit.queries, visit.keys
  i = i._replace(q=q, k=k, v=v, out=out, dout=dout)
  dk, dv, rotated = map(visit.own, (s.dk, s.dv, s.k))
  s = s._replace(dk=dk, dv=dv, k=rotated)
  return visit, i, o._replace(dq=visit.result), s


def _diagonal_starts_dk(call: Call) -> bool:
  """Whether the diagonal comes by every key, and does so before other rows."""
  return call.has_diagonal and call.t >= call.s


def _clear(s: State) -> None:
  s.dk[...] = jnp.zeros_like(s.dk)
  s.dv[...] = jnp.zeros_like(s.dv)


def _start_dq(s: State) -> None:
  s.dq_transposed[...] = jnp.zeros_like(s.dq_transposed)


def _take_statistics(call: Call, i: Inputs, s: State) -> None:
  """di and lse of every row."""
  columns = []
  both = [call.layout.by_rows(x) for x in (i.out, i.dout)]
  for r in range(0, call.rows, tpu.LANES):
    out, dout = (x.load(r, tpu.LANES).astype(jnp.float32) for x in both)
    di = jnp.sum(out * dout, axis=1, keepdims=True)
    columns.append(jnp.broadcast_to(di, (tpu.LANES, tpu.LANES)))
  tpu.store_lanes(s.di, tpu.columns_to_lanes(columns))
  # An infinite lse gives weights of 0: to a row that sees nothing, and in
  # `finite.clear_past_end` to those past the end.
  lse = i.lse[...]
  s.lse[...] = jnp.where(lse == -jnp.inf, jnp.inf, lse)
  s.di[...] -= _lse_part_of_di(call.problem, i)
  if i.dropout is not None:  # what multiplies the kept is left for the end
    s.di[...] *= 1 / call.problem.kept_scale
  if i.segments is not None:
    s.lse[...], s.di[...] = finite.nan_in_lse(s.lse[...], s.di[...])


def _lse_part_of_di(p: Problem, i: Inputs) -> jax.Array:
  return i.dlse[...] * (1 / p.unit)


def _rotate(block: blocks.Block, i: Inputs, s: State) -> None:
  """q and its own keys; the keys before have been by earlier grid steps."""
  assert i.rope is not None
  call, own = block.call, block.own_keys
  sin, cos = i.rope.phases(call, own, s.phases)
  # Without what lies past the end, if there is such an end.
  q = _taken(call, i.q, None if s.dout is None else s.q, pl.ds(0, call.rows))
  s.q[...] = rotate(q, *map(call.layout.by_row, (sin, cos)))
  s.k[own, :] = rotate(i.k[own, :], sin, cos)


class Tile(NamedTuple):
  """Keys and the rows of a block that meet in one turn of a loop.

  Attributes:
    key0: the first key.
    width: how many keys.
    row0: the first row; all from there on take part.
    masked: whether some of the keys may be hidden.
    starts_dq: whether these are the rows' first keys.
    starts_dk: whether these are the keys' first rows.
  """

  key0: Any
  width: int
  row0: int
  masked: bool
  starts_dq: bool = False
  starts_dk: bool = False


def _attend(
  block: blocks.Block, i: Inputs, o: Outputs, s: State, tile: Tile
) -> None:
  """Adds what a tile gives to dq, dk and dv."""
  p, rows = block.call.problem, block.call.rows
  keys, here = pl.ds(tile.key0, tile.width), pl.ds(tile.row0, rows - tile.row0)
  k, v = (i.k if s.k is None else s.k)[keys, :], i.v[keys, :]
  q = _taken(block.call, i.q, s.q, here)
  dout = _taken(block.call, i.dout, s.dout, here)
  logits = block.logits(tpu.dot(k, q, tpu.NT))
  biased = logits
  if i.bias is not None:
    biased = bias.added_beside(block.call, i.bias, logits, tile.row0, keys)
  if i.alibi is not None:
    of_keys = tile.key0, tile.width
    biased += alibi.of_rows_beside(block, i.alibi, here, *of_keys)
  weights = jnp.exp2((biased - s.lse[:, here]) * p.to_base_2)
  if i.bias is not None and block.call.has_ragged_end:  # it is anything there
    weights = jnp.where(s.lse[:, here] != jnp.inf, weights, 0.0)
  if tile.masked:
    mask = _mask(block, i, s, tile, logits.shape)
    weights = jnp.where(mask, weights, 0.0)
  drop = _drop(block, i, tile, here)
  dv = tpu.dot(drop(weights).astype(dout.dtype), dout, tpu.NN)
  dweights = drop(tpu.dot(v, dout, tpu.NT))
  dlogits = weights * _minus_di(dweights, s, here)
  if o.bias is not None:
    of_bias = (dlogits * p.kept_scale).T
    bias.store(block.call, o.bias, tile.row0, of_bias, keys)
  dproducts = _through_soft_cap(p, logits, dlogits).astype(q.dtype)
  dk = tpu.dot(dproducts, q, tpu.NN)
  dq_transposed = tpu.dot(k, dproducts, tpu.TN)
  whole = slice(None)
  _add(s.dv, (keys, whole), dv, starts=tile.starts_dk)
  _add(s.dk, (keys, whole), dk, starts=tile.starts_dk)
  _add(s.dq_transposed, (whole, here), dq_transposed, starts=tile.starts_dq)


def _taken(call: Call, ref: Any, scratch: Any, here: Any) -> jax.Array:
  """Rows as they come, or as they are in scratch."""
  if scratch is not None:
    return scratch[here, :]
  return call.layout.by_rows(ref).load(here.start, here.size)


def _mask(
  block: blocks.Block, i: Inputs, s: State, tile: Tile, shape: tuple[int, ...]
) -> jax.Array:
  if s.mask is not None:
    words = masks.column_at(s.mask.words, tile.key0)
    return masks.visible(words, shape[0], 0)
  ids = None
  if i.segments is not None:
    keys = tpu.lanes_to_column(i.segments.of_keys(tile.key0, tile.width))
    rows = i.segments.rows[:, pl.ds(tile.row0, shape[1])]
    ids = blocks.TileIds(rows, tpu.across(keys, shape[1]))
  return blocks.visible(block, shape, 1, tile.row0, tile.key0, ids)


def _drop(block: blocks.Block, i: Inputs, tile: Tile, here: Any) -> Any:
  """Makes 0 of what dropout drops of a tile."""
  if i.dropout is None:
    return lambda tile: tile
  at = here, tile.key0, tile.width
  is_kept = dropout.of_rows_beside(block.call, i.dropout, *at)
  return lambda tile: jnp.where(is_kept, tile, 0.0)


def _minus_di(dweights: jax.Array, s: State, here: Any) -> jax.Array:
  return dweights - s.di[:, here]


def _through_soft_cap(
  p: Problem, logits: jax.Array, dlogits: jax.Array
) -> jax.Array:
  """The gradient of the products q . k; the kernel's logits are the tanh."""
  if p.soft_cap is None:
    return dlogits
  return dlogits * (1.0 - logits * logits)


def _add(ref: Any, at: Any, new: jax.Array, *, starts: bool) -> None:
  ref[at] = new if starts else ref[at] + new


def _finish_dq(block: blocks.Block, i: Inputs, o: Outputs, s: State) -> None:
  # `backward` scales it by a traced scale, whose gradient it needs it for.
  call = block.call
  dq = _scaled(call.problem, s.dq_transposed[...])
  if i.rope is None:
    dq = dq.astype(o.dq.dtype).T
  else:
    assert s.phases is not None
    sin, cos = map(call.layout.by_row, s.phases.of(block.own_keys))
    dq = _rotate_back(dq.T, sin, cos)
  call.layout.by_rows(o.dq).store(0, dq)


def _dk_and_dv(
  block: blocks.Block, s: State, place: Any
) -> tuple[jax.Array, jax.Array]:
  """Of some keys, float32; the place has the kv head first, if of a pair."""
  dk = _scaled(block.call.problem, s.dk[place])
  if block.scale is not None:
    dk *= block.scale
  if s.phases is not None:
    dk = _rotate_back(dk, *(x[place[-2:]] for x in s.phases))
  dv = s.dv[place]
  if block.call.problem.dropout_rate:
    dv *= block.call.problem.kept_scale
  return dk, dv


def _scaled(p: Problem, sums: jax.Array) -> jax.Array:
  return sums * (p.scale * p.kept_scale)


def _rotate_back(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  return rotate(x, -sin, cos)


# --- the call -----------------------------------------------------------------


def _run(
  call: Call,
  a: Arrays,
  outs: Outs,
  d: Outs,
  dq_dtype: Any,
  places: Any = None,
  wants_bias: bool = False,
) -> Arrays:
  """dq, dk, dv and that of the bias; lse and its cotangent are by row."""
  layout, batch = call.layout, a.q.shape[0]
  (q, k, v), (row, whole, lane) = tiles.operands(call, a)
  out, dout = map(layout.of_queries, (outs.out, d.out))
  bounds, ids, id_specs = operands.segment_operands(call, a.segments)
  mixed = finite.mixed_segments(call, a.segments, bounds)
  rope, rope_specs = operands.rope_operands(call, a)
  words, of_words = masks.operands_of(call, a.masks)
  plan = masks.plan_of(call, a.masks and a.masks.backward)
  slopes, of_slopes = alibi.operands_of(call, a, True)
  drop, of_drop = dropout.operands_of(call, a.dropout)
  of_bias = bias.spec_of(call, a.bias, batch)
  d_bias, of_d_bias = bias.gradient_of(call, a.bias, batch, wants_bias)
  of_lanes = lane, lane, id_specs, rope_specs, of_words, of_slopes, of_drop
  others = ids, rope, words, slopes, drop, a.bias
  inputs = Inputs(q, k, v, out, dout, outs.lse, d.lse, *others)
  specs = Inputs(row, whole, whole, row, row, *of_lanes, of_bias)
  refs, specs, layer = stores.read(places, inputs, specs)
  in_hbm = pl.BlockSpec(memory_space=pl.ANY)
  of_keys = varying_like(q, k.shape, call.problem.gradient_type(k.dtype))
  (gradients,) = pl.pallas_call(
    functools.partial(_kernel, call=call),
    name="flash_attention_bwd",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=layout.grid(batch, pl.cdiv(call.t, call.block_q)),
      in_specs=[specs],
      out_specs=[Outputs(row, in_hbm, in_hbm, of_d_bias)],
      scratch_shapes=[state_of(call, inputs, dq_dtype)],
    ),
    out_shape=[
      Outputs(varying_like(q, q.shape, dq_dtype), of_keys, of_keys, d_bias)
    ],
    compiler_params=tpu.compiler_params(memory.VMEM_BYTES),
  )(blocks.Scalars.of(bounds, a, plan, mixed, layer), refs)
  dq = layout.to_queries(gradients.dq, a.q.shape)
  dk, dv = (layout.to_keys(x, a.k.shape) for x in (gradients.dk, gradients.dv))
  d_bias = bias.summed(gradients.bias, a.bias, call.kv_heads)
  return Arrays(dq, dk, dv, bias=d_bias)


# --- the pass -----------------------------------------------------------------


def backward(p: Problem, saved: Saved, d: Outs) -> Arrays:
  """dq, dk, dv and a bias's, by one call if VMEM holds all keys, else several.

  Args:
    p: as `forward` had it.
    saved: its arrays, and its results.
    d: the cotangents of these.
  """
  a, outs = rotation.before(p, saved.arrays), saved.outs
  a = masks.prepared(p, a)
  sizes = memory.Sizes.of_problem(p, a)
  whole = tiles.backward_call(p, sizes)
  calls = spans.of_call(whole, tiles.backward_keys(whole, sizes))
  wants_bias = saved.wanted is not None and saved.wanted.bias is True
  run = functools.partial(_run, wants_bias=wants_bias)
  if calls == [whole]:
    dq_dtype = p.gradient_type(a.q.dtype if a.scale is None else jnp.float32)
    grads = run(whole, a, outs, d, dq_dtype, saved.places)
  else:
    by_head = functools.partial(whole.layout.to_lse, shape=a.q.shape)
    both = [x._replace(lse=by_head(x.lse)) for x in (outs, d)]
    grads = spans.added(run, calls, a, *both)
  dq, d_scale = grads.q, None
  if a.scale is not None:
    d_scale = (a.q.astype(jnp.float32) * dq).sum(axis=(1, 2, 3))
    dq *= a.scale[:, None, None, None]
  dq = dq.astype(p.gradient_type(a.q.dtype))
  dv = nothing.added(p, a, outs, d, grads.v)
  grads = grads._replace(q=dq, v=dv, scale=d_scale)
  return rotation.back(p, grads, saved.arrays, a)
