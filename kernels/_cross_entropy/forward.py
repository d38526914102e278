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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .._frame.manual import varying_like
from .spec import (
  LOWEST_LOGIT,
  Exponentials,
  Kept,
  Problem,
  RowArrays,
  Statistics,
  cap_slope,
  capped,
)
from .tiles import Tiles, tiles_of

# --- what both passes share ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Static:
  """What a kernel is specialised for.

  Attributes:
    tiles: the sizes.
    soft_cap: of the logits, None for none.
    masked: whether a block of the table may hold rows that are not vocabulary:
      those past its end, or padding.
  """

  tiles: Tiles
  soft_cap: float | None
  masked: bool

  @classmethod
  def of(cls, p: Problem, tiles: Tiles, v: int) -> Static:
    """For a table of v rows."""
    padded = p.vocab_is_split or p.valid_vocab_size != v
    masked = padded or v % tiles.vocab_block != 0
    return cls(tiles, p.logits_soft_cap, masked)


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
  table: Any  # [vocab_block, D]


class Outputs(NamedTuple):
  """Refs of its outputs."""

  top: Any  # [1, rows] float32
  total: Any  # [1, rows] float32
  target: Any  # [1, rows] float32
  kept: Any  # Exponentials [vocab_block, rows] and [1, 8, rows], or None


class State(NamedTuple):
  """Refs of its scratch: of every eighth word so far, for each row."""

  table: Any  # [vocab_block, D] of x's dtype, or None if the table has it
  top: Any  # [8, rows] float32, the largest logit
  total: Any  # [8, rows] float32, the sum of exponentials relative to it
  target: Any  # [8, rows] float32, the label's logit if it is among them


def _kernel(i: Inputs, o: Outputs, s: State, *, static: Static):
  step, tiles = pl.program_id(1), static.tiles

  @pl.when(step == 0)
  def _():
    _start(s)

  table = _cast_table(i, s)
  first, word = step * tiles.vocab_block, words_of_block(tiles)

  @pl.loop(0, tiles.bodies)
  def _(body):
    chunks = tiles.chunks(body)
    products = [tpu.dot(table[...], i.x[at, :], tpu.NT) for at in chunks]
    for at, product in zip(chunks, products, strict=True):
      logits = capped(product, static.soft_cap)
      slope = cap_slope(logits, static.soft_cap)
      s.target[:, at] += _label_logits(word, i.labels[:, at], first, logits)
      if static.masked:
        logits = jnp.where(word < i.valid_vocab[0] - first, logits, -jnp.inf)
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


def _cast_table(i: Inputs, s: State) -> Any:
  """The ref of the table's block in x's dtype."""
  if s.table is None:
    return i.table
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


# --- the call -----------------------------------------------------------------


def forward(
  p: Problem, a: RowArrays, *, keep: bool
) -> tuple[Statistics, Kept | None]:
  """The statistics of all rows, and with `keep` what mode "chunked" keeps."""
  assert p.config is not None
  keep = keep and p.keeps_exponentials
  (n, d), v = a.x.shape, a.embedding.shape[0]
  tiles = tiles_of(p.config, n, v, is_forward=True, keep=keep)
  block, rows = tiles.vocab_block, tiles.rows
  of_rows = tpu.resident((1, rows), lambda i, j: (0, i))
  row_type = varying_like(a.x, (1, n), jnp.float32)
  kept = Exponentials(
    pl.BlockSpec((block, rows), lambda i, j: (j, i)),
    pl.BlockSpec((1, tpu.SUBLANES, rows), lambda i, j: (j, 0, i)),
  )
  kept_type = exponentials_types(p, a) if keep else None
  row_scratch = pltpu.VMEM((tpu.SUBLANES, rows), jnp.float32)
  same_dtype = a.embedding.dtype == a.x.dtype
  (outs,) = pl.pallas_call(
    functools.partial(_kernel, static=Static.of(p, tiles, v)),
    name="linear_cross_entropy_fwd",
    grid=(n // rows, pl.cdiv(v, block)),
    in_specs=[
      Inputs(
        valid_vocab=pl.BlockSpec(memory_space=pltpu.SMEM),
        labels=of_rows,
        x=tpu.resident((rows, d), lambda i, j: (i, 0)),
        table=pl.BlockSpec((block, d), lambda i, j: (j, 0)),
      )
    ],
    out_specs=[Outputs(of_rows, of_rows, of_rows, kept if keep else None)],
    out_shape=[Outputs(row_type, row_type, row_type, kept_type)],
    scratch_shapes=[
      State(
        table=None if same_dtype else pltpu.VMEM((block, d), a.x.dtype),
        top=row_scratch,
        total=row_scratch,
        target=row_scratch,
      )
    ],
    compiler_params=tpu.compiler_params(),
  )(Inputs(a.valid_vocab, a.labels[None], a.x, a.embedding))
  statistics = Statistics(outs.top[0], outs.total[0], outs.target[0])
  return statistics, Kept(outs.kept) if keep else None


def exponentials_types(p: Problem, a: RowArrays) -> Exponentials:
  """Shapes and dtypes of what the forward pass keeps."""
  assert p.config is not None
  n, v = a.x.shape[0], a.embedding.shape[0]
  block = tiles_of(p.config, n, v, is_forward=True, keep=True).vocab_block
  steps = pl.cdiv(v, block)
  return Exponentials(
    varying_like(a.x, (steps * block, n), a.x.dtype),
    varying_like(a.x, (steps, tpu.SUBLANES, n), jnp.float32),
  )
