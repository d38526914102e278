"""Rows to batches, and what guessing by frequency would lose on them."""

from __future__ import annotations

import concurrent.futures
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from .._arguments import whole
from .rows import Batch, Rows


def training_batches(
  rows: Rows, batch_size: int, seed: int, mine: np.ndarray | None = None
) -> Callable[[int], Batch]:
  """A function from a step's number to its batch.

  The batch depends on the rows, the seed and the step alone.
  Each pass over the rows is in another order, which is computed, not stored.

  Args:
    rows: to draw from.
    batch_size: rows of a batch.
    seed: of the order.
    mine: which of the rows of each batch to make, as one of several processes;
      None for all.
  """
  batch_size = whole("batch_size", batch_size, 1, sys.maxsize)
  seed = whole("seed", seed, 0, (1 << 63) - 1)
  source = grain.MapDataset.source(rows).seed(seed)
  endless = source.shuffle().repeat()
  batches = endless.batch(batch_size)

  def batch(step: int) -> Batch:
    if mine is None:
      found = batches[step]
      assert found is not None  # only a filter leaves gaps, and there is none
      return found
    return stacked([endless[step * batch_size + int(i)] for i in mine])

  return batch


def stacked(rows: list[Any]) -> Batch:
  """Rows as the batch that they make."""
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Ahead:
  """The batch of a step, made while the step before is taken.

  Args:
    of: makes the batch of a step; it may be called in another thread.
  """

  def __init__(self, of: Callable[[int], Batch]):
    self.of = of
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._next: tuple[int, concurrent.futures.Future[Batch]] | None = None

  def __call__(self, step: int) -> Batch:
    """Waits for the batch of a step, and begins with the next one's."""
    made = self._next
    batch = made[1].result() if made and made[0] == step else self.of(step)
    self._next = step + 1, self._thread.submit(self.of, step + 1)
    return batch


def evaluation_batches(
  rows: Rows, batch_size: int, mine: np.ndarray | None = None
) -> Iterator[Batch]:
  """Every row once, in order.

  All batches have `batch_size` rows: the last one is filled up with rows whose
  weights are 0.  `mine` is as for `training_batches`.
  """
  for start in range(0, len(rows), batch_size):
    index = start + (np.arange(batch_size) if mine is None else mine)
    batch = rows[np.minimum(index, len(rows) - 1)]
    batch["weights"] = batch["weights"] * (index < len(rows))[:, None]
    yield batch


def unigram_loss(train: Rows, held_out: Rows, vocab_size: int) -> float:
  """The held-out loss of a model that ignores the context.

  It gives each token the probability that it has among the training labels,
  after one is added to every count, so that no probability is zero.

  Returns:
    Nats per token; its exponential is the unigram perplexity.
  """
  smoothed = train.label_counts(vocab_size) + 1
  log_probability = np.log(smoothed / smoothed.sum())
  wanted = held_out.label_counts(vocab_size)
  return float(-(wanted * log_probability).sum() / wanted.sum())
