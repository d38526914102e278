"""A work directory on another machine, and its twin on this one.

    CACHE/work/NAME/         of one URL
        run/                 the twin: a work directory, in which the run works
        run.old/             a former one that was not what is there
        mirrored.json        which step was the newest there, by this machine
        lease                what this machine wrote to the lease
        compiled/            programs of this machine

Each of several processes has a twin, with its parts of the arrays until it
reads a step from there; the first one decides what is done, and alone writes
what is not in parts.

All that is promised of a work directory is promised of the twin, by the same
code.  A `Mirror` carries it to the other machine: a step whose files are up
gets its checksums, which make it count there, and only then do older ones go,
by the same rule.  So whenever the process or the network ends, one complete
step is there, once there was one.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import shutil
import zlib

from .._data.cache import default_directory
from .._errors import UserError
from .._files import json_of, write_atomically
from .._remote import Place
from .checksums import CHECKSUMS, checksums_in
from .identity import CONFIG, TOKENIZER, read_identity, without_config
from .remote import FOLDER, fetch, remote_steps, step_name
from .steps import complete_folders

_METRICS = "metrics.jsonl"


def twin_home(
  place: Place, cache: pathlib.Path | None, process: int = 0
) -> pathlib.Path:
  """What belongs to a URL on this machine.

  Args:
    place: a work directory.
    cache: the one that the user asked for, if any.
    process: of several; each has a twin of its own.
  """
  name = re.sub(r"[^A-Za-z0-9_-]+", "-", place.url.rpartition("/")[2])[:40]
  digest = hashlib.sha256(place.url.encode()).hexdigest()[:12]
  root = (cache or default_directory()).absolute()
  suffix = f"-{process}" if process else ""
  return root / "work" / f"{name}-{digest}{suffix}"


class Twin:
  """What this machine has of a work directory on another one.

  Args:
    place: the work directory.
    home: what belongs to it on this machine; locked.

  Attributes:
    place: the same.
    directory: the twin.
    there: the complete steps of the work directory, and their checksums.
  """

  def __init__(self, place: Place, home: pathlib.Path):
    self.place, self._home = place, home
    self.directory = home / "run"
    self.there: dict[int, bytes] = {}

  def look(self) -> list[int]:
    """Sees which steps are there; those that are half there."""
    self.there, half = remote_steps(self.place)
    return half

  def is_other(self) -> bool:
    """Whether the twin is not what the work directory was, or what follows."""
    if not (self.directory / CONFIG).exists():
      return False
    newest = self.newest()
    if newest is not None:
      folder = complete_folders(self.directory).get(newest[0])
      if folder is not None:
        mark = (folder / CHECKSUMS).read_bytes()
        if mark == self.there[newest[0]]:
          return False
    try:
      noted = json_of((self._home / "mirrored.json").read_text())
    except (OSError, ValueError):
      noted = None
    return noted != (None if newest is None else list(newest))

  def newest(self) -> tuple[int, int] | None:
    """What tells the newest step there from others."""
    step = max(self.there, default=None)
    return None if step is None else (step, zlib.crc32(self.there[step]))

  def note(self) -> None:
    """Keeps which step is the newest there, by this machine."""
    text = json.dumps(self.newest())
    write_atomically(self._home / "mirrored.json", text.encode())

  def set_aside(self) -> str:
    """Renames it; what to say of that."""
    old = self._home / "run.old"
    shutil.rmtree(old, ignore_errors=True)
    os.rename(self.directory, old)
    newest = max(self.there, default=None)
    has = "no step" if newest is None else f"step {newest}"
    return (
      f"{self.place} has {has}, of another run or machine than what this "
      f"machine has of it, which is now {old}; going on from {self.place}"
    )

  def marks(self) -> dict[str, int]:
    """What tells each complete step of the twin from others."""
    folders = complete_folders(self.directory)
    return {
      str(step): zlib.crc32((folder / CHECKSUMS).read_bytes())
      for step, folder in folders.items()
    }

  def remove_what_differs(self) -> None:
    """Removes steps that are not what is there."""
    there = {str(step): zlib.crc32(m) for step, m in self.there.items()}
    for step, mark in self.marks().items():
      if there.get(step) != mark:
        shutil.rmtree(self.directory / FOLDER / step)

  def ahead(self) -> int | None:
    """The newest step, if it is newer than what is there."""
    newest = max(complete_folders(self.directory), default=-1)
    return newest if newest > max(self.there, default=-1) else None

  def lacks(self) -> int | None:
    """The newest step there, if it is not on this machine, nor a newer one."""
    newest = max(self.there, default=None)
    here = complete_folders(self.directory)
    return None if newest in here or self.ahead() is not None else newest

  def is_whole(self, step: int) -> bool:
    """Whether all files of a complete step are on this machine.

    Of what several processes wrote, each has its parts.
    """
    folder = complete_folders(self.directory)[step]
    names = checksums_in((folder / CHECKSUMS).read_bytes())
    return all((folder / name).is_file() for name in names)

  def fetch_newest(self) -> None:
    """Brings the newest step, unless the twin is ahead."""
    newest = max(self.there, default=None)
    if newest is not None and self.ahead() is None:
      folder = self.directory / step_name(newest)
      try:
        fetch(self.place, newest, self.there[newest], folder)
      except FileNotFoundError as error:
        raise UserError(
          f"checkpoint {self.place}/{step_name(newest)}: a file is missing: "
          f"{error}; delete {self.place}/{step_name(newest)} to use an "
          "earlier step"
        ) from error

  def fetch_files(self) -> None:
    """Brings the identity and the records."""
    self.directory.mkdir(parents=True, exist_ok=True)
    found = {n: self.place.read(n) for n in (TOKENIZER, _METRICS, CONFIG)}
    for name, content in found.items():
      if content is not None:
        write_atomically(self.directory / name, content)
    if self.there and not (self.directory / CONFIG).exists():
      raise without_config(self.place, max(self.there))
    if not self.there and found[CONFIG] is not None:
      # The first upload of all may have been cut.
      try:
        read_identity(self.directory)
      except UserError:
        for name in found:
          (self.directory / name).unlink(missing_ok=True)
