"""Page 8: the kernel.

One grid step is a block of queries of one row, with all their heads, against
every key that they see:

  1. begin    at the first step, as many blocks of the cache set out as may
  2. take     new keys and values, if there are any: of all rows at the first
              step; if they are many, of a row at its first
  3. blocks   for each block: one more sets out; the next one is awaited, new
              keys are put into it, and go back; then the online softmax, as in
              flash attention, masked at the ends
  4. finish   out = acc / sum,   lse = m + log2 sum

Products are computed one block ahead, at the last block of a step that of the
next step's first: so the matrix unit does not wait for a row's end.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._attention.softmax import MASKED, lse_of, reciprocal
from .._frame import tpu
from .._frame.manual import varying_like
from . import apart, append, attend, rotate, stream, tiles
from .cache import Cache, layout_of
from .spec import Arrays, Outs, Problem, unflattened, with_new_keys
from .stream import CacheRefs, Scalars, Step, Stream
from .tiles import Call


class Inputs(NamedTuple):
  """Refs, in the kernel; None where there is none."""

  queries: rotate.Queries
  new: append.New | None
  cache: CacheRefs  # in HBM


class Outputs(NamedTuple):
  """Refs, in the kernel."""

  out: Any  # [R, H]
  lse: Any  # [R, LANES] float32, equal in all lanes; or None
  cache: CacheRefs | None  # in HBM: that of the inputs


class State(NamedTuple):
  """Scratch: the online softmax of every row, and what is on its way."""

  rows: attend.Rows
  q: Any  # [2, R, H]: rotated, of this step and the next one; or None
  others: Any  # [R, block] MASKED where a key is of another head; or None
  new: CacheRefs | None
  slots: CacheRefs
  at: stream.Cursor
  semaphores: stream.Semaphores


# --- the kernel ---------------------------------------------------------------


def _kernel(scalars: Scalars, i: Inputs, o: Outputs, s: State, *, call: Call):
  index = pl.program_id(0) * call.blocks_q + pl.program_id(1)
  hbm = i.cache if o.cache is None else o.cache
  copies = Stream(call, scalars, hbm, s.slots, s.at, s.semaphores)
  step = Step.of(call, scalars, index)

  @pl.when(index == 0)
  def _():
    copies.begin()
    if s.others is not None:
      s.others[...] = attend.others(call)

  if i.new is not None and s.new is not None:
    is_first = pl.program_id(1) == 0 if call.held == 1 else index == 0
    pl.when(is_first)(functools.partial(append.take, call, i.new, s.new))

  def arrives(step: Step, block: Any) -> Any:
    slot = copies.take(step, block)
    if s.new is not None:
      append.put(copies, s.new, step, block, slot)
    return slot

  keys = attend.Keys(s.slots, s.others, call.turned)
  given, goes_on = i.queries, i.queries.after is not None
  q, q_after = rotate.queries(given, s.q, index)
  scale = None if scalars.scale is None else scalars.scale[step.b]

  def begin() -> None:
    rotate.rotate(call, given.q, given.table, q)
    attend.begin(call, q, keys, arrives(step, step.first), s.rows)

  def tile(block: Any, slot: Any) -> attend.Tile:
    return attend.Tile(call, step, block, slot, scale)

  def on_block(block: Any, slot: Any) -> Any:
    copies.send_for_next()
    after = attend.After(q, arrives(step, block + 1))

    def with_mask(masked: bool) -> None:
      attend.to_keys(tile(block, slot), q, keys, s.rows, after, masked=masked)

    sees_all = step.sees_all(call, block)
    jax.lax.cond(sees_all, lambda: with_mask(False), lambda: with_mask(True))
    return after.slot

  if goes_on:
    pl.when(index == 0)(begin)
  else:
    begin()
  attend.clear(s.rows)
  last = step.last - 1
  slot = jax.lax.fori_loop(step.first, last, on_block, copies.in_work)
  copies.send_for_next()

  def finish(after: attend.After | None) -> None:
    attend.to_keys(tile(last, slot), q, keys, s.rows, after, masked=True)
    _finish(call, o, s.rows)

  def finish_and_go_on() -> None:
    following = Step.of(call, scalars, index + 1)
    rotate.rotate(call, given.after, given.table_after, q_after)
    arrives(following, following.first)
    finish(attend.After(q_after, copies.slot_after(slot)))

  if goes_on:
    is_last = index == call.steps - 1
    jax.lax.cond(is_last, lambda: finish(None), finish_and_go_on)
  else:
    finish(None)
  if i.new is not None:
    pl.when(index == call.steps - 1)(copies.finish)


def _finish(call: Call, o: Outputs, s: attend.Rows) -> None:
  """out = acc / sum and lse = m + log2 sum."""
  m = s.m[...]
  total = jnp.sum(s.total[...], axis=1, keepdims=True)
  total = jnp.broadcast_to(total, m.shape)
  saw_nothing = m <= MASKED / 2
  inverse = jnp.where(saw_nothing, 0.0, reciprocal(total, o.out.dtype))
  inverse = tpu.across(inverse, o.out.shape[1])
  o.out[...] = (s.acc[...] * inverse).astype(o.out.dtype)
  if o.lse is not None:
    lse = lse_of(m, total, call.problem)
    o.lse[...] = jnp.where(saw_nothing & (lse == lse), -jnp.inf, lse)


# --- the call -----------------------------------------------------------------


def forward(p: Problem, a: Arrays) -> Outs:
  """Attention, and the cache with the new keys if there are any.

  Args:
    p: the problem, with a positive scale.
    a: the arrays.
  """
  layout = layout_of(a.k.shape, a.k.dtype)
  kv_heads = max(a.k.shape[-2], 1)
  sizes = tiles.Sizes.of(a, layout)
  in_pieces = a.table is not None and not sizes.in_chunks
  copies = in_pieces or (apart.is_better(a) and not layout.is_by_head)
  layout = layout._replace(is_by_head=copies or layout.is_by_head)
  heads = a.q.shape[2] // (kv_heads if layout.is_by_head else 1)
  a = rotate.before(p, a, heads)
  cache = None
  if copies:
    a, cache = with_new_keys(rotate.with_new_keys_rotated(a))
    a = apart.in_own_rows(a)
    sizes = tiles.Sizes.of(a, layout)
  if layout.is_by_head:
    outs = _of_rows(p, apart.by_head(a, layout), sizes)
    outs = apart.from_heads(outs, a, layout)
  else:
    outs = apart.from_beside(_of_rows(p, apart.beside(a), sizes), a)
  return outs if cache is None else cache._replace(out=outs.out, lse=outs.lse)


def _of_rows(p: Problem, a: Arrays, sizes: tiles.Sizes) -> Outs:
  """The same of arrays whose heads are as the kernel takes them."""
  if sizes.in_chunks:
    return _run(tiles.call_of(p, a, sizes, sizes.tokens), a)
  more = -sizes.tokens % sizes.unit
  whole = sizes._replace(tokens=sizes.tokens + more)
  longer = _longer(a, sizes, more)
  outs = _run(tiles.call_of(p, longer, whole, sizes.tokens), longer)
  if a.new_k is None:
    return outs

  def cut(x: Any, to: Any, axis: int) -> Any:
    if x is None:
      return None
    return jax.lax.slice_in_dim(x, 0, to.shape[axis], axis=axis % x.ndim)

  return outs._replace(
    k=cut(outs.k, a.k, sizes.axis),
    v=cut(outs.v, a.v, sizes.axis),
    k_scale=cut(outs.k_scale, a.k_scale, -1),
    v_scale=cut(outs.v_scale, a.v_scale, -1),
  )


def _longer(a: Arrays, sizes: tiles.Sizes, more: int) -> Arrays:
  """The arrays, with a cache of so many more tokens that it can be copied.

  This copies the cache, where its length is odd: `decode_attention` says so.
  """

  def longer(x: Any) -> Any:
    return _padded(x, sizes.axis, more)

  def wider(x: Any) -> Any:
    return None if x is None else _padded(x, -1, more * sizes.kv_heads)

  return a._replace(
    k=longer(a.k),
    v=longer(a.v),
    k_scale=wider(a.k_scale),
    v_scale=wider(a.v_scale),
  )


def _padded(x: jax.Array, axis: int, more: int) -> jax.Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, more)
  return jnp.pad(x, widths)


def _run(call: Call, a: Arrays) -> Outs:
  p, (b, t, n, h) = call.problem, a.q.shape
  appends = a.new_k is not None
  cache = _flat(Cache.of(a))
  in_hbm = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), cache)
  of_rows = pl.BlockSpec((None, call.rows, h), lambda b, i, *_: (b, i, 0))
  of_lse = pl.BlockSpec(
    (None, call.rows, tpu.LANES), lambda b, i, *_: (b, i, 0)
  )
  # A step computes with the next one's keys, if it has the new ones of them.
  goes_on = not appends or call.held == call.batch
  table = rotate.table_of(a) if call.rotates else None
  queries, of_queries = rotate.operands(call, a.q, table, goes_on)
  new, of_new = append.operands(call, a, table) if appends else (None, None)
  scalars = Scalars(
    lengths=a.lengths,
    shift=a.shift,
    layer=None if a.layer is None else a.layer.reshape(1),
    table=None if a.table is None else a.table.reshape(-1),
    left=a.left,
    scale=a.scale,
  )
  inputs = Inputs(queries, new, cache)
  out_types = Outputs(
    varying_like(a.q, (b, t * n, h), a.q.dtype),
    varying_like(a.q, (b, t * n, tpu.LANES), jnp.float32)
    if p.return_lse
    else None,
    jax.tree.map(lambda x: varying_like(x, x.shape, x.dtype), cache)
    if appends
    else None,
  )
  needed = tiles.vmem_bytes(call, a)
  got = f"T = {t}, N = {n}, K = {call.kv_heads}, H = {h}"
  (outs,) = pl.pallas_call(
    functools.partial(_kernel, call=call),
    name="decode_attention_fwd",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(b, call.blocks_q),
      in_specs=[Inputs(of_queries, of_new, in_hbm)],
      out_specs=[
        Outputs(
          of_rows,
          of_lse if p.return_lse else None,
          in_hbm if appends else None,
        )
      ],
      scratch_shapes=[_state(call, a)],
    ),
    out_shape=[out_types],
    input_output_aliases=_aliases(scalars, inputs, out_types),
    compiler_params=tpu.compiler_params(
      tpu.vmem_to_ask("decode_attention", needed, _USUAL_VMEM_BYTES, got)
    ),
  )(scalars, inputs)
  return _outs(call, a, outs)


_USUAL_VMEM_BYTES = 32 << 20


def _aliases(scalars: Scalars, i: Inputs, o: Outputs) -> dict[int, int]:
  """The cache's operands, the last, by the results that are the same memory."""
  if o.cache is None:
    return {}
  count = len(jax.tree.leaves(i.cache))
  operands = len(jax.tree.leaves((scalars, i)))
  results = len(jax.tree.leaves(o))
  return {operands - n: results - n for n in range(1, count + 1)}


def _flat(cache: Cache) -> CacheRefs:
  """[X, S K, H], or [X, H, S], and [X, 1, S K] of a cache: the same memory."""
  values = (
    x.reshape(-1, x.shape[-3] * x.shape[-2], x.shape[-1]) for x in cache[:2]
  )
  scales = (
    None if x is None else x.reshape(-1, *x.shape[-2:]) for x in cache[2:]
  )
  return CacheRefs(*values, *scales)


def _state(call: Call, a: Arrays) -> State:
  """Types of the scratch."""
  is_quantized = a.k_scale is not None
  h, rows = call.head_size, call.rows
  block = (h, call.block_rows) if call.turned else (call.block_rows, h)
  slots = pltpu.VMEM((call.slots, *block), a.k.dtype)
  scales = None
  if is_quantized:
    scales = pltpu.VMEM((call.slots, 1, call.block_rows), jnp.float32)
  others = pltpu.VMEM((rows, call.block_rows), jnp.float32)
  return State(
    rows=attend.rows_types(call),
    q=pltpu.VMEM((2, rows, h), a.q.dtype) if call.rotates else None,
    others=others if call.kv_heads > 1 else None,
    new=append.new_types(call, is_quantized) if a.new_k is not None else None,
    slots=CacheRefs(slots, slots, scales, scales),
    at=stream.cursor_types(call, is_quantized),
    semaphores=stream.semaphore_types(call),
  )


def _outs(call: Call, a: Arrays, outs: Outputs) -> Outs:
  """As the op has them."""
  b, t, n, _ = a.q.shape
  lse = None
  if outs.lse is not None:
    lse = outs.lse[:, :, 0].reshape(b, t, n).swapaxes(1, 2)
    lse *= call.problem.unit
  out = outs.out.reshape(a.q.shape)
  if outs.cache is None:
    return Outs(out, lse)
  return unflattened(Outs(out, lse, *outs.cache), a)
