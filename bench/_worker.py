"""A subprocess that compiles one program and prints its row as JSON.

One process per compile: the compiler reads its flags once, and ends the process
on some errors.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from . import (
  _compiler,
  _estimate,
  _listing,
  _machine,
  _prefetch,
  _program,
)
from ._chip import V5E, V5E_AS_COMPILED
from ._job import MARK, Job
from ._row import Row, bound

ESTIMATED = "estimated from the compiled program"
_STEPS_KEPT = 12


def find(job: Job) -> _program.Program:
  """The program that a job names."""
  candidates = (
    _program.suite(job.suite) if job.config is None else _with_config(job)
  )
  found = [p for p in candidates if p.key == job.key]
  if not found:
    raise ValueError(f"{job.suite}: no program is called {job.key}")
  return found[0]


def _with_config(job: Job) -> Sequence[_program.Program]:
  from pallas_gemma.kernels import OPS

  name, case_name, *_ = job.key.split("/")
  return [
    program
    for op in OPS
    for case in op.benches + op.tests
    if (op.name, case.name) == (name, case_name)
    for program in _program.of_case(op, case, "pallas", job.config)
  ]


def measure(program: _program.Program, dump: pathlib.Path) -> Row:
  """Compiles a program and estimates its time.

  Args:
    program: what to compile.
    dump: where this process's compiler prints.
  """
  built = program.build()
  compiled = _compiler.compile_program(
    built.function, built.specs, free_layouts=program.free_layouts
  )
  result = _estimate.estimate(
    compiled.text, _listings(dump), _prefetch.kernel_operands(*built)
  )
  vmem = _compiler.vmem(dump)
  bound_cycles, bound_by = bound(program.costs)
  steps = sorted(result.steps, key=lambda s: -s.cycles * s.times)
  return Row(
    op=program.op,
    case=program.case,
    which=program.which,
    implementation=program.implementation,
    method=ESTIMATED,
    seconds=V5E.seconds(result.cycles),
    cycles=result.cycles,
    lower_bound=result.lower_bound,
    bound_cycles=bound_cycles,
    bound_by=bound_by,
    flops=sum(cost.flops for cost in program.costs),
    least_bytes=sum(cost.hbm_bytes for cost in program.costs),
    shapes=[list(spec.shape) for spec in built.specs],
    hbm_bytes=result.hbm_bytes,
    temp_bytes=compiled.temp_bytes,
    vmem_bytes=vmem.total if vmem else None,
    spill_bytes=vmem.spilled if vmem else None,
    compile_seconds=round(compiled.seconds, 2),
    steps=[dataclasses.asdict(step) for step in steps[:_STEPS_KEPT]],
    collectives=[dataclasses.asdict(c) for c in result.collectives],
    notes=result.notes,
  )


def _listings(dump: pathlib.Path) -> dict[str, pathlib.Path]:
  found = _listing.find_listings(dump)
  if not found:
    raise _listing.ListingError(
      "this libtpu printed no bundle listings: its flags have changed, and "
      "pallas-gemma-bench does not know the new ones"
    )
  return found


def static_cycles(dump: pathlib.Path) -> dict[str, int]:
  """The compiler's own estimate of each instruction that it profiled."""
  found = {}
  for path in (dump / "static").glob("*_static_llo_profile.textproto"):
    text = path.read_text(errors="replace")
    name = re.search(r'hlo_op_name: "(.*?)"', text)
    cycles = re.search(r"estimated_cycles: (\d+)", text)
    if name and cycles and int(cycles[1]):
      found[name[1]] = int(cycles[1])
  return found


def against_static(dump: pathlib.Path) -> dict[str, int]:
  """Cycles of the instructions that the compiler profiled, by either model.

  `model` is ours, `model_as_compiled` ours with the copies of the compiler's.
  """
  static, sums = static_cycles(dump), {"compiler": 0}
  chips = {"model": V5E, "model_as_compiled": V5E_AS_COMPILED}
  for name, path in _listings(dump).items():
    if name in static:
      listing = _listing.parse_listing(path.read_text(errors="replace"), name)
      sums["compiler"] += static[name]
      for model, chip in chips.items():
        cycles = _machine.count(listing, chip=chip).total
        sums[model] = sums.get(model, 0) + cycles
  return sums


def versions() -> Mapping[str, str]:
  """Of what a number depends on."""
  return {name: metadata.version(name) for name in ("jax", "libtpu")}


def main() -> None:
  """Reads a job from the command line; prints a marked line of JSON."""
  job = Job.from_json(json.loads(sys.argv[1]))
  dump = pathlib.Path(sys.argv[2])
  row = measure(find(job), dump)
  result: dict[str, Any] = dataclasses.replace(
    row, config=job.config, versions=versions()
  ).to_json()
  if job.static:
    result["static"] = against_static(dump)
  print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
