"""Page 8: which keys a block of queries meets, and which of them it sees.

A grid step has the queries q0 to q0 + block_q.  By position, of the blocks of
block_kv keys,

    first      full_first      full_last      last
      |  masked    |   all visible  |  masked   |

are to be visited.  On a diagonal the queries' own keys come first, apart, and
the rest ends before them.  Segment ids leave of these blocks the ones between
the first and the last that can share an id with the queries; all are masked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._frame import tpu
from .._rope import rope_timescale
from .._sincos import timescales
from .spec import Arrays, Segments
from .tiles import Call

# --- by position --------------------------------------------------------------


def _min(a: Any, b: Any) -> Any:
  both = isinstance(a, int) and isinstance(b, int)
  return min(a, b) if both else jnp.minimum(a, b)


def _max(a: Any, b: Any) -> Any:
  both = isinstance(a, int) and isinstance(b, int)
  return max(a, b) if both else jnp.maximum(a, b)


def _log2(power_of_two: int) -> int:
  """To divide by a shift, where Mosaic's division takes long."""
  return power_of_two.bit_length() - 1


class Bounds(NamedTuple):
  """Block indices, as in the picture above; each region excludes its end."""

  first: Any
  full_first: Any
  full_last: Any
  last: Any


def bounds_of(call: Call, q0: Any, window: Any) -> Bounds:
  """Which blocks of keys the queries from q0 on need, by position."""
  p, block_kv = call.problem, call.block_kv
  low, high, full_low, full_high = 0, call.s, 0, call.s
  first_q, last_q = q0 - call.shift, q0 - call.shift + call.block_q - 1
  if p.is_causal:
    high, full_high = _min(high, last_q + 1), _min(full_high, first_q + 1)
  if window is not None:
    left, right = window
    low, full_low = _max(low, first_q - left), _max(full_low, last_q - left)
    high = _min(high, last_q + right + 1)
    full_high = _min(full_high, first_q + right + 1)
  first = low >> _log2(block_kv)
  last = _max((high + block_kv - 1) >> _log2(block_kv), first)
  full_first = _min((full_low + block_kv - 1) >> _log2(block_kv), last)
  full_last = _max(_min(full_high >> _log2(block_kv), last), full_first)
  return Bounds(first, full_first, full_last, last)


# --- scalars ---------------------------------------------------------------


class Scalars(NamedTuple):
  """Refs in SMEM: what steers a kernel; None for what is static or absent."""

  segment_bounds: Any  # [2 B n_q], see `segment_bounds`
  mixed: Any  # [B n_q], see `finite.mixed_segments`; of the backward
  scale: Any  # [B] float32
  window: Any  # [2 B]: left and right of each batch element
  layer: Any  # [1] int32, of what lies in stacks

  @classmethod
  def of(
    cls, segment_bounds: Any, a: Arrays, mixed: Any = None, layer: Any = None
  ) -> Scalars:
    """The operands."""
    scale, window = a.scale, a.window
    return cls(
      segment_bounds,
      mixed,
      scale if scale is None else scale.astype(jnp.float32),
      window if window is None else window.reshape(-1),
      layer if layer is None else layer.reshape(1),
    )


# --- the walk -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Block:
  """The queries of one grid step, inside a kernel.

  Attributes:
    call: the kernel's.
    q0: the first query, counted from the call's first.
    window: (left, right), numbers or scalars; or None.
    scale: multiplies the logits beside the problem's; or None.
    kv_blocks: the first and the end of the kv blocks that can share a segment;
      or None.
    mixed: whether ids hide some of these from some queries; or None.
  """

  call: Call
  q0: Any
  window: tuple[Any, Any] | None
  scale: Any
  kv_blocks: tuple[Any, Any] | None
  mixed: Any

  @classmethod
  def of_step(cls, call: Call, scalars: Scalars) -> Block:
    """That of the running grid step."""
    window, scale = call.problem.window, None
    kv_blocks = mixed = None
    if any(x is not None for x in scalars):
      batch = call.layout.batch(pl.program_id(0))
      if scalars.window is not None:
        window = _pair(scalars.window, batch)
      if scalars.scale is not None:
        scale = scalars.scale[batch]
      place = batch * pl.num_programs(1) + pl.program_id(1)
      if scalars.segment_bounds is not None:
        kv_blocks = _pair(scalars.segment_bounds, place)
      if scalars.mixed is not None:
        mixed = scalars.mixed[place] != 0
    q0 = pl.program_id(1) * call.block_q
    return cls(call, q0, window, scale, kv_blocks, mixed)

  @property
  def own_keys(self) -> Any:
    """The keys of the queries' own indices, as a slice."""
    size = self.call.block_q
    return pl.ds(pl.multiple_of(self.q0, size), size)

  def start(
    self, on_diagonal: Callable[[], None], otherwise: Callable[[], None]
  ) -> None:
    """Calls one of both: there may be queries without keys of their index."""
    call = self.call
    if not call.has_diagonal:
      otherwise()
    elif call.t <= call.s:
      on_diagonal()
    else:
      pl.when(self.q0 < call.s)(on_diagonal)
      pl.when(self.q0 >= call.s)(otherwise)

  def for_other_keys(self, attend: Callable[..., None]) -> None:
    """Calls attend(first key, masked=...) for every block off the diagonal."""
    call, block_kv = self.call, self.call.block_kv

    def one(block: Any, masked: bool) -> None:
      attend(pl.multiple_of(block * block_kv, block_kv), masked=masked)

    def loop(low: Any, high: Any, masked: bool) -> None:
      jax.lax.fori_loop(low, high, lambda i, _: one(i, masked), None)

    first, full_first, full_last, last = bounds_of(call, self.q0, self.window)
    has_masked_end = True
    if call.has_diagonal:
      last = _min(self.q0 >> _log2(block_kv), -(-call.s // block_kv))
      # Only where queries are more than keys do the last hang over the end.
      has_masked_end = call.t > call.s
      full_last = _min(last, call.s // block_kv) if has_masked_end else last
      full_first = _min(full_first, full_last)
    if self.kv_blocks is not None:
      low, high = self.kv_blocks
      loop(_max(first, low), _min(last, high), True)
      return
    if self.window is not None:
      loop(first, full_first, True)
    _loop_in_pairs(full_first, full_last, lambda i: one(i, False))
    if has_masked_end:
      loop(full_last, last, True)

  def logits(self, products: jax.Array) -> jax.Array:
    """`Problem.logits` of the products q . k."""
    return self.call.problem.logits(products, self.scale)


def _pair(ref: Any, place: Any) -> tuple[Any, Any]:
  return ref[2 * place], ref[2 * place + 1]


def _loop_in_pairs(low: Any, high: Any, body: Callable[[Any], None]) -> None:
  """Calls body(i) for low <= i < high.

  Two at a time: the matrix unit starts on one while the vector unit ends the
  other.
  """
  pairs = (high - low) >> 1

  def pair(i: Any, _: None) -> None:
    body(low + 2 * i)
    body(low + 2 * i + 1)

  jax.lax.fori_loop(0, pairs, pair, None)
  jax.lax.fori_loop(low + 2 * pairs, high, lambda i, _: body(i), None)


# --- the mask -----------------------------------------------------------------


class TileIds(NamedTuple):
  """Segment ids of a tile, broadcast along it."""

  rows: jax.Array
  keys: jax.Array


def visible(
  block: Block,
  shape: tuple[int, ...],
  row_axis: int,
  row0: Any,
  key0: Any,
  ids: TileIds | None,
) -> jax.Array:
  """The mask of a tile of logits.

  Args:
    block: the grid step's queries.
    shape: of the tile.
    row_axis: which of its axes is that of the rows; the other is the keys'.
    row0: its first row, counted from the block's first.
    key0: its first key, counted from the call's first.
    ids: segment ids, if there are any.
  """
  call, p = block.call, block.call.problem
  index = row0 + jax.lax.broadcasted_iota(jnp.int32, shape, row_axis)
  row, factor = call.layout.tokens(index)
  key = key0 + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - row_axis)
  # How far a key is ahead of the block's first query.
  ahead = key + (call.shift - block.q0)
  mask = _exists(key, call)
  if p.is_causal:
    mask &= _not_after(ahead, row, factor)
  if block.window is not None:
    left, right = block.window
    mask &= _before(row, ahead + (left + 1), factor)
    mask &= _not_after(ahead - right, row, factor)
  if ids is not None:
    mask &= _same_segment(ids)
  return mask


def _exists(key: jax.Array, call: Call) -> jax.Array:
  return key < call.s


def _not_after(ahead: jax.Array, row: jax.Array, factor: int) -> jax.Array:
  """Whether the query at `ahead` is not after that of the row."""
  return ahead * factor <= row


def _before(row: jax.Array, ahead: jax.Array, factor: int) -> jax.Array:
  """Whether the row's query is before that at `ahead`."""
  return row < ahead * factor


def _same_segment(ids: TileIds) -> jax.Array:
  return (ids.rows == ids.keys) & (ids.keys != 0)


# --- segment ids as operands --------------------------------------------------


class SegmentRefs(NamedTuple):
  """What a kernel has of segment ids."""

  rows: Any  # [1, R]
  keys: Any  # [S / LANES, 1, LANES]

  def of_keys(self, key0: Any, width: int) -> jax.Array:
    """[1, width], from key0 on."""
    first = key0 >> _log2(tpu.LANES)
    return jnp.concatenate(
      [self.keys[first + i] for i in range(width // tpu.LANES)], axis=1
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
  its own, and the end: [2 B n_q].
  """
  low_q, high_q = _id_range(padded_ids(segments.q, call.block_q), call.block_q)
  low_k, high_k = _id_range(
    padded_ids(segments.k, call.key_unit), call.block_kv
  )
  meet = (low_q[:, :, None] <= high_k[:, None, :]) & (
    low_k[:, None, :] <= high_q[:, :, None]
  )
  first, end = _first_and_end(meet)
  return jnp.stack([first, end], axis=-1).astype(jnp.int32).reshape(-1)


def _first_and_end(meet: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Of the true ones along the last axis; (0, 0) if there are none."""
  first = jnp.argmax(meet, axis=2)
  end = meet.shape[2] - jnp.argmax(meet[:, :, ::-1], axis=2)
  return first, jnp.where(meet.any(axis=2), end, 0)


def padded_ids(ids: jax.Array, unit: int) -> jax.Array:
  """Padding's id up to a whole number of blocks."""
  return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % unit)))


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
