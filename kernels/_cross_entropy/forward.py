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
from .._frame.sharding import varying_like
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
from .tiles import Tiles, forward_tiles

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


class VocabBlock(NamedTuple):
  """Where the block of the table that is at hand lies in the vocabulary."""

  row: Any  # [vocab_block, chunk] int32, of each logit its row in the block
  first: Any  # scalar int32, the table's row at which the block begins

  @classmethod
  def at(cls, step: Any, tiles: Tiles) -> VocabBlock:
    """The block of a step."""
    first = step * tiles.vocab_block
    shape = (tiles.vocab_block, tiles.chunk)
    return cls(jax.lax.broadcasted_iota(jnp.int32, shape, 0), first)


# --- the kernel ---------------------------------------------------------------


class Inputs(NamedTuple):
  """Refs of the kernel's inputs."""

  valid_vocab: Any  # [1] int32 in SMEM
  labels: Any  # [1, rows] int32
  x: Any  # [rows, D]
  table: Any  # [vocab_block, D]


class Outputs(NamedTuple):
  """Refs of its outputs; `exps` and `shift` if they are kept, else None."""

  top: Any  # [1, rows] float32
  total: Any  # [1, rows] float32
  target: Any  # [1, rows] float32
  exps: Any  # [vocab_block, rows] of x's dtype
  shift: Any  # [1, 8, rows] float32


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
  block = VocabBlock.at(step, tiles)

  @pl.loop(0, tiles.bodies)
  def _(body):
    chunks = tiles.chunks(body)
    products = [tpu.dot(table[...], i.x[at, :], tpu.NT) for at in chunks]
    for at, product in zip(chunks, products, strict=True):
      logits = capped(product, static.soft_cap)
      slope = cap_slope(logits, static.soft_cap)
      s.target[:, at] += _label_logits(block, i.labels[:, at], logits)
      if static.masked:
        logits = _mask(block, i.valid_vocab[0], logits)
      exps, top = _accumulate(s, at, logits)
      if o.exps is not None:
        o.exps[:, at] = _with_slope(exps, slope).astype(o.exps.dtype)
        o.shift[0, :, at] = top

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
  block: VocabBlock, labels: jax.Array, logits: jax.Array
) -> jax.Array:
  """[8, chunk]: each row's label's logit in one sublane, 0 in the others."""
  label_logits = jnp.where(block.row == labels - block.first, logits, 0.0)
  return jnp.sum(_by_sublane(label_logits), axis=0)


def _mask(block: VocabBlock, valid_vocab: Any, logits: jax.Array) -> jax.Array:
  """The logits, -inf where there is no vocabulary."""
  return jnp.where(block.row < valid_vocab - block.first, logits, -jnp.inf)


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
  tiles = forward_tiles(p.config, n, v, keep)
  block, rows = tiles.vocab_block, tiles.rows
  of_rows = tpu.resident((1, rows), lambda i, j: (0, i))
  row_type = varying_like(a.x, (1, n), jnp.float32)
  kept_types = exponentials_types(p, a) if keep else Exponentials(None, None)
  exps_spec = pl.BlockSpec((block, rows), lambda i, j: (j, i))
  shift_spec = pl.BlockSpec((1, tpu.SUBLANES, rows), lambda i, j: (j, 0, i))
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
    out_specs=[
      Outputs(
        *[of_rows] * 3,
        exps=exps_spec if keep else None,
        shift=shift_spec if keep else None,
      )
    ],
    out_shape=[Outputs(*[row_type] * 3, *kept_types)],
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
  return statistics, Kept(Exponentials(outs.exps, outs.shift)) if keep else None


def exponentials_types(p: Problem, a: RowArrays) -> Exponentials:
  """Shapes and dtypes of what the forward pass keeps."""
  assert p.config is not None
  n, v = a.x.shape[0], a.embedding.shape[0]
  block = forward_tiles(p.config, n, v, keep=True).vocab_block
  steps = pl.cdiv(v, block)
  return Exponentials(
    varying_like(a.x, (steps * block, n), a.x.dtype),
    varying_like(a.x, (steps, tpu.SUBLANES, n), jnp.float32),
  )
