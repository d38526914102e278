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
  """The first signal that came, None before."""

  signal: signal.Signals | None = None


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Interruption]:
  """Inside, the first SIGINT or SIGTERM is only noted in what this yields.

  A second one acts as if this were not there: it ends the program at once.
  """
  interruption = Interruption()
  # Python lets only the main thread set handlers; in another one, signals act
  # as the program that called us wants them to.
  if threading.current_thread() is not threading.main_thread():
    yield interruption
    return

  def note(number: int, _: object) -> None:
    interruption.signal = signal.Signals(number)
    for each in _SIGNALS:
      signal.signal(each, before[each])
    # Not by `print`: the signal may have come while the same stream was being
    # written, and Python's streams do not allow a second write inside a first.
    os.write(2, _NOTICE)

  before = {each: signal.signal(each, note) for each in _SIGNALS}
  try:
    yield interruption
  finally:
    for each in _SIGNALS:
      signal.signal(each, before[each])
