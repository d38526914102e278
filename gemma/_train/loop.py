"""Step after step, with evaluations, checkpoints and reports between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .._checkpoint import Checkpoints
from .._data.batches import (
  evaluation_batches,
  training_batches,
  unigram_loss,
)
from .._data.rows import Batch
from .._errors import UserError
from .._flops import flops_per_token, peak_flops
from .config import TrainConfig
from .evaluate import is_evaluated
from .layout import Layout
from .metrics import Metrics, Record
from .optimizer import learning_rate_schedule
from .progress import Progress
from .run import Run
from .step import State, abstract_state, initial_state, make_steps


class Loop:
  """The state of training, and what happens at and after each step.

  What is due after a step comes in this order: the checkpoint, the evaluation,
  the record in metrics.jsonl, the report.  An evaluation, a full disk or a
  terminal that is gone thus costs no step.  The checkpoint has the step's
  record too: if the process ends before the record is written or the
  evaluation done, the run that resumes does it.

  Args:
    run: data and settings; its `done` steps' checkpoint is the state to begin
      with.
    checkpoints: where to restore from and save to.
    metrics: takes the record of each step.
    progress: shows it.
    stops: whether the loop is to end soon; asked between the batches of an
      evaluation.

  Attributes:
    step: optimizer steps done.
  """

  def __init__(
    self,
    run: Run,
    checkpoints: Checkpoints,
    metrics: Metrics,
    progress: Progress,
    stops: Callable[[], bool],
  ):
    config, valid = run.config, run.tokenizer.vocab_size
    self.step = run.done
    self._run = run
    self._checkpoints = checkpoints
    self._metrics = metrics
    self._progress = progress
    self._stops = stops
    self._batch = training_batches(
      run.train_rows, config.batch_size, config.seed
    )
    self._train_step, self._evaluate_batch = make_steps(
      config, valid, run.layout
    )
    self._params, self._optimizer_state = _state_of(run, checkpoints)
    self._schedule = learning_rate_schedule(config.optimizer, config.steps)
    self._unigram = unigram_loss(run.train_rows, run.evaluation_rows, valid)
    self._clock = _Clock(config, run.layout)
    self._saved = run.done
    # Losses and gradient norm of the newest step, not read yet.  Reading them
    # waits until the device has computed them, so they are read after the next
    # step has been started: the device always has work.
    self._pending: dict[str, jax.Array] | None = None
    # The record of the newest step, if it is not written yet.
    self._record: Record | None = None
    # The newest evaluation: its step and what came out.
    self._evaluated: tuple[int, float] | None = None

  def prepare(self, unwritten: Record | None) -> None:
    """Does all that takes long and cannot be interrupted, but for the steps.

    Args:
      unwritten: the record of the newest step, if it has yet to be written or
        evaluated.
    """
    # Compiled now, when nothing would be lost, and not with steps to save.
    batches = evaluation_batches(
      self._run.evaluation_rows, self._run.config.batch_size
    )
    first = self._placed(next(batches))
    jax.block_until_ready(self._evaluate_batch(self._params, first))
    self._record = unwritten
    if unwritten and is_evaluated(self._run.config, self.step):
      self._evaluate()
    self.report()

  def take_step(self) -> None:
    """One optimizer step, and the checkpoint and evaluation that are due.

    Raises:
      UserError: if the loss or the gradient is not a finite number, or the disk
        is full.
    """
    config, batch = self._run.config, self._placed(self._batch(self.step))
    self._params, self._optimizer_state, measured = self._train_step(
      self._params, self._optimizer_state, batch
    )
    self.report()  # the step before
    self.step += 1
    self._pending = measured
    if self.step == config.steps or self.step % config.save_every == 0:
      self.save()
    if is_evaluated(config, self.step):
      self._evaluate()
      self.report()

  def save(self) -> None:
    """Saves a checkpoint of this step, unless there is one.

    The metrics of the steps before go to disk first: a run that resumes from
    the checkpoint does not write them again.
    """
    record = self._measure()
    if self.step == self._saved:
      return
    step, loss = self._evaluated or (None, None)
    try:
      self._metrics.flush()
    finally:  # without records, the steps are still worth it
      self._checkpoints.save(
        self.step,
        record={**self._run.record, "metrics": record},
        loss=loss if step == self.step else None,
        params=self._params,
        optimizer=self._optimizer_state,
      )
      self._saved = self.step
    self._clock.pause()

  def report(self) -> None:
    """Records and shows the newest step, unless that was done already."""
    record = self._measure()
    if record is not None:
      self._record = None
      self._metrics.write(record)
      self._progress.show(record)

  def _measure(self) -> Record | None:
    """Reads the newest step's numbers; returns its record if not written."""
    if self._pending is None:
      return self._record
    config = self._run.config
    measured = {name: float(x) for name, x in self._pending.items()}
    self._pending = None
    loss = measured.get("total_loss", measured["loss"])
    norm = measured["gradient_norm"]
    if not all(map(math.isfinite, measured.values())):
      raise UserError(
        f"loss is {loss}, its gradient {norm}, at step {self.step}; give a "
        "lower --optimizer.learning-rate or longer --optimizer.warmup-steps "
        "and another --work-dir (the last checkpoint is of step "
        f"{self._saved})"
      )
    self._record = {
      "step": self.step,
      "tokens": self.step * config.batch_size * config.sequence_length,
      **measured,
      "learning_rate": np.asarray(self._schedule(self.step - 1)).item(),
      **self._clock.tick(),
    }
    return self._record

  def _placed(self, batch: Batch) -> Any:
    """A batch where it is to lie, each device's rows with it."""
    layout = self._run.layout
    return batch if layout is None else jax.device_put(batch, layout.batch)

  def _evaluate(self) -> None:
    """Adds the held-out loss to the newest record, if it is not to stop."""
    losses, weights = 0.0, 0.0
    config, rows = self._run.config, self._run.evaluation_rows
    record, count = self._measure(), -(-len(rows) // config.batch_size)
    for i, batch in enumerate(evaluation_batches(rows, config.batch_size)):
      if self._stops():
        return
      self._progress.evaluating(i, count)
      loss, weight = self._evaluate_batch(self._params, self._placed(batch))
      losses, weights = losses + float(loss), weights + float(weight)
    self._clock.pause()
    self._evaluated = self.step, losses / weights
    self._checkpoints.note_loss(*self._evaluated)
    if record is not None:
      record["held_out_loss"] = losses / weights
      record["unigram_loss"] = self._unigram


def _state_of(run: Run, checkpoints: Checkpoints) -> State:
  """New parameters and optimizer state, or those of the run's checkpoint."""
  if not run.done:
    return initial_state(run.config, run.layout)
  params, optimizer = abstract_state(run.config, run.layout)
  restored = checkpoints.restore(run.done, params=params, optimizer=optimizer)
  return restored["params"], restored["optimizer"]


class _Clock:
  """Tokens per second of recent steps; evaluations and saves do not count."""

  def __init__(self, config: TrainConfig, layout: Layout | None):
    self._tokens = config.batch_size * config.sequence_length
    self._flops = flops_per_token(config.model, config.sequence_length)
    peak = peak_flops(jax.devices()[0].device_kind)
    devices = 1 if layout is None else layout.config.devices
    self._peak = peak and devices * peak
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
    rates = {"tokens_per_second": speed}
    if self._peak:
      rates["model_flops_utilization"] = speed * self._flops / self._peak
    return rates
