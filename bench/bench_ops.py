"""Every program of the default table as a pytest benchmark.

    pytest bench --benchmark-only
    pytest bench --benchmark-only --benchmark-autosave -k rms_norm
    pytest bench --benchmark-only --benchmark-compare

On a TPU the rounds are measured runs; elsewhere there is one round, whose time
is the estimate from the compiled program.  `extra_info` says which, and holds
cycles, bound and versions.
"""

from __future__ import annotations

from typing import Any

import pytest
from pallas_gemma import bench


class _Clock:
  """Shows pytest-benchmark the times that were found."""

  def __init__(self) -> None:
    self.now = 0.0

  def __call__(self) -> float:
    return self.now


_CLOCK = _Clock()
_CHOICES = bench.choose(bench.Arguments())


@pytest.mark.benchmark(timer=_CLOCK, warmup=False)
@pytest.mark.parametrize(
  "choice", [pytest.param(c, id=c.program.key) for c in _CHOICES]
)
def bench_program(benchmark: Any, choice: bench.Choice) -> None:
  """One program; its group is the problem, so that rivals stand together."""
  (row,) = bench.run_choices(bench.Arguments(jobs=1), [choice])
  if row.error:
    pytest.fail(row.error)
  benchmark.group = "/".join((row.op, row.case, row.which)) + f" ({row.method})"
  benchmark.extra_info.update(
    method=row.method,
    cycles=row.cycles,
    lower_bound=row.lower_bound,
    bound_cycles=row.bound_cycles,
    bound_by=row.bound_by,
    versions=dict(row.versions),
  )
  samples = iter(row.samples or (row.seconds,))

  def one_run() -> None:
    _CLOCK.now += next(samples)

  benchmark.pedantic(one_run, rounds=len(row.samples) or 1, iterations=1)
