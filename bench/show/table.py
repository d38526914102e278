"""The table on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import rich.box
import rich.console
import rich.table

from .. import v5e
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
  columns = [c for c in _COLUMNS if c not in _RARE or _any(rows, c)]
  for heading in columns:
    wraps = heading == "compile s"
    table.add_column(heading, justify="right", no_wrap=not wraps)
  previous = None
  for row in rows:
    problem = (row.op, row.case, row.which)
    if previous is not None and problem[:2] != previous[:2]:
      table.add_section()
    names = [
      new if previous is None or problem[: i + 1] != previous[: i + 1] else ""
      for i, new in enumerate(problem)
    ]
    numbers = _numbers(row)
    table.add_row(
      *names, row.implementation, *(numbers.get(c, "") for c in columns)
    )
    previous = problem
  console.print(table)
  if _CODE in columns:
    console.print(f"{_CODE}: {_CODE_LEGEND}", style="dim", highlight=False)
  for row in rows:
    for note in [row.error] if row.error else [*row.notes, *_code_loops(row)]:
      console.print(f"{row.key}: {note}", style="dim", highlight=False)


def versions(rows: Sequence[Row]) -> str:
  """What the numbers depend on, in one line."""
  found = {tuple(sorted(row.versions.items())) for row in rows if row.versions}
  return "; ".join(
    ", ".join(f"{name} {version}" for name, version in each)
    for each in sorted(found)
  )


_CODE, _MFU = "code", "MFU"
_COLUMNS = (
  *("cycles", "ms", "of bound", _MFU, _CODE),
  *("HBM MiB", "temp MiB", "peak MiB", "VMEM MiB", "compile s"),
)
_RARE = (_CODE, _MFU)  # shown where a row has something to say
_CODE_LEGEND = (
  "what loading the program's code adds to its time if all of it is hidden, "
  "and if nothing is; in the cycles, each overlay is loaded while the one "
  "before it runs"
)


def _any(rows: Sequence[Row], column: str) -> bool:
  return any(_numbers(row).get(column) for row in rows)


def _numbers(row: Row) -> dict[str, str]:
  """What a row says, by column."""
  if row.error:
    return {"cycles": "failed"}
  at_least, at_most = ("≥ ", "≤ ") if row.lower_bound else ("", "")
  fraction = row.of_bound
  return {
    "cycles": f"{at_least}{row.cycles:,}" if row.cycles else "",
    "ms": f"{row.seconds * 1e3:.3f}",
    "of bound": (
      "" if fraction is None else f"{at_most}{fraction:.1%} {row.bound_by}"
    ),
    _MFU: "" if row.mfu is None else f"{at_most}{row.mfu:.1%}",
    _CODE: _code(row),
    "HBM MiB": _mebibytes(row.hbm_bytes),
    "temp MiB": _mebibytes(row.temp_bytes),
    "peak MiB": _mebibytes(row.peak_bytes),
    "VMEM MiB": _mebibytes(row.vmem_bytes),
    "compile s": f"{row.compile_seconds:.1f}",
  }


def _code(row: Row) -> str:
  if row.code is None or not row.code.loaded_bytes:
    return ""
  if_loaded = row.cycles - row.code.cycles
  best, worst = row.code.best_cycles, row.code.worst_cycles
  return f"{best / if_loaded:.1%} to {worst / if_loaded:.1%}"


def _code_loops(row: Row) -> Iterator[str]:
  yield from map(describe_loop, row.code.loops if row.code else ())


def describe_loop(loop: v5e.CodeLoop) -> str:
  """A loop that loads code, in a sentence."""
  return (
    f"{loop.name}: a loop of {loop.bundles:,} bundles over {loop.overlays} "
    f"overlays loads {loop.bytes_a_turn / _MIB:.1f} MiB of code at each of its "
    f"{loop.turns:,} turns"
  )


def _mebibytes(size: int | None) -> str:
  return "" if size is None else f"{size / _MIB:,.1f}"
