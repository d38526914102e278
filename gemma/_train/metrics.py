"""The record of a run: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import time
from typing import Any

import tensorboardX

from .._errors import UserError
from .._files import local_path, write_atomically

_FILE = "metrics.jsonl"

Record = dict[str, Any]
"""Of one optimizer step.  Each has

    step                  optimizer steps done
    tokens                tokens of all batches so far, padding included
    loss                  mean cross-entropy of the batch, nats per token
    gradient_norm         before clipping
    learning_rate         of this step
    time                  when it was written, in seconds since 1970 (Unix time)
    seconds               that the run has taken so far, in all its calls:
                          compiling, evaluating and saving included, the time
                          between two calls not

and, where it applies,

    z_loss, total_loss    with a z-loss: its term, and the sum whose gradient is
                          taken
    tokens_per_second     of recent steps; evaluating and saving do not count
    model_flops_utilization  on a device whose highest rate is known
    held_out_loss         of an evaluation after this step, nats per token
    unigram_loss          of the same tokens, by their frequency alone

Records of earlier versions have no tokens, time and seconds, and their loss
includes the z-loss.
"""

# What TensorBoard has by itself.
_NOT_DRAWN = ("step", "time", "seconds")


class Metrics(contextlib.AbstractContextManager):
  """Appends one record per step, each step once however often a run resumes.

  Args:
    directory: of the run.
    step: of the checkpoint from which the run resumes.  Records of later steps
      are removed: these steps were not saved and will be taken again.
  """

  def __init__(self, directory: pathlib.Path, *, step: int):
    path = directory / _FILE
    kept = [r for r in read_metrics(directory) if r["step"] <= step]
    lines = "".join(json.dumps(r) + "\n" for r in kept)
    write_atomically(path, lines.encode())
    self._file = open(path, "a")
    # Seconds of the run before this call.
    self._before = max((r.get("seconds", 0.0) for r in kept), default=0.0)
    self._started = time.monotonic()
    self._board = tensorboardX.SummaryWriter(
      str(directory / "tensorboard"), purge_step=step + 1
    )

  def __exit__(self, *_) -> None:
    """Flushes and closes both files."""
    self.flush()
    self._file.close()
    self._board.close()

  def write(self, record: Record) -> None:
    """Adds a record, with the time."""
    seconds = self._before + time.monotonic() - self._started
    record = {**record, "time": time.time(), "seconds": seconds}
    self._file.write(json.dumps(record) + "\n")
    for name, value in record.items():
      if name not in _NOT_DRAWN:
        self._board.add_scalar(name, value, record["step"])

  def flush(self) -> None:
    """Puts all records on disk.

    To be called before a checkpoint is saved: a run that resumes from it does
    not write the records up to it again.
    """
    self._file.flush()
    os.fsync(self._file.fileno())
    self._board.flush()


def read_metrics(directory: str | os.PathLike[str]) -> list[Record]:
  """All records of a run, in order; none if there is no file.

  A line that is not whole, because the process died while writing it, is left
  out.  `Record`, in `_train/metrics.py`, says what a record has.
  """
  path = local_path(directory, "run") / _FILE
  try:
    lines = path.read_text(errors="replace").splitlines()
  except (FileNotFoundError, NotADirectoryError):
    return []
  except OSError as error:
    raise UserError(f"metrics {path}: {error.strerror}") from error
  records = []
  for line in lines:
    with contextlib.suppress(ValueError):
      record = json.loads(line)
      if isinstance(record, dict) and isinstance(record.get("step"), int):
        records.append(record)
  return records


def perplexity(loss: float) -> float:
  """exp(loss) of a loss in nats; infinity where a float cannot hold it."""
  return math.exp(loss) if loss < 700 else math.inf
