"""Forward pass of `linear_cross_entropy`: normaliser and label's logit.

Logits are computed transposed, a tile being [words, rows]: both statistics are
then sums down the sublanes, which need no cross-lane traffic, and everything
that belongs to a row (label, maximum, sum) is a vector along the lanes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._sharding import like

LANES, SUBLANES = 128, 8
# A number per row, in VMEM: a vector along the lanes fills eight sublanes.
ROW_BYTES = 4 * SUBLANES
# Contractions of the last dimensions, and of the last with the first.
NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))
# Below every logit, and finite: its difference with itself is not NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Tiles:
  """What a kernel is specialised for.

  Attributes:
    words: rows of the table per grid step.
    rows: rows of x that stay in VMEM while the table streams by.
    chunk: rows of x per matrix product.
    overlap: chunks per loop body, at most: one's exponentials hide behind
      another's product, those of the last one do not.  More chunks lengthen the
      program, and the compiler's work on it.
    keep: whether the forward pass stores what the backward pass then need not
      compute again.
    masked: whether a table tile may hold rows that are not part of the
      vocabulary: those past its end, or padding.
    soft_cap: as in the public function.
    vmem_bytes: what the kernel may use.
  """

  words: int
  rows: int
  chunk: int
  overlap: int
  keep: bool
  masked: bool
  soft_cap: float | None
  vmem_bytes: int

  @property
  def at_once(self) -> int:
    """Chunks per loop body."""
    choices = range(self.overlap, 0, -1)
    return next(k for k in choices if self.rows % (k * self.chunk) == 0)

  def value_bytes(self) -> int:
    """VMEM for what a loop body holds: three float32 tiles of each chunk."""
    return 3 * 4 * self.at_once * self.words * self.chunk

  def chunks(self, i) -> list[Any]:
    """The rows of loop body `i`'s chunks, as slices."""
    starts = [(i * self.at_once + k) * self.chunk for k in range(self.at_once)]
    return [pl.ds(pl.multiple_of(s, self.chunk), self.chunk) for s in starts]


def round_up(n: int, unit: int) -> int:
  """The least multiple of `unit` that is not less than n."""
  return pl.cdiv(n, unit) * unit


def dot(a: jax.Array, b: jax.Array, dimensions) -> jax.Array:
  """Matrix product in the operands' precision, float32 out."""
  exact = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    dimensions,
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )


def resident(shape, index=lambda *_: (0, 0)) -> pl.BlockSpec:
  """A block that stays for many grid steps, hence needs one buffer."""
  return pl.BlockSpec(shape, index, pipeline_mode=pl.Buffered(1))


def table_tile(e_ref, cast_ref, dtype):
  """The tile of the table in x's dtype, cast on chip where it has another."""
  if e_ref.dtype == dtype:
    return e_ref
  cast_ref[...] = e_ref[...].astype(dtype)
  return cast_ref


def cast_scratch(words: int, d: int, table: jax.Array, dtype):
  """Scratch for `table_tile`, as small as can be where it is not used."""
  shape = (SUBLANES, 128) if table.dtype == dtype else (words, d)
  return pltpu.VMEM(shape, dtype)


def capped(logits: jax.Array, soft_cap: float | None) -> jax.Array:
  """The logits of the softmax."""
  if soft_cap is None:
    return logits
  return soft_cap * jnp.tanh(logits / soft_cap)


def cap_slope(logits: jax.Array, soft_cap: float | None) -> jax.Array | None:
  """Derivative of `capped` where its result is `logits`, None for 1."""
  return None if soft_cap is None else 1.0 - (logits / soft_cap) ** 2


def _kernel(
  limit_ref,  # [1] int32 in SMEM, words of the vocabulary
  labels_ref,  # [1, rows] int32
  x_ref,  # [rows, D]
  e_ref,  # [words, D]
  top_ref,  # [1, rows] float32
  total_ref,  # [1, rows] float32
  target_ref,  # [1, rows] float32
  *refs,  # kept_ref [words, rows] of x's dtype, if something is kept
  # shift_ref [1, 8, rows] float32, likewise
  # cast_ref [words, D] of x's dtype, if the table has another
  # max_ref [8, rows] float32: of every eighth word so far,
  # sum_ref the largest logit, the sum of exponentials relative to it,
  # hit_ref and the label's logit if it is among them
  tiles: Tiles,
):
  *kept_refs, cast_ref, max_ref, sum_ref, hit_ref = refs
  j = pl.program_id(1)

  @pl.when(j == 0)
  def _():
    max_ref[...] = jnp.full_like(max_ref, LOWEST)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    hit_ref[...] = jnp.zeros_like(hit_ref)

  e = table_tile(e_ref, cast_ref, x_ref.dtype)
  first = j * tiles.words
  word = jax.lax.broadcasted_iota(jnp.int32, (tiles.words, tiles.chunk), 0)

  def statistics(at, logits):
    logits = capped(logits, tiles.soft_cap)
    slope = cap_slope(logits, tiles.soft_cap)
    by_sublane = (tiles.words // SUBLANES, SUBLANES, tiles.chunk)
    hit = jnp.where(word == labels_ref[:, at] - first, logits, 0.0)
    hit_ref[:, at] += jnp.sum(hit.reshape(by_sublane), axis=0)
    if tiles.masked:
      logits = jnp.where(word < limit_ref[0] - first, logits, -jnp.inf)
    logits = logits.reshape(by_sublane)
    old = max_ref[:, at]
    new = jnp.maximum(old, jnp.max(logits, axis=0))
    exps = jnp.exp(logits - new)
    sum_ref[:, at] *= jnp.exp(old - new)
    sum_ref[:, at] += jnp.sum(exps, axis=0)
    max_ref[:, at] = new
    if tiles.keep:
      kept_ref, shift_ref = kept_refs
      kept = exps.reshape(tiles.words, tiles.chunk)
      if slope is not None:
        # At a masked word the slope may be that of anything.
        kept = jnp.where(kept > 0, kept * slope, 0.0)
      kept_ref[:, at] = kept.astype(kept_ref.dtype)
      shift_ref[0, :, at] = new

  @pl.loop(0, tiles.rows // (tiles.at_once * tiles.chunk))
  def _(i):
    ats = tiles.chunks(i)
    products = [dot(e[...], x_ref[at, :], NT) for at in ats]
    for at, logits in zip(ats, products, strict=True):
      statistics(at, logits)

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    top = jnp.max(max_ref[...], axis=0, keepdims=True)
    parts = sum_ref[...] * jnp.exp(max_ref[...] - top)
    top_ref[...] = top
    total_ref[...] = jnp.sum(parts, axis=0, keepdims=True)
    target_ref[...] = jnp.sum(hit_ref[...], axis=0, keepdims=True)


def forward(
  tiles: Tiles,
  x: jax.Array,
  embedding: jax.Array,
  labels: jax.Array,
  limit: jax.Array,
) -> tuple[jax.Array, ...]:
  """Normaliser and label's logit of every row.

  Args:
    tiles: their sizes; `tiles.rows` divides R.
    x: [R, D].
    embedding: [V, D].
    labels: [R] int32; one that is not a row of the table matches no word.
    limit: [1] int32, words of the vocabulary.

  Returns:
    Three [R] float32: the largest logit, the sum of exponentials relative to
    it, the label's logit, which is 0 where no word matches.  With `tiles.keep`
    also what `kept_types` describes: exponentials relative to a shift, times
    the slope of the soft cap, and the shift.
  """
  n, d = x.shape
  of_rows = resident((1, tiles.rows), lambda i, j: (0, i))
  row_stats = like((1, n), jnp.float32, x)
  kept_specs = [
    pl.BlockSpec((tiles.words, tiles.rows), lambda i, j: (j, i)),
    pl.BlockSpec((1, SUBLANES, tiles.rows), lambda i, j: (j, 0, i)),
  ]
  results = pl.pallas_call(
    functools.partial(_kernel, tiles=tiles),
    name="linear_cross_entropy_fwd",
    grid=(n // tiles.rows, pl.cdiv(embedding.shape[0], tiles.words)),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      of_rows,
      resident((tiles.rows, d), lambda i, j: (i, 0)),
      pl.BlockSpec((tiles.words, d), lambda i, j: (j, 0)),
    ],
    out_specs=[*[of_rows] * 3, *(kept_specs if tiles.keep else [])],
    out_shape=[
      *[row_stats] * 3,
      *(kept_types(tiles.words, x, embedding) if tiles.keep else []),
    ],
    scratch_shapes=[
      cast_scratch(tiles.words, d, embedding, x.dtype),
      *[pltpu.VMEM((SUBLANES, tiles.rows), jnp.float32)] * 3,
    ],
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=tiles.vmem_bytes),
  )(limit, labels[None], x, embedding)
  return *(row[0] for row in results[:3]), *results[3:]


def forward_bytes(
  tiles: Tiles, d: int, x_dtype: jnp.dtype, table_dtype: jnp.dtype
) -> int:
  """VMEM that `forward` takes: its operands' buffers, scratch and values."""
  x_size, table_size = x_dtype.itemsize, table_dtype.itemsize
  cast = x_size if x_dtype != table_dtype else 0
  table = tiles.words * round_up(d, LANES) * (2 * table_size + cast)
  rows = tiles.rows * (round_up(d, LANES) * x_size + 7 * ROW_BYTES)
  kept = 2 * tiles.rows * (tiles.words * x_size + ROW_BYTES)
  return table + rows + tiles.value_bytes() + (kept if tiles.keep else 0)


def kept_types(words: int, x: jax.Array, embedding: jax.Array):
  """Types of kept [V, R], V up to whole tiles, and shift [tiles, 8, R]."""
  n, steps = x.shape[0], pl.cdiv(embedding.shape[0], words)
  return (
    like((steps * words, n), x.dtype, x),
    like((steps, SUBLANES, n), jnp.float32, x),
  )
