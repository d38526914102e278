"""Forward pass of linear cross-entropy: the statistics of every row.

One grid step is a block of the vocabulary against a block of rows, which stays
while the vocabulary goes by:

  1. start       at the first block: the maxima, the sums and the labels' logits
  2. cast        the block of the table to x's dtype, if it has another
  3. for each chunk of rows
     multiply    z = E x^T, of a few chunks before the rest of them, so that the
                 matrix units work on one while the vector unit is at another
     label       the label's logit, if the block has it
     mask        what is not vocabulary to -inf, if the block may hold such
     accumulate  the softmax online:  m' = max(m, max z),  e = exp(z - m'),
                 s' = s exp(m - m') + sum e
     keep        e and m' for the backward pass, in mode "chunked"
  4. finish      at the last block: one maximum and one sum of each row's eight

Logits are computed transposed, a tile being [vocab_block, rows]: maxima and
sums are then taken down the sublanes, which needs no cross-lane traffic, and
all that belongs to a row (label, maximum, sum) is a vector along the lanes.
They are kept apart for the eight sublanes until the last step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .._frame.manual import varying_like
from .bias import bias_block, bias_row, plus_bias
from .spec import (
  LOWEST_LOGIT,
  NO_WORD,
  Exponentials,
  Kept,
  Problem,
  RowArrays,
  Statistics,
  cap_slope,
  capped,
)
from .tiles import Tiles, for_columns, tiles_of

# --- what both passes share ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Static:
  """What a kernel is specialised for.

  Attributes:
    tiles: the sizes.
    soft_cap: of the logits, None for none.
    transposed: whether the table is [D, V].
    masked: whether a block of the table may hold rows that are not vocabulary:
      those past its end, or padding.
  """

  tiles: Tiles
  soft_cap: float | None
  masked: bool
  transposed: bool = False

  @classmethod
  def of(cls, p: Problem, tiles: Tiles, v: int) -> Static:
    """For a table of v rows."""
    padded = p.vocab_is_split or p.valid_vocab_size != v
    masked = padded or v % tiles.vocab_block != 0
    return cls(tiles, p.logits_soft_cap, masked, p.transposed)

  def table_block(self, d: int, index: Callable[..., Any]) -> pl.BlockSpec:
    """A block of the table; `index` is of the grid's indices."""
    block = self.tiles.vocab_block
    if self.transposed:
      return pl.BlockSpec((d, block), lambda *grid: (0, index(*grid)))
    return pl.BlockSpec((block, d), lambda *grid: (index(*grid), 0))


def words_of_block(tiles: Tiles) -> jax.Array:
  """[vocab_block, chunk]: each logit's word, counted from the block's first."""
  shape = (tiles.vocab_block, tiles.chunk)
  return jax.lax.broadcasted_iota(jnp.int32, shape, 0)


# --- the kernel ---------------------------------------------------------------


class Inputs(NamedTuple):
  """Refs of the kernel's inputs."""

  valid_vocab: Any  # [1] int32 in SMEM
  labels: Any  # [1, rows] int32
  x: Any  # [rows, D]
  table: Any  # [vocab_block, D]; [D, vocab_block] if it is transposed
  bias: Any  # [1, vocab_block] float32, None for none


class Outputs(NamedTuple):
  """Refs of its outputs."""

  top: Any  # [1, rows] float32
  total: Any  # [1, rows] float32
  target: Any  # [1, rows] float32
  logit_sum: Any  # [1, rows] float32, None if not wanted
  best: Any  # [1, rows] float32, None if not wanted
  kept: Any  # Exponentials [vocab_block, rows] and [1, 8, rows], or None


class State(NamedTuple):
  """Refs of its scratch: of every eighth word so far, for each row."""

  table: Any  # [vocab_block, D] of x's dtype, or None if the table is so
  bias: Any  # [vocab_block, LANES] float32, or None
  top: Any  # [8, rows] float32, the largest logit
  total: Any  # [8, rows] float32, the sum of exponentials relative to it
  target: Any  # [8, rows] float32, the label's logit if it is among them
  logit_sum: Any  # [8, rows] float32, or None
  best: Any  # [8, rows] float32, the word of the largest logit, or None


def _kernel(i: Inputs, o: Outputs, s: State, *, static: Static):
  step, tiles = pl.program_id(1), static.tiles

  @pl.when(step == 0)
  def _():
    _start(s)

  table = _cast_table(i, s, static)
  if s.bias is not None:
    s.bias[...] = tpu.lanes_to_column(i.bias[...])
  first, word = step * tiles.vocab_block, words_of_block(tiles)

  @pl.loop(0, tiles.bodies)
  def _(body):
    chunks = tiles.chunks(body)
    products = [tpu.dot(table[...], i.x[at, :], tpu.NT) for at in chunks]
    for at, product in zip(chunks, products, strict=True):
      logits = capped(plus_bias(product, s.bias), static.soft_cap)
      slope = cap_slope(logits, static.soft_cap)
      s.target[:, at] += _label_logits(word, i.labels[:, at], first, logits)
      inside = word < i.valid_vocab[0] - first if static.masked else None
      if s.logit_sum is not None:
        s.logit_sum[:, at] += _sum_of_logits(logits, inside)
      if inside is not None:
        logits = jnp.where(inside, logits, -jnp.inf)
      if s.best is not None:
        s.best[:, at] = _best_word(s, at, logits, word + first)
      exps, top = _accumulate(s, at, logits)
      if o.kept is not None:
        kept = _with_slope(exps, slope)
        o.kept.exps[:, at] = kept.astype(o.kept.exps.dtype)
        o.kept.shift[0, :, at] = top

  @pl.when(step == pl.num_programs(1) - 1)
  def _():
    _finish(o, s)


def _start(s: State) -> None:
  s.top[...] = jnp.full_like(s.top, LOWEST_LOGIT)
  s.total[...] = jnp.zeros_like(s.total)
  s.target[...] = jnp.zeros_like(s.target)
  for ref in (s.logit_sum, s.best):
    if ref is not None:
      ref[...] = jnp.zeros_like(ref)


def _cast_table(i: Inputs, s: State, static: Static) -> Any:
  """The ref of the table's block [vocab_block, D] in x's dtype."""
  if s.table is None:
    return i.table
  if static.transposed:

    def turn(at):
      s.table[:, at] = i.table[at, :].astype(s.table.dtype).T

    for_columns(s.table.shape[1], turn)
    return s.table
  s.table[...] = i.table[...].astype(s.table.dtype)
  return s.table


def _by_sublane(tile: jax.Array) -> jax.Array:
  """[vocab_block, chunk] as [vocab_block / 8, 8, chunk]."""
  return tile.reshape(-1, tpu.SUBLANES, tile.shape[1])


def _label_logits(
  word: jax.Array, labels: jax.Array, first: Any, logits: jax.Array
) -> jax.Array:
  """[8, chunk]: each row's label's logit in one sublane, 0 in the others."""
  label_logits = jnp.where(word == labels - first, logits, 0.0)
  return jnp.sum(_by_sublane(label_logits), axis=0)


def _sum_of_logits(logits: jax.Array, inside: jax.Array | None) -> jax.Array:
  """[8, chunk]: the sums of what is vocabulary."""
  if inside is not None:
    logits = jnp.where(inside, logits, 0.0)
  return jnp.sum(_by_sublane(logits), axis=0)


def _best_word(
  s: State, at: Any, logits: jax.Array, word: jax.Array
) -> jax.Array:
  """[8, chunk]: each row's word of the largest logit, so far and in a tile."""
  logits, old = _by_sublane(logits), s.top[:, at]
  new = _running_maximum(old, logits)
  words = _by_sublane(word.astype(jnp.float32))
  first = jnp.min(jnp.where(logits == new, words, NO_WORD), axis=0)
  return jnp.where(new > old, first, s.best[:, at])


def _accumulate(
  s: State, at: Any, logits: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Adds a tile to the online softmax.

  Returns:
    [vocab_block, chunk] exponentials, and the maxima they are relative to,
    [8, chunk].
  """
  logits = _by_sublane(logits)
  old = s.top[:, at]
  new = _running_maximum(old, logits)
  exps = jnp.exp(logits - new)
  s.total[:, at] *= _rescaling(old, new)
  s.total[:, at] += jnp.sum(exps, axis=0)
  s.top[:, at] = new
  return exps.reshape(-1, exps.shape[-1]), new


def _running_maximum(old: jax.Array, logits: jax.Array) -> jax.Array:
  return jnp.maximum(old, jnp.max(logits, axis=0))


def _rescaling(old: jax.Array, new: jax.Array) -> jax.Array:
  """What makes a sum relative to the old maximum one relative to the new."""
  return jnp.exp(old - new)


def _with_slope(exps: jax.Array, slope: jax.Array | None) -> jax.Array:
  """Exponentials times the slope of the soft cap, which dz wants with them."""
  if slope is None:
    return exps
  # Where there is no vocabulary the slope may be that of anything.
  return jnp.where(exps > 0, exps * slope, 0.0)


def _finish(o: Outputs, s: State) -> None:
  top = jnp.max(s.top[...], axis=0, keepdims=True)
  parts = s.total[...] * jnp.exp(s.top[...] - top)
  o.top[...] = top
  o.total[...] = jnp.sum(parts, axis=0, keepdims=True)
  o.target[...] = jnp.sum(s.target[...], axis=0, keepdims=True)
  if s.logit_sum is not None:
    o.logit_sum[...] = jnp.sum(s.logit_sum[...], axis=0, keepdims=True)
  if s.best is not None:
    words = jnp.where(s.top[...] == top, s.best[...], NO_WORD)
    o.best[...] = jnp.min(words, axis=0, keepdims=True)


# --- the call -----------------------------------------------------------------


def forward(
  p: Problem, a: RowArrays, *, keep: bool
) -> tuple[Statistics, Kept | None]:
  """The statistics of all rows, and with `keep` what mode "chunked" keeps."""
  assert p.config is not None
  keep = keep and p.keeps_exponentials
  (n, d), v = a.x.shape, p.vocab(a.embedding)
  tiles = tiles_of(p.config, n, v, is_forward=True, keep=keep)
  static = Static.of(p, tiles, v)
  block, rows = tiles.vocab_block, tiles.rows
  of_rows = tpu.resident((1, rows), lambda i, j: (0, i))
  kept = Exponentials(
    pl.BlockSpec((block, rows), lambda i, j: (j, i)),
    pl.BlockSpec((1, tpu.SUBLANES, rows), lambda i, j: (j, 0, i)),
  )
  types = _types(p, a, keep)
  specs = Outputs(of_rows, of_rows, of_rows, of_rows, of_rows, kept)
  (outs,) = pl.pallas_call(
    functools.partial(_kernel, static=static),
    name="linear_cross_entropy_fwd",
    grid=(n // rows, pl.cdiv(v, block)),
    in_specs=[
      Inputs(
        valid_vocab=pl.BlockSpec(memory_space=pltpu.SMEM),
        labels=of_rows,
        x=tpu.resident((rows, d), lambda i, j: (i, 0)),
        table=static.table_block(d, lambda i, j: j),
        bias=bias_block(a, block, lambda i, j: j),
      )
    ],
    out_specs=[_where_present(types, specs)],
    out_shape=[types],
    scratch_shapes=[_scratch(static, a, types)],
    compiler_params=tpu.compiler_params(),
  )(Inputs(a.valid_vocab, a.labels[None], a.x, a.embedding, bias_row(a)))
  rows_of = (None if out is None else out[0] for out in outs[:-1])
  return Statistics(*rows_of), Kept(outs.kept) if keep else None


def _types(p: Problem, a: RowArrays, keep: bool) -> Outputs:
  """Of all results that there are."""
  row = varying_like(a.x, (1, a.x.shape[0]), jnp.float32)
  return Outputs(
    top=row,
    total=row,
    target=row,
    logit_sum=row if p.label_smoothing else None,
    best=row if p.predicts else None,
    kept=exponentials_types(p, a) if keep else None,
  )


def _where_present(types: Outputs, specs: Outputs) -> Outputs:
  pairs = zip(types, specs, strict=True)
  return Outputs(*(None if t is None else spec for t, spec in pairs))


def _scratch(static: Static, a: RowArrays, types: Outputs) -> State:
  tiles, dtype = static.tiles, a.x.dtype
  is_ready = a.embedding.dtype == dtype and not static.transposed
  row = pltpu.VMEM((tpu.SUBLANES, tiles.rows), jnp.float32)
  block = tiles.vocab_block
  column = pltpu.VMEM((block, tpu.LANES), jnp.float32)
  return State(
    table=None if is_ready else pltpu.VMEM((block, a.x.shape[1]), dtype),
    bias=None if a.bias is None else column,
    top=row,
    total=row,
    target=row,
    logit_sum=None if types.logit_sum is None else row,
    best=None if types.best is None else row,
  )


def exponentials_types(p: Problem, a: RowArrays) -> Exponentials:
  """Shapes and dtypes of what the forward pass keeps."""
  assert p.config is not None
  n, v = a.x.shape[0], p.vocab(a.embedding)
  block = tiles_of(p.config, n, v, is_forward=True, keep=True).vocab_block
  steps = pl.cdiv(v, block)
  return Exponentials(
    varying_like(a.x, (steps * block, n), a.x.dtype),
    varying_like(a.x, (steps, tpu.SUBLANES, n), jnp.float32),
  )
