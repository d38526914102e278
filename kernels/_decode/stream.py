"""Page 4: the copies of the cache to VMEM, some blocks ahead of the work.

The blocks that the grid's steps need, one step after the other, are one stream.
A cursor says which of them is copied next, and into which slot.  At every turn
one more block sets out, into the slot of the block before the one in work,
which may be on its way back to the cache with new keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .tiles import Call


class Scalars(NamedTuple):
  """What is prefetched; refs in the kernel, or their values."""

  lengths: Any  # [B] int32
  shift: Any  # [B] int32, or None
  layer: Any  # [1] int32, of a stack; or None
  table: Any  # [B P] int32, of a cache in pages; or None
  left: Any  # [B] int32, or None
  scale: Any  # [B] float32, or None

  def first(self, call: Call, b: Any) -> Any:
    """Place of a row's first query among its keys; may be negative."""
    first = self.lengths[b] - call.t
    return first if self.shift is None else first - self.shift[b]

  def end(self, call: Call, b: Any) -> Any:
    """Its valid keys."""
    end = self.first(call, b) + call.t
    return jnp.clip(end, 0, call.keys)


class CacheRefs(NamedTuple):
  """Keys and values, in HBM [X, S K, H] or in the slots [slots, block, H].

  Where they are turned, [X, H, S] and [slots, H, block].
  """

  k: Any
  v: Any
  k_scale: Any  # [.., 1, S K or block], or None
  v_scale: Any

  def in_lanes(self, call: Call) -> dict[str, Any]:
    """Those of which a token is a lane, by name."""
    turned = {"k": self.k, "v": self.v} if call.turned else {}
    if self.k_scale is None:
      return turned
    return {**turned, "k_scale": self.k_scale, "v_scale": self.v_scale}

  def in_rows(self, call: Call) -> dict[str, Any]:
    """Those of which a token is a row."""
    return {} if call.turned else {"k": self.k, "v": self.v}


class Ahead(NamedTuple):
  """The block that sets out next, and its grid step's keys; one number each."""

  step: Any
  block: Any
  b: Any
  low: Any
  high: Any
  last: Any


class Cursor(NamedTuple):
  """Where the stream is; in SMEM."""

  ahead: Ahead
  taken: Any  # [1]: the slot of the block that is taken next
  free: Any  # [1]: the slot that the next one goes to
  tiles: Any  # [slots]: how many tiles of a slot are on their way back; or None
  lanes: Any  # [slots]: the same of registers of lanes; or None


class Semaphores(NamedTuple):
  """Of the copies of each slot."""

  arrived: Any
  sent: Any


def cursor_types(call: Call, quantized: bool) -> Cursor:
  """What to ask the compiler for."""
  one, each = (pltpu.SMEM((n,), jnp.int32) for n in (1, call.slots))
  ahead = Ahead(*(one for _ in Ahead._fields))
  in_lanes = quantized or call.turned
  tiles, lanes = None if call.turned else each, each if in_lanes else None
  return Cursor(ahead, one, one, tiles, lanes)


def semaphore_types(call: Call) -> Semaphores:
  """Likewise."""
  of_slots = pltpu.SemaphoreType.DMA((call.slots,))
  return Semaphores(of_slots, of_slots)


class Step(NamedTuple):
  """The queries of a grid step, and the keys that they see.

  Attributes:
    b: the row.
    q0: position of the first query.
    low: the first key that any of them sees.
    high: the end of the keys that any of them sees; may be 0 or less.
    first: the first block.
    last: the end of the blocks: there is at least one, if of nothing.
    left: the window of this row, or None.
    is_last: whether it is the row's last.
  """

  b: Any
  q0: Any
  low: Any
  high: Any
  first: Any
  last: Any
  left: Any
  is_last: Any

  @classmethod
  def of(cls, call: Call, scalars: Scalars, step: Any) -> Step:
    """From its index."""
    b: Any = step
    i: Any = 0
    if call.blocks_q > 1:
      b, i = (f(step, call.blocks_q) for f in (jax.lax.div, jax.lax.rem))
    q0 = scalars.first(call, b) + i * call.block_q
    high = jnp.minimum(scalars.end(call, b), q0 + call.block_q)
    left: Any = call.problem.left
    if scalars.left is not None:
      left = scalars.left[b]
    low: Any = 0 if left is None else jnp.maximum(q0 - left, 0)
    first = 0 if left is None else _floored(low, call.block_kv)
    last = jnp.maximum(_ceiled(high, call.block_kv), first + 1)
    is_last = jnp.equal(i, call.blocks_q - 1)
    return cls(b, q0, low, high, first, last, left, is_last)

  def sees_all(self, call: Call, block: Any) -> Any:
    """Whether every query sees every key of a block."""
    end = (block + 1) * call.block_kv
    sees = (end <= self.q0 + 1) & (end <= self.high)
    if self.left is not None:
      first_of_last = self.q0 + (call.block_q - 1 - self.left)
      sees &= block * call.block_kv >= first_of_last
    return sees


def _floored(a: Any, b: int) -> Any:
  """a // b, of a number from 0 on: a shift where that is all."""
  return a >> (b.bit_length() - 1) if b & (b - 1) == 0 else jax.lax.div(a, b)


def _ceiled(a: Any, b: int) -> Any:
  """a over b, rounded up; 0 of a number below 0."""
  return _floored(jnp.maximum(a, 0) + (b - 1), b)


class Stream(NamedTuple):
  """The copies of one call.

  Attributes:
    call: the call.
    scalars: of it.
    hbm: the cache.
    slots: in VMEM.
    at: the cursor.
    semaphores: of the slots.
  """

  call: Call
  scalars: Scalars
  hbm: CacheRefs
  slots: CacheRefs
  at: Cursor
  semaphores: Semaphores

  def begin(self) -> None:
    """Before the first grid step: as many blocks set out as may."""
    self.at.taken[0] = self.at.free[0] = 0
    for slot in range(self.call.slots):
      self._nothing_sent(slot)
    self._go_ahead(0)
    for _ in range(self.call.slots - 2):
      self.send_for_next()

  def _go_ahead(self, index: Any) -> None:
    """To the first block of a grid step; past the last, to nothing."""
    step = Step.of(
      self.call, self.scalars, jnp.minimum(index, self.call.steps - 1)
    )
    ahead = self.at.ahead
    ahead.step[0], ahead.block[0] = index, step.first
    ahead.b[0], ahead.low[0] = step.b, step.low
    ahead.high[0], ahead.last[0] = step.high, step.last

  def send_for_next(self) -> None:
    """One more block sets out, if there is one."""
    ahead = self.at.ahead

    @pl.when(ahead.step[0] < self.call.steps)
    def _():
      block, slot = ahead.block[0], self.at.free[0]
      self.wait_until_sent(slot)
      low = 0 if not self.has_window else ahead.low[0]
      keys = ahead.b[0], low, ahead.high[0]
      self._each_copy(keys, block, slot, lambda copy: copy.start())
      self.at.free[0] = self.slot_after(slot)
      ahead.block[0] = block + 1

      @pl.when(block + 1 >= ahead.last[0])
      def _():
        self._go_ahead(ahead.step[0] + 1)

  @property
  def has_window(self) -> bool:
    """Whether a row may see no key of a block before its last."""
    return self.call.problem.left is not None or self.scalars.left is not None

  def take(self, step: Step, block: Any) -> Any:
    """Waits for the block that comes next, and gives the slot that it is in."""
    slot = self.at.taken[0]
    keys = step.b, step.low, step.high
    self._each_copy(keys, block, slot, lambda copy: copy.wait())
    self.at.taken[0] = self.slot_after(slot)
    return slot

  @property
  def in_work(self) -> Any:
    """The slot of the block that was taken last."""
    taken = self.at.taken[0]
    return jnp.where(taken == 0, self.call.slots, taken) - 1

  def slot_after(self, slot: Any) -> Any:
    """In turn."""
    return jnp.where(slot == self.call.slots - 1, 0, slot + 1)

  # --- to VMEM ---

  def _each_copy(
    self,
    keys: tuple[Any, Any, Any],
    block: Any,
    slot: Any,
    do: Callable[[Any], None],
  ) -> None:
    """Of what is seen of a block, in whole chunks.

    Args:
      keys: the row, the first of its keys that is seen, and the end of them.
      block: the block.
      slot: where it goes.
      do: starts a copy, or waits for it.
    """
    call, (b, low, high) = self.call, keys
    per_block, key0 = call.block_kv // call.chunk, block * call.block_kv
    first: Any = 0
    if self.has_window:
      first = _floored(jnp.maximum(low - key0, 0), call.chunk)
    last = jnp.minimum(_ceiled(high - key0, call.chunk), per_block)

    def piece(chunk: Any, chunks: int) -> None:
      for copy in self._copies(b, key0, chunk, chunks, slot):
        do(copy)

    def pieces() -> None:
      jax.lax.fori_loop(first, last, lambda i, _: piece(i, 1), None)

    if call.is_contiguous:
      is_whole = (first == 0) & (last == per_block)
      jax.lax.cond(is_whole, lambda: piece(0, per_block), pieces)
    else:
      pieces()

  def _copies(
    self, b: Any, key0: Any, chunk: Any, chunks: int, slot: Any
  ) -> Iterator[Any]:
    """Of some chunks of a block, from HBM."""
    call, size = self.call, chunks * self.call.chunk
    page, token = self._place(b, key0 + chunk * call.chunk)
    there = self._span(token, size, call.chunk)
    here = self._span(chunk * call.chunk, size, call.chunk)
    arrived = self.semaphores.arrived.at[slot]
    for name, hbm in self.hbm.in_rows(call).items():
      to = getattr(self.slots, name).at[slot, here]
      yield pltpu.make_async_copy(hbm.at[page, there], to, arrived)
    for name, hbm in self.hbm.in_lanes(call).items():
      to = getattr(self.slots, name).at[slot, :, here]
      yield pltpu.make_async_copy(hbm.at[page, :, there], to, arrived)

  def _place(self, b: Any, token: Any) -> tuple[Any, Any]:
    """The row of the cache, or page, of a row's token, and its place there."""
    call, row = self.call, b
    if self.scalars.table is not None:
      page = jnp.minimum(_floored(token, call.page), call.pages - 1)
      row = self.scalars.table[b * call.pages + page]
      row = jnp.clip(row, 0, call.layer_rows - 1)
      token -= page * call.page
    if self.scalars.layer is not None:
      row += self.scalars.layer[0] * call.layer_rows
    return row, token

  def _span(self, token: Any, size: int, unit: int) -> Any:
    """The rows of `size` tokens from one on that is a multiple of `unit`."""
    k = self.call.kv_heads
    if isinstance(token, int):
      return pl.ds(token * k, size * k)
    return pl.ds(pl.multiple_of(token * k, unit * k), size * k)

  # --- back ---

  def send_tile(self, b: Any, block: Any, slot: Any, row: Any) -> None:
    """A tile of a block's rows, of keys and of values, back to the cache."""
    for copy in self._tile_back(b, block, slot, row):
      copy.start()

  def send_lanes(self, b: Any, block: Any, slot: Any, row: Any) -> None:
    """A register of what has tokens in lanes, likewise."""
    for copy in self._lanes_back(b, block, slot, row):
      copy.start()

  def wait_until_sent(self, slot: Any) -> None:
    """Until all of a slot that went back has arrived."""
    at = self.at

    def wait(back: Callable[..., Iterator[Any]]) -> None:
      for copy in back(0, 0, slot, 0):
        copy.wait()

    any_sent = at.lanes if at.tiles is None else at.tiles

    @pl.when(any_sent[slot] > 0)
    def _():
      for sent, back in (
        (at.tiles, self._tile_back),
        (at.lanes, self._lanes_back),
      ):
        if sent is not None:
          one = functools.partial(lambda back, *_: wait(back), back)
          jax.lax.fori_loop(0, sent[slot], one, None)
      self._nothing_sent(slot)

  def finish(self) -> None:
    """After the last grid step: waits for what goes back."""
    for slot in range(self.call.slots):
      self.wait_until_sent(slot)

  def _nothing_sent(self, slot: Any) -> None:
    for sent in (self.at.tiles, self.at.lanes):
      if sent is not None:
        sent[slot] = 0

  def _tile_back(
    self, b: Any, block: Any, slot: Any, row: Any
  ) -> Iterator[Any]:
    page, here, there = self._places_back(b, block, row, self.call.tile)
    for name, slots in self.slots.in_rows(self.call).items():
      to = getattr(self.hbm, name).at[page, there]
      sent = self.semaphores.sent.at[slot]
      yield pltpu.make_async_copy(slots.at[slot, here], to, sent)

  def _lanes_back(
    self, b: Any, block: Any, slot: Any, row: Any
  ) -> Iterator[Any]:
    page, here, there = self._places_back(b, block, row, tpu.LANES)
    for name, slots in self.slots.in_lanes(self.call).items():
      to = getattr(self.hbm, name).at[page, :, there]
      sent = self.semaphores.sent.at[slot]
      yield pltpu.make_async_copy(slots.at[slot, :, here], to, sent)

  def _places_back(
    self, b: Any, block: Any, row: Any, size: int
  ) -> tuple[Any, Any, Any]:
    """Page, here and there of `size` rows of a block, a multiple of it on."""
    call = self.call
    # Tiles do not cross pages, whose rows are a multiple of theirs.
    token = block * call.block_kv + _floored(row, call.kv_heads)
    page, token = self._place(b, token)
    head = row - _floored(row, call.kv_heads) * call.kv_heads
    there = token * call.kv_heads + head
    here, there = (pl.ds(pl.multiple_of(x, size), size) for x in (row, there))
    return page, here, there
