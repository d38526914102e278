"""Sizes of the kernels' tiles, by a model of the VMEM they take.

The caller's config decides; else the table of tuned tiles; else the first of a
list in falling order of speed whose buffers fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._frame import tpu
from .._frame.tuned import power_of_two, tuned_config
from .config import FeedForwardConfig, FeedForwardTiles
from .spec import Arrays, Problem
from .visits import PART_ROWS, part_rows

# --- a model of VMEM ----------------------------------------------------------

# Of the 126 MiB that a kernel may take; the model does not know every
# temporary.
_BUDGET_BYTES = 108 << 20
# Of experts, whose temporaries are parts of tiles.
_EXPERT_BUDGET_BYTES = 112 << 20
# What the kernels ask for: the rest is XLA's, which in a block of a model hands
# small arrays from one op to the next there.
VMEM_BYTES = 124 << 20


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes and dtypes that tiles are chosen by, all static.

  Attributes:
    n: rows of x.
    d: width D.
    f: feed-forward width F.
    dtype: x's, that of the arithmetic.
    weight_dtype: of the weights and their gradients.
    down: whether the projection back to D is part of the op.
    kept: whether gate and up go from the forward to the backward pass.
    normed: whether the op takes the norm of x itself.
    branches: 2, or 1 if there is no gate.
    halves: whether both are halves of one array's columns, so that tiles must
      divide F.
    stacked: whether the weights are one layer's of a stack.
    stored: whether gate and up are, and the norm.
    experts: how many experts have weights of their own, 0 for none.
  """

  n: int
  d: int
  f: int
  dtype: jnp.dtype
  weight_dtype: jnp.dtype
  down: bool
  kept: bool
  normed: bool
  branches: int = 2
  halves: bool = False
  stacked: bool = False
  stored: bool = False
  experts: int = 0

  @classmethod
  def of(
    cls, p: Problem, a: Arrays, *, kept: bool, stored: bool = False
  ) -> Sizes:
    """Those of arrays with x [N, D]."""
    n, d = a.x.shape
    weights = [w for w in (a.w_gate, a.w_up, a.w_down) if w is not None]
    return cls(
      n=n,
      d=d,
      f=p.layout.width(a.w_gate),
      dtype=a.x.dtype,
      weight_dtype=jnp.result_type(*(w.dtype for w in weights)),
      down=a.w_down is not None,
      kept=kept,
      normed=a.scale is not None,
      branches=p.layout.branches,
      halves=p.layout.form == "columns",
      stacked=a.layer is not None,
      stored=stored,
      experts=0 if a.group_sizes is None else a.group_sizes.shape[0],
    )

  @property
  def op(self) -> str:
    """The op's name, for errors, tuned tables and traces."""
    if self.experts:
      return "expert_feed_forward"
    return "feed_forward" if self.down else "geglu"

  def rows_at_once(self, tile: int) -> int:
    """Rows of a row tile that are computed together."""
    return part_rows(tile) if self.experts else tile

  @property
  def weights(self) -> int:
    """How many weight matrices there are."""
    return self.branches + self.down


def forward_bytes(sizes: Sizes, tiles: FeedForwardTiles) -> int:
  """VMEM of the forward kernel; every operand has two buffers."""
  rows, cols, width = tiles.rows, tiles.cols, tpu.lanes(sizes.d)
  kept = sizes.branches * sizes.kept
  size, wsize = sizes.dtype.itemsize, sizes.weight_dtype.itemsize
  row_tiles = 2 * rows * width * size * (1 + sizes.down + sizes.normed)
  weights = sizes.weights * width * cols * (2 * wsize + size)
  outputs = 2 * rows * cols * size * (kept + (not sizes.down))
  temporaries = rows * cols * (2 * 4 + size)
  if sizes.down:
    temporaries += 2 * rows * width * 4
  return row_tiles + weights + outputs + temporaries


def backward_bytes(sizes: Sizes, tiles: FeedForwardTiles) -> int:
  """VMEM of the backward kernel."""
  rows, cols, width = tiles.rows, tiles.cols, tpu.lanes(sizes.d)
  kept = sizes.branches * sizes.kept
  size, wsize = sizes.dtype.itemsize, sizes.weight_dtype.itemsize
  buffered = 2 * size * (2 + sizes.down + sizes.normed)
  # Three sums of dx, and what is added to them.
  at_once = sizes.rows_at_once(rows)
  row_tiles = rows * width * (buffered + 3 * 4) + at_once * width * 4
  # A weight and its gradient, and the gradient's sum or the weight's cast.
  one_weight = 4 * wsize + (4 if wsize < 4 else size)
  weights = sizes.weights * width * cols * one_weight
  inputs = 2 * rows * cols * size * (kept + (not sizes.down))
  temporaries = at_once * cols * (3 * size + 3 * 4) + width * cols * 4
  if sizes.normed:  # x and the gradient of the normed rows, in float32
    temporaries += 2 * rows * width * 4
  return row_tiles + weights + inputs + temporaries


# --- a model of the program's length ------------------------------------------

# A grid step is one loop body without loops: it must fit the instruction memory
# (see `_frame/tpu.py`), or its code is loaded anew at every step.  Fitted to
# the compiler's output (JAX 0.12.0.1, libtpu 0.0.50.1), to 3 %.


def forward_bundles(sizes: Sizes, tiles: FeedForwardTiles) -> float:
  """Bundles of a grid step of the forward kernel."""
  products = _product_cycles(sizes, tiles, sizes.weights)
  of_norm = 2 * _registers(tiles.rows, sizes.d) if sizes.normed else 0
  return 0.87 * products + of_norm


def backward_bundles(sizes: Sizes, tiles: FeedForwardTiles) -> float:
  """Bundles of a grid step of the backward kernel."""
  again = 0 if sizes.kept else sizes.branches
  products = _product_cycles(sizes, tiles, 2 * sizes.weights + again)
  per_register = 11 if sizes.normed else 3.5
  return 0.85 * products + per_register * _registers(tiles.rows, sizes.d)


def _product_cycles(
  sizes: Sizes, tiles: FeedForwardTiles, products: int
) -> float:
  """Cycles that the matrix unit takes for products, as many as are unrolled."""
  passes = tpu.FLOAT32_PASSES if sizes.dtype == jnp.float32 else 1
  rows = sizes.rows_at_once(tiles.rows)
  one = rows * tiles.cols * tpu.lanes(sizes.d) / tpu.PRODUCTS_PER_CYCLE
  return products * passes * one


def _registers(rows: int, width: int) -> float:
  """Vector registers that hold a float32 tile."""
  return rows * tpu.lanes(width) / (tpu.SUBLANES * tpu.LANES)


# --- the choice ---------------------------------------------------------------

# Rows and columns in falling order of speed; the first that fits is taken.
_FORWARD = (
  (1024, 512),
  (512, 512),
  (512, 256),
  (256, 256),
  (256, 128),
  (128, 128),
  (64, 128),
  (32, 128),
  (16, 128),
)
_BACKWARD = (
  (512, 1024),
  (512, 512),
  (256, 512),
  (512, 256),
  (256, 256),
  (128, 256),
  *_FORWARD[5:],
)


def forward_tiles(sizes: Sizes, config: FeedForwardConfig) -> FeedForwardTiles:
  """The caller's choice, else the tuned table's, else what fits."""
  return (
    _given(sizes, config.forward)
    or _tuned(sizes, "forward")
    or _fitting(sizes, _FORWARD, forward_bytes, forward_bundles)
  )


def backward_tiles(sizes: Sizes, config: FeedForwardConfig) -> FeedForwardTiles:
  """The caller's choice, else the tuned table's, else what fits."""
  return (
    _given(sizes, config.backward)
    or _tuned(sizes, "backward")
    or _fitting(sizes, _BACKWARD, backward_bytes, backward_bundles)
  )


def _given(
  sizes: Sizes, tiles: FeedForwardTiles | None
) -> FeedForwardTiles | None:
  """The caller's tiles, if they can be had."""
  if tiles is not None and sizes.halves and sizes.f % tiles.cols:
    raise ValueError(
      f"{sizes.op}: cols of tiles must divide F where w_gate is [D, 2F], got "
      f"F = {sizes.f} and {tiles}"
    )
  return tiles


def _tuned(sizes: Sizes, which: str) -> FeedForwardTiles | None:
  entry = tuned_config(
    sizes.op,
    which=which,
    rows=power_of_two(sizes.n),
    width=sizes.d,
    hidden=sizes.f,
    dtype=sizes.dtype.name,
    weight_dtype=sizes.weight_dtype.name,
    saved=sizes.kept,
  )
  return _over(sizes, FeedForwardTiles(**entry)) if entry else None


def _over(sizes: Sizes, tiles: FeedForwardTiles) -> FeedForwardTiles:
  """The tiles, evened out over the rows and F."""
  even = tiles.over(sizes.n, sizes.f)
  if sizes.experts and sizes.n > PART_ROWS:
    rows = min(tpu.round_up(even.rows, PART_ROWS), tiles.rows)
    even = dataclasses.replace(even, rows=rows)
  if not sizes.halves:
    return even
  fewer = range(even.cols, 0, -tpu.LANES)
  cols = next(c for c in fewer if sizes.f % c == 0)
  return dataclasses.replace(even, cols=cols)


def _fitting(
  sizes: Sizes,
  fastest_first: Sequence[tuple[int, int]],
  vmem_bytes: Callable[[Sizes, FeedForwardTiles], int],
  bundles: Callable[[Sizes, FeedForwardTiles], float],
) -> FeedForwardTiles:
  """The first tiles that fit VMEM and the instruction memory.

  The last of the list need only fit VMEM: their code is loaded more than once,
  for want of shorter.
  """
  budget = _EXPERT_BUDGET_BYTES if sizes.experts else _BUDGET_BYTES
  for rows, cols in fastest_first:
    tiles = _over(sizes, FeedForwardTiles(rows, cols))
    if sizes.stacked:  # else nothing is written into the stack in place
      tiles = tiles.dividing(sizes.f)
    is_last = (rows, cols) == fastest_first[-1]
    is_short = bundles(sizes, tiles) <= tpu.INSTRUCTION_BUNDLES
    if vmem_bytes(sizes, tiles) <= budget and (is_short or is_last):
      return tiles
  rows, cols = fastest_first[-1]
  # The second product of experts has F in D's place.
  names = ("D and F", "D or F") if sizes.experts else ("D", "D")
  raise ValueError(
    f"{sizes.op}: the kernel needs {names[0]} small enough that {rows} rows "
    f"and {cols} columns of F fit VMEM, got {names[1]} = {sizes.d} in "
    f"{sizes.dtype}; pass implementation='xla'"
  )


# --- a kernel's plan ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything of a kernel's call that is not an array, all static."""

  problem: Problem
  sizes: Sizes
  tiles: FeedForwardTiles

  @property
  def hangs_over_f(self) -> bool:
    """Whether the last F tile hangs over the end of F.

    Then nothing is written into a stack of [..., F] in place: Pallas's
    interpreter cannot do it.
    """
    return self.sizes.f % self.tiles.cols != 0

  @property
  def of_experts(self) -> bool:
    """Whether a step's weights are its visit's expert's."""
    return self.sizes.experts > 0

  @property
  def sums_in_stack(self) -> tuple[bool, bool, bool]:
    """Whether the layers' stack of each weight's gradient is written into.

    Of both branches in one array's columns a kernel writes halves, which are no
    part of the stack.
    """
    whole = self.sizes.stacked and not self.hangs_over_f
    of_branches = whole and not self.sizes.halves
    return of_branches, of_branches, whole

  @property
  def keeps_in_stack(self) -> bool:
    """Whether what is kept is written into stores."""
    hangs = self.hangs_over_f or self.sizes.n % self.tiles.rows != 0
    return self.sizes.stored and not hangs

  @property
  def row_tiles(self) -> int:
    """How many tiles there are of x's rows."""
    return pl.cdiv(self.sizes.n, self.tiles.rows)

  @property
  def row_steps(self) -> int:
    """Grid steps along them: one for each tile, or the experts' visits."""
    return self.row_tiles + self.sizes.experts

  @property
  def f_tiles(self) -> int:
    """How many tiles there are of the weights' columns."""
    return pl.cdiv(self.sizes.f, self.tiles.cols)


def where_present(record: Any, specs: Any) -> Any:
  """A record of specs, with None where the record of arrays has None."""
  pairs = zip(record, specs, strict=True)
  return type(specs)(*(None if x is None else spec for x, spec in pairs))
