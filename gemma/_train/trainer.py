"""A whole run: from a `TrainConfig` to a checkpoint and what came of it.

The package's docstring says which module does what, and in which order.
"""

from __future__ import annotations

import dataclasses
import pathlib
import signal
from collections.abc import Iterator

import jax
import rich.console

from .._checkpoint import Checkpoints, complete_steps
from .._flops import peak_flops
from .._model import num_parameters
from ..ops import describe_ops
from .config import TrainConfig
from .interrupt import deferred_interrupts
from .loop import Loop
from .metrics import Metrics, plot_losses, read_metrics
from .progress import Progress, completed
from .run import Run, open_run
from .step import abstract_model, device_memory, resolved


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """How a call of `train` ended.

  Attributes:
    directory: holds the checkpoints, metrics.jsonl and loss.png.
    step: optimizer steps done, those of earlier calls included.
    held_out_loss: of the last evaluation, in nats per token; None if there was
      none yet.
    unigram_loss: of the same tokens, predicted from the frequency of tokens in
      the training text alone, in nats per token; likewise None.
    interrupted_by: the signal that ended it early, or None.
  """

  directory: pathlib.Path
  step: int
  held_out_loss: float | None
  unigram_loss: float | None
  interrupted_by: signal.Signals | None = None


def train(
  config: TrainConfig, *, console: rich.console.Console | None = None
) -> TrainResult:
  """Trains until `config.steps` are done; resumes the run its directory holds.

  Args:
    config: the model, the data, the directory, and for how long.
    console: where to report; standard output by default.

  Raises:
    UserError: when the data, the directory or a checkpoint does not fit; the
      message says what to do, and nothing that was there is lost.
  """
  console = console or rich.console.Console()

  def say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)

  run = open_run(config)
  done = max(complete_steps(run.directory), default=0)
  if done >= config.steps:
    say(f"{completed(done, config.steps)} in {run.directory}")
    return _result(run.directory, done)
  run = dataclasses.replace(run, config=resolved(config, device_memory()))
  for line in _describe(run, done):
    say(line)
  result = _train(run, done, console)
  say(f"losses drawn in {plot_losses(run.directory)}")
  return result


def _train(run: Run, done: int, console: rich.console.Console) -> TrainResult:
  with (
    Checkpoints(run.directory, keep=run.config.keep) as checkpoints,
    Metrics(run.directory, step=done) as metrics,
    Progress(done, run.config.steps, console) as progress,
    deferred_interrupts() as interruption,
  ):
    loop = Loop(run, done, checkpoints, metrics, progress)
    while loop.step < run.config.steps and interruption.signal is None:
      loop.take_step()
    loop.save()
  result = _result(run.directory, loop.step)
  return dataclasses.replace(result, interrupted_by=interruption.signal)


def _describe(run: Run, done: int) -> Iterator[str]:
  """The lines printed at the start: device, ops, model, data, steps."""
  config, device = run.config, jax.devices()[0]
  others = jax.device_count() - 1
  unused = f"; {others} more are not used" if others else ""
  yield (
    f"device    {device.device_kind} ({device.platform}), "
    f"JAX {jax.__version__}{unused}"
  )
  model = abstract_model(config)
  for line in describe_ops(model.ops, device.platform):
    yield f"op        {line}"
  if device.platform == "tpu":
    yield f"keeps     of layers {config.model.remat}, in the head {config.head}"
  yield (
    f"model     {num_parameters(model):,} parameters in float32, computing in "
    f"{config.model.dtype}"
  )
  for reason, names in run.corpus.skipped.items():
    more = ", ..." if len(names) > 3 else ""
    yield f"skipped   {len(names)}, {reason}: {', '.join(names[:3])}{more}"
  for name, documents, rows in (
    ("training", run.split.train, run.train_rows),
    ("held out", run.split.held_out, run.held_out_rows),
  ):
    yield f"{name}  {rows.num_labels:,} tokens of {len(documents)} documents"
  if run.split.copied:
    yield (
      f"left out  {run.split.copied:,} characters of training text that are "
      "copies of held-out paragraphs"
    )
  tokens = config.batch_size * config.sequence_length
  yield (
    f"steps     {config.steps:,} of {tokens:,} tokens, {done:,} done; "
    f"{config.steps * tokens / run.train_rows.num_labels:.1f} passes in all"
  )
  if peak_flops(device.device_kind):
    yield (
      "MFU       of 6 x weights of matrix products (the tied head once) + 6 x "
      "layers x sequence x heads x head size FLOPs per token"
    )


def _result(directory: pathlib.Path, step: int) -> TrainResult:
  evaluated = [r for r in read_metrics(directory) if "held_out_loss" in r]
  last = evaluated[-1] if evaluated else {}
  return TrainResult(
    directory, step, last.get("held_out_loss"), last.get("unigram_loss")
  )
