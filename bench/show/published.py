"""The cycle model beside what others measured: part of `--calibrate`.

The kernels are those of `suites.published`.  Their times are by the host's
clock and so have the dispatch in them, which the model leaves out; of a short
program it is the greater part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import rich.box
import rich.console
import rich.table

from ..run.job import Job
from ..run.row import Result
from ..suites import published
from ..suites.published import Measurement
from ..v5e import V5E


def jobs() -> list[Job]:
  """What has to be run for the table: of the packages that are installed."""
  return [
    Job("published", measurement.program.key)
    for measurement in published.measurements()
    if measurement.source.installed
  ]


def missing() -> Iterator[str]:
  """For each package that is not installed, how to get it."""
  for source in published.SOURCES:
    if not source.installed:
      yield (
        f"left out: {source.package} {source.version} is not installed: "
        f"{source.command}"
      )


def show(console: rich.console.Console, results: Sequence[Result]) -> None:
  """Prints the table, below it what could not be counted, and the sources.

  Args:
    console: where to print.
    results: of `jobs()`.
  """
  by_key = {m.program.key: m for m in published.measurements()}
  if results:
    console.print(_table(results, by_key))
  for result in results:
    row = result.row
    for note in [row.error] if row.error else row.notes:
      text = f"{row.key}: {note}"
      console.print(text, style="dim", highlight=False, markup=False)
  for i, source in enumerate(published.SOURCES, start=1):
    if source.installed:
      console.print(
        f"[{i}] {source.package} {source.version}: {source.file}. "
        f"{source.machine}. {source.timing}. Taken off as dispatch: "
        f"{source.dispatch_ms} ms ({source.dispatch}).",
        highlight=False,
        markup=False,
      )


def _table(
  results: Sequence[Result], by_key: dict[str, Measurement]
) -> rich.table.Table:
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  table.add_column("program", no_wrap=True)
  for heading in (
    "model cycles",
    "model ms",
    "measured ms",
    "less dispatch",
    "model / measured",
    "model / less dispatch",
    "source",
  ):
    table.add_column(heading, justify="right")
  for result in results:
    table.add_row(*line(result, by_key[result.row.key]))
  return table


def line(result: Result, measurement: Measurement) -> list[str]:
  """The cells of a row: the estimate, what was measured, and their ratios."""
  row, source = result.row, measurement.source
  device = measurement.ms - source.dispatch_ms
  number = published.SOURCES.index(source) + 1
  measured = [f"{measurement.ms:.3f}", f"{device:.3f}"]
  if row.error:
    cells = ["no estimate", "", *measured, "", ""]
  else:
    ms = V5E.seconds(row.cycles) * 1e3
    at_least = "≥ " if row.lower_bound else ""
    cells = [
      f"{at_least}{row.cycles:,}",
      f"{at_least}{ms:.3f}",
      *measured,
      f"{at_least}{ms / measurement.ms:.3f}",
      f"{at_least}{ms / device:.3f}",
    ]
  return [row.key, *cells, f"[{number}]"]
