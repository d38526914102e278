"""Backward pass of linear cross-entropy: one kernel, both gradients.

Each tile of logits is recomputed, or comes from what the forward pass kept, as
[vocab_block, rows]; turned into

    dz = dtotal * exp(z - top) + dtarget * [word is the label]

and used twice: dE = dz x needs no transpose, and neither does dx^T += E^T dz
with the block of the table transposed, once: done beside dE, a step early, so
that the matrix units never wait for it.

    step s    all rows, in chunks              all columns of D, in pieces
            +----------------------------+   +-----------------------------+
    block   | z = E x^T (or kept)        |   | dE = dz x                   |
    s - 1   | dz, stored in VMEM         | > | and block s of the table,   |
            | dx^T += E^T dz             |   | made ready as E and E^T     |
            +----------------------------+   +-----------------------------+

There is one grid step more than blocks of the vocabulary:

  1. start         at the first step: dx^T = 0, the first block of the table
                   made ready, and the first copy of what was kept begun
  2. rows pass     at all others: dz of the block before, and its part of dx^T
  3. columns pass  then: dE of that block, and the next block made ready
  4. finish        at the last step: dx^T transposed, chunk by chunk, to HBM
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .._frame.kernel import Saved
from .._frame.manual import varying_like
from .forward import Static, words_of_block
from .spec import (
  Exponentials,
  Problem,
  RowArrays,
  RowNumbers,
  Statistics,
  capped,
  table_of,
  through_cap,
)
from .tiles import Tiles, for_columns, tiles_of

# --- the kernel ---------------------------------------------------------------


class Inputs(NamedTuple):
  """Refs of the kernel's inputs, or the arrays; None for what there is not."""

  scalars: Any  # [2] int32 in SMEM: valid_vocab, the first row's place in exps
  labels: Any  # [1, rows] int32
  numbers: Any  # [4, rows] float32, the fields of `RowNumbers`
  x: Any  # [rows, D]
  table: Any  # [vocab_block, D], the block of the next step
  kept: Any  # Exponentials: exps [V, R] in HBM, shift [1, 8, rows]
  de_before: Any  # [vocab_block, D] float32, dE of earlier blocks of rows


class Outputs(NamedTuple):
  """Refs of its outputs, or their types; None for what is not wanted."""

  dx: Any  # [rows, D] in HBM
  de: Any  # [vocab_block, D]


class State(NamedTuple):
  """Refs of its scratch; None for what is not needed."""

  e: Any  # [vocab_block, D] in x's dtype, where logits are recomputed
  et: Any  # [D, vocab_block], for dx
  dxt: Any  # [D, rows] float32, for dx
  stage: Any  # [chunk, D], a part of dx on its way to HBM
  dz: Any  # [vocab_block, rows], for de
  piece: Any  # [2, vocab_block, body_rows], parts of exps on their way here
  semaphores: Any  # [3], of piece's two halves and of stage


def _kernel(i: Inputs, o: Outputs, s: State, *, static: Static):
  step, last = pl.program_id(0), pl.num_programs(0) - 1

  @pl.when(step == 0)
  def _():
    _start(i, s, static)

  @pl.when(step > 0)
  def _():
    _rows_pass(i, s, step - 1, static)
    _columns_pass(i, o, s, step, static)

  if o.dx is not None:

    @pl.when(step == last)
    def _():
      _finish(o, s, static.tiles)


def _start(i: Inputs, s: State, static: Static) -> None:
  if s.dxt is not None:
    s.dxt[...] = jnp.zeros_like(s.dxt)
  if i.kept is not None:
    _fetch(i, s, 0, static.tiles).start()
  for_columns(i.x.shape[1], lambda at: _make_ready(i, s, 0, at, static))


def _finish(o: Outputs, s: State, tiles: Tiles) -> None:
  """dx from dx^T, to HBM."""

  @pl.loop(0, tiles.rows // tiles.chunk)
  def _(i):
    at = pl.ds(pl.multiple_of(i * tiles.chunk, tiles.chunk), tiles.chunk)
    s.stage[...] = s.dxt[:, at].T.astype(s.stage.dtype)
    copy = pltpu.make_async_copy(s.stage, o.dx.at[at, :], s.semaphores.at[2])
    copy.start()
    copy.wait()


# --- the rows pass ------------------------------------------------------------


def _rows_pass(i: Inputs, s: State, j: Any, static: Static) -> None:
  """dz of vocabulary block j, and what it adds to dx^T."""
  tiles = static.tiles
  first, word = j * tiles.vocab_block, words_of_block(tiles)
  valid = i.scalars[0] - first  # words of the block that are vocabulary

  @pl.loop(0, tiles.bodies)
  def _(body):
    chunks = tiles.chunks(body)
    if i.kept is not None:
      sources = _kept_chunks(i, s, j * tiles.bodies + body, tiles)
    else:
      sources = [tpu.dot(s.e[...], i.x[at, :], tpu.NT) for at in chunks]
    for at, source in zip(chunks, sources, strict=True):
      is_label = word == i.labels[:, at] - first
      row = RowNumbers(*(i.numbers[k : k + 1, at] for k in range(4)))
      if i.kept is not None:
        shift = i.kept.shift[0, :, at]
        dz = _from_kept(source, shift, is_label, row, static)
      else:
        dz = _from_logits(source, is_label, row, static)
        if static.masked:
          dz = jnp.where(word < valid, dz, 0.0)
      dz = dz.astype(i.x.dtype)
      if s.dz is not None:
        s.dz[:, at] = dz
      if s.dxt is not None:
        s.dxt[:, at] += tpu.dot(s.et[...], dz, tpu.NN)


def _from_logits(
  logits: jax.Array,
  is_label: jax.Array,
  row: RowNumbers,
  static: Static,
) -> jax.Array:
  """dz [vocab_block, chunk] in float32 from the logits before the soft cap."""
  z = capped(logits, static.soft_cap)
  dz = jnp.exp(z - row.top) * row.dtotal
  dz = jnp.where(is_label, dz + row.dtarget, dz)
  return through_cap(dz, z, static.soft_cap)


def _from_kept(
  kept: jax.Array,
  shift: jax.Array,
  is_label: jax.Array,
  row: RowNumbers,
  static: Static,
) -> jax.Array:
  """dz [vocab_block, chunk] in float32 from what the forward pass kept.

  The label's own is computed afresh, from the label's logit: what is kept is
  rounded, and a probability near 1 has nothing left of its digits when 1 is
  subtracted.
  """
  scale = jnp.exp(shift - row.top) * row.dtotal
  kept = kept.astype(jnp.float32).reshape(-1, *scale.shape)
  dz = (kept * scale).reshape(is_label.shape)
  of_label = jnp.exp(row.target - row.top) * row.dtotal + row.dtarget
  of_label = through_cap(of_label, row.target, static.soft_cap)
  return jnp.where(is_label, of_label, dz)


def _kept_chunks(i: Inputs, s: State, body: Any, tiles: Tiles) -> list[Any]:
  """What was kept for a loop body's chunks; begins the next body's copy.

  Loop bodies are counted over all vocabulary blocks.
  """

  @pl.when(body + 1 < (pl.num_programs(0) - 1) * tiles.bodies)
  def _():
    _fetch(i, s, body + 1, tiles).start()

  _fetch(i, s, body, tiles).wait()
  piece, size = s.piece.at[body % 2], tiles.chunk
  return [piece[:, r : r + size] for r in range(0, tiles.body_rows, size)]


def _fetch(i: Inputs, s: State, body: Any, tiles: Tiles) -> Any:
  """The copy of a loop body's part of exps to its half of `piece`."""
  block, size = tiles.vocab_block, tiles.body_rows
  rows = pl.multiple_of(i.scalars[1] + body % tiles.bodies * size, size)
  words = pl.multiple_of(body // tiles.bodies * block, block)
  return pltpu.make_async_copy(
    i.kept.exps.at[pl.ds(words, block), pl.ds(rows, size)],
    s.piece.at[body % 2],
    s.semaphores.at[body % 2],
  )


# --- the columns pass ---------------------------------------------------------


def _columns_pass(
  i: Inputs, o: Outputs, s: State, step: Any, static: Static
) -> None:
  """dE of the block that `_rows_pass` did, and the next block of the table."""

  def piece(at):
    if o.de is not None:
      de = tpu.dot(s.dz[...], i.x[:, at], tpu.NN)
      if static.masked:
        end = i.scalars[0] - (step - 1) * static.tiles.vocab_block
        de = tpu.zero_past(de, end, axis=0)  # dz is 0 there, but x may be NaN
      if i.de_before is not None:
        de += i.de_before[:, at]
      o.de[:, at] = de.astype(o.de.dtype)
    _make_ready(i, s, step, at, static)

  for_columns(i.x.shape[1], piece)


def _make_ready(
  i: Inputs, s: State, step: Any, at: Any, static: Static
) -> None:
  """Columns `at` of table block `step`, as the next grid step needs them."""
  piece = i.table[:, at].astype(i.x.dtype)
  if s.e is not None:
    s.e[:, at] = piece
  if s.et is None:
    return
  piece = piece.T
  if static.masked:
    valid = i.scalars[0] - step * static.tiles.vocab_block
    # dz is 0 there, but 0 times what is past the table's end may be NaN.
    word = jax.lax.broadcasted_iota(jnp.int32, piece.shape, 1)
    piece = jnp.where(word < valid, piece, jnp.zeros_like(piece))
  s.et[at, :] = piece


# --- the call -----------------------------------------------------------------


def _call(static: Static, inputs: Inputs, types: Outputs) -> Outputs:
  """The gradients of one block of rows; onto de_before, in place, if given."""
  (rows, d), block = inputs.x.shape, static.tiles.vocab_block
  steps = pl.cdiv(inputs.table.shape[0], block)
  in_hbm = pl.BlockSpec(memory_space=pl.ANY)
  finished = pl.BlockSpec((block, d), lambda s: (_finished_block(s), 0))
  kept = Exponentials(
    exps=in_hbm,
    shift=pl.BlockSpec(
      (1, tpu.SUBLANES, rows), lambda s: (_finished_block(s), 0, 0)
    ),
  )
  in_specs = Inputs(
    scalars=pl.BlockSpec(memory_space=pltpu.SMEM),
    labels=tpu.resident((1, rows)),
    numbers=tpu.resident((4, rows)),
    x=tpu.resident((rows, d)),
    table=pl.BlockSpec((block, d), lambda s: (_next_block(s, steps), 0)),
    kept=None if inputs.kept is None else kept,
    de_before=None if inputs.de_before is None else finished,
  )
  out_specs = Outputs(
    dx=None if types.dx is None else in_hbm,
    de=None if types.de is None else finished,
  )
  aliases = {}
  if inputs.de_before is not None:  # the last operand; de is the last result
    operands, results = jax.tree.leaves(inputs), jax.tree.leaves(types)
    aliases = {len(operands) - 1: len(results) - 1}
  (outs,) = pl.pallas_call(
    functools.partial(_kernel, static=static),
    name="linear_cross_entropy_bwd",
    grid=(steps + 1,),
    in_specs=[in_specs],
    out_specs=[out_specs],
    out_shape=[types],
    input_output_aliases=aliases,
    scratch_shapes=[_scratch(static.tiles, inputs, types)],
    compiler_params=tpu.compiler_params(),
  )(inputs)
  return outs


def _next_block(step: Any, steps: int) -> Any:
  """The vocabulary block that a grid step makes ready for the next one."""
  return jnp.minimum(step, steps - 1)


def _finished_block(step: Any) -> Any:
  """The vocabulary block that a grid step finishes."""
  return jnp.maximum(step - 1, 0)


def _scratch(tiles: Tiles, inputs: Inputs, types: Outputs) -> State:
  (rows, d), dtype = inputs.x.shape, inputs.x.dtype
  block, keeps = tiles.vocab_block, inputs.kept is not None
  dx, de = types.dx is not None, types.de is not None
  return State(
    e=None if keeps else pltpu.VMEM((block, d), dtype),
    et=pltpu.VMEM((d, block), dtype) if dx else None,
    dxt=pltpu.VMEM((d, rows), jnp.float32) if dx else None,
    stage=pltpu.VMEM((tiles.chunk, d), dtype) if dx else None,
    dz=pltpu.VMEM((block, rows), dtype) if de else None,
    piece=pltpu.VMEM((2, block, tiles.body_rows), dtype) if keeps else None,
    semaphores=pltpu.SemaphoreType.DMA((3,)),
  )


# --- all rows -----------------------------------------------------------------


def backward(p: Problem, saved: Saved, d_outs: Statistics) -> RowArrays:
  """Gradients [R, D] and [V, D] of x and the table; None if not wanted.

  Where x does not fit VMEM at once, its rows go by in blocks, each of which
  reads the table and adds to the table's gradient, in float32 in HBM.
  """
  assert p.config is not None
  a, wanted, of_x = saved.arrays, saved.wanted, saved.outs
  (n, d), v = a.x.shape, a.embedding.shape[0]
  tiles = tiles_of(p.config, n, v, is_forward=False, keep=p.keeps_exponentials)
  static, blocks = Static.of(p, tiles, v), n // tiles.rows
  # In one block the table's gradient is complete.  Several add it up in whole
  # tiles: the interpreter cannot alias an array with a ragged one.
  de_type = varying_like(a.x, a.embedding.shape, table_of(a).dtype)
  if blocks > 1:
    padded = tpu.round_up(v, tiles.vocab_block)
    de_type = varying_like(a.x, (padded, d), jnp.float32)
  types = Outputs(
    dx=varying_like(a.x, (tiles.rows, d), a.x.dtype) if wanted.x else None,
    de=de_type if table_of(wanted) else None,
  )
  numbers = RowNumbers(of_x.top, d_outs.total, d_outs.target, of_x.target)
  operands = Inputs(
    scalars=jnp.append(a.valid_vocab, 0),
    labels=a.labels[None],
    numbers=jnp.stack(numbers),
    x=a.x,
    table=a.embedding,
    kept=None if saved.kept is None else saved.kept.kept,
    de_before=None,
  )
  if blocks == 1:
    return a.gradients(*_call(static, operands, types))

  def add(de: jax.Array | None, block: Any) -> tuple[Any, Any]:
    inputs = _rows_of_block(operands, block, tiles.rows)
    outs = _call(static, inputs._replace(de_before=de), types)
    return outs.de, outs.dx

  de, dx = add(None, 0)
  de, rest = jax.lax.scan(add, de, jnp.arange(1, blocks))
  if dx is not None:
    dx = jnp.concatenate([dx[None], rest]).reshape(n, d)
  if de is not None:
    de = de[:v].astype(table_of(a).dtype)
  return a.gradients(dx, de)


def _rows_of_block(inputs: Inputs, block: Any, rows: int) -> Inputs:
  """The operands of one block of rows."""
  start = block * rows

  def take(array: jax.Array, axis: int = -1) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, rows, axis)

  kept = inputs.kept
  if kept is not None:  # exps is large: the kernel takes its rows itself
    kept = kept._replace(shift=take(kept.shift))
  return inputs._replace(
    scalars=jnp.append(inputs.scalars[:1], start),
    labels=take(inputs.labels),
    numbers=take(inputs.numbers),
    x=take(inputs.x, axis=0),
    kept=kept,
  )
