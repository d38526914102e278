"""Batches, from the host to where the devices are to have them.

Each process makes the rows that its own devices take, and no others.  The rows
of a step are those of one process on one device: their order is a function of
the seed and the step, not of who takes them.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from .._data.rows import Batch
from .layout import Layout


class Placement:
  """Where the rows of a batch go.

  Args:
    layout: over several devices; None for one.
    shape: of a whole batch, (rows, tokens).

  Attributes:
    rows: the numbers of those that this process takes, in order; None for all.
  """

  def __init__(self, layout: Layout | None, shape: tuple[int, int]):
    self._sharding = None if layout is None else layout.batch
    self._shape = shape
    self.rows: np.ndarray | None = None
    if self._sharding is not None and not self._sharding.is_fully_addressable:
      wanted = self._sharding.addressable_devices_indices_map(shape).values()
      all_rows = np.arange(shape[0])
      self.rows = np.unique(
        np.concatenate([all_rows[index[0]] for index in wanted if index])
      )

  def __call__(self, batch: Batch) -> Any:
    """The arrays of a batch, of which there are `rows`, on the devices."""
    if self._sharding is None:
      return batch
    if self.rows is None:
      return jax.device_put(batch, self._sharding)
    return {name: self._placed(part) for name, part in batch.items()}

  def _placed(self, part: np.ndarray) -> jax.Array:
    assert self.rows is not None and self._sharding is not None
    rows = self.rows

    def of(index: Any) -> np.ndarray:
      start, stop, _ = index[0].indices(self._shape[0])
      first = int(np.searchsorted(rows, start))
      return part[first : first + stop - start][:, *index[1:]]

    return jax.make_array_from_callback(self._shape, self._sharding, of)
