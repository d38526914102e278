"""Page 7: NaN and infinity among what the segments hide.

Padding may hold anything, and so may another segment of a packed row.  A mask
gives hidden keys the weight 0, but 0 times NaN is NaN.  So with segment ids
no product has a factor that is not finite: such elements are set to 0, and
whoever sees one of them gets NaN on another way,

    of q, k   through the logits, which the mask hides from the others
    of v      likewise, as if k were NaN
    of do     through lse, hence the weights, which the mask hides too

Who sees NaN must not get a number; it need not be told which number is missing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from . import blocks, operands, reference
from .layout import Layout, Rows
from .spec import Outs, Problem, Segments
from .tiles import Call

# --- in a kernel --------------------------------------------------------------
# Operands are cleared where they are: their blocks in VMEM are the kernel's own
# copies.  Those of keys stay for all blocks of queries, and are cleared before
# the first.
#
# A v5e has no arithmetic of 16 bits.  Two bfloat16 lie in a word, and exponents
# of ones, which only NaN and infinity have, are found in both at once: adding
# one to them carries into the place of the sign.


def cleared(tile: jax.Array) -> jax.Array:
  """The tile with 0 for what is not finite."""
  words = pltpu.bitcast(tile, jnp.int32)
  return pltpu.bitcast(words & ~_not_finite(words, tile.dtype), tile.dtype)


def nan_where_not_finite(tile: jax.Array, other: jax.Array) -> jax.Array:
  """The tile with NaN where another of its shape is not finite."""
  words = pltpu.bitcast(tile, jnp.int32)
  bad = _not_finite(pltpu.bitcast(other, jnp.int32), other.dtype)
  return pltpu.bitcast(words | bad, tile.dtype)


def nan_in_lse(lse: jax.Array, di: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Both, with NaN in lse, not in di = do . o - dlse, where there is one."""
  is_finite = jnp.abs(di) < jnp.inf
  return jnp.where(is_finite, lse, jnp.nan), jnp.where(is_finite, di, 0.0)


def clear_rows(q: Rows, dout: Rows, lse: Any) -> None:
  """Clears q and do in place, and has lse be NaN where do was not finite."""
  columns = []
  for r in range(0, lse.shape[1], tpu.LANES):
    zeros = dout.load(r, tpu.LANES).astype(jnp.float32) * 0.0  # or NaN
    mark = jnp.sum(zeros, axis=1, keepdims=True)
    columns.append(jnp.broadcast_to(mark, (tpu.LANES, tpu.LANES)))
  marks = tpu.columns_to_lanes(columns)
  for n in range(marks.shape[0]):
    lse[:, pl.ds(n * tpu.LANES, tpu.LANES)] += marks[n : n + 1]
  for x in (q.ref, dout.ref):
    x[...] = cleared(x[...])


def clear_keys(k: Any, v: Any, block: int, mark: bool) -> None:
  """Clears k and v in place, or v alone and has k hold NaN where v held it."""

  def one(n: Any, _: None) -> None:
    here = pl.ds(pl.multiple_of(n * block, block), block)
    keys, values = k[here, :], v[here, :]
    k[here, :] = nan_where_not_finite(keys, values) if mark else cleared(keys)
    v[here, :] = cleared(values)

  jax.lax.fori_loop(0, k.shape[0] // block, one, None)


def clear_unseen_keys(block: blocks.Block, i: Any, mark: bool) -> None:
  """Of a pass's inputs, at the first block of queries; see `clear_keys`."""
  keys = i.k, i.v, block.call.block_kv
  pl.when(pl.program_id(1) == 0)(lambda: clear_keys(*keys, mark))


def clear_unseen(block: blocks.Block, i: Any) -> None:
  """Of the backward's inputs, at the start of a grid step.

  Before all else: what stands on two sides of a branch cannot overlap.
  """
  clear_unseen_keys(block, i, mark=False)
  q, dout = (block.call.layout.by_rows(x) for x in (i.q, i.dout))
  pl.when(block.mixed)(functools.partial(clear_rows, q, dout, i.lse))


def clear_past_end(call: Call, i: Any, s: Any) -> None:
  """Of the backward's rows in the last block, what lies past the end.

  It is undefined.  The rest is taken as it is, to the same scratch.
  """
  if s.dout is None:
    return
  inside = call.t - pl.program_id(1) * call.block_q

  def is_inside(shape: tuple[int, ...], axis: int) -> jax.Array:
    index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    row, factor = call.layout.tokens(index)
    return row < inside * factor

  lane = is_inside(s.lse.shape, 1)
  s.lse[...] = jnp.where(lane, s.lse[...], jnp.inf)
  s.di[...] = jnp.where(lane, s.di[...], 0.0)
  row = is_inside(s.q.shape, 0)
  s.q[...] = _zero_unless(row, call.layout.by_rows(i.q))
  s.dout[...] = _zero_unless(row, call.layout.by_rows(i.dout))


def _zero_unless(inside: jax.Array, rows: Rows) -> jax.Array:
  x = rows.load(0, inside.shape[0])
  return jnp.where(inside, x, jnp.zeros_like(x))


def mixed_segments(call: Call, segments: Segments | None, bounds: Any) -> Any:
  """For every batch element and q block, whether ids hide any key of the kv
  blocks in its bounds from any of its queries: [B n_q] integers.  None without
  ids.
  """
  if segments is None:
    return None
  q = operands.padded_ids(segments.q, call.block_q)
  q = q.reshape(q.shape[0], -1, 1, call.block_q)
  k = operands.padded_ids(segments.k, call.key_unit)
  k = k.reshape(k.shape[0], 1, -1, call.block_kv)
  first, _, _, end = jnp.split(bounds.reshape(*q.shape[:2], 4), 4, axis=2)
  block = jnp.arange(k.shape[2])
  own = q[..., :1]
  strange = (k != own).any(axis=3) & (first <= block) & (block < end)
  one = (q == own).all(axis=(2, 3)) & (own[..., 0, 0] != 0)
  return (strange.any(axis=2) | ~one).astype(jnp.int32).reshape(-1)


def _not_finite(words: jax.Array, dtype: Any) -> jax.Array:
  """Ones in all bits of the elements that are not finite, zeros in others."""
  if dtype == jnp.float32:
    return ((words & 0x7F800000) + 0x00800000) >> 31
  signs = ((words & 0x7F807F80) + 0x00800080) & -0x7FFF8000
  low = jax.lax.shift_right_logical(signs, 15)  # 1 in the lowest bit of each
  return (low << 16) - low


# --- in plain jnp -------------------------------------------------------------


def plain_backward(reference_vjp: Any, p: Problem, saved: Any, d: Outs) -> Any:
  """The reference's gradient, of cotangents that may be anything.

  Differentiation of plain jnp alone would let one row's cotangent into all.
  """
  a = saved.arrays
  if a.segments is None:
    return reference_vjp(p, saved, d)
  layout = Layout.of_shapes(p, a.q.shape, a.k.shape)
  d_lse = layout.to_lse(d.lse, a.q.shape).swapaxes(1, 2)  # [B, T, N]
  bad = ~(jnp.isfinite(d.out).all(axis=-1) & jnp.isfinite(d_lse))
  d = Outs(*(jnp.where(jnp.isfinite(x), x, 0) for x in d))
  grads = reference_vjp(p, saved, d)
  mask = reference.visible(p, a)
  if a.mask is not None:
    mask = mask.any(axis=1)
  of_kv = bad.reshape(*bad.shape[:2], a.k.shape[2], -1).any(axis=-1)
  seen_by_bad = (mask[..., None] & of_kv[:, :, None, :]).any(axis=1)
  bad &= mask.any(axis=-1)[..., None]
  return grads._replace(
    q=_with_nan(grads.q, bad),
    k=_with_nan(grads.k, seen_by_bad),
    v=_with_nan(grads.v, seen_by_bad),
    scale=_with_nan(grads.scale, bad.any(axis=(1, 2))),
  )


def _with_nan(x: Any, bad: jax.Array) -> Any:
  if x is None:
    return None
  return jnp.where(
    bad.reshape(*bad.shape, *[1] * (x.ndim - bad.ndim)), jnp.nan, x
  )
