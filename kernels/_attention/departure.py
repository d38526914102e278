"""Page 10: how dk and dv leave for HBM.

They are whole at the last block of queries of their kv head, in float32 sums.
A block of results that Pallas knows of would be copied right then, ahead of the
queries that the next head's second grid step waits for, and take 2 S H values
of time on the way.  So the copies are the kernel's own: the results are rounded
into an array of their own and leave during the next head's first step, behind
what that step has already asked for.  Of the last head, whose copies nothing
hides, each block leaves as soon as it is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .tiles import Call


class Scratch(NamedTuple):
  """Refs of what the copies need."""

  dk: Any  # [S, H] rounded
  dv: Any  # [S, H]
  sent: Any  # [2] semaphores, of dk and of dv


def scratch(keys: int, head_size: int, dtype: Any) -> Scratch:
  """What to ask the compiler for."""
  rounded = pltpu.VMEM((keys, head_size), dtype)
  return Scratch(rounded, rounded, pltpu.SemaphoreType.DMA((2,)))


class Departure:
  """The copies that one grid step starts and awaits."""

  def __init__(self, call: Call, refs: Scratch, dk_hbm: Any, dv_hbm: Any):
    self.call, self.refs, self.in_hbm = call, refs, (dk_hbm, dv_hbm)
    self.blocks = refs.dk.shape[0] // call.block_kv
    self.head, self.step = pl.program_id(0), pl.program_id(1)
    self.is_last_step = self.step == pl.num_programs(1) - 1
    self.is_last_head = self.head == pl.num_programs(0) - 1

  def begin(self) -> None:
    """Sends off what the head before has left."""

    @pl.when((self.step == 0) & (self.head > 0))
    def _():
      self._for_blocks(lambda n: self._start(self.head - 1, n))

  def end(self, rounded: Callable[[Any], tuple[jax.Array, jax.Array]]) -> None:
    """At the head's last step: takes dk and dv of each block of keys.

    Args:
      rounded: gives both of some keys.
    """

    @pl.when(self.is_last_step)
    def _():
      pl.when(self.head > 0)(lambda: self._wait(self.head - 1))

      def one(n: Any) -> None:
        keys = self._keys(n)
        self.refs.dk[keys, :], self.refs.dv[keys, :] = rounded(keys)
        pl.when(self.is_last_head)(lambda: self._start(self.head, n))

      self._for_blocks(one)
      pl.when(self.is_last_head)(lambda: self._wait(self.head))

  def _for_blocks(self, body: Callable[[Any], None]) -> None:
    jax.lax.fori_loop(0, self.blocks, lambda n, _: body(n), None)

  def _keys(self, n: Any) -> Any:
    size = self.call.block_kv
    return pl.ds(pl.multiple_of(n * size, size), size)

  def _copies(self, head: Any, n: Any) -> list[Any]:
    keys, layout = self._keys(n), self.call.layout
    return [
      pltpu.make_async_copy(
        source.at[keys, :],
        target.at[layout.key_place(head, keys)],
        self.refs.sent.at[i],
      )
      for i, (source, target) in enumerate(
        zip((self.refs.dk, self.refs.dv), self.in_hbm, strict=True)
      )
    ]

  def _start(self, head: Any, n: Any) -> None:
    for copy in self._copies(head, n):
      copy.start()

  def _wait(self, head: Any) -> None:
    def one(n: Any) -> None:
      for copy in self._copies(head, n):
        copy.wait()

    self._for_blocks(one)
