"""What a TPU v5e is, told once, and the helpers that follow from it.

register     8 sublanes x 128 lanes of 32 bits; of bfloat16, two values to
             a 32-bit place, 16 x 128.  The vector unit works on whole
             registers, in float32; a sum along sublanes is cheap, one along
             lanes goes through the cross-lane unit, as a transposition does
MXU          four units of 128 x 128 multiply-adds a cycle, bfloat16 in and
             float32 out; a float32 product takes six passes, see `dot`
VMEM         128 MiB, all that a kernel computes with; copies between it and
             HBM run beside the computation
HBM          16 GiB at 819 GB/s, 546 bytes in a cycle of 1.5 GHz
instructions 65,232 bundles of 64 bytes, a bundle for a cycle.  A program
             that is longer is cut into overlays; a loop over several of
             them is loaded anew at every turn
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# --- the chip -----------------------------------------------------------------

LANES = 128
SUBLANES = 8
BFLOAT16_SUBLANES = 16

VMEM_BYTES = 128 << 20
# What a kernel may take of it; the compiler keeps a little for itself.
KERNEL_VMEM_BYTES = VMEM_BYTES - (2 << 20)

CLOCK_HZ = 1.5e9
PRODUCTS_PER_CYCLE = 4 * 128 * 128
HBM_BYTES_PER_CYCLE = 819e9 / CLOCK_HZ

INSTRUCTION_BUNDLES = 65_232
FLOAT32_PASSES = 6  # of the matrix unit, for a product of float32

_NAMES = {"TPU v5 lite": "v5e", "TPU v5e": "v5e"}


def chip() -> str:
  """Short name of the chip to compile for: that of the mesh, else v5e."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  kind = device.device_kind if device is not None else "TPU v5 lite"
  return _NAMES.get(kind, kind)


def round_up(length: int, unit: int) -> int:
  """The least multiple of `unit` that is not less than `length`."""
  return -(-length // unit) * unit


def lanes(width: int) -> int:
  """Lanes that a row of `width` values takes in VMEM."""
  return round_up(width, LANES)


# --- of a call ----------------------------------------------------------------


def compiler_params(
  vmem_bytes: int = KERNEL_VMEM_BYTES,
) -> pltpu.CompilerParams:
  """What every kernel asks of the compiler.

  Grids run in order, as sums over their steps need; a v5e has one core, so
  nothing is lost where they would not have to.

  The compiler puts no check of its bounds before each copy: some ten bundles of
  scalar work, and what a door lets in is in bounds.  The tests run in the
  interpreter, which finds what is not.

  Args:
    vmem_bytes: what the kernel may take of VMEM.  In what it does not ask for,
      XLA may hand arrays from one op to the next without a way through HBM.
  """
  return pltpu.CompilerParams(
    vmem_limit_bytes=vmem_bytes, disable_bounds_checks=True
  )


def vmem_to_ask(op: str, needed: int, usual: int, got: str) -> int:
  """What a kernel asks of VMEM: the usual, or all that it may take.

  Args:
    op: for the error.
    needed: bytes, by the op's model.
    usual: bytes that do for problems of models.
    got: what makes the problem large, such as "D = 4096".

  Raises:
    ValueError: if a v5e has not so much.
  """
  if needed + needed // 32 <= usual:  # what the compiler adds
    return usual
  if needed > KERNEL_VMEM_BYTES:
    raise ValueError(
      f"{op}: the kernel's smallest tiles must fit {KERNEL_VMEM_BYTES} bytes "
      f"of VMEM, got {got}, which takes {needed}; pass implementation='xla'"
    )
  return KERNEL_VMEM_BYTES


def resident(
  shape: Sequence[int | None], index: Any = lambda *_: (0, 0)
) -> pl.BlockSpec:
  """A block that stays for many grid steps, hence needs one buffer."""
  return pl.BlockSpec(tuple(shape), index, pipeline_mode=pl.Buffered(1))


# --- products -----------------------------------------------------------------

# Which dimension of either factor is summed over.  The matrix unit loads a
# transposed right factor as fast as a plain one; a transposed left one passes
# the cross-lane unit.
NN = ((1,), (0,))
NT = ((1,), (1,))
TN = ((0,), (0,))


def dot(a: jax.Array, b: jax.Array, dims: Any = NN) -> jax.Array:
  """A product of two tiles of one dtype, summed in float32.

  The one rule of precision: bfloat16 factors take one pass of the matrix unit,
  which multiplies them exactly; float32 factors take the six passes that give
  float32 (`Precision.HIGHEST`), whatever `jax_default_matmul_precision` says.
  Who wants the speed of one pass passes bfloat16.
  """
  precision, is_float32 = jax.lax.Precision, a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (dims, ((), ())),
    precision=precision.HIGHEST if is_float32 else precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )


# --- tiles --------------------------------------------------------------------


def zero_past(tile: jax.Array, end: Any, axis: int) -> jax.Array:
  """`tile` with zeros from index `end` of an axis on.

  What hangs over the end of an array is undefined, and undefined times zero
  may be NaN: both factors of a sum over that axis need this.
  """
  index = jax.lax.broadcasted_iota(jnp.int32, tile.shape, axis)
  # The selection is in float32: a v5e has no bfloat16 arithmetic.
  kept = jnp.where(index < end, tile.astype(jnp.float32), 0.0)
  return kept.astype(tile.dtype)


# --- between lanes and sublanes -----------------------------------------------
# A number for each row of a tile is stored in lanes, [1, rows], where it takes
# an eighth of the room; beside a tile it is wanted in sublanes, equal in all
# lanes: [rows, LANES].


def across(column: jax.Array, width: int) -> jax.Array:
  """[rows, LANES], equal in all lanes, at another width."""
  if width % LANES == 0:
    return jnp.tile(column, (1, width // LANES))
  return jnp.broadcast_to(column[:, :1], (column.shape[0], width))


def lanes_to_column(row: jax.Array) -> jax.Array:
  """[1, rows] to [rows, LANES], equal in all lanes."""
  return jnp.concatenate(
    [
      jnp.broadcast_to(row[:, r : r + LANES], (LANES, LANES)).T
      for r in range(0, row.shape[1], LANES)
    ]
  )


def columns_to_lanes(columns: Sequence[jax.Array]) -> jax.Array:
  """n arrays [LANES, LANES], each equal in all lanes, to [n, LANES].

  They share a transposition, each in a lane of its own.
  """
  lane = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
  rows = []
  for start in range(0, len(columns), LANES):
    merged, *others = columns[start : start + LANES]
    for i, column in enumerate(others, 1):
      merged = jnp.where(lane == i, column, merged)
    rows.append(merged.T[: 1 + len(others)])
  return jnp.concatenate(rows)


def store_lanes(ref: Any, rows: jax.Array) -> None:
  """[n, LANES] into a ref [1, n LANES]."""
  for i in range(rows.shape[0]):
    ref[:, pl.ds(i * LANES, LANES)] = rows[i : i + 1]
