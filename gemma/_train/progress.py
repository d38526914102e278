"""What a training run shows while it runs."""

from __future__ import annotations

import contextlib
import time

import rich.console
import rich.progress

from .metrics import Record, perplexity

_SECONDS_BETWEEN_LINES = 10.0


class Progress(contextlib.AbstractContextManager):
  """A line that is redrawn in a terminal; elsewhere, a new line now and then.

  Args:
    start: steps done by earlier runs.
    steps: steps in all.
    console: where to write.
  """

  def __init__(self, start: int, steps: int, console: rich.console.Console):
    self._console = console
    self._steps = steps
    self._start = start
    self._started = self._last_line = time.monotonic()
    self._held_out = ""
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("step {task.completed}/{task.total}"),
      rich.progress.BarColumn(bar_width=24),
      rich.progress.TextColumn("{task.description}"),
      rich.progress.TimeRemainingColumn(),
      console=console,
      disable=not console.is_terminal,
      transient=True,
    )
    self._task = self._bar.add_task("compiling", total=steps, completed=start)

  def __enter__(self) -> Progress:
    """Starts to draw."""
    self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    """Removes the line that was redrawn."""
    self._bar.stop()

  def evaluating(self, batch: int, batches: int) -> None:
    """Reports an evaluation that has done `batch` of its `batches`."""
    now, text = time.monotonic(), f"evaluating {batch}/{batches}"
    self._bar.update(self._task, description=text)
    late = now - self._last_line > _SECONDS_BETWEEN_LINES
    if late and not self._console.is_terminal:
      self._last_line = now
      self._console.print(text, highlight=False, soft_wrap=True)

  def show(self, record: Record) -> None:
    """Reports a step; if it was evaluated, the line stays in a terminal too."""
    now, step = time.monotonic(), record["step"]
    evaluated = "held_out_loss" in record
    if evaluated:
      self._held_out = "  held-out {:.3f} (perplexity {:,.1f})".format(
        record["held_out_loss"], perplexity(record["held_out_loss"])
      )
    text = f"loss {record['loss']:.3f}{self._held_out}"
    if "tokens_per_second" in record:
      text += f"  {record['tokens_per_second']:,.0f} tokens/s"
    if "model_flops_utilization" in record:
      text += f"  MFU {record['model_flops_utilization']:.1%}"
    self._bar.update(self._task, completed=step, description=text)
    late = now - self._last_line > _SECONDS_BETWEEN_LINES
    if evaluated or (late and not self._console.is_terminal):
      self._last_line = now
      self._console.print(
        f"step {step:>{len(str(self._steps))}}/{self._steps}  {text}"
        f"{self._left(step, now)}",
        highlight=False,
        soft_wrap=True,
      )

  def _left(self, step: int, now: float) -> str:
    """The time left, if a step takes what it took on average in this call."""
    if step <= self._start or step >= self._steps:
      return ""
    each = (now - self._started) / (step - self._start)
    minutes, seconds = divmod(round(each * (self._steps - step)), 60)
    return f"  {minutes}:{seconds:02d} left"
