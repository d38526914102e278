"""A model of the VMEM that a pass of linear cross-entropy takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from .._frame import tpu

if TYPE_CHECKING:  # the page that asks
  from .tiles import Tiles

# A float32 number per row, in VMEM: a vector along the lanes fills all the
# sublanes of its registers.
_ROW_BYTES = 4 * tpu.SUBLANES


# Columns of D per product of dE: more would spill, fewer start too often.
GRADIENT_COLUMNS = 512


def _value_bytes(tiles: Tiles, d: int, x_dtype: jnp.dtype) -> int:
  """A loop body's: three float32 tiles a chunk; a float32 product's parts."""
  factors = (tiles.vocab_block + tiles.chunk) * (x_dtype == jnp.float32)
  parts = 3 * 2 * factors * tpu.lanes(d)  # three of bfloat16
  return 3 * 4 * tiles.vocab_block * tiles.body_rows + parts


def _more_bytes(tiles: Tiles) -> int:
  """Of a bias, smoothed labels and predictions, for whichever there are.

  The bias and its gradient in lanes, in two buffers; sums and words of rows in
  scratch and as results, also in two; and another float32 tile a chunk.
  """
  words = 4 * tiles.vocab_block * (2 * tpu.LANES + 4 * tpu.SUBLANES)
  rows = 4 * tiles.rows * _ROW_BYTES
  return words + rows + 4 * tiles.vocab_block * tiles.body_rows


def forward_bytes(
  tiles: Tiles,
  d: int,
  x_dtype: jnp.dtype,
  table_dtype: jnp.dtype,
  *,
  keep: bool,
  transposed: bool = False,
  more: bool = False,
) -> int:
  """VMEM of the forward pass: its operands' buffers, scratch and values."""
  x_size, table_size = x_dtype.itemsize, table_dtype.itemsize
  cast = x_size if x_dtype != table_dtype or transposed else 0
  table = tiles.vocab_block * tpu.lanes(d) * (2 * table_size + cast)
  rows = tiles.rows * (tpu.lanes(d) * x_size + 7 * _ROW_BYTES)
  kept = 2 * tiles.rows * (tiles.vocab_block * x_size + _ROW_BYTES) * keep
  values = _value_bytes(tiles, d, x_dtype)
  return table + rows + kept + values + (_more_bytes(tiles) if more else 0)


def backward_bytes(
  tiles: Tiles,
  d: int,
  x_dtype: jnp.dtype,
  table_dtype: jnp.dtype,
  *,
  keep: bool,
  blocks: int,
  transposed: bool = False,
  more: bool = False,
) -> int:
  """VMEM of the backward pass, whose rows come in so many blocks."""
  d, block = tpu.lanes(d), tiles.vocab_block
  x_size, table_size = x_dtype.itemsize, table_dtype.itemsize
  # Two buffers; from several blocks of rows, in float32 in and out.
  gradient = 2 * table_size if blocks == 1 else 2 * 2 * 4
  copies = x_size * (1 if keep else 2)
  table = block * d * (2 * table_size + copies + gradient)
  rows = tiles.rows * (d * (x_size + 4) + block * x_size + 2 * _ROW_BYTES)
  kept = 2 * (block * tiles.body_rows * x_size + tiles.rows * _ROW_BYTES)
  values = _value_bytes(tiles, d, x_dtype) + 2 * 4 * block * min(
    GRADIENT_COLUMNS, d
  )
  if transposed:  # the gradient once more, on its way out
    values += 4 * block * min(GRADIENT_COLUMNS, d)
  if more:
    values += _more_bytes(tiles)
  stage = tiles.chunk * d * x_size
  return table + rows + stage + values + (kept if keep else 0)
