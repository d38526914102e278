"""One writer to a directory at a time."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterator

import filelock

from ._errors import UserError
from ._files import write_atomically

_LOCK = ".lock"
_HOLDER = ".lock.holder"


@contextlib.contextmanager
def locked(directory: pathlib.Path, name: str = "") -> Iterator[None]:
  """Keeps other writers out of `directory`, an existing one; not readers.

  The lock is the operating system's: it ends with the process that holds it,
  however that ends, so that none is ever left behind.  Who holds it is written
  beside it.

  Args:
    directory: to lock.
    name: for messages; that of the directory by default.

  Raises:
    UserError: if another process, or this one, holds it, naming the holder; or
      if the lock's file cannot be opened.
  """
  name = name or str(directory)
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
  try:
    holder = {
      "pid": os.getpid(),
      "host": platform.node(),
      "since": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
    }
    # Only a message would miss it: a full disk must not keep the rest away.
    with contextlib.suppress(OSError):
      write_atomically(directory / _HOLDER, json.dumps(holder).encode())
    yield
  finally:
    with contextlib.suppress(OSError):
      (directory / _HOLDER).unlink(missing_ok=True)
    if {path.name for path in directory.glob("*")} <= {_LOCK}:
      # Nothing came of it: leave nothing.
      with contextlib.suppress(OSError):
        (directory / _LOCK).unlink()
    lock.release()


def _holder(directory: pathlib.Path) -> str:
  """Who holds the lock, in words."""
  for _ in range(20):  # it may have been taken a moment ago
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
      holder = json.loads((directory / _HOLDER).read_text())
      return (
        f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
      )
    time.sleep(0.05)
  return "another process"
