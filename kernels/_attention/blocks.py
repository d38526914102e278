"""Page 8: which keys a block of queries meets, and which of them it sees.

A grid step has the queries q0 to q0 + block_q.  By position, of the blocks of
block_kv keys,

    first      full_first      full_last      last
      |  masked    |   all visible  |  masked   |

are to be visited.  On a diagonal the queries' own keys come first, apart, and
the rest ends before them.  Segment ids leave of these blocks the ones between
the first and the last that can share an id with the queries; of them a run is
all visible, if the queries have one id, that of all keys of the run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from . import masks
from .spec import Arrays
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

  segment_bounds: Any  # [4 B n_q], see `operands.segment_bounds`
  mixed: Any  # [B n_q], see `finite.mixed_segments`; of the backward
  scale: Any  # [B] float32
  window: Any  # [2 B]: left and right of each batch element
  layer: Any  # [1] int32, of what lies in stacks
  plan: Any  # see `masks.plan_of`

  @classmethod
  def of(
    cls,
    segment_bounds: Any,
    a: Arrays,
    plan: Any,
    mixed: Any = None,
    layer: Any = None,
  ) -> Scalars:
    """The operands."""
    scale, window = a.scale, a.window
    return cls(
      segment_bounds,
      mixed,
      scale if scale is None else scale.astype(jnp.float32),
      window if window is None else window.reshape(-1),
      layer if layer is None else layer.reshape(1),
      plan,
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
    kv_blocks: what segment ids leave, as `Bounds`; or None.
    mixed: whether ids hide some of these from some queries; or None.
    plan: of a mask, and where in it the block's part starts; or None.
  """

  call: Call
  q0: Any
  window: tuple[Any, Any] | None
  scale: Any
  kv_blocks: Bounds | None
  mixed: Any
  plan: tuple[Any, Any] | None

  @classmethod
  def of_step(cls, call: Call, scalars: Scalars) -> Block:
    """That of the running grid step."""
    window, scale = call.problem.window, None
    kv_blocks = mixed = plan = None
    if any(x is not None for x in scalars):
      batch = call.layout.batch(pl.program_id(0))
      if scalars.window is not None:
        window = _pair(scalars.window, batch)
      if scalars.scale is not None:
        scale = scalars.scale[batch]
      place = batch * pl.num_programs(1) + pl.program_id(1)
      if scalars.segment_bounds is not None:
        of_step = [scalars.segment_bounds[4 * place + i] for i in range(4)]
        kv_blocks = Bounds(*of_step)
      if scalars.mixed is not None:
        mixed = scalars.mixed[place] != 0
      if scalars.plan is not None:
        part = masks.part_of(call, pl.program_id(0))
        place = part * pl.num_programs(1) + pl.program_id(1)
        plan = scalars.plan, place * (2 + pl.cdiv(call.s, call.block_kv))
    q0 = pl.program_id(1) * call.block_q
    return cls(call, q0, window, scale, kv_blocks, mixed, plan)

  @property
  def own_keys(self) -> Any:
    """The keys of the queries' own indices, as a slice."""
    size = self.call.block_q
    return pl.ds(pl.multiple_of(self.q0, size), size)

  def with_ids_if_needed(
    self, part: Callable[[Any], None], segments: Any
  ) -> None:
    """Calls part(segments), or part(None) where it would do the same.

    Args:
      part: what meets the queries' own keys and no others.
      segments: refs of ids; None without ids.
    """
    one_id = self._has_one_id
    if segments is None or one_id is None:
      part(segments)
      return
    pl.when(one_id)(lambda: part(None))
    pl.when(jnp.logical_not(one_id))(lambda: part(segments))

  @property
  def _has_one_id(self) -> Any:
    """Whether the queries and the keys of their indices have one id.

    Most blocks have, of long documents and of rows that end in padding.  None
    where nothing is known of it.
    """
    call = self.call
    if self.kv_blocks is None or not call.has_diagonal:
      return None
    shift, own_end = _log2(call.block_kv), self.q0 + call.block_q
    starts = self.kv_blocks.full_first <= self.q0 >> shift
    return starts & (own_end >> shift <= self.kv_blocks.full_last)

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

  def for_other_keys(
    self,
    attend: Callable[..., None],
    take_ids: Callable[[], None] | None = None,
  ) -> None:
    """Calls attend(first key, masked=...) for every block off the diagonal.

    Before blocks with ids to compare comes take_ids(), if the part of
    `with_ids_if_needed` had none.
    """
    call, block_kv = self.call, self.call.block_kv

    def one(block: Any, masked: bool) -> None:
      attend(pl.multiple_of(block * block_kv, block_kv), masked=masked)

    def loop(low: Any, high: Any, masked: bool) -> None:
      jax.lax.fori_loop(low, high, lambda i, _: one(i, masked), None)

    if self.plan is not None:
      ref, at = self.plan
      full, visited = ref[at], ref[at + 1]
      _loop_in_pairs(0, full, lambda i: one(ref[at + 2 + i], False))
      loop_over = functools.partial(jax.lax.fori_loop, full, visited)
      loop_over(lambda i, _: one(ref[at + 2 + i], True), None)
      return
    first, full_first, full_last, last = bounds_of(call, self.q0, self.window)
    has_masked_end = True
    if call.has_diagonal:
      last = _min(self.q0 >> _log2(block_kv), -(-call.s // block_kv))
      # Only where queries are more than keys do the last hang over the end.
      has_masked_end = call.t > call.s
      full_last = _min(last, call.s // block_kv) if has_masked_end else last
      full_first = _min(full_first, full_last)
    if self.kv_blocks is not None:
      by_id = self.kv_blocks
      first, last = _max(first, by_id.first), _min(last, by_id.last)
      full_first = _min(_max(full_first, by_id.full_first), last)
      full_last = _max(_min(full_last, by_id.full_last), full_first)
      # The masked ones on both sides by one loop: its body is long.
      before = _max(full_first - first, 0)

      def on_sides(i: Any, _: None) -> None:
        skipped = jnp.where(i < before, 0, full_last - full_first)
        one(first + i + skipped, True)

      count = before + _max(last - _max(full_last, first), 0)
      one_id = self._has_one_id
      if take_ids is not None and one_id is not None:
        pl.when(one_id & (count > 0))(take_ids)
      jax.lax.fori_loop(0, count, on_sides, None)
      _loop_in_pairs(full_first, full_last, lambda i: one(i, False))
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
