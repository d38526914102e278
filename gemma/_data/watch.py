"""Shows how far the preparation of a text is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import rich.console
import rich.progress

_LONG_TEXT = 5_000_000  # bytes; of less, nothing need be said
_SECONDS_BETWEEN_LINES = 10.0


class Shown(contextlib.AbstractContextManager):
  """A `Watch`: a bar in a terminal, elsewhere a line now and then.

  Args:
    console: None shows nothing.
  """

  def __init__(self, console: rich.console.Console | None):
    self._console = console
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("{task.description}"),
      rich.progress.BarColumn(bar_width=24),
      rich.progress.TaskProgressColumn(),
      rich.progress.TimeRemainingColumn(),
      console=console,
      disable=console is None or not console.is_terminal,
      transient=True,
    )
    self._task: rich.progress.TaskID | None = None

  def __enter__(self) -> Shown:
    """Starts to draw."""
    self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    """Removes what was drawn."""
    self._bar.stop()

  def __call__(self, phase: str, size: int) -> Callable[[int], None]:
    """A phase of so many bytes begins; returns what is told of those done."""
    if self._task is not None:
      self._bar.remove_task(self._task)
    task = self._task = self._bar.add_task(phase, total=size or None)
    done, line = 0, time.monotonic()
    self._say(phase, size, 0)

    def advance(more: int) -> None:
      nonlocal done, line
      done += more
      self._bar.advance(task, more)
      if time.monotonic() - line > _SECONDS_BETWEEN_LINES:
        line = time.monotonic()
        self._say(phase, size, done)

    return advance

  def _say(self, phase: str, size: int, done: int) -> None:
    if self._console is None or self._console.is_terminal or size < _LONG_TEXT:
      return
    text = f"{phase}: {min(done / size, 1):.0%}"
    self._console.print(text, highlight=False, soft_wrap=True)
