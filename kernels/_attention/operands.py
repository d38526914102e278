"""What a kernel has beside q, k and v: segment ids and positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .._rope import rope_timescale
from .._sincos import phases, timescales, width
from .spec import Arrays, Segments
from .tiles import Call

# --- segment ids as operands --------------------------------------------------


class SegmentRefs(NamedTuple):
  """What a kernel has of segment ids."""

  rows: Any  # [1, R]
  keys: Any  # [S / LANES, 1, LANES]

  def of_keys(self, key0: Any, width: int) -> jax.Array:
    """[1, width], from key0 on."""
    return in_lanes(self.keys, key0, width)


def in_lanes(keys: Any, key0: Any, width: int) -> jax.Array:
  """[1, width] of a ref [S / LANES, 1, LANES], from key0 on."""
  first = key0 >> (tpu.LANES.bit_length() - 1)
  return jnp.concatenate(
    [keys[first + i] for i in range(width // tpu.LANES)], axis=1
  )


def segment_operands(
  call: Call, segments: Segments | None
) -> tuple[jax.Array | None, SegmentRefs | None, SegmentRefs | None]:
  """Bounds for `Block`, operands, block specs; all None without segments."""
  if segments is None:
    return None, None, None
  keys = padded_ids(segments.k, call.key_unit)
  operands = SegmentRefs(
    call.layout.repeated(segments.q)[:, None, :],
    keys.reshape(keys.shape[0], -1, 1, tpu.LANES),
  )
  specs = SegmentRefs(
    pl.BlockSpec(
      (None, 1, call.rows),
      lambda b, i, *_: (call.layout.batch(b), 0, i),
    ),
    pl.BlockSpec(
      (None, *operands.keys.shape[1:]),
      lambda b, i, *_: (call.layout.batch(b), 0, 0, 0),
    ),
  )
  return segment_bounds(call, segments), operands, specs


def segment_bounds(call: Call, segments: Segments) -> jax.Array:
  """For every batch element and q block, the first kv block whose ids can meet
  its own, the first and the end of a run of them that has one id, as have all
  of the block's queries, and the end of all: [4 B n_q].
  """
  low_q, high_q = _id_range(padded_ids(segments.q, call.block_q), call.block_q)
  low_k, high_k = _id_range(
    padded_ids(segments.k, call.key_unit), call.block_kv
  )
  meet = (low_q[:, :, None] <= high_k[:, None, :]) & (
    low_k[:, None, :] <= high_q[:, :, None]
  )
  first, end = _first_and_end(meet)
  # An id of padding makes a block no part of a run.
  one_q, one_k = (
    _is_one_id(ids, block)
    for ids, block in (
      (padded_ids(segments.q, call.block_q), call.block_q),
      (padded_ids(segments.k, call.key_unit), call.block_kv),
    )
  )
  full = meet & one_q[:, :, None] & one_k[:, None, :]
  _, full_end = _first_and_end(full)
  index = jnp.arange(full.shape[2])
  others = jnp.where(full | (index >= full_end[..., None]), -1, index)
  full_first = jnp.minimum(others.max(axis=2) + 1, full_end)
  bounds = jnp.stack([first, full_first, full_end, end], axis=-1)
  return bounds.astype(jnp.int32).reshape(-1)


def _first_and_end(meet: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Of the true ones along the last axis; (0, 0) if there are none."""
  first = jnp.argmax(meet, axis=2)
  end = meet.shape[2] - jnp.argmax(meet[:, :, ::-1], axis=2)
  return first, jnp.where(meet.any(axis=2), end, 0)


def padded_ids(ids: jax.Array, unit: int) -> jax.Array:
  """Padding's id up to a whole number of blocks."""
  return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % unit)))


def _is_one_id(ids: jax.Array, block: int) -> jax.Array:
  """Whether all ids of a block are one, not that of padding."""
  ids = ids.reshape(ids.shape[0], -1, block)
  return (ids == ids[..., :1]).all(axis=2) & (ids[..., 0] != 0)


def _id_range(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
  """Least and greatest id of every block, padding aside; an empty range if
  there is nothing else."""
  ids = ids.reshape(ids.shape[0], -1, block)
  top = jnp.iinfo(jnp.int32).max
  low = jnp.min(jnp.where(ids == 0, top, ids), axis=2)
  return low, jnp.max(jnp.where(ids == 0, -top, ids), axis=2)


# --- positions as operands ----------------------------------------------------


class RopeRefs(NamedTuple):
  """What a kernel needs to rotate."""

  positions: Any  # [1, block_q]
  timescale: Any  # [1, W], see `_sincos.timescales`

  def phases(self, call: Call, own: Any, kept: Phases | None) -> Phases:
    """Of the block's own positions: [block_q, W].

    They are those of all kv heads of a batch element, and take longer to
    compute than to rotate by: where they are kept, the first head's are.

    Args:
      call: the kernel's.
      own: the keys of the queries' own indices, as a slice.
      kept: of every position, or None.
    """

    def computed() -> Phases:
      return Phases(*phases(self.positions[...], self.timescale[...]))

    if kept is None:
      return computed()

    def keep() -> None:
      kept.sin[own, :], kept.cos[own, :] = computed()

    if call.kv_heads == 1:
      keep()
    else:
      pl.when(call.layout.is_first_kv_head())(keep)
    return kept.of(own)


class Phases(NamedTuple):
  """Sines and cosines to rotate by; W is `_sincos.width`."""

  sin: Any  # [tokens, W] float32, or a ref of them
  cos: Any  # likewise

  def of(self, tokens: Any) -> Phases:
    """Those of a slice of tokens, loaded."""
    return Phases(self.sin[tokens, :], self.cos[tokens, :])


def phases_scratch(call: Call) -> Phases:
  """What to ask the compiler for, to keep those of every position."""
  shape = call.padded_keys, width(call.layout.head_size)
  of_keys = pltpu.VMEM(shape, jnp.float32)
  return Phases(of_keys, of_keys)


def rope_operands(
  call: Call, a: Arrays
) -> tuple[RopeRefs | None, RopeRefs | None]:
  """Operands and block specs; None without positions [B, T]."""
  if a.positions is None:
    return None, None
  base, half = call.problem.base_frequency, _half(a)
  of_positions = pl.BlockSpec(
    (None, 1, call.block_q),
    lambda b, i, *_: (call.layout.batch(b), 0, i),
  )
  positions = a.positions[:, None, :]
  if a.base is None:
    timescale = timescales(rope_timescale(half, base, jnp.float32)[None, :])
    of_timescale = pl.BlockSpec(timescale.shape, lambda b, i, *_: (0, 0))
  else:  # one for each element of the batch
    by_batch = rope_timescale(half, a.base[:, None, None], jnp.float32)
    timescale = timescales(by_batch)
    of_timescale = pl.BlockSpec(
      (None, *timescale.shape[1:]),
      lambda b, i, *_: (call.layout.batch(b), 0, 0),
    )
  specs = RopeRefs(of_positions, of_timescale)
  return RopeRefs(positions, timescale), specs


def _half(a: Arrays) -> int:
  """The number of frequencies, H / 2."""
  return a.q.shape[-1] // 2
