"""What a training run shows while it runs."""

from __future__ import annotations

import collections
import contextlib
import statistics
import time
from collections.abc import Iterable

import rich.console
import rich.live
import rich.spinner
import rich.text

from .metrics import Record, perplexity

_SECONDS_BETWEEN_LINES = 10.0
_BAR = 24  # characters
_SAMPLES = 99  # steps whose time tells how long the others will take


class Progress(contextlib.AbstractContextManager):
  """A line that is redrawn in a terminal; elsewhere, a new line now and then.

  Until the first step is done it says what is waited for: compilation.  Of
  other work between steps it says so if it is told, by `waits_for`.

  Args:
    start: steps done by earlier runs.
    steps: steps in all.
    console: where to write.
  """

  def __init__(self, start: int, steps: int, console: rich.console.Console):
    self._console = console
    self._redraws = console.is_terminal and not console.is_dumb_terminal
    self._steps = steps
    self._step = start
    # Of recent steps; and of those with an evaluation before or behind.
    self._seconds: collections.deque[float] = collections.deque(maxlen=_SAMPLES)
    self._slow: collections.deque[float] = collections.deque(maxlen=_SAMPLES)
    self._last_line = time.monotonic()
    self._waits = "compiling", self._last_line  # for what, and since when
    self._mark: float | None = None  # when the last step was shown
    self._evaluated = False  # whether an evaluation belonged to it
    self._held_out = ""
    self._measures: tuple[str, ...] = ()
    self._spinner = rich.spinner.Spinner("line")
    self._live = rich.live.Live(
      console=console,
      get_renderable=self._line,
      refresh_per_second=4,
      transient=True,
    )

  def __enter__(self) -> Progress:
    """Starts to draw."""
    if self._redraws:
      self._live.start(refresh=True)
    else:
      self._print("compiling the first step ...")
    return self

  def __exit__(self, *_) -> None:
    """Removes the line that was redrawn."""
    self._live.stop()

  def waits_for(self, what: str) -> None:
    """Shows in a terminal what is done, such as "evaluating", for how long.

    Until the next step is shown.
    """
    self._waits = what, time.monotonic()

  def evaluating(self, batch: int, batches: int) -> None:
    """Reports an evaluation that has done `batch` of its `batches`."""
    now, text = time.monotonic(), f"evaluating {batch}/{batches}"
    self._waits = text, self._waits[1] if batch else now
    if now - self._last_line > _SECONDS_BETWEEN_LINES and not self._redraws:
      self._last_line = now
      self._print(text)

  def show(self, record: Record) -> None:
    """Reports a step; if it was evaluated, the line stays in a terminal too."""
    now, step = time.monotonic(), record["step"]
    self._waits = "", now
    evaluated = "held_out_loss" in record
    self._count(step, now, evaluated)
    if evaluated:
      self._held_out = "held-out {:.3f} (perplexity {:,.1f})".format(
        record["held_out_loss"], perplexity(record["held_out_loss"])
      )
    measures = [f"loss {record['loss']:.3f}", self._held_out]
    skipped = "skipped_in_a_row" in record
    if skipped:
      norm = record["gradient_norm"]
      measures.append(f"not taken: gradient norm {norm:.4g}")
    if "tokens_per_second" in record:
      measures.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if "model_flops_utilization" in record:
      measures.append(f"MFU {record['model_flops_utilization']:.1%}")
    self._measures = tuple(filter(None, measures))
    late = now - self._last_line > _SECONDS_BETWEEN_LINES
    if evaluated or skipped or (late and not self._redraws):
      self._last_line = now
      left = self._left()
      self._print("  ".join([self._where(), *self._measures, *left]))

  def _print(self, text: str) -> None:
    self._console.print(text, highlight=False, markup=False, soft_wrap=True)

  def _count(self, step: int, now: float, evaluated: bool) -> None:
    """Notes how long a step took; not the first, which includes compilation."""
    if self._mark is not None and step > self._step:
      plain = not (evaluated or self._evaluated)
      seconds = (now - self._mark) / (step - self._step)
      (self._seconds if plain else self._slow).append(seconds)
    self._mark, self._evaluated, self._step = now, evaluated, step

  def _where(self) -> str:
    return f"step {self._step:>{len(str(self._steps))}}/{self._steps}"

  def _left(self) -> Iterable[str]:
    """The time left, if a step takes what most of the last ones took.

    Evaluations are in it only if there are no steps without; a save now and
    then is not, by the median.
    """
    steps, times = self._steps - self._step, self._seconds or self._slow
    if not times or steps <= 0:
      return ()
    return (f"{duration(statistics.median(times) * steps)} left",)

  def _line(self) -> rich.console.RenderableType:
    """The line of a terminal: what matters most comes first.

    What a narrow one has no room for is left out, and never the step.
    """
    width, where = self._console.width, f"step {self._step}/{self._steps}"
    what, since = self._waits
    if what:
      waited = duration(time.monotonic() - since)
      text = rich.text.Text(f"{where}  {what}, {waited}")
      text.truncate(width, overflow="crop")
      self._spinner.update(text=text if len(text) < width - 1 else where)
      return self._spinner
    parts = [where]
    for part in (*self._left(), *self._measures):
      if sum(map(len, parts)) + 2 * len(parts) + len(part) <= width:
        parts.append(part)
    text = rich.text.Text("  ".join(parts))
    room = min(_BAR, width - len(text) - 2)
    if room >= _BAR // 3:
      done = room * min(self._step, self._steps) // self._steps
      full, rest = "━━" if self._console.encoding.startswith("utf") else "#."
      text.append("  ").append(full * done, style="bar.complete")
      text.append(rest * (room - done), style="bar.back")
    return text


def duration(seconds: float) -> str:
  """Such as "0:34", "12:05", "20 h 10 min" and "3 d 4 h"."""
  minutes, seconds = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes}:{seconds:02d}"
  hours, minutes = divmod(round(minutes + seconds / 60), 60)
  if hours < 48:
    return f"{hours} h {minutes} min"
  days, hours = divmod(round(hours + minutes / 60), 24)
  return f"{days:,} d {hours} h"


def completed(done: int, steps: int) -> str:
  """What to say of a run that has nothing to do any more."""
  if done > steps:
    return (
      f"training is complete: {done} steps are done, more than the {steps} "
      "that were asked for,"
    )
  return f"training is complete: {done} of {steps} steps"
