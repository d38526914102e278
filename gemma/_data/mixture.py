"""Batches of several texts, in shares that are a function of the step.

Each text has its own order of rows, and each of its rows comes once in a pass
over it.  How many rows a step takes of each follows from the shares alone: what
a text is owed is added up, and the whole rows of it are paid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np

from .._errors import UserError
from .batches import stacked
from .rows import Batch, Rows


@dataclasses.dataclass(frozen=True)
class Weight:
  """Of one text in the mixture: on a line from the first step to the last.

  Attributes:
    first: at the first step; 0 or more, of any scale.
    last: at the last step.
  """

  first: float
  last: float


class Quotas:
  """How many rows of each text a step takes.

  Args:
    weights: of each text.
    steps: of the run; its last one has the last weights.
    batch_size: rows of a step.
  """

  def __init__(self, weights: Sequence[Weight], steps: int, batch_size: int):
    self._first = np.array([weight.first for weight in weights], float)
    self._last = np.array([weight.last for weight in weights], float)
    self._steps, self._size = steps, batch_size
    self._owed = np.zeros(len(weights))
    # Rows before each step: [steps so far + 1, texts].
    self._before = [np.zeros(len(weights), np.int64)]

  def shares(self, step: int) -> np.ndarray:
    """float [texts], whose sum is 1."""
    way = min(step / max(self._steps - 1, 1), 1.0)
    weights = self._first + way * (self._last - self._first)
    return weights / weights.sum()

  def before(self, step: int) -> np.ndarray:
    """int64 [texts]: rows that all steps before this one take of each."""
    while len(self._before) <= step:
      self._owed += self._size * self.shares(len(self._before) - 1)
      rows = np.maximum(np.floor(self._owed), 0).astype(np.int64)
      while rows.sum() < self._size:
        rows[np.argmax(self._owed - rows)] += 1
      while rows.sum() > self._size:
        some = np.where(rows > 0, self._owed - rows, np.inf)
        rows[np.argmin(some)] -= 1
      self._owed -= rows
      self._before.append(self._before[-1] + rows)
    return self._before[step]


def mixed_batches(
  texts: Sequence[Rows],
  quotas: Quotas,
  seed: int,
  mine: np.ndarray | None = None,
) -> Callable[[int], Batch]:
  """As `training_batches`, of several texts.

  Args:
    texts: the rows of each.
    quotas: how many of them a step takes.
    seed: of their orders.
    mine: which of the rows of each batch to make; None for all.

  Raises:
    UserError: if a text has no rows.
  """
  for number, rows in enumerate(texts, 1):
    if not len(rows):
      raise UserError(
        f"mix: text {number} of {len(texts)} has no row of training text; give "
        "more of it, a shorter --sequence-length, or leave it out"
      )
  endless = [
    grain.MapDataset.source(rows).seed((seed + i) % 2**63).shuffle().repeat()
    for i, rows in enumerate(texts)
  ]

  def batch(step: int) -> Batch:
    first, after = quotas.before(step), quotas.before(step + 1)
    wanted = [
      (text, index)
      for text in range(len(texts))
      for index in range(int(first[text]), int(after[text]))
    ]
    chosen = range(len(wanted)) if mine is None else mine.tolist()
    return stacked([endless[wanted[i][0]][wanted[i][1]] for i in chosen])

  return batch
