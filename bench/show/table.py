"""The table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import rich.box
import rich.console
import rich.table

from ..run.row import Row

_MIB = 1 << 20


def show(console: rich.console.Console, rows: Sequence[Row]) -> None:
  """Prints rows, grouped by problem, and below them what could not be decided.

  Args:
    console: where to print.
    rows: in the order in which to show them.
  """
  methods = sorted({row.method for row in rows if row.method})
  table = rich.table.Table(
    title=", ".join(methods) or None, box=rich.box.SIMPLE_HEAD
  )
  for heading in ("op", "case", "pass", "implementation"):
    table.add_column(heading, no_wrap=True)
  for heading in (
    "cycles",
    "ms",
    "of bound",
    "HBM MiB",
    "temp MiB",
    "VMEM MiB",
  ):
    table.add_column(heading, justify="right", no_wrap=True)
  table.add_column("compile s", justify="right")
  previous = None
  for row in rows:
    problem = (row.op, row.case, row.which)
    if previous is not None and problem[:2] != previous[:2]:
      table.add_section()
    names = [
      new if previous is None or problem[: i + 1] != previous[: i + 1] else ""
      for i, new in enumerate(problem)
    ]
    table.add_row(*names, row.implementation, *_numbers(row))
    previous = problem
  console.print(table)
  for row in rows:
    for note in [row.error] if row.error else row.notes:
      console.print(f"{row.key}: {note}", style="dim", highlight=False)


def versions(rows: Sequence[Row]) -> str:
  """What the numbers depend on, in one line."""
  found = {tuple(sorted(row.versions.items())) for row in rows if row.versions}
  return "; ".join(
    ", ".join(f"{name} {version}" for name, version in each)
    for each in sorted(found)
  )


def _numbers(row: Row) -> list[str]:
  if row.error:
    return ["failed", *[""] * 6]
  at_least, at_most = ("≥ ", "≤ ") if row.lower_bound else ("", "")
  fraction = row.of_bound
  return [
    f"{at_least}{row.cycles:,}" if row.cycles else "",
    f"{row.seconds * 1e3:.3f}",
    "" if fraction is None else f"{at_most}{fraction:.1%} {row.bound_by}",
    _mebibytes(row.hbm_bytes),
    _mebibytes(row.temp_bytes),
    _mebibytes(row.vmem_bytes),
    f"{row.compile_seconds:.1f}",
  ]


def _mebibytes(size: int | None) -> str:
  return "" if size is None else f"{size / _MIB:,.1f}"
