"""Step after step, with evaluations, checkpoints and reports between."""

from __future__ import annotations

import functools
import math
import time

import jax
import numpy as np

from .._checkpoint import Checkpoints
from .._data.batches import (
  evaluation_batches,
  training_batches,
  unigram_loss,
)
from .._errors import UserError
from .._flops import flops_per_token, peak_flops
from .config import TrainConfig
from .metrics import Metrics
from .optimizer import learning_rate_schedule
from .progress import Progress
from .run import Run
from .step import State, fresh_state, make_steps


class Loop:
  """The state of training, and what happens at and after each step.

  Args:
    run: data and settings.
    done: steps that are done; their checkpoint is the state to begin with.
    checkpoints: where to restore from and save to.
    metrics: takes the record of each step.
    progress: shows it.

  Attributes:
    step: optimizer steps done.
  """

  def __init__(
    self,
    run: Run,
    done: int,
    checkpoints: Checkpoints,
    metrics: Metrics,
    progress: Progress,
  ):
    config, valid = run.config, run.tokenizer.vocab_size
    self.step = done
    self._run = run
    self._checkpoints = checkpoints
    self._metrics = metrics
    self._progress = progress
    self._batch = training_batches(
      run.train_rows, config.batch_size, config.seed
    )
    self._train_step, self._evaluate_batch = make_steps(config, valid)
    self._params, self._optimizer_state = _initial_state(
      config, checkpoints, done
    )
    self._schedule = learning_rate_schedule(config.optimizer, config.steps)
    self._unigram = unigram_loss(run.train_rows, run.held_out_rows, valid)
    self._clock = _Clock(config)
    self._saved = done
    # Loss and gradient norm of the newest step, not read yet.  Reading them
    # waits until the device has computed them, so they are read after the next
    # step has been started: the device always has work.
    self._pending: tuple[jax.Array, jax.Array] | None = None

  def take_step(self) -> None:
    """One optimizer step, and the evaluation and checkpoint that are due.

    Raises:
      UserError: if the loss or the gradient is not a finite number, or the disk
        is full.
    """
    config, batch = self._run.config, self._batch(self.step)
    self._params, self._optimizer_state, measured = self._train_step(
      self._params, self._optimizer_state, batch
    )
    self._report()
    self.step += 1
    self._pending = measured
    last = self.step == config.steps
    if last or self.step % config.evaluate_every == 0:
      self._report(self._evaluate())
    if last or self.step % config.save_every == 0:
      self.save()

  def save(self) -> None:
    """Saves a checkpoint of this step, unless there is one.

    The metrics go to disk first: a run that resumes from the checkpoint does
    not write them again.
    """
    self._report()
    if self.step == self._saved:
      return
    self._metrics.flush()
    self._checkpoints.save(
      self.step, params=self._params, optimizer=self._optimizer_state
    )
    self._saved = self.step
    self._clock.pause()

  def _report(self, held_out_loss: float | None = None) -> None:
    """Records and shows the newest step, unless that was done already."""
    if self._pending is None:
      return
    (loss, norm), self._pending = map(float, self._pending), None
    if not (math.isfinite(loss) and math.isfinite(norm)):
      raise UserError(
        f"loss is {loss}, its gradient {norm}, at step {self.step}; give a "
        "lower --optimizer.learning-rate or longer --optimizer.warmup-steps "
        "and another --work-dir (the last checkpoint is of step "
        f"{self._saved})"
      )
    record = {
      "step": self.step,
      "loss": loss,
      "gradient_norm": norm,
      "learning_rate": np.asarray(self._schedule(self.step - 1)).item(),
      **self._clock.tick(),
    }
    if held_out_loss is not None:
      record["held_out_loss"] = held_out_loss
      record["unigram_loss"] = self._unigram
    self._metrics.write(record)
    self._progress.show(record)

  def _evaluate(self) -> float:
    """Nats per held-out token."""
    losses, weights = 0.0, 0.0
    rows, size = self._run.held_out_rows, self._run.config.batch_size
    for batch in evaluation_batches(rows, size):
      loss, weight = self._evaluate_batch(self._params, batch)
      losses, weights = losses + float(loss), weights + float(weight)
    self._clock.pause()
    return losses / weights


def _initial_state(
  config: TrainConfig, checkpoints: Checkpoints, done: int
) -> State:
  """New parameters and optimizer state, or those of checkpoint `done`."""
  fresh = functools.partial(fresh_state, config)
  if not done:
    return jax.jit(fresh)()
  params, optimizer = jax.eval_shape(fresh)
  restored = checkpoints.restore(done, params=params, optimizer=optimizer)
  return restored["params"], restored["optimizer"]


class _Clock:
  """Tokens per second of recent steps; evaluations and saves do not count."""

  def __init__(self, config: TrainConfig):
    self._tokens = config.batch_size * config.sequence_length
    self._flops = flops_per_token(config.model, config.sequence_length)
    self._peak = peak_flops(jax.devices()[0].device_kind)
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
