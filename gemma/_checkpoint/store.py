"""Checkpoints: what the trainer saves with and restores from."""

from __future__ import annotations

import contextlib
import errno
import json
import operator
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from .._errors import UserError
from .._files import local_path
from .._processes import Channel, count, is_first, together
from . import steps
from .arrays import read_arrays, write_arrays
from .checksums import checksums_of, put_checksums, verify
from .parts import host_copies, join_parts, write_parts

_SAVING = "saving a checkpoint"
_TOLD = re.compile(r"os_error_code='(\d+)'")
# Of what is written; the thread that does it is one at a time.
_channel = Channel("checkpoints")


class Checkpoints(contextlib.AbstractContextManager):
  """Saves and restores training steps in one directory.

  At every instant it holds at least one complete step, once it had one: a new
  one counts when all of it is on disk and was read back, and only then are
  older ones removed.  So there must be room for one more than are kept.

  Of several processes all do the same: each writes its parts of the arrays, and
  the first one does what is not in parts.

  Args:
    directory: holds `checkpoints/`; all processes see it, or each has its own.
    keep: how many of the newest to keep, besides the one of the lowest held-out
      loss; None for all.
    on_complete: is called whenever a step is complete, by the thread that has
      written it, in each process.
    own: whether each of several processes has a directory of its own, which
      gets its parts alone.
    check: raises a `UserError` if the directory has become another's; it is
      called before anything is written or removed there.

  Raises:
    UserError: if the directory cannot be one.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    keep: int | None,
    on_complete: Callable[[], None] | None = None,
    own: bool = False,
    check: Callable[[], None] = lambda: None,
  ):
    self._directory = local_path(directory, "work directory").absolute()
    if keep is not None and not (type(keep) is int and keep >= 1):
      raise UserError(f"keep: wanted 1 or more, or None, got {keep}")
    self._keep = keep
    self._on_complete = on_complete
    self._check_directory = check
    # Whether this process makes and removes folders.
    self._keeps = own or is_first()
    # The step saved last, which stays whatever its number.
    self._last = -1
    self._writing: _Background | None = None
    with together("opening the checkpoints"):
      if self._keeps:
        steps.clean(self._directory)

  def __exit__(self, kind: Any, *_) -> None:
    """Waits for what is being written, but not if that was interrupted."""
    if kind is None:
      self.finish()
    elif self._writing is not None and kind is not KeyboardInterrupt:
      self._writing.join()

  def finish(self) -> None:
    """Waits until all that was saved is on disk, complete and compared.

    Of several processes all must call it.

    Raises:
      UserError: if it could not be written; see `save`.  Of several processes
        in all of them, wherever it was.
    """
    writing, self._writing = self._writing, None
    if writing is not None:
      with together(_SAVING):
        writing.join()
        writing.check()

  def check(self) -> None:
    """Raises what `finish` would, if that is known already.

    Of several processes one may know it before the others; so they wait for the
    next `save` or `finish`, which they call at the same time.
    """
    writing = self._writing
    if count() == 1 and writing is not None and not writing.is_alive():
      self.finish()

  def save(
    self,
    step: int,
    *,
    record: dict[str, Any] | None = None,
    loss: float | None = None,
    background: bool = False,
    **items: Any,
  ) -> None:
    """Writes a step, wholly or not at all; a step of this number is replaced.

    In the background it takes a copy of the arrays in the host's memory, and
    writes that while the caller goes on; `finish` waits for it, and so does
    whatever else is done here.  Of several processes all must call it.

    Args:
      step: its number, 0 or more; it need not be the highest.
      record: what `read_record` is to give back: values that JSON has.
      loss: the held-out loss, if it is known already; see `note_loss`.
      background: return before it is on disk.
      **items: pytrees of arrays, by the names they are restored by.

    Raises:
      UserError: if the disk is full or cannot be written, or what is read back
        is not what was written.  What was there before still is.  In the
        background: by what is called next.
    """
    self.finish()
    step = step_number(step)
    several = count() > 1
    if not background and not several:
      self._write(step, record, loss, items)
      return
    with together(_SAVING), _disk_errors(self._directory):
      if self._keeps:
        self._check_room(items)
      # The caller may give the arrays away, and an array of a CPU and NumPy's
      # view of it are one.
      copies = (
        host_copies(items)
        if several
        else jax.tree.map(lambda x: np.array(x, copy=True), items)
      )
    if not background:
      self._write(step, record, loss, copies)
      return

    def work(writing: _Background) -> None:
      self._write(step, record, loss, copies)
      late = writing.close()
      if late is not None:
        self._write_loss(step, late)

    self._writing = _Background(step, work)
    self._writing.start()

  def _write(
    self,
    step: int,
    record: dict[str, Any] | None,
    loss: float | None,
    items: dict[str, Any],
  ) -> None:
    with _disk_errors(self._directory), contextlib.ExitStack() as stack:
      folder = steps.part_folder(self._directory, step)
      with self._all_together():
        if self._keeps:
          self._check_room(items)
          stack.enter_context(steps.new_folder(self._directory, step))
      checksums = (
        self._write_arrays(folder, items)
        if count() == 1
        else self._write_parts(folder, items)
      )
      with self._all_together():
        if is_first() and record is not None:
          steps.write_record(folder, record)
          checksums |= checksums_of(folder, steps.RECORD)
      checksums = json.loads(_channel.gather(json.dumps(checksums))[0])
      with self._all_together():
        if self._keeps:
          put_checksums(folder, checksums)
          if loss is not None:
            steps.write_loss(folder, loss)
          self._check_directory()  # all of that may have taken long
          steps.publish(folder, self._directory, step)
      self._last = step
      with self._all_together():
        if self._keeps:
          self._prune()
    if self._on_complete is not None:
      self._on_complete()

  @contextlib.contextmanager
  def _all_together(self) -> Iterator[None]:
    """A block that is done in all processes, or fails in all."""
    with _channel.together(_SAVING), _disk_errors(self._directory):
      yield

  def _write_arrays(
    self, folder: pathlib.Path, items: dict[str, Any]
  ) -> dict[str, tuple[int, int]]:
    """Writes them; the checksums of what was written."""
    for name, item in items.items():
      write_arrays(folder / name, item)
    return checksums_of(folder)

  def _write_parts(
    self, folder: pathlib.Path, items: dict[str, Any]
  ) -> dict[str, tuple[int, int]]:
    """As `_write_arrays`, of several processes; the checksums of all of them.

    Nothing else may be in the folder.
    """
    mine = folder / f".process-{jax.process_index()}"
    checksums: dict[str, tuple[int, int]] = {}
    with self._all_together():
      write_parts(mine, items)
      checksums = checksums_of(mine)
    every = [json.loads(t) for t in _channel.gather(json.dumps(checksums))]
    with self._all_together():
      join_parts(mine, folder, {} if is_first() else every[0])
      shutil.rmtree(mine)
    # What the first one has too, it has of all arrays.
    return {k: v for known in reversed(every) for k, v in known.items()}

  def note_loss(self, step: int, loss: float) -> None:
    """Records the held-out loss of a step that was saved before.

    It is on disk when this returns, or with the step if that is still being
    written, and the step of the lowest one is not removed.  A step that has no
    checkpoint, and a loss that is no finite number, are passed over.

    Args:
      step: its number.
      loss: nats per held-out token.

    Raises:
      UserError: if the disk is full or cannot be written.
    """
    if not is_first():
      return
    writing = self._writing
    if writing is not None:
      if writing.step == step and writing.note(loss):
        return
      writing.join()
    self.check()
    self._write_loss(step, loss)

  def _write_loss(self, step: int, loss: float) -> None:
    self._check_directory()
    folder = steps.complete_folders(self._directory).get(step)
    if folder is not None:
      with _disk_errors(self._directory):
        steps.write_loss(folder, loss)
        self._prune()

  def restore(self, step: int, **abstract: Any) -> dict[str, Any]:
    """Reads the named items of `step` in the shapes and dtypes of `abstract`.

    Raises:
      UserError: if a file is damaged or an array has another shape.
    """
    self.finish()
    return restore(self._directory, step, **abstract)

  def _check_room(self, items: Any) -> None:
    self._check_directory()
    self._directory.mkdir(parents=True, exist_ok=True)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
    free = shutil.disk_usage(self._directory).free
    if size > free:
      detail = f"{size:,} bytes wanted, {free:,} free"
      raise _no_space(self._directory, detail)

  def _prune(self) -> None:
    # Nothing is removed before something was saved in its place.
    if self._keep is not None and self._last >= 0:
      steps.prune(self._directory, self._keep, self._last)


class _Background(threading.Thread):
  """Does something while the caller goes on.

  A daemon, as a program that is to end at once does not wait for it.

  Args:
    step: that is written.
    work: writes it, and is given this.
  """

  def __init__(self, step: int, work: Callable[[_Background], None]):
    super().__init__(name="checkpoint", daemon=True)
    self.step = step
    self._work = work
    self._error: BaseException | None = None
    self._lock = threading.Lock()
    self._loss: float | None = None
    self._closed = False

  def note(self, loss: float) -> bool:
    """Takes the step's held-out loss; False if it is too late."""
    with self._lock:
      self._loss = loss
      return not self._closed

  def close(self) -> float | None:
    """The loss that was noted, after which it is too late."""
    with self._lock:
      self._closed = True
      return self._loss

  def run(self) -> None:
    """Keeps what is raised."""
    try:
      self._work(self)
    except BaseException as error:
      self._error = error

  def check(self) -> None:
    """Raises it."""
    if self._error is not None:
      raise self._error


def restore(
  directory: pathlib.Path, step: int, **abstract: Any
) -> dict[str, Any]:
  """As `Checkpoints.restore`, of a directory that is only read."""
  directory = directory.absolute()
  folder = steps.step_folder(directory, step)
  verify(folder, steps.way_out(directory, step))
  return {
    name: read_arrays(directory, folder / name, tree)
    for name, tree in abstract.items()
  }


def step_number(step: Any) -> int:
  """A whole number, 0 or more, of whatever type.

  Raises:
    UserError: if it is none.
  """
  try:
    number = operator.index(step)
  except TypeError:
    number = -1
  if number < 0 or isinstance(step, bool):
    raise UserError(f"step: wanted a whole number, 0 or more, got {step!r}")
  return number


@contextlib.contextmanager
def _disk_errors(directory: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    # Orbax passes on TensorStore's errors, which are of several classes: the
    # message holds the error number, where Python's own OSError has an
    # attribute.  What has neither goes on as it is.
    told = _TOLD.search(str(error))
    number = int(told[1]) if told else getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
      raise _no_space(directory, "") from error
    if not (told or isinstance(error, OSError)):
      raise
    detail = os.strerror(int(told[1])) if told else error
    raise UserError(
      f"work directory {directory}: cannot write a checkpoint: {detail}; "
      "earlier ones are intact"
    ) from error


def _no_space(directory: pathlib.Path, detail: str) -> UserError:
  return UserError(
    f"work directory {directory}: no space left on its disk"
    f"{f' ({detail})' if detail else ''}; make room and start again, earlier "
    "checkpoints are intact"
  )
