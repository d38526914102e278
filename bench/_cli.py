"""The command `pallas-gemma-bench`."""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import importlib.util
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import rich.console
import rich.progress
import tyro

from . import _calibration, _measured, _program, _sweep, _table
from ._job import Job
from ._row import Row

SUITES = ("registry", "baselines", "gemma")


# Minutes of the compiler's, or of executing what it prints: not in the default
# table, which a machine with two cores is to finish in a quarter of an hour.
_SLOW = (
  "gemma_2b_32k",
  "gemma_2b_8k_f32_weights",
  "geglu/gemma_2b_8k_normed/*",
  "*/pallas-residuals-none",
  "feed_forward/*/fwd+bwd/xla",
  "flash_attention/*/fwd+bwd/jax-splash-1024x1024x512",  # the fused is faster
  "linear_cross_entropy/gemma_2b_8k/*",
  "linear_cross_entropy/gemma_7b_4k/*",
  "gemma_block/gemma_2b_4x2k/*",
)


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

  calibrate: bool = False
  """Show the timing model beside published measurements and the compiler's own
  static model, and nothing else."""

  timeout: float = 900.0
  """Seconds after which a compilation is given up."""


@dataclasses.dataclass(frozen=True)
class Choice:
  """A program and the suite that lists it."""

  suite: str
  program: _program.Program


def choose(arguments: Arguments) -> list[Choice]:
  """The programs that the arguments ask for, one op and case after another."""
  choices = [
    Choice(suite, program)
    for suite in SUITES
    for program in _program.suite(suite)
    if _wanted(program, arguments)
  ]
  for package in sorted({c.program.needs for c in choices if c.program.needs}):
    if importlib.util.find_spec(package) is None:
      print(f"left out: {package} is not installed", file=sys.stderr)
      choices = [c for c in choices if c.program.needs != package]
  # A baseline belongs beside the op that it is compared with.
  order: dict[tuple[str, str, str], int] = {}
  for choice in choices:
    order.setdefault(_problem(choice.program), len(order))
  return sorted(choices, key=lambda c: order[_problem(c.program)])


def _problem(program: _program.Program) -> tuple[str, str, str]:
  return program.op, program.case, program.which


def _wanted(program: _program.Program, arguments: Arguments) -> bool:
  if not arguments.filter:
    slow = _matches(program, _SLOW)
    return (program.default and not slow) or arguments.all
  return _matches(program, arguments.filter)


def _matches(program: _program.Program, patterns: Sequence[str]) -> bool:
  return any(
    fnmatch.fnmatchcase(program.key, pattern)
    or pattern in program.key.split("/")
    for pattern in patterns
  )


def measures(arguments: Arguments) -> bool:
  """Whether to run programs, not only to compile them."""
  if arguments.mode == "auto":
    # Asking JAX would take hold of the TPU, or wait long for none.
    return any(glob.glob(p) for p in ("/dev/accel*", "/dev/vfio/[0-9]*"))
  return arguments.mode == "measured"


def run(arguments: Arguments, choices: Sequence[Choice]) -> list[Row]:
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
    rows.append(_measured.measure(program, arguments.runs))
    state = rows[-1].error or f"{rows[-1].seconds * 1e3:.3f} ms"
    console.print(f"{program.key}: {state}", soft_wrap=True)
  return rows


def estimate(arguments: Arguments, choices: Sequence[Choice]) -> list[Row]:
  """Compiles the programs and estimates their time."""
  jobs = [Job(choice.suite, choice.program.key) for choice in choices]
  results = _results(arguments, jobs)
  for result in results:
    result.pop("transient", None)
  return [Row.from_json(result) for result in results]


def _results(arguments: Arguments, jobs: Sequence[Job]) -> list[dict[str, Any]]:
  """Runs jobs, with a display of their progress."""
  console = _progress_console()
  cache = arguments.cache or _sweep.cache_directory()
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

    def done(job: Job, result: dict[str, Any]) -> None:
      progress.update(task, advance=1, description=job.key)
      if not console.is_terminal:
        at_least = "at least " if result["lower_bound"] else ""
        state = result["error"] or f"{at_least}{result['cycles']:,} cycles"
        console.print(f"{job.key}: {state}", soft_wrap=True)

    return _sweep.run_jobs(
      jobs,
      workers=arguments.jobs,
      timeout=arguments.timeout,
      cache=None if arguments.fresh else cache,
      done=done,
    )


def write(path: pathlib.Path, rows: Sequence[Row], command: str) -> None:
  """Writes rows as JSON lines, each with the command that made it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
    "".join(
      json.dumps(row.to_json() | {"command": command}) + "\n" for row in rows
    )
  )


def main() -> None:
  """Entry point of `pallas-gemma-bench`."""
  arguments = tyro.cli(Arguments, prog="pallas-gemma-bench")
  console = rich.console.Console(width=None if sys.stdout.isatty() else 160)
  if not measures(arguments) and importlib.util.find_spec("libtpu") is None:
    sys.exit(
      "pallas-gemma-bench: libtpu, the TPU compiler, is not installed: "
      "pip install 'jax[tpu]' on x86-64 Linux"
    )
  if arguments.calibrate:
    results = _results(arguments, _calibration.jobs())
    console.print(_calibration.table(results))
    return
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
  try:
    rows = run(arguments, choices)
  except KeyboardInterrupt:
    sys.exit("pallas-gemma-bench: stopped; finished programs are kept")
  _table.show(console, rows)
  console.print(_table.versions(rows), highlight=False)
  if arguments.json:
    write(
      arguments.json, rows, shlex.join(["pallas-gemma-bench", *sys.argv[1:]])
    )
  if any(row.error for row in rows):
    sys.exit(1)


if __name__ == "__main__":
  main()
