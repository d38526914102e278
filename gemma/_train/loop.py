"""Step after step, with evaluations, checkpoints and reports between."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .._checkpoint import Checkpoints, HeldOutLoss, read_record
from .._data.batches import (
  Ahead,
  evaluation_batches,
  training_batches,
  unigram_loss,
)
from .._data.mixture import mixed_batches
from .._data.rows import Batch
from .._errors import UserError
from .._files import write_atomically
from .._processes import is_first
from .evaluate import is_evaluated
from .guard import Guard, OptimizerState, from_record, to_record
from .metrics import Metrics, Record, Unwritten
from .optimizer import learning_rate_schedule
from .place import Placement
from .profile import Profile
from .progress import Progress
from .run import Run
from .step import State, abstract_state, initial_state, make_steps
from .times import Clock, Part, Times


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
    profile: traces the steps it is to.
    stops: whether the loop is to end soon; asked between the batches of an
      evaluation.

  Attributes:
    step: optimizer steps done.
  """

  def __init__(
    self,
    run: Run,
    checkpoints: Checkpoints,
    metrics: Metrics | Unwritten,
    progress: Progress,
    profile: Profile,
    stops: Callable[[], bool],
  ):
    config, valid = run.config, run.tokenizer.vocab_size
    self.step = run.done
    self._run = run
    self._checkpoints = checkpoints
    self._metrics = metrics
    self._progress = progress
    self._profile = profile
    self._stops = stops
    self._placed = Placement(
      run.layout, (config.batch_size, config.sequence_length)
    )
    self._batch = Ahead(self._batches(self._placed.rows))
    self._train_step, self._evaluate_batch = make_steps(
      config, valid, run.layout
    )
    self._params, self._optimizer_state = _state_of(run, checkpoints)
    self._schedule = learning_rate_schedule(config.optimizer, config.steps)
    self._unigram = unigram_loss(run.train_rows, run.evaluation_rows, valid)
    self._clock = Clock(config, run.layout)
    self._times = Times()
    self._step_part: Part = "compile"  # the first step is compiled first
    self._saved = run.done
    # Why the run cannot go on, once it is known.
    self._failure: UserError | None = None
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
    first = self._placed(next(self._evaluation_batches()))
    with self._times.part("compile"):
      jax.block_until_ready(self._evaluate_batch(self._params, first))
    self._record = unwritten
    if unwritten and is_evaluated(self._run.config, self.step):
      self._evaluate()
    self.report()

  def take_step(self) -> None:
    """One optimizer step, and the checkpoint and evaluation that are due.

    Raises:
      UserError: if too many steps in a row were not taken, or the disk is full.
    """
    config = self._run.config
    self._profile.begin(self.step)
    with self._times.part("input"):
      batch = self._placed(self._batch(self.step))
    with self._times.part(self._step_part):
      self._params, self._optimizer_state, measured = self._train_step(
        self._params, self._optimizer_state, batch
      )
    self._step_part = "step"
    self.report()  # the step before
    self.step += 1
    self._pending = measured
    if self.step == config.steps or self.step % config.save_every == 0:
      self.save(background=self.step < config.steps)
    if is_evaluated(config, self.step):
      self._evaluate()
      self.report()
    if self._profile.is_over(self.step):
      self.report()
      self._profile.end()
    self.check()

  def stops(self) -> bool:
    """Whether the loop is to end; of several processes, all are asked."""
    with self._times.part("step"):  # it waits for nothing but devices
      return self._stops()

  def check(self) -> None:
    """Ends the run if it cannot go on, saved.

    Raises:
      UserError: if too many steps in a row were not taken, or a checkpoint
        could not be written.
    """
    self._checkpoints.check()
    if self._failure is not None:
      self.save()
      self.report()
      raise self._failure

  def save(self, background: bool = False) -> None:
    """Saves a checkpoint of this step, unless there is one.

    In the background it is written while the next steps are taken.  Else it is
    on disk when this returns, as is what was being written.

    The metrics of the steps before go to disk first: a run that resumes from
    the checkpoint does not write them again.
    """
    config, record = self._run.config, self._measure()
    if self.step == self._saved:
      if not background:
        with self._times.part("save"):
          self._checkpoints.finish()
      return
    step, loss = self._evaluated or (None, None)
    adamw, guard = self._optimizer_state
    told = {**self._run.record, "guard": to_record(guard), "metrics": record}
    with self._times.part("save"):
      try:
        self._metrics.flush()
      finally:  # without records, the steps are still worth it
        self._checkpoints.save(
          self.step,
          record=told,
          loss=loss if step == self.step else None,
          background=background and config.save_in_background,
          params=self._params,
          optimizer=adamw,
        )
        self._saved = self.step
    self._clock.pause()

  def report(self) -> None:
    """Records and shows the newest step, unless that was done already."""
    record = self._measure()
    if record is not None:
      self._record = None
      with self._times.part("log"):
        record |= self._times.take()
        self._progress.show(self._metrics.write(record))

  def _measure(self) -> Record | None:
    """Reads the newest step's numbers; returns its record if not written."""
    if self._pending is None:
      return self._record
    config = self._run.config
    with self._times.part("step"):
      measured = {name: x.item() for name, x in self._pending.items()}
    self._pending = None
    in_a_row = measured.pop("skipped_in_a_row")
    # Steps that moved the schedule on, before this one.
    taken = self.step - 1 - (measured["skipped"] - bool(in_a_row))
    self._record = {
      "step": self.step,
      "tokens": self.step * config.batch_size * config.sequence_length,
      **measured,
      "learning_rate": np.asarray(self._schedule(taken)).item(),
      **self._clock.tick(),
    }
    if in_a_row:
      self._record["skipped_in_a_row"] = in_a_row
    if in_a_row and in_a_row % config.max_skipped == 0:
      self._failure = self._gives_up(self._record)
    return self._record

  def _gives_up(self, record: Record) -> UserError:
    """What to say when too many steps in a row were not taken.

    Leaves their batches in the directory.
    """
    count = self._run.config.max_skipped
    newest = range(self.step - count, self.step)
    path = self._run.directory / f"skipped-{self.step}.npz"
    if is_first():
      _write_batches(path, newest, map(self._batches(), newest))
    loss, norm = (
      record.get("total_loss", record["loss"]),
      record["gradient_norm"],
    )
    return UserError(
      f"loss is {loss:.4g}, its gradient {norm:.4g}, at step {self.step}; "
      f"{count} steps in a row were not taken (--max-skipped), their batches "
      f"are in {path}, a checkpoint is saved; give a lower "
      "--optimizer.learning-rate or longer --optimizer.warmup-steps and "
      "another --work-dir, or the same command to go on"
    )

  def _batches(self, mine: np.ndarray | None = None) -> Callable[[int], Batch]:
    """The batch of a step, or the rows of it that are this process's."""
    config, rows = self._run.config, self._run.train_rows
    quotas = self._run.quotas()
    if quotas is not None:
      return mixed_batches(rows.parts(), quotas, config.seed, mine)
    return training_batches(rows, config.batch_size, config.seed, mine)

  def _evaluation_batches(self) -> Iterator[Batch]:
    """This process's rows of the batches of an evaluation."""
    rows, size = self._run.evaluation_rows, self._run.config.batch_size
    return evaluation_batches(rows, size, self._placed.rows)

  def _evaluate(self) -> None:
    """Adds the held-out loss to the newest record, if it is not to stop."""
    losses, weights = 0.0, 0.0
    config, rows = self._run.config, self._run.evaluation_rows
    record, count = self._measure(), -(-len(rows) // config.batch_size)
    with self._times.part("evaluate"):
      for i, batch in enumerate(self._evaluation_batches()):
        if self._stops():
          return
        self._progress.evaluating(i, count)
        loss, weight = self._evaluate_batch(self._params, self._placed(batch))
        losses, weights = losses + float(loss), weights + float(weight)
    self._clock.pause()
    self._evaluated = self.step, HeldOutLoss(losses / weights, len(rows))
    self._checkpoints.note_loss(*self._evaluated)
    if record is not None:
      record["held_out_loss"] = losses / weights
      record["unigram_loss"] = self._unigram


def _state_of(run: Run, checkpoints: Checkpoints) -> State:
  """New parameters and optimizer state, or those of the run's checkpoint."""
  if not run.done:
    return initial_state(run.config, run.layout)
  params, (adamw, _) = abstract_state(run.config, run.layout)
  restored = checkpoints.restore(run.done, params=params, optimizer=adamw)
  guard = from_record(read_record(run.directory, run.done).get("guard"))
  where = None if run.layout is None else run.layout.everywhere
  guard = jax.jit(
    lambda: Guard(*map(jnp.asarray, guard)), out_shardings=where
  )()
  return restored["params"], OptimizerState(restored["optimizer"], guard)


def _write_batches(
  path: pathlib.Path, done: Sequence[int], batches: Iterable[Batch]
) -> None:
  """Leaves the batches of steps, after so many were done, to be looked at."""
  made, content = list(batches), io.BytesIO()
  named = {"step": np.array(done) + 1}
  for name in made[0]:
    named[name] = np.stack([batch[name] for batch in made])
  np.savez(content, allow_pickle=False, **named)
  write_atomically(path, content.getvalue())
