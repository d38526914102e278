"""Which rows of its row tile a grid step computes.

For weights that all rows share: all of them, each tile once.  For those of
experts, a tile is visited once by every expert that has rows in it, one visit
after the other:

    rows       0 . . . . . . . . . . . . . . . . . . . . . . 24
    tile       |      0      |      1      |      2      |
    expert     |    0     |1 |          2          |  -  |
    visit      |    0     |1 |  2   |      3       |4 5  |
                           expert 1 in tile 0, 2 in tile 0 and 1, ...

A visit computes those parts of the tile, of 128 rows, in which the expert has
any, and writes the expert's rows of them: the others stay as the visit before
left them, for the tile stays in VMEM, or are zero.  An expert without rows has
one visit as well, which clears its gradients.  What is left after the last
expert, rows of none and visits that are not needed, are visits without rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._frame import tpu

if TYPE_CHECKING:  # the plan is of another page
  from .tiles import Plan


# Rows that are computed together: as many as the matrix unit has to be given
# for the time it takes to load the next weights.
PART_ROWS = 128


def part_rows(tile: int) -> int:
  """Of a row tile, of which an expert's rows are computed in parts."""
  return tile if tile % PART_ROWS else PART_ROWS


class Visits(NamedTuple):
  """Of each visit, [visits] int32, prefetched; or their refs."""

  expert: Any  # whose weights it is given
  tile: Any  # of x's rows
  begin: Any  # of the expert's rows in the tile
  end: Any  # and behind the last of them; of none, both are 0
  first_part: Any  # of the tile that has any of them
  end_part: Any  # and behind the last one
  is_first: Any  # 1 at an expert's first visit
  is_last: Any  # 1 at its last
  opens: Any  # 1 at a tile's first visit
  closes: Any  # 1 at its last


def visits_of(group_sizes: jax.Array, rows: int, tile: int) -> Visits:
  """The visits of x [rows, D] in row tiles, by how many rows each expert has.

  Args:
    group_sizes: [E] int32.
    rows: of x.
    tile: rows of a tile.
  """
  experts, tiles = group_sizes.shape[0], pl.cdiv(rows, tile)
  ends = jnp.minimum(jnp.cumsum(group_sizes), rows)
  starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
  first_tile = jnp.clip(starts // tile, 0, tiles - 1)
  of_expert = jnp.where(ends > starts, (ends - 1) // tile - first_tile + 1, 1)
  after = jnp.cumsum(of_expert)  # the number of the visit after its last
  visit = jnp.arange(tiles + experts, dtype=jnp.int32)
  # Rows of none are seen by the last expert, at its own visits' end.
  owner = jnp.sum(visit[:, None] >= after[None, :], axis=1, dtype=jnp.int32)
  is_rest = owner == experts
  expert = jnp.minimum(owner, experts - 1)
  since = visit - (after - of_expert)[expert]
  # The rest begins in the tile in which the last expert ends.
  rest_tile = ends[-1] // tile + visit - after[-1]
  at = jnp.where(is_rest, rest_tile, first_tile[expert] + since)
  at = jnp.clip(at, 0, tiles - 1)
  begin = jnp.clip(starts[expert] - at * tile, 0, tile)
  end = jnp.clip(ends[expert] - at * tile, 0, tile)
  is_none = is_rest | (begin >= end)
  is_first, is_last = _ends_of_runs(expert)
  opens, closes = _ends_of_runs(at)
  begin, end = jnp.where(is_none, 0, begin), jnp.where(is_none, 0, end)
  numbers = Visits(
    expert=expert,
    tile=at,
    begin=begin,
    end=end,
    first_part=begin // part_rows(tile),
    end_part=pl.cdiv(end, part_rows(tile)),
    is_first=is_first,
    is_last=is_last,
    opens=opens,
    closes=closes,
  )
  return jax.tree.map(lambda x: x.astype(jnp.int32), numbers)


def _ends_of_runs(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Where a run of equal numbers begins, and where it ends."""
  changes, one = x[1:] != x[:-1], jnp.ones(1, bool)
  return jnp.concatenate([one, changes]), jnp.concatenate([changes, one])


class Rows:
  """Those of its row tile that a grid step computes, or of a part of it.

  Attributes:
    is_first: whether it is the first step of these weights, at this F tile.
    is_last: whether it is the last one.
    tile: which of the row tiles.
    expert: whose weights they meet; None if these are of all rows.
  """

  def __init__(self, visits: Visits | None, plan: Plan, axis: int):
    """Of the step that a kernel is in, along this axis of its grid."""
    self._n, self._tile = plan.sizes.n, plan.tiles.rows
    self._step, self._of_expert = pl.program_id(axis), visits is not None
    self._part = part_rows(plan.tiles.rows)
    self.expert: Any = None
    if visits is None:
      self.is_first = self._step == 0
      self.is_last, self.tile = self._step == plan.row_tiles - 1, self._step
      return
    self.is_first = visits.is_first[self._step] == 1
    self.is_last = visits.is_last[self._step] == 1
    self._begin, self._end = visits.begin[self._step], visits.end[self._step]
    self.tile, self.expert = visits.tile[self._step], visits.expert[self._step]
    self._first_part = visits.first_part[self._step]
    self._end_part = visits.end_part[self._step]
    self._opens = visits.opens[self._step] == 1
    self._closes = visits.closes[self._step] == 1

  def each_part(self, compute: Callable[[Rows, Callable[[Any], Any]], None]):
    """Has the rows computed: at once, or an expert's in parts of the tile.

    Args:
      compute: is given the rows of a part, and what takes that part of the ref
        of a tile, or of None.
    """
    if not self._of_expert:
      compute(self, lambda ref: ref)
      return
    size = self._part

    def one(k: Any, _: None) -> None:
      start = pl.multiple_of(k * size, size)
      part = copy.copy(self)
      part.is_first = self.is_first & (k == self._first_part)
      part._begin, part._end = self._begin - start, self._end - start
      compute(
        part,
        lambda ref: None if ref is None else ref.at[pl.ds(start, size), :],
      )

    jax.lax.fori_loop(self._first_part, self._end_part, one, None)

  def clear_if_none(self, *sums: Any):
    """Clears an expert's sums, which nothing may be added to: it has no row."""
    if self._of_expert:

      @pl.when(self.is_first & (self._end == 0))
      def _():
        _clear(sums)

  def when_tile_begins(self, do: Callable[[], None]):
    """Does something once for each time that the tile is come to."""
    if self._of_expert:
      pl.when(self._opens)(do)
    else:
      do()

  def when_tile_ends(self, do: Callable[[], None]):
    """Does something once for each time that the tile is left."""
    if self._of_expert:
      pl.when(self._closes)(do)
    else:
      do()

  def open(self, *results: Any):
    """Clears a tile of which rows may be of none, before others are written."""
    if self._of_expert:
      self.when_tile_begins(lambda: _clear(results))

  def inside(self, tile: jax.Array) -> jax.Array:
    """A [rows, any] tile with zeros in place of other rows."""
    if self._of_expert:
      # The selection is in float32: a v5e has no bfloat16 arithmetic.
      wide = tile.astype(jnp.float32)
      return jnp.where(self._are_own(tile), wide, 0.0).astype(tile.dtype)
    if self._n % self._tile == 0:
      return tile
    return tpu.zero_past(tile, self._n - self._step * self._tile, axis=0)

  def write(self, ref: Any, tile: jax.Array):
    """Writes the rows; others stay."""
    if self._of_expert:
      before = ref[...].astype(jnp.float32)
      tile = jnp.where(self._are_own(tile), tile.astype(jnp.float32), before)
    ref[...] = tile.astype(ref.dtype)

  def _are_own(self, tile: jax.Array) -> jax.Array:
    index = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
    return (index >= self._begin) & (index < self._end)


def _clear(refs: Iterable[Any]):
  for ref in refs:
    if ref is not None:
      ref[...] = jnp.zeros(ref.shape, ref.dtype)
