"""Backward pass of `linear_cross_entropy`: one kernel, both gradients.

Each tile of logits is recomputed, again as [words, rows], turned into

    dz = dlse * exp(z - lse) + dtarget * [word is the label]

and used twice: dE += dz x needs no transpose, and neither does dx^T += E^T dz
with the tile of the table transposed, once, whatever the number of rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._linear_cross_entropy_fwd import (
  LANES,
  NN,
  NT,
  ROW_BYTES,
  SUBLANES,
  Tiles,
  cap_slope,
  capped,
  cast_scratch,
  dot,
  resident,
  round_up,
  table_tile,
)
from ._sharding import like

# Columns of D per product of dE: its float32 result must not spill too much.
_COLUMNS = 512


def _from_logits(tiles, word, logits, limit, labels, rows):
  """dz [words, chunk] in float32 from the logits before the soft cap."""
  lse, dlse, dtarget = (rows[k : k + 1] for k in range(3))
  z = capped(logits, tiles.soft_cap)
  dz = jnp.exp(z - lse) * dlse
  dz = jnp.where(word == labels, dz + dtarget, dz)
  slope = cap_slope(z, tiles.soft_cap)
  if slope is not None:
    dz *= slope
  return jnp.where(word < limit, dz, 0.0) if tiles.masked else dz


def _from_kept(tiles, word, kept, shift, labels, rows):
  """dz [words, chunk] in float32 from what the forward pass kept.

  The label's word is computed afresh: what it keeps is rounded, and a
  probability near 1 has nothing left of its digits when 1 is subtracted.
  """
  lse, dlse, dtarget, target = (rows[k : k + 1] for k in range(4))
  scale = jnp.exp(shift - lse) * dlse
  kept = kept.astype(jnp.float32).reshape(-1, SUBLANES, tiles.chunk)
  dz = (kept * scale).reshape(tiles.words, tiles.chunk)
  of_label = jnp.exp(target - lse) * dlse + dtarget
  slope = cap_slope(target, tiles.soft_cap)
  if slope is not None:
    of_label *= slope
  return jnp.where(word == labels, of_label, dz)


def _columns(d: int, body) -> None:
  """Calls body(start, size) over [0, d) in pieces of at most `_COLUMNS`."""

  @pl.loop(0, d // _COLUMNS)
  def _(i):
    body(pl.multiple_of(i * _COLUMNS, _COLUMNS), _COLUMNS)

  if d % _COLUMNS:
    body(d // _COLUMNS * _COLUMNS, d % _COLUMNS)


def _kernel(
  scalars_ref,  # [2] int32 in SMEM: words of the vocabulary, first row in kept
  labels_ref,  # [1, rows] int32
  stats_ref,  # [4, rows] float32: lse, cotangents of lse and target, target
  x_ref,  # [rows, D]
  e_ref,  # [words, D]
  *refs,  # kept_ref [V, R] in HBM and shift_ref [1, 8, rows], if kept;
  # de_in_ref [words, D], if blocks of rows came before this one;
  # dx_ref [rows, D] in HBM
  # de_ref [words, D]
  # cast_ref [words, D] of x's dtype, if the table has another
  # et_ref [D, words]
  # dz_ref [words, rows]
  # dxt_ref [D, rows] float32
  # stage_ref [chunk, D], on dx's way to HBM
  # piece_ref [2, words, chunks of a loop body], on its way from kept
  # semaphores [3], of piece's two halves and of stage
  tiles: Tiles,
):
  *in_refs, dx_ref, de_ref, cast_ref, et_ref, dz_ref = refs[:-4]
  dxt_ref, stage_ref, piece_ref, semaphores = refs[-4:]
  kept_refs, de_in_refs = in_refs[: 2 * tiles.keep], in_refs[2 * tiles.keep :]
  j = pl.program_id(0)
  words, chunk = tiles.words, tiles.chunk
  limit = scalars_ref[0] - j * words
  d = x_ref.shape[1]

  @pl.when(j == 0)
  def _():
    dxt_ref[...] = jnp.zeros_like(dxt_ref)

  e = table_tile(e_ref, cast_ref, x_ref.dtype)
  et = e[...].T
  if tiles.masked:
    # dz is 0 there, but 0 times what is past the table's end may be NaN.
    column = jax.lax.broadcasted_iota(jnp.int32, et.shape, 1)
    et = jnp.where(column < limit, et, jnp.zeros_like(et))
  et_ref[...] = et
  word = jax.lax.broadcasted_iota(jnp.int32, (words, chunk), 0)
  bodies = tiles.rows // (tiles.at_once * chunk)

  def fetch(step):
    """The copy of loop body `step`'s part of kept, counted over all tiles."""
    size = piece_ref.shape[2]
    start = scalars_ref[1] + step % bodies * size
    at = pl.ds(pl.multiple_of(start, size), size)
    of_tile = pl.ds(pl.multiple_of(step // bodies * words, words), words)
    return pltpu.make_async_copy(
      kept_refs[0].at[of_tile, at],
      piece_ref.at[step % 2],
      semaphores.at[step % 2],
    )

  if tiles.keep:

    @pl.when(j == 0)
    def _():
      fetch(0).start()

  @pl.loop(0, bodies)
  def _(i):
    ats = tiles.chunks(i)
    if tiles.keep:
      step = j * bodies + i

      @pl.when(step + 1 < pl.num_programs(0) * bodies)
      def _():
        fetch(step + 1).start()

      fetch(step).wait()
      piece = piece_ref.at[step % 2]
      sources = [piece[:, k * chunk : (k + 1) * chunk] for k in range(len(ats))]
    else:
      sources = [dot(e[...], x_ref[at, :], NT) for at in ats]
    for at, source in zip(ats, sources, strict=True):
      labels, rows = labels_ref[:, at] - j * words, stats_ref[:, at]
      if tiles.keep:
        shift = kept_refs[1][0, :, at]
        dz = _from_kept(tiles, word, source, shift, labels, rows)
      else:
        dz = _from_logits(tiles, word, source, limit, labels, rows)
      dz_ref[:, at] = dz = dz.astype(dz_ref.dtype)
      dxt_ref[:, at] += dot(et_ref[...], dz, NN)

  def table_gradient(start, size):
    at = pl.ds(start, size)
    de = dot(dz_ref[...], x_ref[:, at], NN)
    for ref in de_in_refs:
      de += ref[:, at]
    de_ref[:, at] = de.astype(de_ref.dtype)

  _columns(d, table_gradient)

  @pl.when(j == pl.num_programs(0) - 1)
  def _():
    @pl.loop(0, tiles.rows // chunk)
    def _(i):
      at = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
      stage_ref[...] = dxt_ref[:, at].T.astype(stage_ref.dtype)
      copy = pltpu.make_async_copy(
        stage_ref, dx_ref.at[at, :], semaphores.at[2]
      )
      copy.start()
      copy.wait()


def _row_block(
  tiles: Tiles,
  table_gradient,
  embedding: jax.Array,
  scalars: jax.Array,
  labels: jax.Array,
  stats: jax.Array,
  x: jax.Array,
  kept: tuple[jax.Array, ...],
  *de: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """dx and dE of `tiles.rows` rows; onto de, in place, if it is given."""
  rows, d = x.shape
  tile = pl.BlockSpec((tiles.words, d), lambda j: (j, 0))
  kept_specs = [
    pl.BlockSpec(memory_space=pl.ANY),
    pl.BlockSpec((1, SUBLANES, rows), lambda j: (j, 0, 0)),
  ]
  body = tiles.at_once * tiles.chunk if tiles.keep else LANES
  return pl.pallas_call(
    functools.partial(_kernel, tiles=tiles),
    name="linear_cross_entropy_bwd",
    grid=(pl.cdiv(embedding.shape[0], tiles.words),),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      resident((1, rows)),
      resident((4, rows)),
      resident((rows, d)),
      tile,
      *(kept_specs if tiles.keep else []),
      *[tile] * len(de),
    ],
    out_specs=[pl.BlockSpec(memory_space=pl.ANY), tile],
    out_shape=[like(x.shape, x.dtype, x), table_gradient],
    input_output_aliases={5 + len(kept): 1} if de else {},
    scratch_shapes=[
      cast_scratch(tiles.words, d, embedding, x.dtype),
      pltpu.VMEM((d, tiles.words), x.dtype),
      pltpu.VMEM((tiles.words, rows), x.dtype),
      pltpu.VMEM((d, rows), jnp.float32),
      pltpu.VMEM((tiles.chunk, d), x.dtype),
      pltpu.VMEM((2, tiles.words if tiles.keep else SUBLANES, body), x.dtype),
      pltpu.SemaphoreType.DMA((3,)),
    ],
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=tiles.vmem_bytes),
  )(scalars, labels, stats, x, embedding, *kept, *de)


def backward_bytes(
  tiles: Tiles,
  d: int,
  x_dtype: jnp.dtype,
  table_dtype: jnp.dtype,
  blocks: int,
) -> int:
  """VMEM that `backward` takes: its operands' buffers, scratch and values."""
  d = round_up(d, LANES)
  x_size, table_size = x_dtype.itemsize, table_dtype.itemsize
  cast = x_size if x_dtype != table_dtype else 0
  gradient = 2 * table_size if blocks == 1 else 2 * 2 * 4
  table = tiles.words * d * (2 * table_size + cast + x_size + gradient)
  rows = tiles.rows * (d * (x_size + 4) + tiles.words * x_size + 2 * ROW_BYTES)
  body = tiles.at_once * tiles.chunk
  kept = 2 * (tiles.words * body * x_size + tiles.rows * ROW_BYTES)
  values = tiles.value_bytes() + 2 * 4 * tiles.words * min(_COLUMNS, d)
  stage = tiles.chunk * d * x_size
  return table + rows + stage + values + (kept if tiles.keep else 0)


def backward(
  tiles: Tiles,
  x: jax.Array,
  embedding: jax.Array,
  labels: jax.Array,
  limit: jax.Array,
  statistics: tuple[jax.Array, ...],
  cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Gradients of x and the table.

  Where x does not fit VMEM at once, its rows go by in blocks, each of which
  reads the table and adds to the table's gradient, in float32 in HBM.

  Args:
    tiles: as `forward` had them, but for the words if nothing was kept.
    x: as `forward` had it, like all to `limit`.
    embedding: likewise.
    labels: likewise.
    limit: likewise.
    statistics: what `forward` returned.
    cotangents: of its first two results.

  Returns:
    [R, D] and [V, D], of the dtypes of x and the table.
  """
  n, d = x.shape
  lse, target, *kept = statistics
  blocks = n // tiles.rows
  stats = jnp.stack([lse, *cotangents, target])
  if blocks == 1:
    whole = like(embedding.shape, embedding.dtype, x)
    one = functools.partial(_row_block, tiles, whole)
    scalars = jnp.append(limit, 0)
    return tuple(one(embedding, scalars, labels[None], stats, x, tuple(kept)))
  # In whole tiles: the interpreter cannot alias an array with a ragged one.
  v = embedding.shape[0]
  whole = like((round_up(v, tiles.words), d), jnp.float32, x)
  one = functools.partial(_row_block, tiles, whole, embedding)

  def rows_of(i):
    """Block i of everything that has rows, which come last but in x."""
    at = i * tiles.rows
    take = functools.partial(
      jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=tiles.rows
    )
    last = functools.partial(take, axis=-1)
    # What is large stays whole; the kernel takes its rows of it.
    of_kept = (*kept[:1], *map(last, kept[1:]))
    scalars = jnp.append(limit, at)
    return scalars, last(labels[None]), last(stats), take(x), of_kept

  def add(de, i):
    dx, de = one(*rows_of(i), de)
    return de, dx

  first, de = one(*rows_of(0))
  de, rest = jax.lax.scan(add, de, jnp.arange(1, blocks))
  dx = jnp.concatenate([first[None], rest]).reshape(n, d)
  return dx, de[:v].astype(embedding.dtype)
