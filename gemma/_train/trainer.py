"""A whole run: from a `TrainConfig` to a checkpoint and what came of it.

The package's docstring says which module does what, and in which order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import signal
from collections.abc import Callable, Iterator

import jax
import rich.console

from .._arguments import instance
from .._checkpoint import (
  CONFIG,
  Checkpoints,
  best_step,
  read_losses,
  read_record,
  set_aside_unfinished,
)
from .._errors import UserError
from .._flops import peak_flops
from .._output import Output, reporting
from .._params import num_parameters
from .._processes import Poll, is_first, start, together
from ..ops import describe_ops
from .config import TrainConfig
from .evaluate import is_evaluated
from .interrupt import deferred_interrupts
from .loop import Loop
from .metrics import (
  Metrics,
  Record,
  Unwritten,
  read_metrics,
  unwritten_record,
)
from .plot import plot_losses
from .profile import Profile
from .progress import Progress, completed
from .run import Run, describe_data, open_run
from .step import abstract_model, device_memory, resolved
from .work import Work, open_work


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """How a call of `train` ended.

  Attributes:
    directory: holds the checkpoints, metrics.jsonl and loss.png.  Of a run that
      works on another machine, what this one has of it.
    step: optimizer steps done, those of earlier calls included.
    held_out_loss: of the last evaluation, in nats per token; None if there was
      none yet.
    unigram_loss: of the same tokens, predicted from the frequency of tokens in
      the training text alone, in nats per token; likewise None.
    interrupted_by: the signal that ended it early, or None; SIGPIPE if nobody
      reads any more what it prints.
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

  Of several processes, each is to call it, with the same config.

  Args:
    config: the model, the data, the directory, and for how long.
    console: where to report; standard output by default.  Only the first of
      several processes does.

  Raises:
    UserError: when the data, the directory or a checkpoint does not fit; the
      message says what to do, and nothing that was there is lost.
  """
  start(instance("config", config, TrainConfig).distributed)
  console = instance(
    "console", console or rich.console.Console(), rich.console.Console
  )
  if not is_first():
    console = rich.console.Console(quiet=True)
  with contextlib.ExitStack() as stack:
    work = open_work(config, stack)
    reporter, output = stack.enter_context(reporting(console))
    return _run(config, work, reporter, output)


def _run(
  config: TrainConfig,
  work: Work,
  console: rich.console.Console,
  output: Output,
) -> TrainResult:
  def say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)

  work.pull(say)
  directory = work.directory
  run = _opened(config, work, console, say)
  done, unwritten = run.done, _unwritten(run)
  if done >= config.steps and unwritten is None:
    with work.sent():
      say(f"{completed(done, config.steps)} in {work.name}")
    return _result(directory, done)
  memory = device_memory()
  if memory is not None and config.model.remat == "auto":
    say("compiling steps, to see which fits the memory ...")
  config = resolved(config, memory, run.layout)
  run = dataclasses.replace(run, config=config)
  for line in _describe(run):
    say(line)
  result = _train(run, work, unwritten, console, output)
  with work.sent():
    try:
      if is_first():
        plot_losses(directory)
        say(f"losses drawn in {work.name}/loss.png")
    except (OSError, UserError) as error:  # the picture only; all is saved
      say(f"losses not drawn: {error}")
  if not is_first():
    return result
  best = best_step(work.name)
  if best is not None:
    say(
      f"best checkpoint: step {best}, held-out loss "
      f"{read_losses(work.name)[best]:.3f}; it is kept, and "
      "`sample --step best` takes it"
    )
  return result


def _opened(
  config: TrainConfig,
  work: Work,
  console: rich.console.Console,
  say: Callable[[str], None],
) -> Run:
  """The run; of several processes, the first one makes what is not there."""
  run, directory = None, work.directory
  for mine in (is_first(), not is_first()):
    with together("reading the data"):
      if not mine:
        continue
      if not is_first():
        work.share()
      if is_first():
        for step, folder in set_aside_unfinished(directory).items():
          say(
            f"step {step} is unfinished (it has no checksums.json) and "
            f"ignored; it is now {folder}"
          )
      elif not (directory / CONFIG).exists():
        raise UserError(
          f"work directory {directory}: process {jax.process_index()} does not "
          "see what the first process wrote there; give one that all hosts "
          "share"
        )
      run = open_run(config, directory, console)
      if is_first():
        work.share()
  assert run is not None
  return run


def _unwritten(run: Run) -> Record | None:
  """The newest step's record, if the run ended before it was complete."""
  if not run.done:
    return None
  record = read_record(run.directory, run.done).get("metrics")
  evaluated = is_evaluated(run.config, run.done)
  return unwritten_record(run.directory, run.done, record, evaluated)


def _train(
  run: Run,
  work: Work,
  unwritten: Record | None,
  console: rich.console.Console,
  output: Output,
) -> TrainResult:
  config = run.config
  with (
    deferred_interrupts() as interruption,
    work.sent(),
    Checkpoints(
      run.directory,
      keep=config.keep,
      on_complete=work.push,
      own=work.mirror is not None,
      check=work.check,
    ) as checkpoints,
    _metrics(work, run.done - 1 if unwritten else run.done) as metrics,
    Progress(run.done, config.steps, console) as progress,
    Profile(config.profile if is_first() else None, run.directory) as profile,
  ):
    poll, nobody_reads = Poll(), getattr(signal, "SIGPIPE", signal.SIGTERM)
    told = 0  # by a signal to any of the processes

    def stops() -> bool:
      nonlocal told
      gone = nobody_reads if output.gone else 0  # no SIGPIPE in Windows
      told = poll(interruption.signal or gone)
      return told != 0

    loop = Loop(run, checkpoints, metrics, progress, profile, stops)
    loop.prepare(unwritten)
    while loop.step < config.steps and not loop.stops():
      loop.take_step()
      interruption.holds = True
    if work.mirror is not None:
      progress.waits_for("uploading")
    loop.save()
    loop.report()
    loop.check()
  stopped = interruption.signal
  if stopped is None and told and loop.step < config.steps:
    stopped = signal.Signals(told)
  with together("the records"):
    pass  # the first process has written them
  result = _result(run.directory, loop.step)
  return dataclasses.replace(result, interrupted_by=stopped)


def _metrics(work: Work, step: int) -> Metrics | Unwritten:
  if not is_first():
    return Unwritten()
  return Metrics(work.directory, step=step, check=work.check)


def _describe(run: Run) -> Iterator[str]:
  """The lines printed at the start: device, ops, model, data, steps."""
  config, device = run.config, jax.devices()[0]
  mesh = None if run.layout is None else run.layout.config
  others = jax.device_count() - (mesh.devices if mesh else 1)
  unused = f"; {others} more are not used" if others else ""
  yield (
    f"device    {device.device_kind} ({device.platform}), "
    f"JAX {jax.__version__}{unused}"
  )
  if mesh is not None:
    several = jax.process_count()
    of = f" of {several} processes" if several > 1 else ""
    yield f"mesh      {mesh}, {mesh.devices} devices{of}"
  model = abstract_model(config)
  for line in describe_ops(model.ops, device.platform):
    yield f"op        {line}"
  if device.platform == "tpu":
    yield f"keeps     of layers {config.model.remat}, in the head {config.head}"
  yield (
    f"model     {num_parameters(model):,} parameters in float32, computing in "
    f"{config.model.dtype}"
  )
  yield from describe_data(run)
  tokens = config.batch_size * config.sequence_length
  yield (
    f"steps     {config.steps:,} of {tokens:,} tokens, {run.done:,} done; "
    f"{config.steps * tokens / run.train_rows.num_labels:.1f} passes in all"
  )
  rows = run.evaluation_rows
  batches = -(-len(rows) // config.batch_size)
  yield (
    f"evaluates {rows.num_labels:,} held-out tokens, {batches:,} batches, "
    f"every {config.evaluate_every:,} steps"
  )
  for change in run.changes:
    yield f"changed   {change}"
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
