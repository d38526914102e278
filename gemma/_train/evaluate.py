"""On how much held-out text a run is evaluated, and on which."""

from __future__ import annotations

import numpy as np

from .._data.rows import Rows
from .config import TrainConfig

# A batch is evaluated in a third of the time in which it is trained on, or in
# less: the backward pass takes twice as many operations as the forward pass.
_BATCHES_PER_STEP = 3
_SHARE = 0.05  # of the time of training, for `eval_batches` "auto"


def num_batches(config: TrainConfig) -> int | None:
  """Batches of one evaluation at most; None for all.

  "auto" means as many as all evaluations of the run can have in 5 % of the time
  of its steps, and at least one.  It depends on the settings alone, not on the
  speed of a machine: the same run is evaluated on the same text everywhere.
  """
  if config.eval_batches == "all":
    return None
  if config.eval_batches != "auto":
    return config.eval_batches
  evaluations = -(-config.steps // config.evaluate_every)
  batches = _SHARE * config.steps * _BATCHES_PER_STEP / evaluations
  return max(int(batches + 1e-9), 1)


def evaluation_rows(rows: Rows, config: TrainConfig) -> Rows:
  """The rows of every evaluation: drawn by the seed, in the order of the text.

  The rows of a smaller `eval_batches` are among those of a larger one.
  """
  batches = num_batches(config)
  wanted = len(rows) if batches is None else batches * config.batch_size
  if wanted >= len(rows):
    return rows
  order = np.random.default_rng(config.seed).permutation(len(rows))
  drawn = rows.take(np.sort(order[:wanted]))
  # Very short rows may hold nothing but ends of documents, which predict
  # nothing.
  return drawn if drawn.num_labels else rows


def is_evaluated(config: TrainConfig, step: int) -> bool:
  """Whether the run is evaluated after this step."""
  return step == config.steps or step % config.evaluate_every == 0
