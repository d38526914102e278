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
  NN,
  NT,
  Tiles,
  capped,
  cast_scratch,
  dot,
  resident,
  table_tile,
)
from ._sharding import like

# Columns of D per product of dE: its float32 result must not spill too much.
_COLUMNS = 256


def _logits_gradient(tiles, word, logits, limit, first, labels, rows):
  """dz [words, chunk] in float32 from the logits before the soft cap."""
  lse, dlse, dtarget = (rows[k : k + 1] for k in range(3))
  z = capped(logits, tiles.soft_cap)
  dz = jnp.exp(z - lse) * dlse
  dz = jnp.where(word == labels - first, dz + dtarget, dz)
  if tiles.soft_cap is not None:
    dz *= 1.0 - (z / tiles.soft_cap) ** 2
  if tiles.masked:
    dz = jnp.where(word < limit - first, dz, 0.0)
  return dz


def _columns(d: int, body) -> None:
  """Calls body(start, size) over [0, d) in pieces of at most `_COLUMNS`."""

  @pl.loop(0, d // _COLUMNS)
  def _(i):
    body(pl.multiple_of(i * _COLUMNS, _COLUMNS), _COLUMNS)

  if d % _COLUMNS:
    body(d // _COLUMNS * _COLUMNS, d % _COLUMNS)


def _kernel(
  limit_ref,  # [1] int32 in SMEM, words of the vocabulary
  labels_ref,  # [1, rows] int32
  stats_ref,  # [3, rows] float32: lse and the cotangents of lse and target
  x_ref,  # [rows, D]
  e_ref,  # [words, D]
  *refs,  # de_in_ref [words, D], if tiles of rows came before these;
  # dx_ref [rows, D] in HBM
  # de_ref [words, D]
  # cast_ref [words, D] of x's dtype, if the table has another
  # et_ref [D, words]
  # dz_ref [words, rows]
  # dxt_ref [D, rows] float32
  # stage_ref [chunk, D], on dx's way to HBM
  # semaphore
  tiles: Tiles,
):
  *de_in_ref, dx_ref, de_ref, cast_ref, et_ref, dz_ref = refs[:-3]
  dxt_ref, stage_ref, semaphore = refs[-3:]
  j = pl.program_id(0)
  words, chunk = tiles.words, tiles.chunk
  d = x_ref.shape[1]

  @pl.when(j == 0)
  def _():
    dxt_ref[...] = jnp.zeros_like(dxt_ref)

  e = table_tile(e_ref, cast_ref, x_ref.dtype)
  first = j * words
  et = e[...].T
  if tiles.masked:
    # dz is 0 there, but 0 times what is past the table's end may be NaN.
    column = jax.lax.broadcasted_iota(jnp.int32, et.shape, 1)
    et = jnp.where(column < limit_ref[0] - first, et, jnp.zeros_like(et))
  et_ref[...] = et
  word = jax.lax.broadcasted_iota(jnp.int32, (words, chunk), 0)
  step = tiles.at_once()

  @pl.loop(0, tiles.rows // (step * chunk))
  def _(i):
    ats = [
      pl.ds(pl.multiple_of((i * step + k) * chunk, chunk), chunk)
      for k in range(step)
    ]
    products = [dot(e[...], x_ref[at, :], NT) for at in ats]
    for at, logits in zip(ats, products, strict=True):
      dz = _logits_gradient(
        tiles,
        word,
        logits,
        limit_ref[0],
        first,
        labels_ref[:, at],
        stats_ref[:, at],
      ).astype(x_ref.dtype)
      dz_ref[:, at] = dz
      dxt_ref[:, at] += dot(et_ref[...], dz, NN)

  def table_gradient(start, size):
    at = pl.ds(start, size)
    de = dot(dz_ref[...], x_ref[:, at], NN)
    for ref in de_in_ref:
      de += ref[:, at]
    de_ref[:, at] = de.astype(de_ref.dtype)

  _columns(d, table_gradient)

  @pl.when(j == pl.num_programs(0) - 1)
  def _():
    @pl.loop(0, tiles.rows // chunk)
    def _(i):
      at = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
      stage_ref[...] = dxt_ref[:, at].T.astype(stage_ref.dtype)
      copy = pltpu.make_async_copy(stage_ref, dx_ref.at[at, :], semaphore)
      copy.start()
      copy.wait()


def _row_block(
  tiles: Tiles,
  table_dtype,
  limit: jax.Array,
  embedding: jax.Array,
  labels: jax.Array,
  stats: jax.Array,
  x: jax.Array,
  *de: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """dx and dE of `tiles.rows` rows; onto de, in place, if it is given."""
  rows, d = x.shape
  v = embedding.shape[0]
  table_tile_spec = pl.BlockSpec((tiles.words, d), lambda j: (j, 0))
  dx, de = pl.pallas_call(
    functools.partial(_kernel, tiles=tiles),
    name="linear_cross_entropy_bwd",
    grid=(pl.cdiv(v, tiles.words),),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      resident((1, rows)),
      resident((3, rows)),
      resident((rows, d)),
      table_tile_spec,
      *[table_tile_spec] * len(de),
    ],
    out_specs=[pl.BlockSpec(memory_space=pl.ANY), table_tile_spec],
    out_shape=[like(x.shape, x.dtype, x), like((v, d), table_dtype, x)],
    input_output_aliases={5: 1} if de else {},
    scratch_shapes=[
      cast_scratch(tiles.words, d, embedding, x.dtype),
      pltpu.VMEM((d, tiles.words), x.dtype),
      pltpu.VMEM((tiles.words, rows), x.dtype),
      pltpu.VMEM((d, rows), jnp.float32),
      pltpu.VMEM((tiles.chunk, d), x.dtype),
      pltpu.SemaphoreType.DMA,
    ],
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=tiles.vmem_bytes),
  )(limit, labels, stats, x, embedding, *de)
  return dx, de


def backward(
  tiles: Tiles,
  x: jax.Array,
  embedding: jax.Array,
  labels: jax.Array,
  limit: jax.Array,
  lse: jax.Array,
  dlse: jax.Array,
  dtarget: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of x and the table from those of `forward`'s results.

  Where x does not fit VMEM at once, its rows go by in blocks, each of which
  reads the table and adds to the table's gradient, in float32 in HBM.
  """
  n, d = x.shape
  blocks = n // tiles.rows
  stats = jnp.stack([lse, dlse, dtarget])
  one = functools.partial(_row_block, tiles)
  if blocks == 1:
    return one(embedding.dtype, limit, embedding, labels[None], stats, x)
  parts = (
    labels.reshape(blocks, 1, tiles.rows),
    stats.reshape(3, blocks, tiles.rows).swapaxes(0, 1),
    x.reshape(blocks, tiles.rows, d),
  )
  one = functools.partial(one, jnp.float32, limit, embedding)
  first, de = one(*(part[0] for part in parts))

  def add(de, part):
    dx, de = one(*part, de)
    return de, dx

  de, rest = jax.lax.scan(add, de, tuple(part[1:] for part in parts))
  dx = jnp.concatenate([first[None], rest]).reshape(n, d)
  return dx, de.astype(embedding.dtype)
