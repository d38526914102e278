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
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .._frame.kernel import Saved
from .backward_records import (
  Inputs,
  Outputs,
  State,
  gradient_types,
  scratch,
)
from .bias import add_lanes, bias_row, finish_bias, plus_bias, start_bias
from .forward import Static, words_of_block
from .spec import (
  Exponentials,
  Problem,
  RowArrays,
  RowNumbers,
  Statistics,
  capped,
  through_cap,
)
from .tiles import Tiles, for_columns, tiles_of

# --- the kernel ---------------------------------------------------------------


def _kernel(i: Inputs, o: Outputs, s: State, *, static: Static):
  step, last = pl.program_id(0), pl.num_programs(0) - 1

  @pl.when(step == 0)
  def _():
    _start(i, s, static)

  @pl.when(step > 0)
  def _():
    _rows_pass(i, s, step - 1, static)
    if s.db is not None:
      finish_bias(o, s)
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
  start_bias(i, s)

  @pl.loop(0, tiles.bodies)
  def _(body):
    chunks = tiles.chunks(body)
    if i.kept is not None:
      sources = _kept_chunks(i, s, j * tiles.bodies + body, tiles)
    else:
      sources = [tpu.dot(s.e[...], i.x[at, :], tpu.NT) for at in chunks]
    for at, source in zip(chunks, sources, strict=True):
      is_label = word == i.labels[:, at] - first
      count = i.numbers.shape[0]
      row = RowNumbers(*(i.numbers[k : k + 1, at] for k in range(count)))
      if i.kept is not None:
        shift = i.kept.shift[0, :, at]
        dz = _from_kept(source, shift, is_label, row, static)
      else:
        logits = plus_bias(source, s.bias)
        dz = _from_logits(logits, is_label, row, static)
      # What is kept is 0 where there is no vocabulary; a smoothed label is not.
      if static.masked and (i.kept is None or row.dlogit_sum is not None):
        dz = jnp.where(word < valid, dz, 0.0)
      if s.db is not None:
        s.db[...] += add_lanes(dz)
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
  if row.dlogit_sum is not None:
    dz += row.dlogit_sum
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
  dz = jnp.where(is_label, of_label, dz)
  # Smoothed labels are not kept with a soft cap: see the public function.
  return dz if row.dlogit_sum is None else dz + row.dlogit_sum


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
      here = (slice(None), at)
      if static.transposed:
        de, here = de.T, (at, slice(None))
      if i.de_before is not None:
        de += i.de_before[here]
      o.de[here] = de.astype(o.de.dtype)
    _make_ready(i, s, step, at, static)

  for_columns(i.x.shape[1], piece)


def _make_ready(
  i: Inputs, s: State, step: Any, at: Any, static: Static
) -> None:
  """Columns `at` of table block `step`, as the next grid step needs them."""
  here = (at, slice(None)) if static.transposed else (slice(None), at)
  given = i.table[here].astype(i.x.dtype)
  if s.e is not None:
    s.e[:, at] = given.T if static.transposed else given
  if s.et is None:
    return
  piece = given if static.transposed else given.T
  if static.masked:
    valid = i.scalars[0] - step * static.tiles.vocab_block
    # dz is 0 there, but 0 times what is past the table's end may be NaN.
    word = jax.lax.broadcasted_iota(jnp.int32, piece.shape, 1)
    piece = jnp.where(word < valid, piece, jnp.zeros_like(piece))
  s.et[at, :] = piece


# --- the call -----------------------------------------------------------------


def _call(static: Static, inputs: Inputs, types: Outputs) -> Outputs:
  """The gradients of one block of rows; onto de_before if given.

  In place where both are sums in float32.
  """
  (rows, d), block = inputs.x.shape, static.tiles.vocab_block
  steps = pl.cdiv(inputs.table.shape[1 if static.transposed else 0], block)
  in_hbm = pl.BlockSpec(memory_space=pl.ANY)
  finished = static.table_block(d, _finished_block)
  of_words = pl.BlockSpec((1, block), lambda s: (0, _finished_block(s)))
  kept = Exponentials(
    exps=in_hbm,
    shift=pl.BlockSpec(
      (1, tpu.SUBLANES, rows), lambda s: (_finished_block(s), 0, 0)
    ),
  )
  in_specs = Inputs(
    scalars=pl.BlockSpec(memory_space=pltpu.SMEM),
    labels=tpu.resident((1, rows)),
    numbers=tpu.resident(inputs.numbers.shape),
    x=tpu.resident((rows, d)),
    table=static.table_block(d, lambda s: _next_block(s, steps)),
    bias=None if inputs.bias is None else of_words,
    kept=None if inputs.kept is None else kept,
    de_before=None if inputs.de_before is None else finished,
  )
  out_specs = Outputs(
    dx=None if types.dx is None else in_hbm,
    db=None if types.db is None else of_words,
    de=None if types.de is None else finished,
  )
  aliases, before, after = {}, inputs.de_before, types.de
  # The last operand, and the last result.
  if before is not None and after is not None and before.dtype == after.dtype:
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
    scratch_shapes=[scratch(static.tiles, inputs, types)],
    compiler_params=tpu.compiler_params(),
  )(inputs)
  return outs


def _next_block(step: Any, steps: int) -> Any:
  """The vocabulary block that a grid step makes ready for the next one."""
  return jnp.minimum(step, steps - 1)


def _finished_block(step: Any) -> Any:
  """The vocabulary block that a grid step finishes."""
  return jnp.maximum(step - 1, 0)


# --- all rows -----------------------------------------------------------------


def backward(p: Problem, saved: Saved, d_outs: Statistics) -> RowArrays:
  """Gradients of x, the table and the bias; None for what is not wanted.

  Where x does not fit VMEM at once, its rows go by in blocks, each of which
  reads the table and adds to the table's gradient, in float32 in HBM.  The last
  writes it in the table's dtype.
  """
  assert p.config is not None
  a, wanted, of_x = saved.arrays, saved.wanted, saved.outs
  (n, _), v = a.x.shape, p.vocab(a.embedding)
  tiles = tiles_of(p.config, n, v, is_forward=False, keep=p.keeps_exponentials)
  static, blocks = Static.of(p, tiles, v), n // tiles.rows
  numbers = [of_x.top, d_outs.total, d_outs.target, of_x.target]
  if p.label_smoothing:
    numbers.append(d_outs.logit_sum)
  operands = Inputs(
    scalars=jnp.append(a.valid_vocab, 0),
    labels=a.labels[None],
    numbers=jnp.stack(numbers),
    x=a.x,
    table=a.embedding,
    bias=None if saved.kept is not None else bias_row(a),
    kept=None if saved.kept is None else saved.kept.kept,
    de_before=None,
  )
  sums, complete = (
    gradient_types(static, a, wanted, v, is_sum=is_sum)
    for is_sum in (True, False)
  )
  if blocks == 1:
    outs = _call(static, operands, complete)
    return a.gradients(outs.dx, outs.de, outs.db)

  def add(
    de: jax.Array | None, block: Any, types: Outputs = sums
  ) -> tuple[Any, Any]:
    inputs = _rows_of_block(operands, block, tiles.rows)
    outs = _call(static, inputs._replace(de_before=de), types)
    return outs.de, (outs.dx, outs.db)

  is_cast = complete.de is not None and complete.de.dtype != jnp.float32
  de, first = add(None, 0)
  parts = [jax.tree.map(lambda one: one[None], first)]
  if blocks - is_cast > 1:
    de, rest = jax.lax.scan(add, de, jnp.arange(1, blocks - is_cast))
    parts.append(rest)
  if is_cast:
    de, last = add(de, blocks - 1, complete)
    parts.append(jax.tree.map(lambda one: one[None], last))
  elif de is not None:
    de = de[:, :v] if p.transposed else de[:v]
  dx, db = jax.tree.map(lambda *blocks: jnp.concatenate(blocks), *parts)
  if dx is not None:
    dx = dx.reshape(a.x.shape)
  if db is not None:
    db = jnp.sum(db, axis=0)
  return a.gradients(dx, de, db)


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
