"""Signals as a request to finish the step and save.

SIGINT is Ctrl-C, SIGTERM what `kill` and a machine that is taken away send, and
SIGHUP that the terminal went.  Until there is something to save, a command ends
at once; from then on the step is finished and saved first.

A program gets the same request more than once: `timeout` signals a process and
then its group, and of a closed terminal the shell and the system tell.  Hence
only Ctrl-C, and a second after the first request, ends without saving.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from .._output import Output

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
_NOTICE = "\nfinishing the step and saving; Ctrl-C again to stop at once\n"
_REPEATED = 1.0  # seconds in which a Ctrl-C repeats the first request
_SHOW_CURSOR = "\x1b[?25h"


@dataclasses.dataclass
class Interruption:
  """What signals asked for, and whether they have to wait.

  Attributes:
    signal: the first that came, None before.
    holds: whether there is something to save, for which signals have to wait.
  """

  signal: signal.Signals | None = None
  holds: bool = False
  _since: float = 0.0

  def note(self, number: int) -> None:
    """Takes the request of a signal."""
    if self.signal is None:
      self.signal, self._since = signal.Signals(number), time.monotonic()

  def is_final(self, number: int) -> bool:
    """Whether a signal that comes now is not to wait for the save."""
    if not self.holds:
      return True
    late = time.monotonic() - self._since > _REPEATED
    return self.signal is not None and number == signal.SIGINT and late


_nothing_to_save = Interruption()
# What the signals of the process are to respect.
_current = _nothing_to_save


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Interruption]:
  """Inside, signals are noted in what this yields.

  Signals that are ignored, as under `nohup`, stay so.  Outside the main thread
  nothing changes: Python lets no other one set handlers.
  """
  global _current
  interruption = Interruption()
  handled = _handled()
  if not handled:
    yield interruption
    return
  # Not by `print`: the signal may have come while the same stream was being
  # written, and Python's streams do not allow a second write inside a first.
  notices = Output(sys.stderr)

  def note(number: int, _: object) -> None:
    if interruption.signal is None:
      interruption.note(number)
      notices.write(_NOTICE)
    elif interruption.holds and interruption.is_final(number):
      raise KeyboardInterrupt

  before = {each: signal.signal(each, note) for each in handled}
  _current = interruption
  try:
    yield interruption
  finally:
    _current = _nothing_to_save
    for each, handler in before.items():
      signal.signal(each, handler)
    notices.drain(0.5)


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
  """Inside, a signal ends the process, unless something is to be saved.

  With one line and the exit code 128 + its number, at once: Python itself would
  first let the compiler or the tokenizer come to an end, which may take
  minutes.  For commands; a library must not end the process it is in.
  """
  handled = _handled()
  if not handled or os.name != "posix":
    yield
    return
  reader, writer = os.pipe()
  os.set_blocking(writer, False)

  def watch() -> None:
    while arrived := os.read(reader, 64):
      for number in arrived:
        if number in handled and _current.is_final(number):
          _end(number)
    os.close(reader)

  def wait(number: int, _: object) -> None:
    """Does nothing, as `watch` does it, in a thread that need not wait."""

  before: dict[int, Any] = {}
  wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=watch, daemon=True).start()
  try:
    before |= {each: signal.signal(each, wait) for each in handled}
    yield
  finally:
    for each, handler in before.items():
      signal.signal(each, handler)
    signal.set_wakeup_fd(wakeup)
    os.close(writer)


def _handled() -> list[signal.Signals]:
  """The signals that this thread may and should handle."""
  if threading.current_thread() is not threading.main_thread():
    return []
  ignored = (signal.SIG_IGN, None)  # None: a handler that is not Python's
  return [each for each in _SIGNALS if signal.getsignal(each) not in ignored]


def _end(number: int) -> None:
  text = f"\npallas-gemma: ended by {signal.Signals(number).name}\n"
  if sys.__stderr__ is not None:
    with contextlib.suppress(OSError):
      if os.isatty(2):
        text = _SHOW_CURSOR + text  # a progress bar hides it
      if select.select([], [2], [], 0)[1]:  # held by Ctrl-S, it would wait
        os.write(2, text.encode())
  os._exit(128 + number)
