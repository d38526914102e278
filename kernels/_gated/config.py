"""The sizes of tiles that a caller may choose, and what is kept."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jax.experimental import pallas as pl

from .._frame import tpu
from .._frame.check import is_one_of, is_size


@dataclasses.dataclass(frozen=True)
class FeedForwardTiles:
  """Sizes of one kernel's tiles.

  Attributes:
    rows: rows of x per grid step; a multiple of 16 (the bfloat16 sublanes).
    cols: columns of F per grid step; a multiple of 128 (the lanes).
  """

  rows: int
  cols: int

  def __post_init__(self):
    units = (("rows", tpu.BFLOAT16_SUBLANES), ("cols", tpu.LANES))
    for name, unit in units:
      value = getattr(self, name)
      if not is_size(value, unit):
        raise ValueError(
          f"FeedForwardTiles: {name} must be a positive multiple of {unit}, "
          f"got {value!r}"
        )

  def over(self, n: int, f: int) -> FeedForwardTiles:
    """These tiles for n rows and F columns, evened out.

    1100 rows in tiles of at most 1024 are two of 560, not one of 1024 and a
    rest that costs as much.
    """
    return FeedForwardTiles(
      _even(n, self.rows, tpu.BFLOAT16_SUBLANES),
      _even(f, self.cols, tpu.LANES),
    )

  def dividing(self, f: int) -> FeedForwardTiles:
    """These with columns that divide F, if there are half as many that do."""
    fewer = range(self.cols, self.cols // 2 - 1, -tpu.LANES)
    cols = next((c for c in fewer if f % c == 0), self.cols)
    return dataclasses.replace(self, cols=cols)


def _even(length: int, tile: int, unit: int) -> int:
  count = pl.cdiv(length, tile)
  return tpu.round_up(pl.cdiv(length, count), unit)


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
  forward: FeedForwardTiles | None = None
  backward: FeedForwardTiles | None = None

  def __post_init__(self):
    if not is_one_of(self.residuals, ("gate_up", "none")):
      raise ValueError(
        f"FeedForwardConfig: residuals must be 'gate_up' or 'none', "
        f"got {self.residuals!r}"
      )
    for name in ("forward", "backward"):
      tiles = getattr(self, name)
      if tiles is not None and not isinstance(tiles, FeedForwardTiles):
        raise ValueError(
          f"FeedForwardConfig: {name} must be FeedForwardTiles or None, "
          f"got {tiles!r}"
        )
