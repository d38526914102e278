"""Earlier results beside those of now: `pallas-gemma-bench --compare`.

A change that is to cost nothing has to leave every row's cycles and temporaries
as they were, or lower.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import rich.box
import rich.console
import rich.table

from ..run.row import Row

TOLERANCE = 5e-4  # of the cycles: what another order of instructions may cost

Verdict = Literal["equal", "lower", "higher", "missing"]
_VERDICTS: tuple[Verdict, ...] = ("equal", "lower", "higher", "missing")


@dataclasses.dataclass(frozen=True)
class Change:
  """A program's earlier row and that of now, None where there is none."""

  before: Row
  now: Row | None

  @property
  def cycles(self) -> int:
    """How many it takes more than before."""
    return self.now.cycles - self.before.cycles if self.now else 0

  @property
  def temp_bytes(self) -> int:
    """How many bytes of temporaries it has more; 0 where either is unknown."""
    if self.now is None:
      return 0
    now, before = self.now.temp_bytes, self.before.temp_bytes
    return 0 if now is None or before is None else now - before

  @property
  def is_missing(self) -> bool:
    """Whether there is no number to compare."""
    return self.now is None or bool(self.now.error)

  @property
  def is_worse(self) -> bool:
    """Whether it is missing, or rises by more than is allowed."""
    if self.now is None or self.now.error:
      return True
    # The truth behind a lower bound may be any number above it.
    unknown = self.now.lower_bound and not self.before.lower_bound
    limit = TOLERANCE * self.before.cycles
    return unknown or self.cycles > limit or self.temp_bytes > 0

  @property
  def verdict(self) -> Verdict:
    """In a word; a rise of either number counts before a fall of the other."""
    if self.is_missing:
      return "missing"
    if self.is_worse or self.cycles > 0:
      return "higher"
    return "lower" if self.cycles < 0 or self.temp_bytes < 0 else "equal"


def changes(before: Iterable[Row], now: Iterable[Row]) -> list[Change]:
  """Each earlier row with that of the same program and config now.

  Earlier rows without a number, and rows that are new, are left out; of several
  rows of one program, the last counts.
  """
  earlier = {_name(row): row for row in before if not row.error}
  later = {_name(row): row for row in now}
  return [Change(row, later.get(name)) for name, row in earlier.items()]


def _name(row: Row) -> str:
  return f"{row.key} {dict(row.config)}" if row.config else row.key


def show(console: rich.console.Console, compared: Sequence[Change]) -> None:
  """Prints a line for each change, why programs are missing, and the sum."""
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  table.add_column("program", overflow="fold", min_width=24)
  table.add_column("", no_wrap=True, min_width=len("missing !"))
  for heading in (
    "cycles before",
    "now",
    "difference",
    "temp before",
    "now",
    "difference",
  ):
    table.add_column(heading, justify="right", no_wrap=True)
  for change in compared:
    table.add_row(_name(change.before), *_numbers(change))
  console.print(table)
  for change in compared:
    if change.is_missing:
      why = change.now.error if change.now else "no such row any more"
      console.print(
        f"{_name(change.before)}: {why}", highlight=False, soft_wrap=True
      )
  console.print(summary(compared), highlight=False, soft_wrap=True)


def _numbers(change: Change) -> list[str]:
  before, now = change.before, change.now
  mark = change.verdict + (" !" if change.is_worse else "")
  cycles, temp = _cycles(before), _bytes(before.temp_bytes)
  if now is None or now.error:
    return [mark, cycles, "", "", temp, "", ""]
  return [
    mark,
    cycles,
    _cycles(now),
    _difference(change.cycles, before.cycles),
    temp,
    _bytes(now.temp_bytes),
    f"{change.temp_bytes:+,}" if change.temp_bytes else "",
  ]


def _cycles(row: Row) -> str:
  return ("≥ " if row.lower_bound else "") + f"{row.cycles:,}"


def _bytes(size: int | None) -> str:
  return "" if size is None else f"{size:,}"


def _difference(cycles: int, before: int) -> str:
  if not cycles:
    return ""
  share = f" ({cycles / before:+.3%})" if before else ""
  return f"{cycles:+,}{share}"


def summary(compared: Sequence[Change]) -> str:
  """How many are equal, lower, higher and missing, in one line."""
  count = collections.Counter(change.verdict for change in compared)
  counts = ", ".join(f"{count[verdict]} {verdict}" for verdict in _VERDICTS)
  worse = sum(change.is_worse for change in compared)
  return (
    f"{len(compared)} programs: {counts}; {worse} worse (missing, more "
    f"temporaries, or cycles by more than {TOLERANCE:.2%})"
  )
