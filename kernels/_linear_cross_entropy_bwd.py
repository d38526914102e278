"""Backward pass of `linear_cross_entropy`: one kernel, both gradients.

Each tile of logits is recomputed, or comes from what the forward pass kept, as
[words, rows]; turned into

    dz = dtotal * exp(z - top) + dtarget * [word is the label]

and used twice: dE = dz x needs no transpose, and neither does dx^T += E^T dz
with the tile of the table transposed, once, whatever the number of rows.

    step s    all rows, in chunks              all columns of D, in pieces
            +----------------------------+   +-----------------------------+
    tile    | z = E x^T (or kept)        |   | dE = dz x                   |
    s - 1   | dz, stored in VMEM         | > | and tile s of the table, to |
            | dx^T += E^T dz             |   | be ready as E and E^T       |
            +----------------------------+   +-----------------------------+

The matrix units never wait for a transpose: it is done beside dE, a step early.
"""

from __future__ import annotations

import functools
from typing import Any

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
  dot,
  resident,
  round_up,
)
from ._sharding import like

# Columns of D per product of dE: more would spill, fewer start too often.
_COLUMNS = 512


def _from_logits(tiles, word, logits, limit, labels, rows):
  """dz [words, chunk] in float32 from the logits before the soft cap."""
  top, dtotal, dtarget = (rows[k : k + 1] for k in range(3))
  z = capped(logits, tiles.soft_cap)
  dz = jnp.exp(z - top) * dtotal
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
  top, dtotal, dtarget, target = (rows[k : k + 1] for k in range(4))
  scale = jnp.exp(shift - top) * dtotal
  kept = kept.astype(jnp.float32).reshape(-1, SUBLANES, tiles.chunk)
  dz = (kept * scale).reshape(tiles.words, tiles.chunk)
  of_label = jnp.exp(target - top) * dtotal + dtarget
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


class _Refs:
  """The kernel's references by name; those it was not given are None.

  In order:
    scalars: [2] int32 in SMEM: words of the vocabulary, first row in kept.
    labels: [1, rows] int32.
    stats: [4, rows] float32: top, cotangents of total and target, target.
    x: [rows, D].
    table: [words, D], the tile of the next step.
    kept: [V, R] in HBM, and
    shift: [1, 8, rows] float32, if the forward pass kept something.
    de_before: [words, D] float32, if blocks of rows came before this one.
    dx: [rows, D] in HBM, if it is wanted.
    de: [words, D], if it is wanted.
    e: [words, D] in x's dtype, where logits are recomputed.
    et: [D, words], for dx.
    dz: [words, rows], for dE.
    dxt: [D, rows] float32, for dx, and
    stage: [chunk, D], on its way to HBM.
    piece: [2, words, rows of a loop body], on their way from kept.
    semaphores: [3], of piece's two halves and of stage.
  """

  scalars: Any
  labels: Any
  stats: Any
  x: Any
  table: Any
  kept: Any = None
  shift: Any = None
  de_before: Any = None
  dx: Any = None
  de: Any = None
  e: Any = None
  et: Any = None
  dz: Any = None
  dxt: Any = None
  stage: Any = None
  piece: Any = None
  semaphores: Any = None


def _take_tile(tiles: Tiles, r: _Refs, step, at) -> None:
  """Columns `at` of table tile `step`, as the next step needs them."""
  piece = r.table[:, at].astype(r.x.dtype)
  if r.e is not None:
    r.e[:, at] = piece
  if r.et is None:
    return
  piece = piece.T
  if tiles.masked:
    # dz is 0 there, but 0 times what is past the table's end may be NaN.
    word = jax.lax.broadcasted_iota(jnp.int32, piece.shape, 1)
    inside = word < r.scalars[0] - step * tiles.words
    piece = jnp.where(inside, piece, jnp.zeros_like(piece))
  r.et[at, :] = piece


def _fetch(tiles: Tiles, r: _Refs, body):
  """The copy of loop body `body`'s part of kept, counted over all tiles."""
  size = tiles.at_once * tiles.chunk
  bodies = tiles.rows // size
  rows = pl.multiple_of(r.scalars[1] + body % bodies * size, size)
  words = pl.multiple_of(body // bodies * tiles.words, tiles.words)
  return pltpu.make_async_copy(
    r.kept.at[pl.ds(words, tiles.words), pl.ds(rows, size)],
    r.piece.at[body % 2],
    r.semaphores.at[body % 2],
  )


def _rows_pass(tiles: Tiles, r: _Refs, j) -> None:
  """dz of tile j, and what it adds to dx."""
  words, chunk = tiles.words, tiles.chunk
  bodies = tiles.rows // (tiles.at_once * chunk)
  word = jax.lax.broadcasted_iota(jnp.int32, (words, chunk), 0)
  limit = r.scalars[0] - j * words

  @pl.loop(0, bodies)
  def _(i):
    ats = tiles.chunks(i)
    if tiles.keep:
      body = j * bodies + i

      @pl.when(body + 1 < (pl.num_programs(0) - 1) * bodies)
      def _():
        _fetch(tiles, r, body + 1).start()

      _fetch(tiles, r, body).wait()
      piece = r.piece.at[body % 2]
      sources = [piece[:, k * chunk : (k + 1) * chunk] for k in range(len(ats))]
    else:
      sources = [dot(r.e[...], r.x[at, :], NT) for at in ats]
    for at, source in zip(ats, sources, strict=True):
      labels, rows = r.labels[:, at] - j * words, r.stats[:, at]
      if tiles.keep:
        shift = r.shift[0, :, at]
        dz = _from_kept(tiles, word, source, shift, labels, rows)
      else:
        dz = _from_logits(tiles, word, source, limit, labels, rows)
      dz = dz.astype(r.x.dtype)
      if r.dz is not None:
        r.dz[:, at] = dz
      if r.dxt is not None:
        r.dxt[:, at] += dot(r.et[...], dz, NN)


def _columns_pass(tiles: Tiles, r: _Refs, step) -> None:
  """dE of the tile that `_rows_pass` did, and the next tile of the table."""

  def one(start, size):
    at = pl.ds(start, size)
    if r.de is not None:
      de = dot(r.dz[...], r.x[:, at], NN)
      if r.de_before is not None:
        de += r.de_before[:, at]
      r.de[:, at] = de.astype(r.de.dtype)
    _take_tile(tiles, r, step, at)

  _columns(r.x.shape[1], one)


def _kernel(*refs, names: tuple[str, ...], tiles: Tiles):
  r = _Refs()
  for name, ref in zip(names, refs, strict=True):
    setattr(r, name, ref)
  step, last = pl.program_id(0), pl.num_programs(0) - 1

  @pl.when(step == 0)
  def _():
    if r.dxt is not None:
      r.dxt[...] = jnp.zeros_like(r.dxt)
    if tiles.keep:
      _fetch(tiles, r, 0).start()
    _columns(r.x.shape[1], lambda at, n: _take_tile(tiles, r, 0, pl.ds(at, n)))

  @pl.when(step > 0)
  def _():
    _rows_pass(tiles, r, step - 1)
    _columns_pass(tiles, r, step)

  if r.dxt is None:
    return

  @pl.when(step == last)
  def _():
    @pl.loop(0, tiles.rows // tiles.chunk)
    def _(i):
      at = pl.ds(pl.multiple_of(i * tiles.chunk, tiles.chunk), tiles.chunk)
      r.stage[...] = r.dxt[:, at].T.astype(r.stage.dtype)
      copy = pltpu.make_async_copy(r.stage, r.dx.at[at, :], r.semaphores.at[2])
      copy.start()
      copy.wait()


def _row_block(
  tiles: Tiles,
  wanted: tuple[bool, bool],
  table_gradient: jax.ShapeDtypeStruct,
  embedding: jax.Array,
  scalars: jax.Array,
  labels: jax.Array,
  stats: jax.Array,
  x: jax.Array,
  kept: tuple[jax.Array, ...],
  de_before: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array | None]:
  """dx and dE of `tiles.rows` rows; onto de_before, in place, if given."""
  rows, d = x.shape
  words, body = tiles.words, tiles.at_once * tiles.chunk
  steps = pl.cdiv(embedding.shape[0], words)
  in_hbm = pl.BlockSpec(memory_space=pl.ANY)
  # A step computes on the tile before the one that it makes ready.
  ready = pl.BlockSpec((words, d), lambda s: (jnp.minimum(s, steps - 1), 0))
  done = pl.BlockSpec((words, d), lambda s: (jnp.maximum(s - 1, 0), 0))
  inputs = {
    "scalars": (scalars, pl.BlockSpec(memory_space=pltpu.SMEM)),
    "labels": (labels, resident((1, rows))),
    "stats": (stats, resident((4, rows))),
    "x": (x, resident((rows, d))),
    "table": (embedding, ready),
  }
  if tiles.keep:
    of_tile = pl.BlockSpec(
      (1, SUBLANES, rows), lambda s: (jnp.maximum(s - 1, 0), 0, 0)
    )
    inputs["kept"], inputs["shift"] = (kept[0], in_hbm), (kept[1], of_tile)
  aliases = {}
  if de_before is not None:
    aliases = {len(inputs): int(wanted[0])}
    inputs["de_before"] = (de_before, done)
  outputs, scratch = {}, {}
  if not tiles.keep:
    scratch["e"] = pltpu.VMEM((words, d), x.dtype)
  if wanted[0]:
    outputs["dx"] = (like(x.shape, x.dtype, x), in_hbm)
    scratch["et"] = pltpu.VMEM((d, words), x.dtype)
    scratch["dxt"] = pltpu.VMEM((d, rows), jnp.float32)
    scratch["stage"] = pltpu.VMEM((tiles.chunk, d), x.dtype)
  if wanted[1]:
    outputs["de"] = (table_gradient, done)
    scratch["dz"] = pltpu.VMEM((words, rows), x.dtype)
  if tiles.keep:
    scratch["piece"] = pltpu.VMEM((2, words, body), x.dtype)
  scratch["semaphores"] = pltpu.SemaphoreType.DMA((3,))
  arrays, in_specs = zip(*inputs.values(), strict=True)
  types, out_specs = zip(*outputs.values(), strict=True)
  results = pl.pallas_call(
    functools.partial(
      _kernel, names=(*inputs, *outputs, *scratch), tiles=tiles
    ),
    name="linear_cross_entropy_bwd",
    grid=(steps + 1,),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=types,
    input_output_aliases=aliases,
    scratch_shapes=list(scratch.values()),
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=tiles.vmem_bytes),
  )(*arrays)
  named = dict(zip(outputs, results, strict=True))
  return named.get("dx"), named.get("de")


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
  gradient = 2 * table_size if blocks == 1 else 2 * 2 * 4
  copies = x_size * (1 if tiles.keep else 2)
  table = tiles.words * d * (2 * table_size + copies + gradient)
  rows = tiles.rows * (d * (x_size + 4) + tiles.words * x_size + 2 * ROW_BYTES)
  body = tiles.at_once * tiles.chunk
  kept = 2 * (tiles.words * body * x_size + tiles.rows * ROW_BYTES)
  values = tiles.value_bytes() + 2 * 4 * tiles.words * min(_COLUMNS, d)
  stage = tiles.chunk * d * x_size
  return table + rows + stage + values + (kept if tiles.keep else 0)


def backward(
  tiles: Tiles,
  wanted: tuple[bool, bool],
  x: jax.Array,
  embedding: jax.Array,
  labels: jax.Array,
  limit: jax.Array,
  statistics: tuple[jax.Array, ...],
  cotangents: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array | None, jax.Array | None]:
  """Gradients of x and the table.

  Where x does not fit VMEM at once, its rows go by in blocks, each of which
  reads the table and adds to the table's gradient, in float32 in HBM.

  Args:
    tiles: as `forward` had them, but for the words if nothing was kept.
    wanted: which of the gradients; the other one is None, and no work.
    x: as `forward` had it, like all to `limit`.
    embedding: likewise.
    labels: likewise.
    limit: likewise.
    statistics: what `forward` returned.
    cotangents: of its first three results; that of the first, a shift that
      cancels, is of no account.

  Returns:
    [R, D] and [V, D], of the dtypes of x and the table.
  """
  n, d = x.shape
  top, _, target, *kept = statistics
  blocks = n // tiles.rows
  stats = jnp.stack([top, *cotangents[1:], target])
  one = functools.partial(_row_block, tiles, wanted)
  if blocks == 1:
    whole = like(embedding.shape, embedding.dtype, x)
    scalars = jnp.append(limit, 0)
    return one(whole, embedding, scalars, labels[None], stats, x, tuple(kept))
  # In whole tiles: the interpreter cannot alias an array with a ragged one.
  v = embedding.shape[0]
  whole = like((round_up(v, tiles.words), d), jnp.float32, x)

  def add(de, i):
    at = i * tiles.rows
    take = functools.partial(
      jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=tiles.rows
    )
    last = functools.partial(take, axis=-1)
    # What is large stays whole; the kernel takes its rows of it.
    of_kept = (*kept[:1], *map(last, kept[1:]))
    rows = last(labels[None]), last(stats), take(x), of_kept
    dx, de = one(whole, embedding, jnp.append(limit, at), *rows, de)
    return de, dx

  de, dx = add(None, 0)
  de, rest = jax.lax.scan(add, de, jnp.arange(1, blocks))
  if dx is not None and rest is not None:
    dx = jnp.concatenate([dx[None], rest]).reshape(n, d)
  return dx, None if de is None else de[:v].astype(embedding.dtype)
