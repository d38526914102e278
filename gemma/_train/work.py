"""The directory that a run works in, by its own or for one elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator

import jax

from .._checkpoint import Mirror, open_directory, twin_home
from .._errors import UserError
from .._files import remote_url
from .._lease import Lease, LeaseLostError
from .._lock import locked
from .._processes import count, is_first, together
from .._remote import Place, place_of
from .config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Work:
  """Where a run works.

  Attributes:
    directory: of this machine; it exists, can be written, and is locked.
    name: what the user calls it.
    mirror: carries it to another machine; None if it is to be here.
    check: raises a `UserError` if it has become another's meanwhile.
  """

  directory: pathlib.Path
  name: str
  mirror: Mirror | None = None
  check: Callable[[], None] = lambda: None

  def pull(self, say: Callable[[str], None]) -> None:
    """Brings what is on another machine.

    Args:
      say: tells the user what happens there, from any thread.
    """
    if self.mirror is not None:
      self.mirror.pull(say)
      say(f"work      {self.name}; on this machine {self.directory}")

  def share(self) -> None:
    """Lets other processes see the run; the first one calls it first."""
    if self.mirror is not None and count() > 1:
      self.mirror.share()

  def push(self) -> None:
    """Uploads what is new, if it is to be on another machine."""
    if self.mirror is not None:
      self.mirror.push()

  @contextlib.contextmanager
  def sent(self) -> Iterator[None]:
    """At the end all is where it is to be, however that comes.

    Raises:
      UserError: if it could not be uploaded, unless another error came first.
    """
    try:
      yield
    except LeaseLostError:
      raise
    except Exception as error:
      # The other ones of several processes may know of no error.
      if self.mirror is not None and count() == 1:
        try:
          self.mirror.finish()
        except UserError as second:
          if isinstance(error, UserError):
            raise UserError(f"{error}; and {second}") from error
      raise
    if self.mirror is not None:
      self.mirror.finish()


def open_work(config: TrainConfig, stack: contextlib.ExitStack) -> Work:
  """Opens the directory of a run, until the end of the stack.

  Args:
    config: of the run.
    stack: frees it.

  Raises:
    UserError: if it cannot be written, or another process works in it.
  """
  place = place_of(config.directory, "work directory")
  with together("opening the work directory"):
    if place is not None:
      return _open_twin(config, place, stack)
    directory = pathlib.Path(config.directory)
    if is_first() and not os.path.exists(directory):
      stack.callback(_remove_if_empty, directory.absolute())
    directory = open_directory(directory)
    if not is_first():
      return Work(directory, str(directory))
    check = stack.enter_context(locked(directory))
  return Work(directory, str(directory), check=check)


def _open_twin(
  config: TrainConfig, place: Place, stack: contextlib.ExitStack
) -> Work:
  process = jax.process_index() if count() > 1 else 0
  home = twin_home(place, config.cache_dir, process)
  try:
    open_directory(home)
  except UserError as error:
    raise UserError(
      f"work directory {place}: its twin on this machine cannot be written: "
      f"{error.__cause__}; give --cache-dir another place"
    ) from error
  check = stack.enter_context(locked(home, name=place.url))
  lease = None
  if is_first():
    lease = stack.enter_context(Lease(place, home / "lease"))
  mirror = Mirror(place, home, lease, config.keep)
  return Work(mirror.directory, place.url, mirror, check)


def _remove_if_empty(directory: pathlib.Path) -> None:
  """As nothing came of it."""
  with contextlib.suppress(OSError):
    directory.rmdir()


def local_home(config: TrainConfig) -> pathlib.Path:
  """The folder for what belongs to the run and this machine alone."""
  place = place_of(config.directory, "work directory")
  return (
    config.directory if place is None else twin_home(place, config.cache_dir)
  )


def shown(config: TrainConfig) -> str:
  """The work directory as the user is to give it."""
  return remote_url(config.directory) or str(config.directory.absolute())
