"""Page 10: a pair of kv heads around a grid step.

By words two kv heads come together, and the grid is (B K / 2, blocks of
queries, 2): a block has a step for either head.  What both need comes before
the first and leaves after the second:

  1. first   wait for the words of this block, take them apart, and send for
             those of the next
  2. both    the kernel, on the heads of one kv head
  3. second  wait until the words of the last block's result have left, put
             this one's together, and send them off

Keys come likewise, once for each pair of kv heads; where a block of queries
brings the keys of its own indices to the diagonal, block by block with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .tiles import Call
from .words import Blocks, Store, per_word, word_type


class Scratch(NamedTuple):
  """Refs of all arrays that come and go by words."""

  queries: tuple[Store, ...]
  keys: tuple[Store, ...]
  result: Store  # of queries


def scratch(
  call: Call, queries: int, dtype: Any, result_dtype: Any
) -> Scratch | None:
  """What to ask the compiler for; None in other layouts.

  Args:
    call: the kernel's.
    queries: how many arrays of queries come.
    dtype: theirs, and that of keys.
    result_dtype: of what leaves.
  """
  layout = call.layout
  if layout.kind != "pairs":
    return None

  def store(dtype: Any, group: int, tokens: int) -> Store:
    heads = (layout.together, *([group] if group > 1 else []))
    rows = layout.together * group // per_word(dtype)
    at_the_end = (tokens, layout.head_size)
    return Store(
      pltpu.VMEM((rows, *at_the_end), word_type(dtype)),
      pltpu.VMEM((*heads, *at_the_end), dtype),
      pltpu.SemaphoreType.DMA((2,)),
    )

  of_queries = layout.group, call.block_q
  return Scratch(
    (store(dtype, *of_queries),) * queries,
    (store(dtype, 1, call.padded_keys),) * 2,
    store(result_dtype, *of_queries),
  )


class Visit:
  """What comes and goes around one grid step.

  Attributes:
    queries: refs of what came, of this step's kv head, as heads first has them.
    keys: likewise.
    result: ref for what leaves.
  """

  def __init__(
    self,
    call: Call,
    refs: Scratch,
    queries: Sequence[Any],
    keys: Sequence[Any],
    result: Any,
    segments: Any,
  ):
    layout = call.layout
    self.pair, self.block, self.member = (pl.program_id(i) for i in range(3))
    self.is_last_block = self.block == pl.num_programs(1) - 1
    self.is_last_pair = self.pair == pl.num_programs(0) - 1
    self._queries = [
      Blocks(hbm, store, layout, call.t, call.block_q)
      for hbm, store in zip(queries, refs.queries, strict=True)
    ]
    # What segments hide is cleared in all keys, before the first block.
    by_block = call.brings_own_keys and segments is None
    size = call.block_q if by_block else call.padded_keys
    self._keys = [
      Blocks(hbm, store, layout, call.s, size, stays=True)
      for hbm, store in zip(keys, refs.keys, strict=True)
    ]
    self._result = Blocks(result, refs.result, layout, call.t, call.block_q)
    self.queries, self.keys = (
      [x.store.heads.at[self.member] for x in xs]
      for xs in (self._queries, self._keys)
    )
    self.result = refs.result.heads.at[self.member]

  def own(self, of_both: Any) -> Any:
    """This step's kv head in scratch that has both, if there is such."""
    return None if of_both is None else of_both.at[self.member]

  def begin(self) -> None:
    """At the first of a block's steps: has its heads in VMEM."""

    @pl.when(self.member == 0)
    def _():
      self._await()
      self._take_apart()
      self._send_for_more()

  def end(self) -> None:
    """At the second: sends off the result."""
    pl.when(self.member == pl.num_programs(2) - 1)(self._give)

  def _await(self) -> None:
    @pl.when((self.pair == 0) & (self.block == 0))
    def _():
      for x in self._keys:
        x.clear_end()
      for x in self._queries + self._keys:
        x.start(0, 0)

    for x in self._queries:
      x.wait(self.pair, self.block)

    @self._when_keys_come
    def _():
      pl.when(self.pair == 0)(lambda: self._wait_for_keys(self.block))

    @pl.when((self.pair > 0) & (self.block == 0))
    def _():
      jax.lax.fori_loop(
        0, self._keys[0].count, lambda n, _: self._wait_for_keys(n), None
      )

  def _wait_for_keys(self, n: Any) -> None:
    for x in self._keys:
      x.wait(self.pair, n)

  def _take_apart(self) -> None:
    for x in self._queries:
      x.take_apart(self.block)

    @self._when_keys_come
    def _():
      for x in self._keys:
        x.take_apart(self.block)

  def _send_for_more(self) -> None:
    """The next queries, and keys for the next pair, where these have been; the
    first pair has its own brought just ahead."""

    @pl.when(~(self.is_last_pair & self.is_last_block))
    def _():
      pair = jnp.where(self.is_last_block, self.pair + 1, self.pair)
      block = jnp.where(self.is_last_block, 0, self.block + 1)
      for x in self._queries:
        x.start(pair, block)

    count = self._keys[0].count

    @pl.when((self.pair == 0) & (self.block + 1 < count))
    def _():
      for x in self._keys:
        x.start(0, self.block + 1)

    @pl.when(~self.is_last_pair & (self.block < count))
    def _():
      for x in self._keys:
        x.start(self.pair + 1, self.block)

  def _when_keys_come(self, body: Callable[[], None]) -> None:
    if self._keys[0].count == self._queries[0].count:
      body()
    else:
      pl.when(self.block < self._keys[0].count)(body)

  def _give(self) -> None:
    @pl.when((self.pair > 0) | (self.block > 0))
    def _():
      is_first_block = self.block == 0
      pair = jnp.where(is_first_block, self.pair - 1, self.pair)
      last = pl.num_programs(1) - 1
      block = jnp.where(is_first_block, last, self.block - 1)
      self._result.wait(pair, block, leaves=True)

    self._result.put_together(self.block)
    self._result.start(self.pair, self.block, leaves=True)

    @pl.when(self.is_last_pair & self.is_last_block)
    def _():
      self._result.wait(self.pair, self.block, leaves=True)
