"""Page 9: [B, T, N, H] as it is, by words of 32 bits.

In HBM the heads of a token are sublanes of one tile, and of bfloat16 the heads
2 n and 2 n + 1 share its words.  A copy can take the words of two such heads,
a row of H for every token, but no half of them.  So copies of the kernels' own
bring both heads to VMEM,

    words in HBM     [B, T, N / 2, H]   one row for two heads of a token
    words in VMEM    [rows, tokens, H]  where copies come and go
    heads in VMEM    [2, G, tokens, H]  what the kernel works on: the G query
                                        heads of two kv heads, or these two

where the halves are taken apart, three operations of the vector unit for two
registers, and those of results put together.  A float32 head is a row of words
by itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .._frame.tuned import power_of_two
from .layout import Layout

# Taken apart or put together at a time, so that registers do for them.
_WORDS = 256 * tpu.SUBLANES * tpu.LANES

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


# --- blocks -------------------------------------------------------------------


class Store(NamedTuple):
  """Refs: where an array's pair of kv heads is in VMEM."""

  words: Any  # [rows of words, tokens, H]
  heads: Any  # [2, G, tokens, H]; [2, tokens, H] of keys and where G is 1
  moved: Any  # [2] semaphores of the copies, the first of a first pair of keys


@dataclasses.dataclass(frozen=True)
class Blocks:
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
    words, heads, _ = self.store
    dtype, per = self.hbm.dtype, per_word(self.hbm.dtype)

    def some(here: Any) -> None:
      for row in range(words.shape[0]):
        for i, head in enumerate(apart(words[row, here, :], dtype)):
          heads[(*self._head(per * row + i), here)] = head

    self._for_parts(n, some)

  def put_together(self, n: Any) -> None:
    """Words of a block, of its heads."""
    words, heads, _ = self.store
    dtype, per = self.hbm.dtype, per_word(self.hbm.dtype)

    def some(here: Any) -> None:
      for row in range(words.shape[0]):
        places = [self._head(per * row + i) for i in range(per)]
        words[row, here, :] = together(
          [heads[(*place, here)] for place in places], dtype
        )

    self._for_parts(n, some)

  def _for_parts(self, n: Any, do: Callable[[Any], None]) -> None:
    """Calls `do` for so many tokens of a block that registers do for them."""
    rows, _, width = self.store.words.shape
    size = self.size
    part = math.gcd(size, power_of_two(_WORDS // (rows * width)))
    first = n * self.size if self.stays and self.count > 1 else 0

    def one(i: Any, _: None) -> None:
      do(pl.ds(pl.multiple_of(first + i * part, part), part))

    jax.lax.fori_loop(0, size // part, one, None)

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
    return pltpu.make_async_copy(source, target, self._moved(pair))

  def _moved(self, pair: Any) -> Any:
    # Copies may end in any order.  While those of a first pair are waited for
    # block by block, some of the next are under way.
    is_other = jnp.minimum(pair, 1) if self.stays else 1
    return self.store.moved.at[is_other]
