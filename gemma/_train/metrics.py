"""The record of a run: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import tensorboardX.proto.event_pb2
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.summary import scalar

from .._errors import UserError
from .._files import json_of, write_atomically
from .._remote import place_of

_FILE = "metrics.jsonl"
_events: Any = tensorboardX.proto.event_pb2  # generated, without types
_BUFFER = 8192  # bytes that wait to be written together

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
    wall_seconds          since the run began, that time included
    goodput               of wall_seconds, the share in which devices took steps
                          that count: not skipped, nor lost and taken again
    parameter_norm        after this step
    skipped               steps that were not taken, so far; see `guard`
    step_seconds, ...     since the record before, the seconds of each part that
                          `times` names

and, where it applies,

    z_loss, total_loss    with a z-loss: its term, and the sum whose gradient is
                          taken
    skipped_in_a_row      if this step was not taken: it and those before it
    tokens_per_second     of recent steps; evaluating and saving do not count
    tokens_per_second_per_device  the same, of each device
    model_flops_utilization  on a device whose highest rate is known
    held_out_loss         of an evaluation after this step, nats per token
    unigram_loss          of the same tokens, by their frequency alone

A number that is not finite is null in the file.  Records of earlier versions
lack what is newer, and the loss of the first ones includes the z-loss.
"""

_WALL = {"time", "wall_seconds"}

# What TensorBoard has by itself.
_NOT_DRAWN = ("step", "time", "seconds", "wall_seconds")


class Metrics(contextlib.AbstractContextManager):
  """Appends one record per step, each step once however often a run resumes.

  Args:
    directory: of the run.
    step: of the checkpoint from which the run resumes.  Records of later steps
      are removed: these steps were not saved and will be taken again.
    check: raises a `UserError` if the directory has become another run's.

  Raises:
    UserError: here and by `flush`, if the disk is full; `write` does not fail.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    step: int,
    check: Callable[[], None] = lambda: None,
  ):
    self._path, self._check = directory / _FILE, check
    there = read_metrics(directory)
    kept = [r for r in there if r["step"] <= step]
    self._unwritten = b""
    # Seconds of the run before this call.
    self._before = max((r.get("seconds", 0.0) for r in kept), default=0.0)
    self._started = time.monotonic()
    # When the run began, in Unix time, and its seconds of steps that count.
    began = [r["time"] - r["wall_seconds"] for r in there if r.keys() >= _WALL]
    self._began = min(began, default=time.time())
    self._useful = sum(map(_useful, kept))
    lines = b"".join(map(_line, kept))
    with self._errors():
      self._file = self._opened(lines)
    self._board = _Board(directory / "tensorboard", step + 1)

  def __exit__(self, *_) -> None:
    """Flushes and closes both files."""
    try:
      self.flush()
    finally:
      self._file.close()
      self._board.close()

  def write(self, record: Record) -> Record:
    """Adds a record; its "step" counts the steps done.

    Returns:
      The record with times and goodput.
    """
    now = time.time()
    wall = max(now - self._began, 0.0)
    self._useful += _useful(record)
    record = {
      **record,
      "time": now,
      "seconds": self._before + time.monotonic() - self._started,
      "wall_seconds": wall,
      "goodput": min(self._useful / wall, 1.0) if wall else 0.0,
    }
    self._unwritten += _line(record)
    if len(self._unwritten) > _BUFFER:
      with contextlib.suppress(OSError):  # `flush` tries again, and says so
        self._write()
    self._board.write(record)
    return record

  def flush(self) -> None:
    """Puts all records on disk.

    To be called before a checkpoint is saved: a run that resumes from it does
    not write the records up to it again.
    """
    with self._errors():
      self._write()
      self._keep()
      os.fsync(self._file.fileno())
    self._board.flush()

  def _opened(self, content: bytes) -> io.FileIO:
    write_atomically(self._path, content)
    return open(self._path, "a+b", buffering=0)

  def _keep(self) -> None:
    """Puts the file back, if it was deleted or another was put in its place.

    As long as it is open, all of it is there.
    """
    with contextlib.suppress(FileNotFoundError):
      there = os.stat(self._path)
      if os.path.samestat(there, os.fstat(self._file.fileno())):
        return
    self._check()
    self._file.seek(0)
    content = self._file.read()
    self._file.close()
    self._file = self._opened(content)

  def _write(self) -> None:
    """Writes what can be written, and forgets that."""
    while self._unwritten:
      written = self._file.write(self._unwritten) or 0
      self._unwritten = self._unwritten[written:]

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise UserError(
        f"{self._path}: {error.strerror or error}; make room and start again"
      ) from error


class Unwritten(contextlib.AbstractContextManager):
  """As `Metrics`, of a process that writes none."""

  def __exit__(self, *_) -> None:
    """Nothing is left to do."""

  def write(self, record: Record) -> Record:
    """Gives the record back."""
    return record

  def flush(self) -> None:
    """Nothing waits."""


def _useful(record: Record) -> float:
  """Seconds in which the devices took the step, if it counts."""
  skipped = "skipped_in_a_row" in record
  return 0.0 if skipped else record.get("step_seconds", 0.0)


def _line(record: Record) -> bytes:
  """As the file has it: JSON knows no infinity and no NaN."""
  known = {
    name: None if isinstance(x, float) and not math.isfinite(x) else x
    for name, x in record.items()
  }
  return json.dumps(known).encode() + b"\n"


class _Board:
  """TensorBoard's copy of the metrics; what cannot be written is left out.

  By the package's writer and not by its SummaryWriter, whose thread ends at the
  first error, whereupon the program waits for it without end.
  """

  def __init__(self, directory: pathlib.Path, first_step: int):
    self._writer: EventsWriter | None = None
    with contextlib.suppress(OSError):
      directory.mkdir(exist_ok=True)
      self._writer = EventsWriter(str(directory / "events"))
    # What another process has written of these steps and later ones is void.
    log = _events.SessionLog
    self._write(step=first_step, session_log=log(status=log.START))

  def write(self, record: Record) -> None:
    """Adds a record."""
    for name, number in record.items():
      if name not in _NOT_DRAWN and math.isfinite(number):
        self._write(step=record["step"], summary=scalar(name, number))

  def flush(self) -> None:
    """Puts all records on disk."""
    if self._writer is not None:
      with contextlib.suppress(OSError):
        self._writer.flush()

  def close(self) -> None:
    """Ends the file."""
    if self._writer is not None:
      with contextlib.suppress(OSError):
        self._writer.close()

  def _write(self, **event: Any) -> None:
    if self._writer is not None:
      with contextlib.suppress(OSError):
        self._writer.write_event(_events.Event(wall_time=time.time(), **event))


def unwritten_record(
  directory: pathlib.Path, step: int, record: Record | None, evaluated: bool
) -> Record | None:
  """The record of a checkpoint's step, if it has yet to be completed.

  The checkpoint is written before the record, and the evaluation comes between.

  Args:
    directory: of the run.
    step: of the checkpoint.
    record: that the checkpoint has.
    evaluated: whether the step is one of those to be evaluated.
  """
  written = [r for r in read_metrics(directory) if r["step"] == step]
  if written and ("held_out_loss" in written[0] or not evaluated):
    return None
  return written[0] if written else record


def read_metrics(directory: str | os.PathLike[str]) -> list[Record]:
  """All records of a run, in order; none if there is no file.

  The run may be on another machine, as in gs://bucket/run.

  A line that is not whole, because the process died while writing it, is left
  out; a number that was not finite is NaN.  `Record`, in `_train/metrics.py`,
  says what a record has.
  """
  if place := place_of(directory, "run"):
    content = place.read(_FILE) or b""
  else:
    path = pathlib.Path(directory) / _FILE
    try:
      content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
      return []
    except OSError as error:
      raise UserError(f"metrics {path}: {error.strerror}") from error
  lines = content.decode(errors="replace").splitlines()
  records = []
  for line in lines:
    with contextlib.suppress(ValueError):
      record = json_of(line)
      numbers = _numbers(record) if isinstance(record, dict) else {}
      if isinstance(numbers.get("step"), int):
        records.append(numbers)
  return records


def _numbers(record: dict[str, Any]) -> Record:
  """What is known of a step; damage may have made something else of it."""
  known = {name: math.nan if x is None else x for name, x in record.items()}
  return {
    name: x
    for name, x in known.items()
    # No count is as large as 2^63; with enough digits it would be no float.
    if type(x) is float or (type(x) is int and abs(x) < 1 << 63)
  }


def perplexity(loss: float) -> float:
  """exp(loss) of a loss in nats; infinity where a float cannot hold it."""
  return math.exp(loss) if loss < 700 else math.inf
