"""Measured times beside earlier estimates: `pallas-gemma-bench --beside`.

For who has a v5e: the committed results are estimates, and this says how far
they are from what the chip does.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

import rich.box
import rich.console
import rich.table

from ..run.row import Row


@dataclasses.dataclass(frozen=True)
class Pair:
  """A row of now and the earlier one of the same program."""

  earlier: Row
  now: Row

  @property
  def ratio(self) -> float:
    """The time of now over the earlier one."""
    return self.now.seconds / self.earlier.seconds


def pairs(earlier: Iterable[Row], now: Iterable[Row]) -> list[Pair]:
  """The rows of now that have a time, and an earlier one, in their order."""
  known = {row.key: row for row in earlier if not row.error and row.seconds}
  return [
    Pair(known[row.key], row)
    for row in now
    if not row.error and row.key in known
  ]


def show(console: rich.console.Console, both: Sequence[Pair]) -> None:
  """Prints both times of each program, their ratio, and the ratios' median."""
  methods = sorted({pair.now.method for pair in both})
  before = sorted({pair.earlier.method for pair in both})
  table = rich.table.Table(
    title=f"{', '.join(methods)}, beside {', '.join(before)}",
    box=rich.box.SIMPLE_HEAD,
  )
  table.add_column("program", no_wrap=True)
  for heading in ("now, ms", "earlier, ms", "now / earlier"):
    table.add_column(heading, justify="right", no_wrap=True)
  for pair in both:
    bound = "≥ " if pair.earlier.lower_bound else ""
    table.add_row(
      pair.now.key,
      f"{pair.now.seconds * 1e3:.3f}",
      f"{bound}{pair.earlier.seconds * 1e3:.3f}",
      f"{pair.ratio:.3f}",
    )
  console.print(table)
  console.print(summary(both), highlight=False, soft_wrap=True)


def summary(both: Sequence[Pair]) -> str:
  """The ratios in one line, and whether they say anything."""
  ratios = [pair.ratio for pair in both]
  text = (
    f"{len(both)} programs, now / earlier: median "
    f"{statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
  )
  devices = {pair.now.versions.get("device", "") for pair in both} - {""}
  if any("TPU v5 lite" not in d and "TPU v5e" not in d for d in devices):
    named = ", ".join(sorted(devices))
    text += f"; measured on {named}, of which estimates for a v5e say nothing"
  return text
