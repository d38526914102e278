"""The plots of the report: the roofline, and attention against its length."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from pallas_gemma.kernels import OPS

from ..run.row import Row
from ..v5e import V5E
from .problems import OURS


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
    if row.implementation == OURS and row.which == "fwd" and row.least_bytes:
      first.setdefault(row.op, row)
  return list(first.values())


def _lengths(axes, rows: Sequence[Row]) -> None:
  attention = {op.name for op in OPS if "attention" in op.baselines}
  by_case = {
    row.case: row.shapes[0][1]
    for row in rows
    if row.op in attention
    and row.which == "fwd"
    and row.implementation in (OURS, "xla")
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
