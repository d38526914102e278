"""`--profile START:STOP`: what the devices do in some steps, by JAX's profiler.

The trace goes to WORK_DIR/profile, for TensorBoard's profile plug-in, XProf or
Perfetto.
"""

from __future__ import annotations

import contextlib
import pathlib
import re

from .._errors import UserError

FOLDER = "profile"
_WINDOW = re.compile(r"(\d{1,18}):(\d{1,18})")


def window_of(text: str) -> tuple[int, int]:
  """10 and 20 of "10:20": once 10 steps are done, until 20 are.

  Raises:
    UserError: if it is none.
  """
  found = _WINDOW.fullmatch(text.strip())
  start, stop = map(int, found.groups()) if found else (0, 0)
  if stop <= start:
    raise UserError(
      f"profile: wanted START:STOP, such as 10:20 for the steps after the 10th "
      f"to the 20th, got {text!r}"
    )
  return start, stop


class Profile(contextlib.AbstractContextManager):
  """Traces the steps of a window.

  Args:
    text: the window, as `window_of` reads it; None traces nothing.
    directory: of the run.
  """

  def __init__(self, text: str | None, directory: pathlib.Path):
    self._start, self._stop = window_of(text) if text else (0, 0)
    self._folder = directory / FOLDER
    self._runs = False

  def begin(self, done: int) -> None:
    """Called before a step, with how many are done."""
    if not self._runs and self._start <= done < self._stop:
      import jax

      jax.profiler.start_trace(str(self._folder))
      self._runs = True

  def is_over(self, done: int) -> bool:
    """Whether the window ends here; the devices are to be waited for then."""
    return self._runs and done >= self._stop

  def end(self) -> None:
    """Writes the trace, if there is one."""
    if self._runs:
      import jax

      self._runs = False
      jax.profiler.stop_trace()

  def __exit__(self, *_) -> None:
    """A run that ends early has what it has."""
    self.end()
