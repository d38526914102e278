"""Checkpoints: what the trainer saves with and restores from."""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax

from .._errors import UserError
from .._files import local_path
from .._processes import is_first, together
from . import steps
from .arrays import read_arrays, write_arrays
from .checksums import verify, write_checksums

_SAVING = "saving a checkpoint"


class Checkpoints(contextlib.AbstractContextManager):
  """Saves and restores training steps in one directory.

  At every instant it holds at least one complete step, once it had one: a new
  one counts when all of it is on disk and was read back, and only then are
  older ones removed.  So there must be room for one more than are kept.

  Of several processes all do the same; the first one does what is not in parts.

  Args:
    directory: holds `checkpoints/`.
    keep: how many of the newest to keep, besides the one of the lowest held-out
      loss; None for all.

  Raises:
    UserError: if the directory cannot be one.
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int | None):
    self._directory = local_path(directory, "work directory").absolute()
    if keep is not None and keep < 1:
      raise UserError(f"keep: wanted 1 or more, or None, got {keep}")
    self._keep = keep
    # The step saved last, which stays whatever its number.
    self._last = -1
    with together("opening the checkpoints"):
      if is_first():
        steps.clean(self._directory)

  def __exit__(self, *_) -> None:
    """Nothing is left to do: all that was saved is on disk."""

  def save(
    self,
    step: int,
    *,
    record: dict[str, Any] | None = None,
    loss: float | None = None,
    **items: Any,
  ) -> None:
    """Writes a step, wholly or not at all; a step of this number is replaced.

    Args:
      step: its number, 0 or more; it need not be the highest.
      record: what `read_record` is to give back: values that JSON has.
      loss: the held-out loss, if it is known already; see `note_loss`.
      **items: pytrees of arrays, by the names they are restored by.

    Raises:
      UserError: if the disk is full or cannot be written, or what is read back
        is not what was written.  What was there before still is.
    """
    step = step_number(step)
    with _disk_errors(self._directory), contextlib.ExitStack() as stack:
      with together(_SAVING):
        folder = steps.part_folder(self._directory, step)
        if is_first():
          self._check_room(items)
          stack.enter_context(steps.new_folder(self._directory, step))
      for name, item in items.items():
        with together(_SAVING):
          write_arrays(folder / name, item)
      with together(_SAVING):
        if is_first():
          if record is not None:
            steps.write_record(folder, record)
          write_checksums(folder)
          if loss is not None:
            steps.write_loss(folder, loss)
          steps.publish(folder, self._directory, step)
      self._last = step
      if is_first():
        self._prune()

  def note_loss(self, step: int, loss: float) -> None:
    """Records the held-out loss of a step that was saved before.

    It is on disk when this returns, and the step of the lowest one is not
    removed.  A step that has no checkpoint, and a loss that is no finite
    number, are passed over.

    Args:
      step: its number.
      loss: nats per held-out token.

    Raises:
      UserError: if the disk is full or cannot be written.
    """
    folder = None
    if is_first():
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
    return restore(self._directory, step, **abstract)

  def _check_room(self, items: Any) -> None:
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
  except (OSError, ValueError) as error:
    # Orbax passes on TensorStore's errors: a ValueError whose message holds
    # the error number, where Python's own OSError has an attribute.
    if f"os_error_code='{errno.ENOSPC}'" in str(error) or (
      getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    ):
      raise _no_space(directory, "") from error
    if not isinstance(error, OSError):
      raise
    raise UserError(
      f"work directory {directory}: cannot write a checkpoint: {error}; "
      "earlier ones are intact"
    ) from error


def _no_space(directory: pathlib.Path, detail: str) -> UserError:
  return UserError(
    f"work directory {directory}: no space left on its disk"
    f"{f' ({detail})' if detail else ''}; make room and start again, earlier "
    "checkpoints are intact"
  )
