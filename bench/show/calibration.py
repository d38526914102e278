"""How far the cycle model is to be trusted: `pallas-gemma-bench --calibrate`.

It stands beside measurements that were published for a v5e (those of other
packages' kernels are in `show.published`), and beside the compiler's own static
model, which unrolls every loop.  The static model assumes slower copies (1,133
cycles to the first byte, 90 % of the bandwidth, but that for each of those
under way), so programs that wait for copies differ; the last column is our
model with copies like that.
"""

from __future__ import annotations

from collections.abc import Sequence

import rich.box
import rich.table

from ..run.job import Job
from ..run.row import Result
from ..suites import calibration
from ..v5e import V5E

# Milliseconds by the wall clock, from JAX's guide to matmuls in Pallas.
_PUBLISHED = {
  "matmul/8192/fwd/pallas-512x1024x1024": 6.10,
  "matmul/8192/fwd/xla": 6.05,
  "matmul/4096/fwd/pallas-512x1024x1024": 0.889,
  "matmul/4096/fwd/xla": 0.827,
  "matmul/1024/fwd/pallas-128x128x128": 0.298,
}
_DISPATCH_MS = 0.1  # of which is the host's


def jobs() -> list[Job]:
  """What has to be run for the table."""
  return [
    Job(
      "calibration",
      program.key,
      ask_compiler=calibration.is_unrolled(program),
    )
    for program in calibration.programs()
  ]


def table(results: Sequence[Result]) -> rich.table.Table:
  """The model beside what is known from elsewhere.

  Args:
    results: of `jobs()`.
  """
  shown = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  shown.add_column("program", no_wrap=True)
  for heading in (
    "model cycles",
    "model ms",
    "published ms",
    "less dispatch",
    "model / published",
    "compiler's static cycles",
    "model / static",
    "with the compiler's copies",
  ):
    shown.add_column(heading, justify="right")
  for result in results:
    shown.add_row(*_line(result))
  return shown


def _line(result: Result) -> list[str]:
  row, static = result.row, result.static
  if row.error:
    return [row.key, row.error, *[""] * 7]
  ms = V5E.seconds(row.cycles) * 1e3
  line = [row.key, f"{row.cycles:,}", f"{ms:.3f}", *[""] * 6]
  if row.key in _PUBLISHED:
    published = _PUBLISHED[row.key]
    device = published - _DISPATCH_MS
    line[3:6] = [f"{published:.3f}", f"{device:.3f}", f"{ms / device:.3f}"]
  if static and static.compiler:
    line[6:] = [
      f"{static.compiler:,}",
      f"{static.model / static.compiler:.3f}",
      f"{static.model_as_compiled / static.compiler:.3f}",
    ]
  return line
