"""What the backward kernel is given: its inputs, its results, its scratch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from . import alibi, departure, dropout, masks, operands, pairs
from .tiles import Call


class Inputs(NamedTuple):
  """Refs, in the kernel; R = block_q G rows; None where a problem has none."""

  q: Any  # R rows of H, as the layout has them
  k: Any  # [S, H], the same for all blocks of queries
  v: Any  # [S, H]
  out: Any  # as q
  dout: Any  # as q
  lse: Any  # [1, R] in units of `Problem.unit`
  dlse: Any  # [1, R] likewise
  segments: operands.SegmentRefs | None
  rope: operands.RopeRefs | None
  mask: Any  # [S / 4096, block_q or R, LANES] int32, see `masks`
  alibi: alibi.Refs | None
  dropout: dropout.Refs | None
  bias: Any  # [G or 1, block_q, S]


class Outputs(NamedTuple):
  """Refs, in the kernel."""

  dq: Any  # as q
  dk: Any  # all keys of all kv heads, in HBM: the layout has them
  dv: Any  # likewise
  bias: Any  # [G or 1, block_q, S]: its gradient; or None


class State(NamedTuple):
  """Scratch; the sums are float32."""

  lse: Any  # [1, R] of this block; inf where a row sees nothing
  di: Any  # [1, R]
  dq_transposed: Any  # [H, R] of this block
  dk: Any  # [S, H] of all blocks so far
  dv: Any  # [S, H] likewise
  q: Any  # [R, H] rotated, finite; None if it is as it comes
  dout: Any  # [R, H] finite; None if it is as it comes
  departure: departure.Scratch
  k: Any  # [S, H] rotated as far as the grid has come; or None
  phases: operands.Phases | None  # [S, W]
  pairs: pairs.Scratch | None
  mask: masks.Scratch | None


def state_of(call: Call, i: Inputs, dq_dtype: Any) -> State:
  """Types of the scratch for these operands."""
  layout, s, h = call.layout, call.padded_keys, call.layout.head_size
  is_rotated = i.rope is not None
  by_lane = pltpu.VMEM((1, call.rows), jnp.float32)
  of_keys = layout.of_each_head((s, h))
  of_rows = pltpu.VMEM((call.rows, h), i.q.dtype)
  return State(
    lse=by_lane,
    di=by_lane,
    dq_transposed=pltpu.VMEM((h, call.rows), jnp.float32),
    dk=pltpu.VMEM(of_keys, jnp.float32),
    dv=pltpu.VMEM(of_keys, jnp.float32),
    q=of_rows if call.has_ragged_end or is_rotated else None,
    dout=of_rows if call.has_ragged_end else None,
    departure=departure.scratch(call, i.k.dtype),
    k=pltpu.VMEM(of_keys, i.k.dtype) if is_rotated else None,
    phases=operands.phases_scratch(call) if is_rotated else None,
    pairs=pairs.scratch(call, 3, i.q.dtype, dq_dtype),
    mask=None if i.mask is None else masks.scratch(call),
  )
