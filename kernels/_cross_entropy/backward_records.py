"""The records of the backward kernel, what it needs and what it gives."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .._frame.manual import varying_like
from .forward import Static
from .spec import RowArrays, table_of
from .tiles import Tiles


class Inputs(NamedTuple):
  """Refs of the kernel's inputs, or the arrays; None for what there is not."""

  scalars: Any  # [2] int32 in SMEM: valid_vocab, the first row's place in exps
  labels: Any  # [1, rows] int32
  numbers: Any  # [4 or 5, rows] float32, the fields of `RowNumbers`
  x: Any  # [rows, D]
  table: Any  # [vocab_block, D] or transposed, the block of the next step
  bias: Any  # [1, vocab_block] float32, None for none, or if logits are kept
  kept: Any  # Exponentials: exps [V, R] in HBM, shift [1, 8, rows]
  de_before: Any  # as de, float32, dE of earlier blocks of rows


class Outputs(NamedTuple):
  """Refs of its outputs, or their types; None for what is not wanted."""

  dx: Any  # [rows, D] in HBM
  db: Any  # [1, vocab_block] float32
  de: Any  # [vocab_block, D], or transposed


class State(NamedTuple):
  """Refs of its scratch; None for what is not needed."""

  e: Any  # [vocab_block, D] in x's dtype, where logits are recomputed
  et: Any  # [D, vocab_block], for dx
  dxt: Any  # [D, rows] float32, for dx
  stage: Any  # [chunk, D], a part of dx on its way to HBM
  dz: Any  # [vocab_block, rows], for de
  bias: Any  # [vocab_block, LANES] float32
  db: Any  # [vocab_block, LANES] float32, to be summed over the lanes
  piece: Any  # [2, vocab_block, body_rows], parts of exps on their way here
  semaphores: Any  # [3], of piece's two halves and of stage


def scratch(tiles: Tiles, inputs: Inputs, types: Outputs) -> State:
  """What to ask the compiler for."""
  (rows, d), dtype = inputs.x.shape, inputs.x.dtype
  block, keeps = tiles.vocab_block, inputs.kept is not None
  dx, de = types.dx is not None, types.de is not None
  column = pltpu.VMEM((block, tpu.LANES), jnp.float32)
  return State(
    e=None if keeps else pltpu.VMEM((block, d), dtype),
    et=pltpu.VMEM((d, block), dtype) if dx else None,
    dxt=pltpu.VMEM((d, rows), jnp.float32) if dx else None,
    stage=pltpu.VMEM((tiles.chunk, d), dtype) if dx else None,
    dz=pltpu.VMEM((block, rows), dtype) if de else None,
    bias=None if inputs.bias is None else column,
    db=None if types.db is None else column,
    piece=pltpu.VMEM((2, block, tiles.body_rows), dtype) if keeps else None,
    semaphores=pltpu.SemaphoreType.DMA((3,)),
  )


def gradient_types(
  static: Static, a: RowArrays, wanted: RowArrays, v: int, *, is_sum: bool
) -> Outputs:
  """Of the gradients of one block of rows.

  Args:
    static: of the call.
    a: the op's arrays.
    wanted: of which of them there is to be a gradient.
    v: words, V.
    is_sum: whether the table's is a sum to which the next block of rows adds,
      in float32.  It is of whole tiles: the interpreter cannot alias an array
      with a ragged one.
  """
  tiles, d = static.tiles, a.x.shape[1]
  shape, dtype = a.embedding.shape, table_of(a).dtype
  if is_sum:
    padded, dtype = tpu.round_up(v, tiles.vocab_block), jnp.float32
    shape = (d, padded) if static.transposed else (padded, d)
  return Outputs(
    dx=varying_like(a.x, (tiles.rows, d), a.x.dtype) if wanted.x else None,
    db=varying_like(a.x, (1, v), jnp.float32) if wanted.bias else None,
    de=varying_like(a.x, shape, dtype) if table_of(wanted) else None,
  )
