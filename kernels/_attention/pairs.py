"""Page 9: [B, T, N, H] as it is, a pair of kv heads at a time.

In HBM the heads of a token are sublanes of one tile, and of bfloat16 the heads
2 n and 2 n + 1 share its 32-bit words.  A copy can take the words of one such
pair, a row of every token, but no half of them.  So the kernel's own copies
bring the heads of two kv heads together, as words [tokens, H], and it takes
the halves apart in VMEM, three operations of the vector unit for two registers:

    words in HBM        [B, T, N / 2, H]   one row of H words for each token
    words in VMEM       [G, block_q, H]    where copies come and go
    heads in VMEM       [2, G, block_q, H] what the kernel works on, heads first

and puts the halves of results together before they leave.  A float32 head is
a row of words by itself.

The grid is (B K / 2, blocks of queries, 2).  What the two steps of a block need
comes before the first and leaves after the second:

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

from .layout import Layout
from .tiles import Call

# --- words --------------------------------------------------------------------


def per_word(dtype: Any) -> int:
  """Heads that share a word."""
  return 4 // jnp.dtype(dtype).itemsize


def word_type(dtype: Any) -> Any:
  """Of what copies move."""
  return dtype if per_word(dtype) == 1 else jnp.uint32


def in_words(ref: Any) -> Any:
  """[B, T, N, H] in HBM by rows of words, [B, T, N / heads per word, H]."""
  return ref if per_word(ref.dtype) == 1 else ref.bitcast(jnp.uint32)


def place(hbm: Any, layout: Layout, pair: Any, tokens: Any, row: int) -> Any:
  """Where a row of words of a pair of kv heads is, of [B, T, N, H] in HBM."""
  words, pairs = in_words(hbm), layout.kv_heads // layout.together
  first = jax.lax.rem(pair, pairs) * (words.shape[2] // pairs)
  return words.at[jax.lax.div(pair, pairs), tokens, first + row, :]


def apart(words: jax.Array, dtype: Any) -> list[jax.Array]:
  """The heads in words."""
  if per_word(dtype) == 1:
    return [words]
  # A bfloat16 is the upper half of the float32 of its value.
  halves = words << 16, words & jnp.uint32(0xFFFF0000)
  return [
    jax.lax.bitcast_convert_type(x, jnp.float32).astype(dtype) for x in halves
  ]


def together(heads: Sequence[jax.Array], dtype: Any) -> jax.Array:
  """Words of heads, rounded to the dtype."""
  if per_word(dtype) == 1:
    (head,) = heads
    return head.astype(dtype)
  low, high = (
    jax.lax.bitcast_convert_type(
      x.astype(dtype).astype(jnp.float32), jnp.uint32
    )
    for x in heads
  )
  return (low >> 16) | high


# --- scratch ------------------------------------------------------------------


class Store(NamedTuple):
  """Refs: where an array's pair of kv heads is in VMEM."""

  words: Any  # [rows of words, tokens, H]
  heads: Any  # [2, G, tokens, H]; [2, tokens, H] of keys and where G is 1
  moved: Any  # a semaphore of the copies


class Scratch(NamedTuple):
  """Refs of all arrays that come and go by words."""

  queries: tuple[Store, ...]
  keys: tuple[Store, ...]
  result: Store  # of queries


def scratch(
  call: Call, queries: Sequence[Any], keys: Sequence[Any], result_dtype: Any
) -> Scratch | None:
  """What to ask the compiler for, by the dtypes; None in other layouts."""
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
      pltpu.SemaphoreType.DMA(()),
    )

  of_queries = layout.group, call.block_q
  return Scratch(
    tuple(store(dtype, *of_queries) for dtype in queries),
    tuple(store(dtype, 1, call.padded_keys) for dtype in keys),
    store(result_dtype, *of_queries),
  )


# --- the copies ---------------------------------------------------------------


class Blocks(NamedTuple):
  """Blocks of tokens of a pair of kv heads, in HBM and in VMEM.

  Attributes:
    hbm: the whole array, [B, T, N, H].
    store: its pair in VMEM.
    layout: as the call has it.
    tokens: how many there are.
    size: tokens of a block; the last may have fewer.
    stays: whether all blocks have a place of their own in VMEM, as keys have.
  """

  hbm: Any
  store: Store
  layout: Layout
  tokens: int
  size: int
  stays: bool = False

  @property
  def count(self) -> int:
    """How many blocks."""
    return pl.cdiv(self.tokens, self.size)

  def start(self, pair: Any, n: Any, *, leaves: bool = False) -> None:
    """Starts the copies of a block."""
    self._for_copies(pair, n, leaves, lambda copy: copy.start())

  def wait(self, pair: Any, n: Any, *, leaves: bool = False) -> None:
    """Waits for them."""
    self._for_copies(pair, n, leaves, lambda copy: copy.wait())

  def take_apart(self, n: Any) -> None:
    """The heads of a block of words that has come."""
    here, per = self._here(n, self.size), per_word(self.hbm.dtype)
    for row in range(self.store.words.shape[0]):
      heads = apart(self.store.words[row, here, :], self.hbm.dtype)
      for i, head in enumerate(heads):
        self.store.heads[(*self._head(per * row + i), here)] = head

  def put_together(self, n: Any) -> None:
    """Words of a block, of its heads."""
    here, per = self._here(n, self.size), per_word(self.hbm.dtype)
    for row in range(self.store.words.shape[0]):
      heads = [
        self.store.heads[(*self._head(per * row + i), here)] for i in range(per)
      ]
      self.store.words[row, here, :] = together(heads, self.hbm.dtype)

  def clear_end(self) -> None:
    """Sets what lies past the end of keys to 0: it is hidden, but is read."""
    words = self.store.words
    if words.shape[1] > self.tokens:
      past = words.at[:, pl.ds(self.tokens, words.shape[1] - self.tokens), :]
      past[...] = jnp.zeros(past.shape, words.dtype)

  def _head(self, n: int) -> tuple[int, ...]:
    """Index of a pair's n-th head in its store."""
    shape = self.store.heads.shape
    return divmod(n, shape[1]) if len(shape) == 4 else (n,)

  def _here(self, n: Any, size: int) -> Any:
    if not self.stays or self.count == 1:
      return pl.ds(0, size)
    return pl.ds(pl.multiple_of(n * self.size, self.size), size)

  def _for_copies(
    self, pair: Any, n: Any, leaves: bool, do: Callable[[Any], None]
  ) -> None:
    def of_size(size: int) -> None:
      for row in range(self.store.words.shape[0]):
        do(self._copy(pair, n, row, size, leaves))

    rest = self.tokens % self.size
    if self.count == 1:
      of_size(self.tokens)
    elif not rest:
      of_size(self.size)
    else:
      pl.when(n < self.count - 1)(lambda: of_size(self.size))
      pl.when(n == self.count - 1)(lambda: of_size(rest))

  def _copy(self, pair: Any, n: Any, row: int, size: int, leaves: bool) -> Any:
    first = n * self.size
    if self.count > 1:
      first = pl.multiple_of(first, self.size)
    there = place(self.hbm, self.layout, pair, pl.ds(first, size), row)
    here = self.store.words.at[row, self._here(n, size), :]
    source, target = (here, there) if leaves else (there, here)
    return pltpu.make_async_copy(source, target, self.store.moved)


# --- a grid step --------------------------------------------------------------


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
    *,
    own_keys: bool,
  ):
    """Of a kernel's refs; `own_keys`: whether keys come block by block."""
    layout = call.layout
    self.pair, self.block, self.member = (pl.program_id(i) for i in range(3))
    self.is_last_block = self.block == pl.num_programs(1) - 1
    self.is_last_pair = self.pair == pl.num_programs(0) - 1
    self._queries = [
      Blocks(hbm, store, layout, call.t, call.block_q)
      for hbm, store in zip(queries, refs.queries, strict=True)
    ]
    size = call.block_q if own_keys else call.padded_keys
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
      for x in self._keys:
        x.wait(self.pair, self.block)

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
