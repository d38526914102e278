"""Turns results/*.json into the tables and plots that readers see.

    pallas-gemma-bench --json results/v5e.json
    python -P -m pallas_gemma.bench.show.report

README.md gets the list of ops, from the registry, and the headline table;
results/README.md gets every row, and whole steps of the model.  Each stands
between two markers, `<!-- NAME -->` and `<!-- /NAME -->`, and no number in them
is typed.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Annotated

import tyro
from pallas_gemma.kernels import OPS

from ..run.row import Row
from ..suites.program import OVERLAPPED
from . import files, train_step
from .plots import draw as draw
from .problems import OURS, Problem, problems
from .steps import steps as steps


@dataclasses.dataclass(frozen=True)
class Arguments:
  """Writes the tables and plots of the README files from committed results."""

  results: pathlib.Path = pathlib.Path("results")
  """Folder of results; plots go there too."""

  readme: pathlib.Path = pathlib.Path("README.md")
  """File that gets the ops and the headline table."""

  full: pathlib.Path = pathlib.Path("results/README.md")
  """File that gets every row."""

  plots: Annotated[bool, tyro.conf.arg(help="Also draw the plots.")] = True


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


# --- the list of ops ----------------------------------------------------------


def ops_table() -> str:
  """Every op of the registry, and which of its passes are kernels."""
  lines = ["| op | what | forward | backward |", "|---|---|---|---|"]
  for op in OPS:
    case = op.benches[0]
    has_gradient = op.cost(*case.args, **case.kwargs)[1] is not None
    summary = (op.function.__doc__ or "").splitlines()[0].rstrip(".")
    forward = "Pallas" if op.pallas else "reference (XLA)"
    backward = forward if has_gradient else "reference (XLA)"
    lines.append(f"| `{op.name}` | {summary} | {forward} | {backward} |")
  return "\n".join(lines)


# --- the headline -------------------------------------------------------------

_LAST = "fwd+bwd"
_HEADLINE = ("ours, ms", "best other, ms", "which", "speed-up", "of bound")


def headline(rows: Sequence[Row]) -> str:
  """A row for each op, on its first case and with its gradient; the model."""
  ops = {op.name: op.benches[0].name for op in OPS}
  compared = [p for p in problems(rows) if p.ours and p.best_other]
  with_gradient = {(p.op, p.case) for p in compared if p.which == _LAST}
  chosen = [
    p
    for p in compared
    if p.which == _LAST or (p.op, p.case) not in with_gradient
  ]
  first = [p for p in chosen if ops.get(p.op) == p.case]
  of_others = [p for p in chosen if p.op == "others"]
  blocks = [p for p in chosen if p.op not in ops and p not in of_others]
  lines = [
    f"One TPU v5e, bfloat16, forward and backward, {_provenance(rows)}.",
    "",
    *_head("op", "arrays"),
    *_headline_lines(first, lambda p: _shapes(p, rows)),
  ]
  for found, title in (
    (blocks, "A whole transformer block of the model, forward and backward:"),
    (of_others, "One of other libraries', with `integrations` and as it is:"),
  ):
    if found:
      lines += ["", title, "", *_head("model", "tokens")]
      of_block = functools.partial(_tokens, rows=rows)
      lines += _headline_lines(found, of_block, block=True)
  return "\n".join(lines)


def _head(*what: str) -> list[str]:
  names = (*what, *_HEADLINE)
  right = {"ours, ms", "best other, ms", "speed-up", "of bound"}
  rule = ("---:" if name in right else "---" for name in names)
  return [f"| {' | '.join(names)} |", f"|{'|'.join(rule)}|"]


def _headline_lines(
  chosen: Sequence[Problem], what, *, block: bool = False
) -> list[str]:
  lines = []
  for problem in chosen:
    for ours in problem.ours:
      other, mode = problem.best_other, _mode(ours)
      name = _model_name(problem.case) if block else f"`{problem.op}`"
      cells = [
        f"{name}, {mode}" if mode else name,
        what(problem),
        _milliseconds(ours),
        _milliseconds(other),
        other.implementation if other else "",
        _gain(ours, other),
        _of_bound(ours),
      ]
      lines.append("| " + " | ".join(cells) + " |")
  return lines


def _model_name(case: str) -> str:
  """`gemma_2b_1x8k` is of Gemma 2B, `gemma2_2b_local_8k` of Gemma2 2B local."""
  name, size, *kind, _ = case.split("_")
  return " ".join([name.capitalize(), size.upper(), *kind])


def _arguments(
  problem: Problem, rows: Sequence[Row]
) -> Sequence[Sequence[int]]:
  """Shapes of the arguments: those of the pass without cotangents."""
  return next(
    (
      row.shapes
      for row in rows
      if (row.op, row.case) == (problem.op, problem.case)
      and row.which == "fwd"
      and row.implementation == OURS
    ),
    problem.ours[0].shapes,
  )


def _shapes(problem: Problem, rows: Sequence[Row]) -> str:
  """`[8192, 2048], 2 × [2048, 16384]`."""
  texts = [str(list(shape)) for shape in _arguments(problem, rows)]
  found = []
  for text in dict.fromkeys(texts):
    count = texts.count(text)
    found.append(f"{count} × {text}" if count > 1 else text)
  return ", ".join(found)


def _tokens(problem: Problem, rows: Sequence[Row]) -> str:
  batch, length, *_ = _arguments(problem, rows)[0]
  return f"{batch} × {length}"


# --- every row ----------------------------------------------------------------


def markdown(rows: Sequence[Row], commands: Sequence[str]) -> str:
  """The table of every row, and the commands that made it."""
  lines = [
    f"One TPU v5e, bfloat16, {_provenance(rows)}.",
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
  lines += ["", "Made by", "", "```"]
  lines += [command.replace(" -k ", " \\\n  -k ") for command in commands]
  return "\n".join([*lines, "```"])


def _line(problem: Problem, ours: Row | None) -> str:
  other = problem.best_other
  mode = _mode(ours) if ours else ""
  cells = [
    f"`{problem.op}`",
    f"{problem.case}, {mode}" if mode else problem.case,
    problem.which,
    _milliseconds(ours),
    _of_bound(ours),
    _milliseconds(other),
    other.implementation if other else "",
    _gain(ours, other),
  ]
  return "| " + " | ".join(cells) + " |"


def _provenance(rows: Sequence[Row]) -> str:
  """How the numbers came about, and with which versions."""
  methods = ", ".join(sorted({row.method for row in rows}))
  found = {name: v for row in rows for name, v in row.versions.items()}
  versions = ", ".join(f"{name} {v}" for name, v in sorted(found.items()))
  return f"**{methods}** ({versions})"


def _mode(ours: Row) -> str:
  return ours.implementation.partition("-")[2]


def _of_bound(ours: Row | None) -> str:
  if ours is None or not ours.of_bound:
    return ""
  return f"{ours.of_bound:.1%} {ours.bound_by}"


def _gain(ours: Row | None, other: Row | None) -> str:
  if not ours or not other or ours.lower_bound:
    return ""
  at_least = "≥ " if other.lower_bound else ""
  return f"{at_least}{other.seconds / ours.seconds:.2f}"


def _milliseconds(row: Row | None) -> str:
  if row is None:
    return ""
  return ("≥ " if row.lower_bound else "") + f"{row.seconds * 1e3:.3f}"


# --- files --------------------------------------------------------------------


def insert(text: str, part: str, name: str = "bench") -> str:
  """`text` with what stands between the markers of `name` replaced.

  Raises:
    ValueError: if it has no such markers.
  """
  start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
  pattern = re.compile(f"{start}.*?{end}", re.DOTALL)
  if not pattern.search(text):
    raise ValueError(f"report: no {start} ... {end} in the README")
  return pattern.sub(lambda _: f"{start}\n{part}\n{end}", text)


def readme_text(text: str, rows: Sequence[Row]) -> str:
  """README.md with its generated parts as they should be."""
  return insert(insert(text, ops_table(), "ops"), headline(rows), "headline")


def full_text(text: str, rows: Sequence[Row], commands: Sequence[str]) -> str:
  """results/README.md with its generated parts as they should be."""
  # What is computed in these cannot be told from what communicates.
  timed = [row for row in rows if row.implementation != OVERLAPPED]
  text = insert(insert(text, markdown(timed, commands)), steps(timed), "steps")
  return insert(text, train_step.markdown(rows), "slices")


def main() -> None:
  """Entry point of `python -m pallas_gemma.bench.show.report`."""
  arguments = tyro.cli(Arguments, prog="pallas_gemma.bench.show.report")
  rows, commands = read(arguments.results)
  readme, full = arguments.readme, arguments.full
  readme.write_text(readme_text(readme.read_text(), rows))
  full.write_text(full_text(full.read_text(), rows, commands))
  if arguments.plots:
    for path in draw(rows, arguments.results):
      print(f"wrote {path}")


if __name__ == "__main__":
  main()
