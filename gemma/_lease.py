"""One writer to a place on another machine at a time.

Stores of objects have no locks that end with their holder.  So the holder
writes who it is, and again every minute; what is older than a few minutes was
left by a process that was killed, and is taken over.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import platform
import threading
import time
import uuid
from typing import Any

from ._errors import UserError
from ._files import json_of, write_atomically
from ._remote import Place

LEASE = "lease.json"

_BEAT = 60.0  # seconds between two signs of life
STALE = 300.0  # seconds after the last one, after which it is taken over


_NOTED = 10  # leases that a file keeps


class LeaseLostError(UserError):
  """Another process has taken the place."""


class Lease(contextlib.AbstractContextManager):
  """The right to write to a place, as long as the context lasts.

  Args:
    place: to write to.
    own: a file of this machine that nobody else writes meanwhile, which keeps
      what was written last: a lease that a killed process had taken with the
      same file is taken over at once.

  Attributes:
    was_gone: whether it was found missing since this was last made False: all
      else that is there may have been deleted with it.

  Raises:
    UserError: if another process has it, naming the holder.
  """

  def __init__(self, place: Place, own: pathlib.Path):
    self._place = place
    self.was_gone = False
    self._alive = time.time()  # when the last sign of life was given
    self._id = uuid.uuid4().hex
    self._since = f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}"
    self._ended = threading.Event()
    # Of what is read, and then written by it.
    self._lock = threading.Lock()
    # Noted before it is taken: it is known again whenever this one is killed.
    self._former = _ids(own)
    noted = [*self._former, self._id][-_NOTED:]
    write_atomically(own, " ".join(noted).encode())
    self._acquire()
    self._thread = threading.Thread(target=self._beat, daemon=True)
    self._thread.start()

  def __exit__(self, *_) -> None:
    """Gives it back; it would end by itself, too."""
    self._ended.set()
    with self._lock, contextlib.suppress(UserError):
      if self._read().get("id") == self._id:
        self._place.remove(LEASE)

  def check(self) -> None:
    """Raises a `LeaseLostError` if another process has it now."""
    with self._lock:
      there = self._read()
      if not there and time.time() - self._alive > STALE:
        raise LeaseLostError(
          f"{self._place.what} {self._place}: its lease is gone, and as this "
          f"process gave no sign of life for {STALE / 60:.0f} minutes, another "
          "may have taken it and given it back; the same command looks"
        )
      self.was_gone |= not there
      if there.get("id", self._id) != self._id:
        raise LeaseLostError(
          f"{self._place.what} {self._place}: it was taken over by "
          f"{_name(there)}, as this process gave no sign of life for "
          f"{STALE / 60:.0f} minutes; what is written there is that one's"
        )
      self._place.write(LEASE, self._content())
      self._alive = time.time()

  def _acquire(self) -> None:
    for _ in range(3):  # it may be given back meanwhile
      if self._place.create(LEASE, self._content()):
        break
      there = self._read()
      if not there:
        if self._place.read(LEASE) is None:
          continue
      elif not self._is_stale(there):
        raise self._refusal(there)
      self._place.write(LEASE, self._content())
      break
    # Another one may have done the same at the same time.
    there = self._read()
    if there.get("id") != self._id:
      raise self._refusal(there)

  def _is_stale(self, there: dict[str, Any]) -> bool:
    """Whether its holder has ended.

    Only its own clock tells when a holder gave a sign of life.
    """
    return there.get("id") in self._former or not _age(there) < STALE

  def _refusal(self, there: dict[str, Any]) -> UserError:
    age = _age(there)
    rest = f"its lease ends in {max(STALE - age, 0.0):.0f} seconds"
    if age < -STALE:
      rest = (
        f"delete {self._place}/{LEASE}, which is of {-age:,.0f} seconds from "
        "now: one of the clocks is wrong"
      )
    return UserError(
      f"{self._place.what} {self._place}: in use by {_name(there)}; wait for "
      "it or stop it, or give --work-dir another place (if it was killed, "
      f"{rest})"
    )

  def _read(self) -> dict[str, Any]:
    """What is there; {} if there is nothing, or it is damaged."""
    with contextlib.suppress(ValueError):
      there = json_of(self._place.read(LEASE) or b"")
      if isinstance(there, dict):
        return there
    return {}

  def _content(self) -> bytes:
    told = {
      "id": self._id,
      "pid": os.getpid(),
      "host": platform.node(),
      "since": self._since,
      "time": time.time(),
    }
    return json.dumps(told).encode()

  def _beat(self) -> None:
    while not self._ended.wait(_BEAT):
      # What is lost is said by the next `check`; what cannot be reached may be
      # there the next time.
      with contextlib.suppress(UserError):
        self.check()


def _ids(own: pathlib.Path) -> list[str]:
  """Of the leases that were taken with this file, the newest ones."""
  with contextlib.suppress(OSError):
    return own.read_text().split()
  return []


def _age(there: dict[str, Any]) -> float:
  """Seconds since its holder gave a sign of life."""
  written = there.get("time")
  return time.time() - written if isinstance(written, int | float) else STALE


def _name(there: dict[str, Any]) -> str:
  pid, host, since = (there.get(n, "?") for n in ("pid", "host", "since"))
  return f"process {pid} on {host}, since {since}"
