"""How the backward kernel sums dx in HBM, where VMEM cannot hold all of it.

dx is a sum over F tiles, the outer dimension of the grid, so that each of its
row tiles is added to once for every F tile.  It is float32 and as large as x;
VMEM has slots for three row tiles, used in turn:

    grid step      slot 0       slot 1       slot 2
       s           adds up      fetches      leaves
       s + 1       leaves       adds up      fetches
       s + 2       fetches      leaves       adds up

Step s adds to the slot that was filled during step s - 1.  Meanwhile the sum of
step s - 1 is on its way to HBM, and what step s + 1 adds to is on its way from
there, into the slot of step s - 2; so step s begins by waiting until the sum of
step s - 2 has left.  A row tile is fetched again only when all others have had
a step, and there are more of them than slots: its sum is in HBM by then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .tiles import Plan

_SLOTS = 3  # one leaving, one in work, one arriving


def dx_travels(plan: Plan) -> bool:
  """Whether dx has more row tiles than slots, and is summed in HBM."""
  return plan.f_tiles > 1 and plan.row_tiles > _SLOTS


def slots(plan: Plan) -> int:
  """Row tiles of dx that VMEM holds."""
  return 1 if plan.f_tiles == 1 else min(plan.row_tiles, _SLOTS)


class TravelScratch(NamedTuple):
  """Refs of what the copies need beside the slots."""

  slot: Any  # [1] in SMEM, the slot that this grid step works on
  arrived: Any  # [slots] semaphores of the copies from HBM
  sent: Any  # [slots] semaphores of the copies to HBM


def travel_scratch() -> TravelScratch:
  """What to ask the compiler for."""
  return TravelScratch(
    slot=pltpu.SMEM((1,), jnp.int32),
    arrived=pltpu.SemaphoreType.DMA((_SLOTS,)),
    sent=pltpu.SemaphoreType.DMA((_SLOTS,)),
  )


class Travel:
  """The copies that one grid step starts and awaits.

  Attributes:
    slot: the slot that this step works on.
  """

  def __init__(
    self,
    dx_hbm: Any,
    dx_sum: Any,
    refs: TravelScratch,
    row_tile: Any,
    plan: Plan,
  ):
    self.dx_hbm, self.dx_sum, self.refs = dx_hbm, dx_sum, refs
    self.rows = plan.tiles.rows
    self.f_tiles, self.row_tiles = plan.f_tiles, plan.row_tiles
    self.j, self.i = pl.program_id(0), row_tile
    is_first = (self.j == 0) & (self.i == 0)

    @pl.when(is_first)
    def _():
      refs.slot[0] = 0

    self.slot = refs.slot[0]
    self.next = jnp.where(self.slot == _SLOTS - 1, 0, self.slot + 1)
    self.last = jnp.where(self.slot == 0, _SLOTS - 1, self.slot - 1)
    # The row tiles of the step before the last, and of the next one.
    i, n = self.i, self.row_tiles
    self.two_before = jnp.where(i >= 2, i - 2, i - 2 + n)
    self.after = jnp.where(i == n - 1, 0, i + 1)

  def begin(self):
    """Makes this step's slot ready, and the next one for the step after."""
    self._free_next()
    self._fetch_next()
    self._receive()

  def end(self):
    """Sends this step's sum off; after the last step, waits for the rest."""
    self._copy_out(self.i, self.slot).start()
    self.refs.slot[0] = self.next

    @pl.when((self.j == self.f_tiles - 1) & (self.i == self.row_tiles - 1))
    def _():
      self._copy_out(self.i - 1, self.last).wait()
      self._copy_out(self.i, self.slot).wait()

  def _free_next(self):
    """Waits until the sum of the step before the last has left its slot."""

    @pl.when((self.j > 0) | (self.i >= 2))
    def _():
      self._copy_out(self.two_before, self.next).wait()

  def _fetch_next(self):
    """Starts to fetch what the next step adds to, if there is anything yet."""
    i, j, n = self.i, self.j, self.row_tiles
    has_past = jnp.where(i == n - 1, j + 1, j) > 0
    is_last = (j == self.f_tiles - 1) & (i == n - 1)

    @pl.when(has_past & jnp.logical_not(is_last))
    def _():
      self._copy_in(self.after, self.next).start()

  def _receive(self):
    """Waits for what this step adds to; the step before had it fetched."""

    @pl.when(self.j > 0)
    def _():
      self._copy_in(self.i, self.slot).wait()

  def _in_hbm(self, i: Any) -> Any:
    start = pl.multiple_of(i * self.rows, self.rows)
    return self.dx_hbm.at[pl.ds(start, self.rows), :]

  def _copy_in(self, i: Any, slot: Any) -> Any:
    return pltpu.make_async_copy(
      self._in_hbm(i), self.dx_sum.at[slot], self.refs.arrived.at[slot]
    )

  def _copy_out(self, i: Any, slot: Any) -> Any:
    return pltpu.make_async_copy(
      self.dx_sum.at[slot], self._in_hbm(i), self.refs.sent.at[slot]
    )
