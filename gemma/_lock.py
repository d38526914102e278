"""One writer to a directory at a time."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import platform
import time
import uuid
from collections.abc import Callable, Iterator

import filelock

from ._errors import UserError
from ._files import json_of, write_atomically

_LOCK = ".lock"
_HOLDER = ".lock.holder"


@contextlib.contextmanager
def locked(
  directory: pathlib.Path, name: str = ""
) -> Iterator[Callable[[], None]]:
  """Keeps other writers out of `directory`, an existing one; not readers.

  The lock is the operating system's: it ends with the process that holds it,
  however that ends, so that none is ever left behind.  Who holds it is written
  beside it.

  Whoever deletes the lock's file, or the whole directory, lets others in: what
  is yielded tells whether that was so, and is to be called before each writing
  that could harm what is theirs.

  Args:
    directory: to lock.
    name: for messages; that of the directory by default.

  Yields:
    What raises a `UserError` if the directory is no longer the one locked.

  Raises:
    UserError: if another process, or this one, holds it, naming the holder; or
      if the lock's file cannot be opened.
  """
  name = name or str(directory)
  lock = _acquired(directory, name)
  file = os.stat(directory / _LOCK)
  holder = {
    "pid": os.getpid(),
    "host": platform.node(),
    "since": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
    "id": uuid.uuid4().hex,
  }
  note = json.dumps(holder).encode()

  def check() -> None:
    if not (_has_note(directory, note) or _has_file(directory, file)):
      what = "it" if name == str(directory) else f"here {directory}"  # a twin
      raise UserError(
        f"work directory {name}: {what} was {_what_became_of(directory)} while "
        "this process worked in it; nothing more is written there"
      )

  try:
    # Only a message would miss it: a full disk must not keep the rest away.
    with contextlib.suppress(OSError):
      write_atomically(directory / _HOLDER, note)
    yield check
  finally:
    if _has_note(directory, note):
      with contextlib.suppress(OSError):
        (directory / _HOLDER).unlink(missing_ok=True)
    empty = {path.name for path in directory.glob("*")} <= {_LOCK}
    if empty and _has_file(directory, file):
      # Nothing came of it: leave nothing.
      with contextlib.suppress(OSError):
        (directory / _LOCK).unlink()
    lock.release()


def _acquired(directory: pathlib.Path, name: str) -> filelock.BaseFileLock:
  # Held by the block and not by a thread: threads may take turns in it.
  lock = filelock.FileLock(directory / _LOCK, thread_local=False)
  try:
    lock.acquire(blocking=False)
  except filelock.Timeout:
    raise UserError(
      f"work directory {name}: in use by {_holder(directory)}; wait for "
      "it or stop it, or give --work-dir another place"
    ) from None
  except OSError as error:
    raise UserError(
      f"work directory {name}: cannot lock it: {error.strerror or error}; "
      "give --work-dir another place"
    ) from error
  return lock


# Two signs, of which one is enough: there may have been no room for the note,
# and some file systems give a file another number from time to time.


def _has_note(directory: pathlib.Path, note: bytes) -> bool:
  with contextlib.suppress(OSError):
    return (directory / _HOLDER).read_bytes() == note
  return False


def _has_file(directory: pathlib.Path, file: os.stat_result) -> bool:
  # As long as the lock is open no other file gets its number.
  with contextlib.suppress(OSError):
    return os.path.samestat(os.stat(directory / _LOCK), file)
  return False


def _what_became_of(directory: pathlib.Path) -> str:
  if (directory / _LOCK).exists():
    return f"taken over by {_holder(directory)}"
  return "deleted, moved or replaced"


def _holder(directory: pathlib.Path) -> str:
  """Who holds the lock, in words."""
  for _ in range(20):  # it may have been taken a moment ago
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
      holder = json_of((directory / _HOLDER).read_text())
      return (
        f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
      )
    time.sleep(0.05)
  return "another process"
