"""Page 4: how many tokens and heads one grid step takes."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from .._frame import tpu
from .._frame.check import is_size

_TILE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Tile sizes.  They change speed, never results.

  Attributes:
    rows: tokens per grid step; a multiple of 128 (their positions lie in
      lanes).
    heads: heads per grid step, a multiple of 16; None is all of them.
  """

  rows: int = 256
  heads: int | None = None

  def __post_init__(self):
    if not is_size(self.rows, tpu.LANES):
      raise ValueError(
        f"RopeConfig: rows must be a positive multiple of {tpu.LANES}, "
        f"got {self.rows!r}"
      )
    if self.heads is not None and not is_size(self.heads, 16):
      raise ValueError(
        f"RopeConfig: heads must be None or a positive multiple of 16, "
        f"got {self.heads!r}"
      )

  @classmethod
  def fitting(cls, heads: int, head_size: int, dtype: jnp.dtype) -> RopeConfig:
    """Tiles of a megabyte, or of 128 tokens and some of the heads."""
    head_bytes = tpu.lanes(head_size) * jnp.dtype(dtype).itemsize
    # A tile's heads lie in sublanes, which come in eights; one head alone is
    # laid out as a matrix of tokens.
    sublanes = 1 if heads == 1 else tpu.round_up(heads, tpu.SUBLANES)
    token_bytes = head_bytes * sublanes
    rows = _TILE_BYTES // token_bytes // tpu.LANES * tpu.LANES
    if token_bytes * tpu.LANES <= 4 * _TILE_BYTES:
      return cls(rows=min(max(rows, tpu.LANES), 1024))
    fit = 4 * _TILE_BYTES // (tpu.LANES * head_bytes) // 16 * 16
    return cls(rows=tpu.LANES, heads=max(fit, 16))
