"""What a step of training takes on a slice: memory, compute, communication."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import rich.box
import rich.console
import rich.table

from ..run.row import Row
from ..suites.program import APART, OVERLAPPED
from ..v5e import V5E

_GIB = 2**30
_SOURCE = re.compile(
  r"jit\(\w+\)/|[\w\-]+\(|\)|(?:eval_jaxpr|while|body|closed_call)/"
)


@dataclasses.dataclass(frozen=True)
class Traffic:
  """The collectives of one kind, of one operation.

  Attributes:
    kind: what they do.
    source: the operation.
    runs: in a step.
    nbytes: of their arrays, all runs.
    seconds: on the links alone, all runs.
    exposed: of these, seconds in which the core waits.
  """

  kind: str
  source: str
  runs: int
  nbytes: int
  seconds: float
  exposed: float

  @property
  def cells(self) -> tuple[str, ...]:
    """Runs, MiB, ms on the links and ms exposed, as tables have them."""
    return (
      f"{self.runs:,}",
      f"{self.nbytes / 2**20:,.1f}",
      f"{self.seconds * 1e3:.2f}",
      f"{self.exposed * 1e3:.2f}",
    )


def traffic(collectives: Iterable[Mapping[str, Any]]) -> list[Traffic]:
  """Collectives as a row has them, added up, those that take longest first."""
  sums: dict[tuple[str, str], list[Mapping[str, Any]]] = (
    collections.defaultdict(list)
  )
  for one in collectives:
    links = " (DCN)" if one["between_slices"] else ""
    sums[one["kind"] + links, _short(one["source"])].append(one)
  found = []
  for (kind, source), many in sums.items():
    runs = [int(one["times"]) for one in many]
    nbytes, seconds, exposed = (
      sum(n * one[what] for n, one in zip(runs, many, strict=True))
      for what in ("nbytes", "seconds", "exposed")
    )
    found.append(Traffic(kind, source, sum(runs), nbytes, seconds, exposed))
  return sorted(found, key=lambda t: -t.seconds)


def _short(source: str) -> str:
  """The last parts of the name of an operation."""
  parts = [p for p in _SOURCE.sub("", source).split("/") if p]
  return "/".join(parts[-3:]) or "(the compiler's own)"


def show(console: rich.console.Console, apart: Row, overlapped: Row) -> None:
  """Prints what one chip of a slice does in a step.

  Args:
    console: where.
    apart: the program in which collectives stand apart, for the cycles.
    overlapped: the program as a user compiles it, for memory and collectives.
  """
  found = traffic(overlapped.collectives)
  for line in summary(apart, overlapped, found):
    console.print(line, highlight=False)
  table = rich.table.Table(box=rich.box.SIMPLE)
  for heading in ("collective", "of"):
    table.add_column(heading, overflow="fold")
  for heading in ("runs", "MiB", "ms on the links", "ms exposed"):
    table.add_column(heading, justify="right")
  for t in found:
    table.add_row(t.kind, t.source, *t.cells)
  console.print(table)


_LEAST = 1e-3  # seconds on the links of what the tables of readers tell


def markdown(rows: Sequence[Row]) -> str:
  """A table of all steps of which both programs are there, and one of each."""
  of = {
    name: {
      row.case: row
      for row in rows
      if row.op == "gemma_train_step" and row.implementation == name
    }
    for name in (APART, OVERLAPPED)
  }
  pairs = [(of[APART].get(case), row) for case, row in of[OVERLAPPED].items()]
  both = [(a, row, traffic(row.collectives)) for a, row in pairs if a]
  lines = [
    "| step | peak GiB | computing, ms | on the links, ms | exposed, ms | "
    "MFU, computing | MFU, with what is exposed |",
    "|---|---:|---:|---:|---:|---:|---:|",
    *(_step_line(*step) for step in both),
  ]
  for _, row, found in both:
    lines += [
      "",
      f"{row.case}: collectives of more than a millisecond",
      "",
      "| collective | of | runs | MiB | on the links, ms | exposed, ms |",
      "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
      _line(t.kind, f"`{t.source}`", *t.cells)
      for t in found
      if t.seconds >= _LEAST
    ]
  return "\n".join(lines)


def _step_line(apart: Row, overlapped: Row, found: Sequence[Traffic]) -> str:
  sums = _sums(apart, found)
  at_least, at_most = ("≥ ", "≤ ") if apart.lower_bound else ("", "")
  return _line(
    apart.case,
    f"{(overlapped.peak_bytes or 0) / _GIB:.2f}",
    f"{at_least}{apart.seconds * 1e3:.1f}",
    f"{sums.links * 1e3:.1f}",
    f"{sums.exposed * 1e3:.1f}",
    f"{at_most}{sums.mfu:.1%}",
    f"{at_most}{sums.mfu_exposed:.1%}",
  )


def _line(*cells: str) -> str:
  return f"| {' | '.join(cells)} |"


class _Sums(NamedTuple):
  """Of a step: seconds, and what of the peak the model's operations are."""

  links: float
  exposed: float
  mfu: float
  mfu_exposed: float


def _sums(apart: Row, found: Sequence[Traffic]) -> _Sums:
  exposed = sum(t.exposed for t in found)
  work = (apart.model_flops or 0) / V5E.peak_flops
  return _Sums(
    sum(t.seconds for t in found),
    exposed,
    work / apart.seconds,
    work / (apart.seconds + exposed),
  )


def summary(
  apart: Row, overlapped: Row, found: Sequence[Traffic]
) -> Iterator[str]:
  """The lines above the table."""
  sums = _sums(apart, found)
  at_least = "at least " if apart.lower_bound else ""
  yield f"{apart.case}: one chip's part of a step, estimated, not measured"
  for name, row in (("as compiled", overlapped), ("collectives apart", apart)):
    if row.peak_bytes is not None:
      yield f"  memory at the peak, {name}: {row.peak_bytes / _GIB:.2f} GiB"
  yield (
    f"  compute: {at_least}{apart.cycles:,} cycles, "
    f"{apart.seconds * 1e3:.2f} ms"
  )
  yield (
    f"  collectives: {sums.links * 1e3:.2f} ms on the links, of which "
    f"{sums.exposed * 1e3:.2f} ms are exposed"
  )
  if apart.model_flops:
    yield (
      f"  MFU: {sums.mfu:.1%} without exposed communication, "
      f"{sums.mfu_exposed:.1%} with it"
    )
