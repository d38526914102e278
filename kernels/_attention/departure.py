"""Page 12: how dk and dv leave for HBM.

They are whole at the last block of queries of their kv head, in float32 sums.
A block of results that Pallas knows of would be copied right then, ahead of the
queries that the next head's second grid step waits for, and take 2 S H values
of time on the way.  So the copies are the kernel's own: the results are rounded
into an array of their own and leave during the next head's first step, behind
what that step has already asked for.  Of the last head, whose copies nothing
hides, each block leaves as soon as it is rounded.

Of a pair of kv heads both leave together, as words; see `words`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import words
from .tiles import Call


class Scratch(NamedTuple):
  """Refs of what the copies need."""

  dk: Any  # [S, H] rounded; of pairs, words [rows of words, S, H]
  dv: Any  # likewise
  sent: Any  # [2] semaphores, of dk and of dv


def scratch(call: Call, dtype: Any) -> Scratch:
  """What to ask the compiler for."""
  layout, dtype = call.layout, call.problem.gradient_type(dtype)
  shape: tuple[int, ...] = (call.padded_keys, layout.head_size)
  if layout.kind == "pairs":
    shape = (layout.together // words.per_word(dtype), *shape)
    dtype = words.word_type(dtype)
  leaving = pltpu.VMEM(shape, dtype)
  return Scratch(leaving, leaving, pltpu.SemaphoreType.DMA((2,)))


class Departure:
  """The copies that one grid step starts and awaits.

  A kv head below is the grid's first index: one, or a pair.
  """

  def __init__(self, call: Call, refs: Scratch, dk_hbm: Any, dv_hbm: Any):
    self.call, self.refs, self.in_hbm = call, refs, (dk_hbm, dv_hbm)
    self.has_pairs = call.layout.kind == "pairs"
    self.head, self.step = pl.program_id(0), pl.program_id(1)
    self.is_first_step = self.step == 0
    self.is_last_step = self.step == pl.num_programs(1) - 1
    if self.has_pairs:
      member = pl.program_id(2)
      self.is_first_step &= member == 0
      self.is_last_step &= member == pl.num_programs(2) - 1
    self.is_last_head = self.head == pl.num_programs(0) - 1

  def begin(self) -> None:
    """Sends off what the head before has left."""

    @pl.when(self.is_first_step & (self.head > 0))
    def _():
      self._for_blocks(lambda keys: self._start(self.head - 1, keys))

  def end(self, results: Callable[[Any], tuple[jax.Array, jax.Array]]) -> None:
    """At the head's last step: takes dk and dv of each block of keys.

    Args:
      results: gives both, in float32, of a place in the sums.
    """

    @pl.when(self.is_last_step)
    def _():
      pl.when(self.head > 0)(lambda: self._wait(self.head - 1))

      def one(keys: Any) -> None:
        self._round(keys, results)
        pl.when(self.is_last_head)(lambda: self._start(self.head, keys))

      self._for_blocks(one)
      pl.when(self.is_last_head)(lambda: self._wait(self.head))

  def _round(
    self, keys: Any, results: Callable[[Any], tuple[jax.Array, jax.Array]]
  ) -> None:
    both, every = (self.refs.dk, self.refs.dv), slice(None)
    if not self.has_pairs:
      for ref, x in zip(both, results((keys, every)), strict=True):
        ref[keys, :] = x.astype(ref.dtype)
      return
    heads = [
      results((n, keys, every)) for n in range(self.call.layout.together)
    ]
    for ref, hbm, xs in zip(
      both, self.in_hbm, zip(*heads, strict=True), strict=True
    ):
      per = words.per_word(hbm.dtype)
      for row in range(ref.shape[0]):
        of_row = xs[row * per : (row + 1) * per]
        ref[row, keys, :] = words.together(of_row, hbm.dtype)

  def _for_blocks(self, body: Callable[[Any], None]) -> None:
    """Calls body(keys) for all keys that leave."""
    size = self.call.block_kv
    keys = self.call.s if self.has_pairs else self.call.padded_keys

    def one(n: Any, _: None) -> None:
      body(pl.ds(pl.multiple_of(n * size, size), size))

    jax.lax.fori_loop(0, keys // size, one, None)
    if keys % size:
      body(pl.ds(keys - keys % size, keys % size))

  def _copies(self, keys: Any, head: Any) -> list[Any]:
    layout, copies = self.call.layout, []
    both = (self.refs.dk, self.refs.dv)
    for i, (source, target) in enumerate(zip(both, self.in_hbm, strict=True)):
      if self.has_pairs:
        parts = [
          (
            source.at[row, keys, :],
            words.place(target, layout, head, keys, row),
          )
          for row in range(source.shape[0])
        ]
      else:
        place = layout.key_place(head, keys)
        parts = [(source.at[keys, :], target.at[place])]
      copies += [
        pltpu.make_async_copy(*part, self.refs.sent.at[i]) for part in parts
      ]
    return copies

  def _start(self, head: Any, keys: Any) -> None:
    for copy in self._copies(keys, head):
      copy.start()

  def _wait(self, head: Any) -> None:
    def one(keys: Any) -> None:
      for copy in self._copies(keys, head):
        copy.wait()

    self._for_blocks(one)
