"""Which steps there are, and how one comes and goes without a gap.

    checkpoints/STEP               complete, if it has its checksums
    checkpoints/STEP.unfinished    had none when a run was resumed
    checkpoints/.working/
        STEP.part                  is being written
        STEP.new                   complete, about to take an older STEP's place
        STEP.old                   is being removed

Each goes to the next by a rename.  A process killed in between leaves things in
.working, which the next `Checkpoints` clears; a STEP.new there counts as STEP.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from .._errors import UserError
from .._files import json_of, sync_folder, write_atomically
from .checksums import CHECKSUMS

_Folder = TypeVar("_Folder")

RECORD = "record.json"
LOSS = "loss.json"
STEP = re.compile(r"(0|[1-9][0-9]*)")
_NEW = re.compile(r"(0|[1-9][0-9]*)\.new")


class HeldOutLoss(float):
  """Nats per token, the mean of so many rows of text; None if nobody said.

  The loss of fewer rows is that of other text: the two do not compare.
  """

  rows: int | None

  def __new__(cls, loss: float, rows: int | None = None) -> HeldOutLoss:
    held = super().__new__(cls, loss)
    held.rows = rows
    return held


# --- which there are ---


def complete_steps(directory: pathlib.Path) -> list[int]:
  """The steps that were written to the end, in order."""
  return sorted(complete_folders(directory))


def unfinished_steps(directory: pathlib.Path) -> list[int]:
  """Steps whose folder has no checksums, in order.

  This version makes none: a folder gets its name when all is in it.  Either an
  earlier version was killed while saving, or the file was lost.
  """
  steps = set(_folders(_root(directory), STEP))
  return sorted(steps - set(complete_folders(directory)))


def complete_folders(directory: pathlib.Path) -> dict[int, pathlib.Path]:
  """The folder of each complete step."""
  root, working = _root(directory), _working(directory)
  while True:
    before = _inodes(root), _inodes(working)
    folders = _folders(root, STEP) | _folders(working, _NEW)
    found = {
      step: folder
      for step, folder in folders.items()
      if (folder / CHECKSUMS).exists()
    }
    # If another process renamed folders meanwhile, look again.
    if before == (_inodes(root), _inodes(working)):
      return found


def step_folder(directory: pathlib.Path, step: int) -> pathlib.Path:
  """The folder of a complete step.

  Raises:
    UserError: if there is none, saying which there are.
  """
  folders = complete_folders(directory)
  if step not in folders:
    raise UserError(
      f"checkpoint {directory}: no complete step {step}; it has "
      f"{', '.join(map(str, sorted(folders))) or 'none'}"
    )
  return folders[step]


def choose_step(directory: pathlib.Path, wanted: int | str | None) -> int:
  """The step that is meant: a number, "best", or None for the newest.

  Raises:
    UserError: if there is none, or the one that is meant is unfinished.
  """
  steps, unfinished = complete_steps(directory), unfinished_steps(directory)
  if wanted == "best":
    # An unfinished one that was evaluated may be the best.
    lost = [s for s in unfinished if (_root(directory, s) / LOSS).exists()]
    best = lowest(local_losses(directory))
    if best is None and not lost:
      raise UserError(
        f"checkpoint {directory}: no step has a held-out loss, so none is the "
        f"best; it has {', '.join(map(str, steps)) or 'none'}"
      )
  elif wanted is None:
    if not steps and not unfinished:
      raise UserError(f"checkpoint {directory}: no complete step; it has none")
    best = max(steps, default=None)
    lost = [s for s in unfinished if best is None or s > best]
  elif isinstance(wanted, str):
    raise UserError(f'step: wanted a number or "best", got {wanted!r}')
  else:
    step_folder(directory, wanted)
    return wanted
  if lost or best is None:
    root = _root(directory, lost[-1])
    raise UserError(
      f"checkpoint {root / CHECKSUMS}: missing: step {lost[-1]} is unfinished, "
      f"or the file was lost; {way_out(directory, lost[-1])}"
    )
  return best


def way_out(directory: pathlib.Path, step: int) -> str:
  """What can be done about a damaged step, for a message."""
  earlier = [s for s in complete_steps(directory) if s < step]
  use = f"go back to step {earlier[-1]}" if earlier else "train from the start"
  return f"delete {_root(directory, step)} to {use}"


def _root(directory: pathlib.Path, step: int | None = None) -> pathlib.Path:
  root = directory / "checkpoints"
  return root if step is None else root / str(step)


def _working(directory: pathlib.Path) -> pathlib.Path:
  return _root(directory) / ".working"


def _inodes(root: pathlib.Path) -> dict[str, int]:
  """What is in `root`: a folder that takes another's name has another inode."""
  try:
    with os.scandir(root) as entries:
      return {entry.name: entry.inode() for entry in entries}
  except (FileNotFoundError, NotADirectoryError):
    return {}


def _folders(
  root: pathlib.Path, pattern: re.Pattern[str]
) -> dict[int, pathlib.Path]:
  """What is in `root` under a name like `pattern`, by its step."""
  matches = [(name, pattern.fullmatch(name)) for name in _inodes(root)]
  return {int(match[1]): root / name for name, match in matches if match}


# --- what was said of them ---


def lowest(losses: Mapping[int, float]) -> int | None:
  """Of those of as many rows as the newest; of equal ones the newest."""
  if not losses:
    return None
  return lowest_of_each(losses)[_rows(losses[max(losses)])]


def lowest_of_each(losses: Mapping[int, float]) -> dict[int | None, int]:
  """The same, for each number of rows."""
  best: dict[int | None, int] = {}
  for step in sorted(losses, key=lambda s: (losses[s], -s)):
    best.setdefault(_rows(losses[step]), step)
  return best


def _rows(loss: float) -> int | None:
  return loss.rows if isinstance(loss, HeldOutLoss) else None


def local_losses(directory: pathlib.Path) -> dict[int, float]:
  """The held-out loss of each step that has one."""
  folders = complete_folders(directory)
  losses = {step: _read_loss(path) for step, path in sorted(folders.items())}
  return {step: x for step, x in losses.items() if x is not None}


def write_loss(folder: pathlib.Path, loss: float) -> None:
  """Notes a step's held-out loss; one that is no finite number is not noted."""
  if math.isfinite(loss):
    value, rows = float(loss), _rows(loss)
    content = {"held_out_loss": value, "crc32": _crc32(value, rows)}
    if rows is not None:
      content["rows"] = rows
    write_atomically(folder / LOSS, json.dumps(content).encode())


def _read_loss(folder: pathlib.Path) -> float | None:
  path = folder / LOSS
  try:
    return loss_in(path.read_bytes(), path)
  except FileNotFoundError:
    return None
  except OSError:
    return loss_in(b"", path)


def loss_in(content: bytes, path: object) -> HeldOutLoss:
  """The held-out loss that a file holds.

  Args:
    content: of the file.
    path: for the message.

  Raises:
    UserError: if it is damaged.
  """
  try:
    told = json_of(content)
    loss, rows = told["held_out_loss"], told.get("rows")
    if told["crc32"] == _crc32(loss, rows):
      return HeldOutLoss(loss, rows)
  except (ValueError, KeyError, TypeError, AttributeError):
    pass
  raise UserError(
    f"checkpoint {path}: damaged; delete it: the step stays, its held-out loss "
    "is unknown then"
  )


def _crc32(loss: float, rows: int | None) -> int:
  said = repr(loss) if rows is None else f"{loss!r} {rows!r}"
  return zlib.crc32(said.encode())


def write_record(folder: pathlib.Path, record: dict[str, Any]) -> None:
  """Writes what was recorded with a step."""
  text = json.dumps(record, indent=2) + "\n"
  write_atomically(folder / RECORD, text.encode())


# --- how they come and go ---


def part_folder(directory: pathlib.Path, step: int) -> pathlib.Path:
  """Where a step is written before it is complete."""
  return _working(directory) / f"{step}.part"


@contextlib.contextmanager
def new_folder(directory: pathlib.Path, step: int) -> Iterator[pathlib.Path]:
  """An empty one, to write a step in; it does not stay there."""
  folder = part_folder(directory, step)
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  try:
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)
    _leave(directory)


def publish(folder: pathlib.Path, directory: pathlib.Path, step: int) -> None:
  """Makes `folder`, complete and with its checksums, the step's."""
  final, new = _root(directory, step), _working(directory) / f"{step}.new"
  if new.exists():  # complete as well, and older
    _replace(directory, step)
  if os.path.lexists(final):
    os.rename(folder, new)
    _replace(directory, step)
  else:
    os.rename(folder, final)
  sync_folder(final.parent)


def _replace(directory: pathlib.Path, step: int) -> None:
  """Gives STEP.new the name STEP, and removes what had it."""
  working = _working(directory)
  old = working / f"{step}.old"
  shutil.rmtree(old, ignore_errors=True)
  # Nothing has it if the process was killed after this line the last time.
  with contextlib.suppress(FileNotFoundError):
    os.rename(_root(directory, step), old)
  os.rename(working / f"{step}.new", _root(directory, step))
  shutil.rmtree(old, ignore_errors=True)
  _leave(directory)


def _discard(directory: pathlib.Path, folder: pathlib.Path) -> None:
  """Removes a folder, which is whole as long as it has its name."""
  working = _working(directory)
  old = working / f"{folder.name}.old"
  working.mkdir(exist_ok=True)
  shutil.rmtree(old, ignore_errors=True)
  with contextlib.suppress(FileNotFoundError):  # by hand, meanwhile
    os.rename(folder, old)
  shutil.rmtree(old, ignore_errors=True)
  _leave(directory)


def _leave(directory: pathlib.Path) -> None:
  with contextlib.suppress(OSError):  # not empty
    _working(directory).rmdir()


def clean(directory: pathlib.Path) -> None:
  """Ends what a killed process began: replacing, writing, removing."""
  working = _working(directory)
  for step in _folders(working, _NEW):
    _replace(directory, step)
  shutil.rmtree(working, ignore_errors=True)
  # Of earlier versions.
  for folder in _root(directory).glob("*.orbax-checkpoint-tmp*"):
    shutil.rmtree(folder, ignore_errors=True)


def set_aside_unfinished(directory: pathlib.Path) -> dict[int, pathlib.Path]:
  """Renames the unfinished steps, so that they are no steps any more.

  Nothing is removed: if the checksums alone were lost, the arrays may be whole.

  Returns:
    The new name of each.
  """
  aside = {}
  for step in unfinished_steps(directory):
    folder = _root(directory, step)
    aside[step] = folder.with_name(f"{step}.unfinished")
    if aside[step].exists():
      _discard(directory, aside[step])
    os.rename(folder, aside[step])
  return aside


def prune(directory: pathlib.Path, keep: int, saved: int) -> None:
  """Removes all complete steps but the newest, the best and the last saved.

  There is a best one for each number of rows that steps were evaluated on.

  Args:
    directory: of the checkpoint.
    keep: how many of the newest stay.
    saved: the step saved last, which may be an earlier one.
  """
  folders = complete_folders(directory)
  for step in superfluous(folders, _read_loss, keep, saved):
    _discard(directory, folders[step])


def superfluous(
  folders: Mapping[int, _Folder],
  loss_of: Callable[[_Folder], float | None],
  keep: int,
  saved: int,
) -> list[int]:
  """The steps that need not stay, in order.

  Args:
    folders: of all complete steps.
    loss_of: a folder's held-out loss, if it is known.
    keep: how many of the newest stay.
    saved: the step saved last, which may be an earlier one.
  """
  losses: dict[int, float] = {}
  spared: set[int | None] = {*sorted(folders)[-keep:], saved}
  for step, folder in folders.items():
    try:
      loss = loss_of(folder)
    except UserError:  # it may be the best
      spared.add(step)
    else:
      if loss is not None:
        losses[step] = loss
  spared.update(lowest_of_each(losses).values())
  return sorted(set(folders) - spared)
