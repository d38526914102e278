"""The command `pallas-gemma-bench`."""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import importlib.util
import os
import pathlib
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal

import rich.console
import rich.progress
import tyro

from .run import measured, sweep
from .run.job import Job
from .run.row import Result, Row
from .show import beside, calibration, compare, files, published
from .show import table as tables
from .suites.program import APART, OVERLAPPED, Program, suite

SUITES = ("registry", "baselines", "gemma", "others")
_WIDTH = 180  # of what goes to a file or a pipe: the tables whole


@dataclasses.dataclass(frozen=True)
class Arguments:
  """Times every op of the registry, and what it is compared with, on TPU v5e.

  Without a TPU the programs are compiled for one and their time is estimated
  from the compiler's own output.
  """

  filter: Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["-k"])
  ] = ()
  """Programs to run, such as 'rms_norm' or '*/gemma_2b_8k/*/pallas': parts of
  op/case/pass/implementation, or patterns of the whole."""

  all: bool = False
  """Run every case, not the default table alone."""

  jobs: Annotated[int, tyro.conf.arg(aliases=["-j"])] = os.cpu_count() or 1
  """Compilations at a time."""

  json: pathlib.Path | None = None
  """Also write one JSON line per program to this file."""

  mode: Literal["auto", "compiled", "measured"] = "auto"
  """Estimate from the compiled program, or measure by the clock; auto measures
  where there is a TPU."""

  runs: int = 20
  """Runs of each program, of which the median counts, when measuring."""

  list: bool = False
  """Show the programs' names and run nothing."""

  cache: pathlib.Path | None = None
  """Folder of earlier results; default ~/.cache/pallas-gemma/bench."""

  fresh: bool = False
  """Neither read nor write earlier results."""

  compare: tuple[pathlib.Path, ...] = ()
  """Files that --json wrote, or folders of them: run the programs that they
  list, show what has changed, and fail if a program is gone, or has more
  temporaries or more than 0.05 % more cycles."""

  against: tuple[pathlib.Path, ...] = ()
  """With --compare: files or folders of later results, to run nothing."""

  beside: tuple[pathlib.Path, ...] = ()
  """Files that --json wrote, or folders of them: also show each time beside the
  one in them, such as what a v5e measures beside the estimates in results."""

  calibrate: bool = False
  """Show the cycle model beside published measurements, of kernels of other
  packages too where these are installed, and beside the compiler's own static
  model, and nothing else."""

  train_step: str | None = None
  """Compile the trainer's whole step for a slice, such as v5e-8 or report-7b,
  and show one chip's memory, compute, collectives and utilisation, and nothing
  else."""

  train_model: Literal["2b", "7b"] | None = None
  """The model of --train-step; default 2b, and 7b for report-7b."""

  timeout: float = 900.0
  """Seconds after which a compilation is given up."""


@dataclasses.dataclass(frozen=True)
class Choice:
  """A program and the suite that lists it."""

  suite: str
  program: Program


def choose(arguments: Arguments) -> list[Choice]:
  """The programs that the arguments ask for, one op and case after another."""
  choices = _installed(c for c in _all() if _wanted(c.program, arguments))
  # A baseline belongs beside the op that it is compared with.
  order: dict[tuple[str, str, str], int] = {}
  for choice in choices:
    order.setdefault(_problem(choice.program), len(order))
  return sorted(choices, key=lambda c: order[_problem(c.program)])


def _all() -> Iterator[Choice]:
  for name in SUITES:
    for program in suite(name):
      yield Choice(name, program)


def _installed(choices: Iterable[Choice]) -> list[Choice]:
  """Those that have what they need; says what the others lack."""
  choices = list(choices)
  for package in sorted({c.program.needs for c in choices if c.program.needs}):
    if importlib.util.find_spec(package) is None:
      print(f"left out: {package} is not installed", file=sys.stderr)
      choices = [c for c in choices if c.program.needs != package]
  return choices


def _problem(program: Program) -> tuple[str, str, str]:
  return program.op, program.case, program.which


def _wanted(program: Program, arguments: Arguments) -> bool:
  if not arguments.filter:
    return program.default or arguments.all
  return _matches(program.key, arguments.filter)


def _matches(key: str, patterns: Sequence[str]) -> bool:
  return any(
    fnmatch.fnmatchcase(key, pattern) or pattern in key.split("/")
    for pattern in patterns
  )


def measures(arguments: Arguments) -> bool:
  """Whether to run programs, not only to compile them."""
  if arguments.mode == "auto":
    # Asking JAX would take hold of the TPU, or wait long for none.
    return any(glob.glob(p) for p in ("/dev/accel*", "/dev/vfio/[0-9]*"))
  return arguments.mode == "measured"


def run_choices(arguments: Arguments, choices: Sequence[Choice]) -> list[Row]:
  """Times programs in the way that the arguments ask for."""
  if measures(arguments):
    return measure(arguments, choices)
  return estimate(arguments, choices)


def _progress_console() -> rich.console.Console:
  """Where progress does not disturb a pipe."""
  return rich.console.Console(stderr=True)


def measure(arguments: Arguments, choices: Sequence[Choice]) -> list[Row]:
  """Runs the programs on the device at hand."""
  import jax

  console, rows = _progress_console(), []
  for choice in choices:
    program = choice.program
    # Only kernels want a TPU; what XLA compiles runs anywhere.
    if jax.default_backend() != "tpu" and "xla" not in program.implementation:
      console.print(f"{program.key}: left out, needs a TPU", soft_wrap=True)
      continue
    rows.append(measured.measure(program, arguments.runs))
    state = rows[-1].error or f"{rows[-1].seconds * 1e3:.3f} ms"
    console.print(f"{program.key}: {state}", soft_wrap=True)
  return rows


def estimate(arguments: Arguments, choices: Sequence[Choice]) -> list[Row]:
  """Compiles the programs and estimates their time."""
  jobs = [Job(choice.suite, choice.program.key) for choice in choices]
  return [result.row for result in _results(arguments, jobs)]


def _results(arguments: Arguments, jobs: Sequence[Job]) -> list[Result]:
  """Runs jobs, with a display of their progress."""
  console = _progress_console()
  cache = arguments.cache or sweep.cache_directory()
  with rich.progress.Progress(
    rich.progress.TextColumn("{task.completed}/{task.total}"),
    rich.progress.BarColumn(bar_width=24),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TextColumn("{task.description}"),
    console=console,
    disable=not console.is_terminal,
    transient=True,
  ) as progress:
    task = progress.add_task("compiling", total=len(jobs))

    def done(job: Job, result: Result) -> None:
      progress.update(task, advance=1, description=job.key)
      if not console.is_terminal:
        at_least = "at least " if result.row.lower_bound else ""
        state = result.row.error or f"{at_least}{result.row.cycles:,} cycles"
        console.print(f"{job.key}: {state}", soft_wrap=True)

    return sweep.run_jobs(
      jobs,
      workers=arguments.jobs,
      timeout=arguments.timeout,
      cache=None if arguments.fresh else cache,
      done=done,
    )


def compare_rows(
  arguments: Arguments,
) -> tuple[list[compare.Change], list[Row]]:
  """What has changed since earlier results, and the rows of now.

  Raises:
    ValueError: if there are no earlier results, or a file cannot be read.
  """
  before = [line.row for line in files.read(arguments.compare)]
  if arguments.filter:
    before = [row for row in before if _matches(row.key, arguments.filter)]
  if not any(not row.error for row in before):
    raise ValueError("--compare: no results in these files to compare with")
  if arguments.against:
    now = [line.row for line in files.read(arguments.against)]
  else:
    keys = {row.key for row in before if not row.error}
    choices = [c for c in _all() if c.program.key in keys]
    installed = _installed(choices)
    # What is said to be left out is not gone.
    left_out = {c.program.key for c in choices if c not in installed}
    before = [row for row in before if row.key not in left_out]
    now = run_choices(arguments, installed)
  return compare.changes(before, now), now


def _compare(arguments: Arguments, console: rich.console.Console) -> None:
  """Shows what has changed; exits with 1 if anything is worse."""
  try:
    compared, now = compare_rows(arguments)
  except ValueError as error:
    sys.exit(f"pallas-gemma-bench: {error}")
  for when, rows in (("before", [c.before for c in compared]), ("now", now)):
    console.print(f"{when}: {tables.versions(rows)}", highlight=False)
  compare.show(console, compared)
  _write(arguments, now)
  if any(change.is_worse for change in compared):
    sys.exit(1)


def _write(arguments: Arguments, rows: Sequence[Row]) -> None:
  if arguments.json:
    command = shlex.join(["pallas-gemma-bench", *sys.argv[1:]])
    files.write(arguments.json, rows, command)


def _show(arguments: Arguments, console: rich.console.Console) -> None:
  """Times the programs that are asked for; exits with 1 if one fails."""
  choices = choose(arguments)
  if not choices:
    sys.exit(
      f"pallas-gemma-bench: no program matches {' '.join(arguments.filter)}; "
      "--list shows them"
    )
  if arguments.list:
    for choice in choices:
      console.print(choice.program.key, highlight=False)
    return
  earlier = [line.row for line in _read_beside(arguments)]
  rows = run_choices(arguments, choices)
  tables.show(console, rows)
  console.print(tables.versions(rows), highlight=False)
  _write(arguments, rows)
  if both := beside.pairs(earlier, rows):
    console.print(f"earlier: {tables.versions([p.earlier for p in both])}")
    beside.show(console, both)
  elif arguments.beside:
    sys.exit("pallas-gemma-bench: --beside: no program in common")
  if any(row.error for row in rows):
    sys.exit(1)


def _read_beside(arguments: Arguments) -> list[files.Line]:
  """The lines to show beside those of now; exits if there are none."""
  try:
    return files.read(arguments.beside)
  except ValueError as error:
    sys.exit(f"pallas-gemma-bench: --beside: {error}")


def _calibrate(arguments: Arguments, console: rich.console.Console) -> None:
  """Shows the cycle model beside what is known from elsewhere."""
  for sentence in published.missing():
    print(sentence, file=sys.stderr)
  console.print(calibration.table(_results(arguments, calibration.jobs())))
  published.show(console, _results(arguments, published.jobs()))


def _train_step(arguments: Arguments, console: rich.console.Console) -> None:
  """Shows a step of training; exits with 1 if it does not compile."""
  from .show import train_step
  from .suites import gemma_step  # the trainer: slow to import

  preset = arguments.train_step or ""
  model = arguments.train_model or ("7b" if preset == "report-7b" else "2b")
  try:
    case = gemma_step.case_of(preset, model)
  except ValueError as error:
    sys.exit(f"pallas-gemma-bench: {error}")
  both = {
    p.implementation: Choice("gemma", p)
    for p in gemma_step.programs()
    if p.case == case.name
  }
  rows = estimate(arguments, [both[name] for name in (APART, OVERLAPPED)])
  _write(arguments, rows)
  for row in rows:
    if row.error:
      sys.exit(f"pallas-gemma-bench: {row.key}: {row.error}")
  train_step.show(console, *rows)
  console.print(tables.versions(rows), highlight=False)


def main() -> None:
  """Entry point of `pallas-gemma-bench`."""
  arguments = tyro.cli(Arguments, prog="pallas-gemma-bench")
  console = rich.console.Console(width=None if sys.stdout.isatty() else _WIDTH)
  runs = not (arguments.list or arguments.against)
  if (
    runs
    and not measures(arguments)
    and importlib.util.find_spec("libtpu") is None
  ):
    sys.exit(
      "pallas-gemma-bench: libtpu, the TPU compiler, is not installed: "
      "pip install 'jax[tpu]' on x86-64 Linux"
    )
  try:
    if arguments.train_step is not None:
      _train_step(arguments, console)
    elif arguments.calibrate:
      _calibrate(arguments, console)
    elif arguments.compare:
      _compare(arguments, console)
    else:
      _show(arguments, console)
  except KeyboardInterrupt:
    sys.exit("pallas-gemma-bench: stopped; finished programs are kept")


if __name__ == "__main__":
  main()
