"""What the kernels of gated units share: configuration, and the cut of a tile.

Both kernels hold one row tile of x and one F tile of the weights in VMEM:

               D                    cols                    D
          +---------+          +----+----+----+        +---------+
     rows |  x  i   |        D | Wg | Wu |  j |   cols |  Wd  j  |
          +---------+          +----+----+----+        +---------+

D is never cut.  The last row tile and the last F tile may hang over the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._norm import RowNorm
from ._tuned import power_of_two, tuned_config

# --- configuration ------------------------------------------------------------

_LANES = 128
_SUBLANES = 16  # of bfloat16
_MIB = 1 << 20
# A v5e has 128 MiB of VMEM; the model below does not know every temporary.
_VMEM_BYTES = 124 * _MIB
_BUDGET_BYTES = 108 * _MIB
COMPILER_PARAMS = pltpu.CompilerParams(vmem_limit_bytes=_VMEM_BYTES)


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes of one kernel's tiles.

  Attributes:
    rows: rows of x per grid step; a multiple of 16 (the bfloat16 sublanes).
    cols: columns of F per grid step; a multiple of 128 (the lanes).
  """

  rows: int
  cols: int

  def __post_init__(self):
    for name, unit in (("rows", _SUBLANES), ("cols", _LANES)):
      value = getattr(self, name)
      if not isinstance(value, int) or value <= 0 or value % unit:
        raise ValueError(
          f"Tiles: {name} must be a positive multiple of {unit}, got {value!r}"
        )

  def over(self, n: int, f: int) -> Tiles:
    """These tiles for n rows and F columns, evened out.

    1100 rows in tiles of at most 1024 are two of 560, not one of 1024 and a
    rest that costs as much.
    """
    return Tiles(
      _even(n, self.rows, _SUBLANES),
      _even(f, self.cols, _LANES),
    )


def _even(length: int, tile: int, unit: int) -> int:
  count = pl.cdiv(length, tile)
  return pl.cdiv(pl.cdiv(length, count), unit) * unit


Residuals = Literal["gate_up", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
  """How `geglu` and `feed_forward` run; changes speed, not results.

  Attributes:
    residuals: what the forward pass leaves to the backward pass beside its
      inputs: "gate_up" keeps the two products [..., F] in x's dtype, and x's
      norm if it takes one; "none" keeps nothing and computes them again, two
      matmuls more.
    forward: tiles of the forward kernel; None picks them from the shape.
    backward: tiles of the backward kernel; None picks them from the shape.
  """

  residuals: Residuals = "gate_up"
  forward: Tiles | None = None
  backward: Tiles | None = None

  def __post_init__(self):
    if self.residuals not in ("gate_up", "none"):
      raise ValueError(
        f"FeedForwardConfig: residuals must be 'gate_up' or 'none', "
        f"got {self.residuals!r}"
      )
    for name in ("forward", "backward"):
      tiles = getattr(self, name)
      if tiles is not None and not isinstance(tiles, Tiles):
        raise ValueError(
          f"FeedForwardConfig: {name} must be Tiles or None, got {tiles!r}"
        )


@dataclasses.dataclass(frozen=True)
class Problem:
  """Sizes and types that tiles are chosen by, all static.

  Attributes:
    n: rows of x.
    d: width D.
    f: feed-forward width F.
    dtype: x's, that of the arithmetic.
    weight_dtype: of the weights and their gradients.
    down: whether the projection back to D is part of the op.
    saved: whether gate and up go from the forward to the backward pass.
    normed: whether the op takes the norm of x itself.
  """

  n: int
  d: int
  f: int
  dtype: jnp.dtype
  weight_dtype: jnp.dtype
  down: bool
  saved: bool
  normed: bool

  @classmethod
  def of(
    cls, x: jax.Array, *weights: jax.Array, saved: bool, normed: bool
  ) -> Problem:
    """The problem of x [N, D] and two or three weights."""
    n, d = x.shape
    return cls(
      n=n,
      d=d,
      f=weights[0].shape[1],
      dtype=x.dtype,
      weight_dtype=jnp.result_type(*(w.dtype for w in weights)),
      down=len(weights) == 3,
      saved=saved,
      normed=normed,
    )

  @property
  def weights(self) -> int:
    """How many weight matrices there are."""
    return 3 if self.down else 2


# In falling order of speed; the first that fits is taken.
_FORWARD = ((1024, 512), (512, 512), (512, 256), (256, 256), (256, 128))
_BACKWARD = (
  (512, 1024),
  (512, 512),
  (256, 512),
  (512, 256),
  (256, 256),
  (128, 256),
)
_SMALL = ((128, 128), (64, 128), (32, 128), (16, 128))


def forward_bytes(p: Problem, tiles: Tiles) -> int:
  """VMEM of the forward kernel; every operand has two buffers."""
  rows, cols = tiles.rows, tiles.cols
  size, wsize = p.dtype.itemsize, p.weight_dtype.itemsize
  lanes = _round_up(p.d, _LANES)
  row_tiles = 2 * rows * lanes * size * (1 + p.down + p.normed)
  weights = p.weights * lanes * cols * (2 * wsize + size)
  outputs = 2 * rows * cols * size * (2 * p.saved + (not p.down))
  temporaries = rows * cols * (2 * 4 + size) + p.down * 2 * rows * lanes * 4
  return row_tiles + weights + outputs + temporaries


def backward_bytes(p: Problem, tiles: Tiles) -> int:
  """VMEM of the backward kernel."""
  rows, cols = tiles.rows, tiles.cols
  size, wsize = p.dtype.itemsize, p.weight_dtype.itemsize
  lanes = _round_up(p.d, _LANES)
  row_tiles = rows * lanes * (2 * size * (2 + p.down + p.normed) + 4 * 4)
  # A weight and its gradient, and the gradient's sum or the weight's cast.
  weights = p.weights * lanes * cols * (4 * wsize + (4 if wsize < 4 else size))
  inputs = 2 * rows * cols * size * (2 * p.saved + (not p.down))
  temporaries = rows * cols * (3 * size + 3 * 4) + lanes * cols * 4
  return row_tiles + weights + inputs + temporaries


def _round_up(length: int, unit: int) -> int:
  return pl.cdiv(length, unit) * unit


def _candidates(first) -> Iterator[Tiles]:
  for rows, cols in first + _SMALL:
    yield Tiles(rows, cols)


def _fitting(op: str, p: Problem, first, size: Callable[..., int]) -> Tiles:
  for tiles in _candidates(first):
    evened = tiles.over(p.n, p.f)
    if size(p, evened) <= _BUDGET_BYTES:
      return evened
  raise ValueError(
    f"{op}: the kernel needs D small enough that {_SMALL[-1][0]} rows and "
    f"{_SMALL[-1][1]} columns of F fit VMEM, got D = {p.d} in {p.dtype}; pass "
    f"implementation='xla'"
  )


def _tuned(op: str, p: Problem, which: str) -> Tiles | None:
  entry = tuned_config(
    op,
    which=which,
    rows=power_of_two(p.n),
    width=p.d,
    hidden=p.f,
    dtype=p.dtype.name,
    weight_dtype=p.weight_dtype.name,
    saved=p.saved,
  )
  return Tiles(**entry).over(p.n, p.f) if entry else None


def forward_tiles(op: str, p: Problem, config: FeedForwardConfig) -> Tiles:
  """The caller's choice, else the tuned table's, else what fits."""
  return (
    config.forward
    or _tuned(op, p, "forward")
    or _fitting(op, p, _FORWARD, forward_bytes)
  )


def backward_tiles(op: str, p: Problem, config: FeedForwardConfig) -> Tiles:
  """The caller's choice, else the tuned table's, else what fits."""
  return (
    config.backward
    or _tuned(op, p, "backward")
    or _fitting(op, p, _BACKWARD, backward_bytes)
  )


# --- inside a tile ------------------------------------------------------------

# Which dimension of either factor is summed over.  The unit loads a transposed
# right factor as fast as a plain one; a transposed left one passes the
# cross-lane unit, which has time for it.
NN = ((1,), (0,))
NT = ((1,), (1,))
TN = ((0,), (0,))


def dot(a: jax.Array, b: jax.Array, dims=NN) -> jax.Array:
  """A product of two tiles with a float32 sum."""
  return jax.lax.dot_general(
    a, b, (dims, ((), ())), preferred_element_type=jnp.float32
  )


def normed_tile(norm: RowNorm | None, r) -> jax.Array:
  """r.x, or its norm: taken once, with r.scale into r.normed, for all F tiles.

  The F tiles must be the grid's inner dimension.
  """
  if norm is None:
    return r.x[...]

  @pl.when(pl.program_id(1) == 0)
  def _():
    x = r.x[...].astype(jnp.float32)
    r.normed[...] = norm.of(x, r.scale[...]).astype(r.normed.dtype)

  return r.normed[...]


def zero_past(tile: jax.Array, end: jax.Array | int, axis: int) -> jax.Array:
  """`tile` with zeros from index `end` of an axis on.

  What hangs over the end of an array is undefined, and undefined times zero
  may be NaN: both factors of a sum over that axis need this.
  """
  ids = jax.lax.broadcasted_iota(jnp.int32, tile.shape, axis)
  # The selection is in float32: a v5e has no bfloat16 arithmetic.
  kept = jnp.where(ids < end, tile.astype(jnp.float32), 0.0)
  return kept.astype(tile.dtype)
