"""Turns results/*.json into the README's table and plots.

    pallas-gemma-bench --json results/v5e.json
    python -P -m pallas_gemma.bench.show.report

The table goes between the markers `<!-- bench -->` and `<!-- /bench -->`; no
number in it is typed.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Annotated

import tyro
from pallas_gemma.kernels import OPS

from ..run.row import Row
from ..v5e import V5E
from . import files

_START, _END = "<!-- bench -->", "<!-- /bench -->"
_OURS = "pallas"


@dataclasses.dataclass(frozen=True)
class Arguments:
  """Writes the README's benchmark table and plots from committed results."""

  results: pathlib.Path = pathlib.Path("results")
  """Folder of results; plots go there too."""

  readme: pathlib.Path = pathlib.Path("README.md")
  """File whose marked part is replaced."""

  plots: Annotated[bool, tyro.conf.arg(help="Also draw the plots.")] = True


def is_ours(row: Row) -> bool:
  """Whether a row is of this package: `pallas`, `pallas-chunked`."""
  return row.implementation.partition("-")[0] == _OURS


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
    """The fastest of the others."""
    others = [r for r in self.rows if not is_ours(r)]
    return min(
      others, key=lambda row: (row.lower_bound, row.seconds), default=None
    )


def read(folder: pathlib.Path) -> tuple[list[Row], list[str]]:
  """The rows of all results without an error, and the commands that made them.

  Raises:
    ValueError: if there are none.
  """
  lines = files.read(sorted(folder.glob("*.json")))
  rows = [line.row for line in lines if not line.row.error]
  if not rows:
    raise ValueError(f"report: no results in {folder}/*.json")
  return rows, sorted({line.command for line in lines})


def problems(rows: Iterable[Row]) -> list[Problem]:
  """Rows by what they compute, op by op, in the order in which they come."""
  groups: dict[tuple[str, str, str], list[Row]] = {}
  rows = list(rows)
  ops = list(dict.fromkeys(row.op for row in rows))
  for row in sorted(rows, key=lambda row: ops.index(row.op)):
    groups.setdefault((row.op, row.case, row.which), []).append(row)
  return [Problem(*key, tuple(group)) for key, group in groups.items()]


def markdown(rows: Sequence[Row], commands: Sequence[str]) -> str:
  """The README's table."""
  methods = ", ".join(sorted({row.method for row in rows}))
  found = {name: v for row in rows for name, v in row.versions.items()}
  versions = ", ".join(f"{name} {v}" for name, v in sorted(found.items()))
  lines = [
    f"TPU v5e, one chip, bfloat16, **{methods}** ({versions}). The bound is "
    "the larger of matrix-unit and HBM time, from shapes alone; products that "
    "a mode computes twice to save memory (`linear_cross_entropy`'s default, "
    "`residuals-none`) are not in it. `own-layout`: heads first in memory, as "
    "the projections of a model give them; the baselines have it too.",
    "",
    "| op | case | pass | ours, ms | of bound | best other, ms | which | "
    "speed-up |",
    "|---|---|---|---:|---:|---:|---|---:|",
  ]
  lines += [
    _line(problem, ours)
    for problem in problems(rows)
    for ours in problem.ours or (None,)
  ]
  lines += ["", "Made by " + ", ".join(f"`{c}`" for c in commands) + "."]
  return "\n".join(lines)


def _line(problem: Problem, ours: Row | None) -> str:
  other = problem.best_other
  mode = ours.implementation.partition("-")[2] if ours else ""
  gain = (
    f"{other.seconds / ours.seconds:.2f}"
    if ours and other and not (ours.lower_bound or other.lower_bound)
    else ""
  )
  cells = [
    f"`{problem.op}`",
    f"{problem.case}, {mode}" if mode else problem.case,
    problem.which,
    _milliseconds(ours),
    f"{ours.of_bound:.1%} {ours.bound_by}" if ours and ours.of_bound else "",
    _milliseconds(other),
    other.implementation if other else "",
    gain,
  ]
  return "| " + " | ".join(cells) + " |"


def _milliseconds(row: Row | None) -> str:
  if row is None:
    return ""
  return ("≥ " if row.lower_bound else "") + f"{row.seconds * 1e3:.3f}"


def insert(readme: str, table: str) -> str:
  """`readme` with the part between its markers replaced.

  Raises:
    ValueError: if it has no markers.
  """
  pattern = re.compile(f"{_START}.*?{_END}", re.DOTALL)
  if not pattern.search(readme):
    raise ValueError(f"report: no {_START} ... {_END} in the README")
  return pattern.sub(lambda _: f"{_START}\n{table}\n{_END}", readme)


def draw(rows: Sequence[Row], folder: pathlib.Path) -> list[pathlib.Path]:
  """The plots: the roofline, and attention against its length."""
  import matplotlib

  matplotlib.use("agg")
  from matplotlib import pyplot

  paths = []
  for name, plot in (("roofline", _roofline), ("attention", _lengths)):
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    plot(axes, rows)
    paths.append(folder / f"{name}.png")
    figure.savefig(paths[-1], dpi=120, metadata={"Software": None})
    pyplot.close(figure)
  return paths


def _roofline(axes, rows: Sequence[Row]) -> None:
  peak = V5E.flops_per_cycle * V5E.clock_hz
  ridge = peak / V5E.hbm_bytes_per_second
  span = [ridge / 64, ridge, ridge * 64]
  roof = [min(peak, x * V5E.hbm_bytes_per_second) / 1e12 for x in span]
  axes.loglog(span, roof, color="black", label="v5e")
  for i, ours in enumerate(_one_per_op(rows)):
    # Without a matmul there is no intensity: such ops stand at the left, as far
    # below the roof as their bandwidth is below the chip's.
    intensity = ours.flops / ours.least_bytes or span[0] * 2**i
    rate = intensity * ours.least_bytes / ours.seconds / 1e12
    mark = "o" if ours.flops else "s"
    axes.plot(intensity, rate, mark, label=f"{ours.op} {ours.case}")
  axes.set_xlabel("flops per byte of compulsory traffic")
  axes.set_ylabel("TFLOP/s")
  axes.set_title(f"Roofline, forward, {rows[0].method}", fontsize=10)
  axes.legend(fontsize=6)


def _one_per_op(rows: Sequence[Row]) -> list[Row]:
  """The kernel's forward pass on each op's first case."""
  first: dict[str, Row] = {}
  for row in rows:
    if row.implementation == _OURS and row.which == "fwd" and row.least_bytes:
      first.setdefault(row.op, row)
  return list(first.values())


def _lengths(axes, rows: Sequence[Row]) -> None:
  attention = {op.name for op in OPS if "attention" in op.baselines}
  by_case = {
    row.case: row.shapes[0][1]
    for row in rows
    if row.op in attention
    and row.which == "fwd"
    and row.implementation in (_OURS, "xla")
    and row.case.startswith("gemma_2b")
  }
  lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
  for row in rows:
    if row.op in attention and row.case in by_case and row.of_bound:
      line = lines.setdefault((row.implementation, row.which), [])
      line.append((by_case[row.case], 100 * row.of_bound))
  for (implementation, which), points in lines.items():
    lengths, shares = zip(*sorted(points), strict=True)
    axes.plot(lengths, shares, "o-", label=f"{implementation}, {which}")
  axes.set_xscale("log", base=2)
  axes.set_ylim(0, 100)
  axes.set_xlabel("sequence length")
  axes.set_ylabel("% of the MXU bound")
  axes.set_title(f"Causal attention, {rows[0].method}", fontsize=10)
  if lines:
    axes.legend(fontsize=7)


def main() -> None:
  """Entry point of `python -m pallas_gemma.bench.show.report`."""
  arguments = tyro.cli(Arguments, prog="pallas_gemma.bench.show.report")
  rows, commands = read(arguments.results)
  readme = arguments.readme.read_text()
  arguments.readme.write_text(insert(readme, markdown(rows, commands)))
  if arguments.plots:
    for path in draw(rows, arguments.results):
      print(f"wrote {path}")


if __name__ == "__main__":
  main()
