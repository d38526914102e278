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
from collections.abc import Callable, Iterator

from .._data.cache import default_directory
from .._errors import UserError
from .._files import write_atomically
from .._lease import Lease, LeaseLostError
from .._processes import Channel, count, is_first, together
from .._remote import Place
from .checksums import CHECKSUMS
from .identity import CONFIG, TOKENIZER, read_identity
from .remote import FOLDER, fetch, remote_steps, step_name
from .steps import LOSS, complete_folders, loss_in, superfluous

_METRICS = "metrics.jsonl"
_READING = "reading the work directory"
_SENDING = "uploading"
# Of what is uploaded, by one thread at a time.
_channel = Channel("mirror")
# Of this machine alone.
_LOCAL = (FOLDER, "cache", "compiled")


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


class Mirror:
  """Carries a twin to the work directory that it is of.

  Args:
    place: the work directory.
    home: what belongs to it on this machine; locked.
    lease: on the place; None but for the first process.
    keep: how many of the newest steps to keep there, besides the best.

  Attributes:
    directory: the twin.
  """

  def __init__(
    self, place: Place, home: pathlib.Path, lease: Lease | None, keep: int
  ):
    self.directory = home / "run"
    self._place, self._home, self._lease = place, home, lease
    self._keep = keep
    self._say: Callable[[str], None] = lambda text: None
    self._there: dict[int, bytes] = {}  # complete steps, and their checksums
    self._half: set[int] = set()  # steps of which something is there
    self._losses: dict[int, bytes | None] = {}  # loss.json of steps there
    self._sent: dict[str, tuple[int, int]] = {}  # size and time of files
    self._error: UserError | None = None

  # --- from there ---

  def pull(self, say: Callable[[str], None]) -> None:
    """Makes the twin what the work directory is, or finds that it is ahead.

    Args:
      say: tells the user something, from any thread, now and later.

    Raises:
      UserError: if it cannot be reached, or what is there is damaged.
    """
    self._say = say
    with together(_READING):
      if is_first():
        self._reconcile()
    self._settle_what_is_ahead()
    with together(_READING):
      if not is_first():
        self._there, _ = remote_steps(self._place)
        self._remove_what_differs()
        self._fetch_files()
      self._fetch_newest()

  def _reconcile(self) -> None:
    """What is there counts, unless the twin follows from it."""
    self._there, half = remote_steps(self._place)
    self._half = set(half)
    for step in half:
      self._say(
        f"step {step} is half uploaded to {self._place} (it has no "
        f"{CHECKSUMS}) and removed"
      )
    self._clean()
    if self._is_other():
      self._set_aside()
    self.directory.mkdir(parents=True, exist_ok=True)
    if not (self.directory / CONFIG).exists():
      self._fetch_files()
    self._note()

  def _settle_what_is_ahead(self) -> None:
    """Several processes upload at once what is not there, if all have it."""
    if count() == 1:
      return
    marks = self._marks()
    newest = max(self._there, default=-1) if is_first() else -1
    told = _channel.gather(json.dumps([newest, marks]))
    newest, first = json.loads(told[0])
    ahead = max(map(int, first), default=-1)
    if ahead <= newest:
      return
    name = str(ahead)
    if all(json.loads(t)[1].get(name) == first[name] for t in told):
      self._push()
    elif is_first():
      self._set_aside()
      self.directory.mkdir(parents=True)
      self._fetch_files()
      self._note()

  def _marks(self) -> dict[str, int]:
    """What tells each complete step of the twin from others."""
    folders = complete_folders(self.directory)
    return {
      str(step): zlib.crc32((folder / CHECKSUMS).read_bytes())
      for step, folder in folders.items()
    }

  def _remove_what_differs(self) -> None:
    there = {str(step): zlib.crc32(m) for step, m in self._there.items()}
    for step, mark in self._marks().items():
      if there.get(step) != mark:
        shutil.rmtree(self.directory / FOLDER / step)

  def _fetch_newest(self) -> None:
    newest = max(self._there, default=None)
    ahead = max(complete_folders(self.directory), default=-1)
    if newest is not None and ahead <= newest:
      folder = self.directory / step_name(newest)
      try:
        fetch(self._place, newest, self._there[newest], folder)
      except FileNotFoundError as error:
        raise UserError(
          f"checkpoint {self._place}/{step_name(newest)}: a file is missing: "
          f"{error}; delete {self._place}/{step_name(newest)} to use an "
          "earlier step"
        ) from error
    elif ahead >= 0:
      self._say(
        f"step {ahead} is on this machine alone, as an upload had failed; it "
        "is uploaded with the next one"
      )

  def _is_other(self) -> bool:
    """Whether the twin is not what the work directory was, or what follows."""
    if not (self.directory / CONFIG).exists():
      return False
    newest = self._newest()
    if newest is not None:
      folder = complete_folders(self.directory).get(newest[0])
      if folder is not None:
        mark = (folder / CHECKSUMS).read_bytes()
        if mark == self._there[newest[0]]:
          return False
    try:
      noted = json.loads((self._home / "mirrored.json").read_text())
    except (OSError, ValueError):
      noted = None
    return noted != (None if newest is None else list(newest))

  def _newest(self) -> tuple[int, int] | None:
    """What tells the newest step there from others."""
    step = max(self._there, default=None)
    return None if step is None else (step, zlib.crc32(self._there[step]))

  def _note(self) -> None:
    text = json.dumps(self._newest())
    write_atomically(self._home / "mirrored.json", text.encode())

  def _set_aside(self) -> None:
    old = self._home / "run.old"
    shutil.rmtree(old, ignore_errors=True)
    os.rename(self.directory, old)
    newest = max(self._there, default=None)
    has = "no step" if newest is None else f"step {newest}"
    self._say(
      f"{self._place} has {has}, of another run or machine than what this "
      f"machine has of it, which is now {old}; going on from {self._place}"
    )

  def share(self) -> None:
    """Gives the run's identity to the other processes.

    The first one is to call it before them.
    """
    if is_first():
      self._send_files()
    else:
      self._fetch_files()

  def _fetch_files(self) -> None:
    self.directory.mkdir(parents=True, exist_ok=True)
    found = {n: self._place.read(n) for n in (TOKENIZER, _METRICS, CONFIG)}
    for name, content in found.items():
      if content is not None:
        write_atomically(self.directory / name, content)
    if not self._there and found[CONFIG] is not None:
      # The first upload of all may have been cut.
      try:
        read_identity(self.directory)
      except UserError:
        for name in found:
          (self.directory / name).unlink(missing_ok=True)

  # --- to there ---

  def push(self) -> None:
    """Uploads what is new.  If that fails it is said, and tried the next time.

    Raises:
      LeaseLostError: if another process works there now.
    """
    try:
      self._push()
    except LeaseLostError:
      raise
    except UserError as error:
      if self._error is None:
        self._say(f"not uploaded: {error}; it is tried again at the next save")
      self._error = error
    else:
      if self._error is not None:
        self._say(f"uploaded to {self._place} again")
      self._error = None

  def finish(self) -> None:
    """Uploads what is new, and has the records in all processes.

    Raises:
      UserError: if it fails.
    """
    try:
      self._push()
      if not is_first():
        self._fetch_files()
    except LeaseLostError:
      raise
    except UserError as error:
      raise UserError(
        f"{error}; what is not uploaded is in {self.directory}, and the same "
        "command on this machine uploads it"
      ) from error

  def _push(self) -> None:
    folders = complete_folders(self.directory)
    send, spare = self._plan(folders)
    for step in send:
      self._send_step(step, folders[step])
    with _channel.together(_SENDING):
      if self._lease is not None:
        for step in sorted(set(folders) & set(self._there)):
          self._send_loss(step, folders[step])
        for step in spare:
          self._place.remove(f"{step_name(step)}/{CHECKSUMS}")
          del self._there[step]
          self._half.add(step)
        self._clean()

  def _plan(
    self, folders: dict[int, pathlib.Path]
  ) -> tuple[list[int], list[int]]:
    """The steps to upload, in order, and those to remove; as the first says.

    It uploads what is no step by the way.
    """
    plan: tuple[list[int], list[int]] = [], []
    every = _channel.gather(json.dumps(list(folders)))
    with _channel.together(_SENDING):
      if self._lease is not None:
        self._lease.check()
        self._send_files()
        known = dict.fromkeys([*self._there, *folders])
        spare = superfluous(
          {step: step for step in known},
          lambda step: self._loss(step, folders.get(step)),
          self._keep,
          max(folders, default=-1),
        )
        have = set.intersection(*(set(json.loads(text)) for text in every))
        new = have - set(spare) - set(self._there)
        # What is most worth first.
        plan = sorted(new, reverse=True), sorted(set(spare) & set(self._there))
    send, spare = json.loads(_channel.gather(json.dumps(plan))[0])
    return send, spare

  def _send_step(self, step: int, folder: pathlib.Path) -> None:
    """Uploads what this process has of it; at last its checksums."""
    there, mark = step_name(step), (folder / CHECKSUMS).read_bytes()
    self._half.add(step)
    with _channel.together(_SENDING):
      names = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (CHECKSUMS, LOSS)
      ]
      self._place.upload({f"{there}/{name}": folder / name for name in names})
    with _channel.together(_SENDING):
      if self._lease is not None:
        self._send_loss(step, folder)
        self._lease.check()  # it may have taken long
        self._place.write(f"{there}/{CHECKSUMS}", mark)
    self._half.discard(step)
    self._there[step] = mark
    self._note()

  def _send_loss(self, step: int, folder: pathlib.Path) -> None:
    content = _read(folder / LOSS)
    if content is not None and content != self._loss_there(step):
      self._place.write(f"{step_name(step)}/{LOSS}", content)
      self._losses[step] = content

  def _loss_there(self, step: int) -> bytes | None:
    if step not in self._losses:
      name = f"{step_name(step)}/{LOSS}"
      self._losses[step] = self._place.read(name)
    return self._losses[step]

  def _loss(self, step: int, folder: pathlib.Path | None) -> float | None:
    """A step's held-out loss, as this machine or the other knows it."""
    content = None if folder is None else _read(folder / LOSS)
    if content is None and step in self._there:
      content = self._loss_there(step)
    return None if content is None else loss_in(content, step)

  def _send_files(self) -> None:
    """All that is no checkpoint; config.json after what it describes."""
    for path in sorted(self._files(), key=lambda p: p.name == CONFIG):
      found = path.stat()
      state = found.st_size, found.st_mtime_ns
      name = path.relative_to(self.directory).as_posix()
      if self._sent.get(name) != state:
        # As it is now: what is appended meanwhile goes the next time.
        self._place.write(name, path.read_bytes())
        self._sent[name] = state

  def _files(self) -> Iterator[pathlib.Path]:
    for path in self.directory.rglob("*"):
      parts = path.relative_to(self.directory).parts
      hidden = any(part.startswith(".") for part in parts)
      if parts[0] not in _LOCAL and not hidden and path.is_file():
        yield path

  def _clean(self) -> None:
    """Removes what is left of steps that do not count."""
    for step in sorted(self._half):
      self._place.remove_folder(step_name(step))
      self._half.discard(step)


def _read(path: pathlib.Path) -> bytes | None:
  try:
    return path.read_bytes()
  except FileNotFoundError:
    return None
