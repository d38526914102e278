"""How linear cross-entropy is cut into tiles.

First the config, all that a caller may choose; then the sizes of one pass; at
the end the choice, by a model of VMEM and of the program's length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._frame import tpu
from .._frame.check import is_one_of, is_size
from .memory import GRADIENT_COLUMNS, backward_bytes, forward_bytes

Mode = Literal["recompute", "chunked"]

# --- configuration ------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCrossEntropyConfig:
  """Tile sizes and what is kept between the passes: speed, never results.

  The table goes through VMEM in blocks of the vocabulary; `words` in a name
  means the rows of the table in such a block.

  Attributes:
    mode: "recompute" keeps three numbers per row between the passes, and
      computes the logits twice.  "chunked" keeps the exponentials, [V, R] of
      x's dtype in HBM, and saves a matrix product of four.
    forward_words: the forward pass's vocabulary block, a multiple of 128.
    backward_words: the same for the backward pass, and for both if the forward
      pass keeps the exponentials.
    rows: rows of x that stay in VMEM, at most; a multiple of `chunk`.  Blocks
      of them take turns.
    chunk: rows of x per matrix product; a multiple of 128.
  """

  mode: Mode = "recompute"
  forward_words: int = 768
  backward_words: int = 512
  rows: int = 8192
  chunk: int = 256

  def __post_init__(self):
    if not is_one_of(self.mode, ("recompute", "chunked")):
      raise ValueError(
        "LinearCrossEntropyConfig: mode must be 'recompute' or 'chunked', "
        f"got {self.mode!r}"
      )
    for name, value, unit in (
      ("forward_words", self.forward_words, tpu.LANES),
      ("backward_words", self.backward_words, tpu.LANES),
      ("chunk", self.chunk, tpu.LANES),
      ("rows", self.rows, self.chunk),
    ):
      if not is_size(value, unit):
        raise ValueError(
          f"LinearCrossEntropyConfig: {name} must be a positive multiple of "
          f"{unit}, got {value!r}"
        )

  @classmethod
  def for_problem(
    cls,
    x: Any,
    embedding: Any,
    mode: Mode = "recompute",
    *,
    transposed: bool = False,
    more: bool = False,
  ) -> LinearCrossEntropyConfig:
    """The config that fits x [R, D] and embedding [V, D], or [D, V].

    With `more` also a bias, smoothed labels or predictions.
    """
    (n, d), v = x.shape, embedding.shape[1 if transposed else 0]
    dtypes = x.dtype, embedding.dtype
    return cls.fitting(n, d, v, *dtypes, mode, transposed=transposed, more=more)

  @classmethod
  def fitting(
    cls,
    n: int,
    d: int,
    v: int,
    x_dtype: jnp.dtype,
    table_dtype: jnp.dtype,
    mode: Mode = "recompute",
    *,
    transposed: bool = False,
    more: bool = False,
  ) -> LinearCrossEntropyConfig:
    """The config for x [n, d] and a table [v, d] by a model of VMEM.

    With more blocks of rows, those of the vocabulary may be wider, and traffic
    is more: each block of rows reads the table, and reads and writes its
    gradient.

    Raises:
      ValueError: if not even the smallest tiles fit.
    """
    sizes = _Sizes(
      *(n, d, v, x_dtype, table_dtype),
      keep=mode == "chunked",
      transposed=transposed,
      more=more,
    )
    best = min(
      (c for c in _candidates(sizes) if _fits(sizes, c)),
      key=lambda c: (_memory_rank(sizes, c), _cycles(sizes, c)),
      default=None,
    )
    if best is None:
      body = _body_rows(_chunk(sizes), n)
      raise ValueError(
        f"linear_cross_entropy: wanted rows of which {body} fit VMEM beside a "
        f"tile of the table, got D = {d}"
      )
    return cls(
      mode=mode,
      forward_words=next(
        block
        for block in _vocab_blocks(sizes)
        if _fits_forward(sizes, best, block)
      ),
      backward_words=best.vocab_block,
      rows=best.rows,
      chunk=best.chunk,
    )


# --- the sizes of one pass ----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tiles:
  """The sizes that one pass is compiled for.

  Attributes:
    vocab_block: rows of the table per grid step.
    rows: rows of x that stay in VMEM while the table streams by.
    chunk: rows of x per matrix product.
    overlap: chunks per loop body, at most: one's exponentials hide behind
      another's product, those of the last do not.  More lengthen the program.
  """

  vocab_block: int
  rows: int
  chunk: int
  overlap: int

  @property
  def chunks_per_body(self) -> int:
    """As many as `overlap` allows and the rows divide into."""
    choices = range(self.overlap, 0, -1)
    return next(k for k in choices if self.rows % (k * self.chunk) == 0)

  @property
  def body_rows(self) -> int:
    """Rows of x per loop body."""
    return self.chunks_per_body * self.chunk

  @property
  def bodies(self) -> int:
    """Loop bodies that go over all rows."""
    return self.rows // self.body_rows

  def chunks(self, body: Any) -> list[Any]:
    """The rows of each chunk of a loop body, as slices."""
    starts = [
      (body * self.chunks_per_body + k) * self.chunk
      for k in range(self.chunks_per_body)
    ]
    return [pl.ds(pl.multiple_of(s, self.chunk), self.chunk) for s in starts]


def tiles_of(
  config: LinearCrossEntropyConfig,
  n: int,
  v: int,
  *,
  is_forward: bool,
  keep: bool,
) -> Tiles:
  """Those of a pass over n rows, as `padded_rows` has them, and V = v.

  With `keep` the forward pass has the backward pass's vocabulary blocks.
  """
  block = config.backward_words
  if is_forward and not keep:
    block = config.forward_words
  return Tiles(
    vocab_block=min(block, tpu.round_up(v, tpu.LANES)),
    rows=n // pl.cdiv(n, config.rows),
    chunk=min(config.chunk, n),
    overlap=_overlap(is_forward=is_forward, keep=keep),
  )


def for_columns(d: int, body: Callable[[Any], None]) -> None:
  """Calls body(slice) over the columns of D in pieces of at most 512."""
  size = GRADIENT_COLUMNS

  @pl.loop(0, d // size)
  def _(i):
    body(pl.ds(pl.multiple_of(i * size, size), size))

  if d % size:
    body(pl.ds(d // size * size, d % size))


def padded_rows(config: LinearCrossEntropyConfig, n: int) -> int:
  """n rows and as many more as it takes until tiles divide them."""
  blocks = pl.cdiv(n, config.rows)
  chunk = min(config.chunk, tpu.round_up(n, tpu.LANES))
  body = min(_body_rows(chunk, n), config.rows)
  return blocks * tpu.round_up(pl.cdiv(n, blocks), body)


def _overlap(*, is_forward: bool, keep: bool) -> int:
  """Chunks per loop body: two where it is long, having two products each."""
  return 4 if is_forward or keep else 2


def _body_rows(chunk: int, n: int) -> int:
  """Rows of a loop body: two chunks, unless there is but one."""
  return chunk if n <= chunk else 2 * chunk


# --- the choice of a config ---------------------------------------------------

# Vocabulary blocks to choose from; wider ones only compile more slowly.
_VOCAB_BLOCKS = (768, 512, 384, 256, 128)
# A product in float32 is six on the matrix units, and as long a program.
_WIDEST_FLOAT32_BLOCK = 256
_CHUNKS, _FLOAT32_CHUNKS = (256, 128), (128,)
# What a product of one chunk, and a step over one vocabulary block, take to
# start and to stop, in rows of theirs.
_CHUNK_START_ROWS = 8
_BLOCK_START_ROWS = 10
# One block of rows is preferred to several even if the vocabulary block must
# then be narrower, down to this.
_NARROWEST_PREFERRED_BLOCK = 384


class _Sizes(NamedTuple):
  """What the choice of tiles depends on."""

  n: int  # rows of x
  d: int
  v: int
  x_dtype: jnp.dtype
  table_dtype: jnp.dtype
  keep: bool
  transposed: bool
  more: bool  # a bias, smoothed labels or predictions


class _Candidate(NamedTuple):
  """Tiles of the backward pass, which has the larger share of the work."""

  vocab_block: int
  blocks: int  # of rows
  rows: int  # in each
  chunk: int


def _vocab_blocks(sizes: _Sizes) -> list[int]:
  """Those whose loop body fits the instruction memory, the widest first."""
  is_float32 = sizes.x_dtype == jnp.float32
  passes = tpu.FLOAT32_PASSES if is_float32 else 1
  rows = _body_rows(_chunk(sizes), sizes.n)
  # A fifth more bundles than cycles of the three products, with 768 columns.
  bundles = 1.2 * 3 * passes * rows * sizes.d / tpu.PRODUCTS_PER_CYCLE
  widest = min(
    tpu.INSTRUCTION_BUNDLES / bundles,
    _WIDEST_FLOAT32_BLOCK if is_float32 else max(_VOCAB_BLOCKS),
  )
  return [b for b in _VOCAB_BLOCKS if b <= widest] or [min(_VOCAB_BLOCKS)]


def _chunk(sizes: _Sizes) -> int:
  """Rows per product: fewer where more would mostly be padding."""

  def padded_work(chunk: int) -> float:
    rows = tpu.round_up(sizes.n, _body_rows(chunk, sizes.n))
    return (1 + _CHUNK_START_ROWS / chunk) * rows

  is_float32 = sizes.x_dtype == jnp.float32
  return min(_FLOAT32_CHUNKS if is_float32 else _CHUNKS, key=padded_work)


def _candidates(sizes: _Sizes) -> Iterator[_Candidate]:
  """All choices; of two that are as good, the one to prefer comes first."""
  chunk = _chunk(sizes)
  body = _body_rows(chunk, sizes.n)
  for vocab_block in _vocab_blocks(sizes):
    for blocks in range(1, pl.cdiv(sizes.n, body) + 1):
      rows = tpu.round_up(pl.cdiv(sizes.n, blocks), body)
      yield _Candidate(vocab_block, blocks, rows, chunk)


def _fits(sizes: _Sizes, c: _Candidate) -> bool:
  """Whether VMEM holds it, and a forward pass of the same rows."""
  overlap = _overlap(is_forward=False, keep=sizes.keep)
  needed = backward_bytes(
    Tiles(c.vocab_block, c.rows, c.chunk, overlap),
    sizes.d,
    sizes.x_dtype,
    sizes.table_dtype,
    keep=sizes.keep,
    blocks=c.blocks,
    transposed=sizes.transposed,
    more=sizes.more,
  )
  return needed <= _vmem_bytes(sizes) and _fits_forward(
    sizes, c, min(_VOCAB_BLOCKS)
  )


def _fits_forward(sizes: _Sizes, c: _Candidate, vocab_block: int) -> bool:
  """Whether VMEM holds a forward pass with this vocabulary block."""
  needed = forward_bytes(
    Tiles(
      vocab_block, c.rows, c.chunk, _overlap(is_forward=True, keep=sizes.keep)
    ),
    sizes.d,
    sizes.x_dtype,
    sizes.table_dtype,
    keep=sizes.keep,
    transposed=sizes.transposed,
    more=sizes.more,
  )
  return needed <= _vmem_bytes(sizes)


def _vmem_bytes(sizes: _Sizes) -> int:
  """What there is of VMEM: XLA may hold a bias and its gradient there whole."""
  return tpu.KERNEL_VMEM_BYTES - (2 * 4 * sizes.v if sizes.more else 0)


def _cycles(sizes: _Sizes, c: _Candidate) -> float:
  """Of the backward pass, divided by D: its products or its traffic.

  Each block of rows moves the table and its gradient, and to add to it, the
  latter is float32 and moves twice.
  """
  steps = pl.cdiv(sizes.v, c.vocab_block)
  products = 3 * c.rows * steps * (c.vocab_block + _BLOCK_START_ROWS)
  gradient = 8 if c.blocks > 1 else 4
  moved = sizes.v * (sizes.table_dtype.itemsize + gradient)
  return c.blocks * max(
    products / tpu.PRODUCTS_PER_CYCLE, moved / tpu.HBM_BYTES_PER_CYCLE
  )


def _memory_rank(sizes: _Sizes, c: _Candidate) -> int:
  """Less is better, whatever the cycles; within a rank these decide.

  0  one block of rows: its gradient of the table is final and needs no float32
     copy in HBM, which is worth the few percent that a middling vocabulary
     block costs
  1  one block of rows with a vocabulary block that is too narrow for that, or
     several blocks of rows, with float32 sums of the gradient in HBM
  2  several, with vocabulary blocks that do not divide V: the sums are of
     whole blocks, and cutting off what is past V copies them
  """
  if c.blocks > 1:
    return 1 if sizes.v % c.vocab_block == 0 else 2
  widest = _vocab_blocks(sizes)[0]
  enough = min(sizes.v, _NARROWEST_PREFERRED_BLOCK, widest)
  return 0 if c.vocab_block >= enough else 1
