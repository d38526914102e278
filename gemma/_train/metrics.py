"""The record of a run: metrics.jsonl, TensorBoard and loss.png."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from typing import Any

import matplotlib.figure
import tensorboardX

from .._files import write_atomically

_FILE = "metrics.jsonl"

Record = dict[str, Any]
"""Of one step: "step", "loss" and so on, as `Loop` writes them."""


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
    self._board = tensorboardX.SummaryWriter(
      str(directory / "tensorboard"), purge_step=step + 1
    )

  def __exit__(self, *_) -> None:
    """Flushes and closes both files."""
    self.flush()
    self._file.close()
    self._board.close()

  def write(self, record: Record) -> None:
    """Adds a record; its "step" counts the optimizer steps done."""
    self._file.write(json.dumps(record) + "\n")
    for name, value in record.items():
      if name != "step":
        self._board.add_scalar(name, value, record["step"])

  def flush(self) -> None:
    """Puts all records on disk.

    To be called before a checkpoint is saved: a run that resumes from it does
    not write the records up to it again.
    """
    self._file.flush()
    os.fsync(self._file.fileno())
    self._board.flush()


def read_metrics(directory: pathlib.Path) -> list[Record]:
  """All records of a run, in order; none if there is no file.

  A line that is not whole, because the process died while writing it, is left
  out.
  """
  try:
    lines = (directory / _FILE).read_text().splitlines()
  except FileNotFoundError:
    return []
  records = []
  for line in lines:
    with contextlib.suppress(json.JSONDecodeError):
      records.append(json.loads(line))
  return records


def perplexity(loss: float) -> float:
  """exp(loss) of a loss in nats; infinity where a float cannot hold it."""
  return math.exp(loss) if loss < 700 else math.inf


def plot_losses(directory: pathlib.Path) -> pathlib.Path:
  """Draws loss.png from the records: training, held-out, unigram."""
  records = read_metrics(directory)
  figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
  axes = figure.subplots()
  curves: list[tuple[str, str, dict[str, Any]]] = [
    ("loss", "training", dict(linewidth=0.8, alpha=0.7)),
    ("held_out_loss", "held out", dict(linewidth=2, marker=".")),
    ("unigram_loss", "held out, unigram", dict(linestyle="--", color="gray")),
  ]
  for name, label, style in curves:
    points = [(r["step"], r[name]) for r in records if name in r]
    if points:
      axes.plot(*zip(*points, strict=True), label=label, **style)
  axes.set(xlabel="step", ylabel="loss, nats per token")
  axes.grid(alpha=0.3)
  if axes.lines:
    axes.legend()
  path = directory / "loss.png"
  figure.savefig(path, dpi=120)
  return path
