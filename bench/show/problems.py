"""Rows by what they compute: ours beside the best of the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ..run.row import Row

OURS = "pallas"


def is_ours(row: Row) -> bool:
  """Whether a row is of this package: `pallas`, `pallas-chunked`."""
  return row.implementation.partition("-")[0] == OURS


@dataclasses.dataclass(frozen=True)
class Problem:
  """The rows of one op, case and pass."""

  op: str
  case: str
  which: str
  rows: tuple[Row, ...]

  @property
  def ours(self) -> list[Row]:
    """The kernel's, and those of its other modes."""
    return [r for r in self.rows if is_ours(r)]

  @property
  def best_other(self) -> Row | None:
    """The fastest of the others, as far as their times are known."""
    others = [r for r in self.rows if not is_ours(r)]
    return min(others, key=lambda row: row.seconds, default=None)


def problems(rows: Iterable[Row]) -> list[Problem]:
  """Rows by what they compute, op by op, in the order in which they come."""
  groups: dict[tuple[str, str, str], list[Row]] = {}
  rows = list(rows)
  ops = list(dict.fromkeys(row.op for row in rows))
  for row in sorted(rows, key=lambda row: ops.index(row.op)):
    groups.setdefault((row.op, row.case, row.which), []).append(row)
  return [Problem(*key, tuple(group)) for key, group in groups.items()]
