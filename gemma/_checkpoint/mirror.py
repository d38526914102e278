"""How what a run writes gets to a work directory on another machine."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator

from .._errors import UserError
from .._lease import Lease, LeaseLostError
from .._processes import Channel, count, is_first, together
from .._remote import Place
from .checksums import CHECKSUMS
from .identity import CONFIG
from .remote import FOLDER, step_name
from .steps import LOSS, complete_folders, loss_in, superfluous
from .twin import Twin

_READING = "reading the work directory"
_SENDING = "uploading"
# Of what is uploaded, by one thread at a time.
_channel = Channel("mirror")
# Of this machine alone.
_LOCAL = (FOLDER, "cache", "compiled")


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
    self._twin = Twin(place, home)
    self.directory = self._twin.directory
    self._place, self._lease = place, lease
    self._keep = keep
    self._say: Callable[[str], None] = lambda text: None
    self._half: set[int] = set()  # steps of which something is there
    self._losses: dict[int, bytes | None] = {}  # loss.json of steps there
    self._sent: dict[str, tuple[int, int]] = {}  # size and time of files
    self._error: Exception | None = None

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
        self._twin.look()
        self._twin.remove_what_differs()
        self._twin.fetch_files()
      lacks = self._twin.lacks()
      if lacks is not None:  # it may take long
        self._say(f"fetching step {lacks} from {self._place} ...")
      self._twin.fetch_newest()

  def _reconcile(self) -> None:
    """What is there counts, unless the twin follows from it."""
    self._half = set(self._twin.look())
    for step in sorted(self._half):
      self._say(
        f"step {step} is half uploaded to {self._place} (it has no "
        f"{CHECKSUMS}) and removed"
      )
    self._clean()
    if self._twin.is_other():
      self._say(self._twin.set_aside())
    if not (self.directory / CONFIG).exists():
      self._twin.fetch_files()
    self._twin.note()

  def _settle_what_is_ahead(self) -> None:
    """What is in the twin alone is of use if all of it is still there.

    Several processes upload it at once, as each has but a part of it.
    """
    ahead = self._twin.ahead() if is_first() else None
    marks = self._twin.marks()
    told = [json.loads(t) for t in _channel.gather(json.dumps([ahead, marks]))]
    ahead, first = told[0]
    if ahead is None:
      return
    name = str(ahead)
    all_have = all(have.get(name) == first[name] for _, have in told)
    if count() > 1 and all_have:
      self._push()
    elif count() == 1 and self._twin.is_whole(ahead):
      self._say(
        f"step {ahead} is on this machine alone, as an upload had failed; it "
        "is uploaded with the next one"
      )
    elif is_first():
      self._say(self._twin.set_aside())
      self._twin.fetch_files()
      self._twin.note()

  def share(self) -> None:
    """Gives the run's identity to the other processes.

    The first one is to call it before them.
    """
    if is_first():
      self._send_files()
    else:
      self._twin.fetch_files()

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
    except (UserError, OSError) as error:
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
        self._twin.fetch_files()
    except LeaseLostError:
      raise
    except (UserError, OSError) as error:
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
        for step in sorted(set(folders) & set(self._twin.there)):
          self._send_loss(step, folders[step])
        for step in spare:
          self._place.remove(f"{step_name(step)}/{CHECKSUMS}")
          del self._twin.there[step]
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
        if self._lease.was_gone:
          self._see_anew()
          self._lease.was_gone = False
        self._send_files()
        known = dict.fromkeys([*self._twin.there, *folders])
        spare = superfluous(
          {step: step for step in known},
          lambda step: self._loss(step, folders.get(step)),
          self._keep,
          max(folders, default=-1),
        )
        have = set.intersection(*(set(json.loads(text)) for text in every))
        new = have - set(spare) - set(self._twin.there)
        # What is most worth first.
        plan = (
          sorted(new, reverse=True),
          sorted(set(spare) & set(self._twin.there)),
        )
    send, spare = json.loads(_channel.gather(json.dumps(plan))[0])
    return send, spare

  def _see_anew(self) -> None:
    """What was uploaded may not be there any more."""
    self._half |= set(self._twin.look())
    self._sent.clear()
    self._losses.clear()

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
    self._twin.there[step] = mark
    self._twin.note()

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
    if content is None and step in self._twin.there:
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
