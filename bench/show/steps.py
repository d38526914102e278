"""Whole steps of the model: memory, utilisation, and what other depths take.

Two depths of the same program give any other by a straight line:

    cycles(L) = cycles(b) + (L - b) / (b - a) * (cycles(b) - cycles(a))
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from ..run.row import Row
from ..v5e import V5E

_DEPTH = re.compile(r"_(\d+)_layers")
_MODELS = {"gemma_2b": 18, "gemma_7b": 28}  # layers
_HEADINGS = ("program", "ms", "of bound", "MFU", "peak GiB")


def steps(rows: Sequence[Row]) -> str:
  """A table of what was timed of the model's layers and steps.

  Each pair of depths is followed by a layer's share and by the whole model, as
  far as a straight line leads.
  """
  chosen = [row for row in rows if row.peak_bytes and not row.error]
  lines = [
    f"| {' | '.join(_HEADINGS)} |",
    "|---|" + "---:|" * (len(_HEADINGS) - 1),
  ]
  for row in chosen:
    if row.op.startswith(("gemma_layers", "gemma_train_step", "gemma_decode")):
      lines.append(_line(f"`{row.op}` {row.case}, {row.which}", row))
      lines += _beyond(row, chosen)
  return "\n".join(lines)


def _beyond(row: Row, rows: Sequence[Row]) -> Iterator[str]:
  """What a row says together with that of fewer layers, if there is one."""
  depth = _depth(row)
  fewer = [
    (other, _depth(other))
    for other in rows
    if _family(other) == _family(row) and 0 < _depth(other) < depth
  ]
  if not depth or not fewer:
    return
  other, less = fewer[-1]
  name = f"`{row.op}` {_family(row)[1]}, {row.which}"
  layer = (row.cycles - other.cycles) / (depth - less)
  yield f"| {name}: a layer more | {V5E.seconds(layer) * 1e3:.3f} | | | |"
  whole = next((n for m, n in _MODELS.items() if row.case.startswith(m)), None)
  if whole is not None and row.model_flops and other.model_flops:
    more = whole - depth
    per_layer = (row.model_flops - other.model_flops) / (depth - less)
    yield _line(
      f"{name}: {whole} layers by a straight line",
      dataclasses.replace(
        row,
        cycles=round(row.cycles + more * layer),
        seconds=V5E.seconds(row.cycles + more * layer),
        model_flops=round(row.model_flops + more * per_layer),
        bound_cycles=0,
        peak_bytes=None,
      ),
    )


def _depth(row: Row) -> int:
  """How many layers its case has, 0 where it does not say."""
  match = _DEPTH.search(row.case)
  return int(match[1]) if match else 0


def _family(row: Row) -> tuple[str, str, str, str]:
  """What rows share that differ in depth alone."""
  return row.op, _DEPTH.sub("", row.case), row.which, row.implementation


def _line(name: str, row: Row) -> str:
  at_least, at_most = ("≥ ", "≤ ") if row.lower_bound else ("", "")
  cells = [
    name,
    f"{at_least}{row.seconds * 1e3:.3f}",
    f"{at_most}{row.of_bound:.1%} {row.bound_by}" if row.of_bound else "",
    "" if row.mfu is None else f"{at_most}{row.mfu:.1%}",
    "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
  ]
  return f"| {' | '.join(cells)} |"
