"""Where the time of a run goes, and how fast it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal

import jax

from .._flops import flops_per_token, peak_flops
from .config import TrainConfig
from .layout import Layout

Part = Literal[
  "input",  # waiting for a batch, and handing it to the devices
  "compile",  # the first step, the first evaluation
  "step",  # waiting for the devices to take a step
  "log",  # records and the screen
  "save",  # checkpoints
  "evaluate",  # on held-out text
  "other",
]


class Times:
  """Adds up the time of each part since the last record.

  At every moment one part takes the time: what begins within another one
  interrupts it.
  """

  def __init__(self) -> None:
    self._part: Part = "other"
    self._since = time.perf_counter()
    self._seconds: dict[Part, float] = {}

  @contextlib.contextmanager
  def part(self, name: Part) -> Iterator[None]:
    """Inside, time is that part's."""
    outer = self._switch(name)
    try:
      yield
    finally:
      self._switch(outer)

  def take(self) -> dict[str, float]:
    """Seconds by part, as "step_seconds", since this was called last."""
    self._switch(self._part)
    taken = {f"{part}_seconds": s for part, s in self._seconds.items()}
    self._seconds = {}
    return taken

  def _switch(self, name: Part) -> Part:
    now, outer = time.perf_counter(), self._part
    before = self._seconds.get(outer, 0.0)
    self._seconds[outer] = before + now - self._since
    self._part, self._since = name, now
    return outer


class Clock:
  """Tokens per second of recent steps; evaluations and saves do not count."""

  def __init__(self, config: TrainConfig, layout: Layout | None):
    self._tokens = config.batch_size * config.sequence_length
    self._flops = flops_per_token(config.model, config.sequence_length)
    self._peak = peak_flops(jax.devices()[0].device_kind)
    self._devices = 1 if layout is None else layout.config.devices
    # Of one step: an exponential moving average.
    self._seconds = 0.0
    # When the step before ended, if nothing but training has happened since.
    self._mark: float | None = None

  def pause(self) -> None:
    """Leaves out the time until the next tick: it is not of training alone."""
    self._mark = None

  def tick(self) -> dict[str, float]:
    """Called after each step; returns the rates by the name of their metric.

    The first call only starts the clock: the first step includes compilation.
    """
    before, self._mark = self._mark, time.perf_counter()
    if before is not None:
      taken = self._mark - before
      share = 0.1 if self._seconds else 1.0
      self._seconds += share * (taken - self._seconds)
    if not self._seconds:
      return {}
    speed = self._tokens / self._seconds
    each = speed / self._devices
    rates = {"tokens_per_second": speed, "tokens_per_second_per_device": each}
    if self._peak:
      rates["model_flops_utilization"] = each * self._flops / self._peak
    return rates
