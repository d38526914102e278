"""Ctrl-C and `kill` as a request to finish the step and save."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTICE = b"\nfinishing the step and saving; once more to stop at once\n"


@dataclasses.dataclass
class Interruption:
  """What has come so far."""

  signal: signal.Signals | None = None


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Interruption]:
  """Notes the first SIGINT or SIGTERM; the second acts at once, as ever."""
  interruption = Interruption()
  # Python lets only the main thread set handlers; elsewhere the caller minds.
  if threading.current_thread() is not threading.main_thread():
    yield interruption
    return

  def note(number: int, _: object) -> None:
    interruption.signal = signal.Signals(number)
    for each in _SIGNALS:
      signal.signal(each, before[each])
    # Not print: the signal may have come in the middle of one.
    os.write(2, _NOTICE)

  before = {each: signal.signal(each, note) for each in _SIGNALS}
  try:
    yield interruption
  finally:
    for each in _SIGNALS:
      signal.signal(each, before[each])
