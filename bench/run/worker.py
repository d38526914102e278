"""A subprocess that compiles one program and prints its result as JSON.

One process per compile: the compiler reads its flags once, and ends the process
on some errors.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from .. import v5e
from ..suites import program as programs
from ..suites.program import Program
from .job import MARK, Job
from .row import Result, Row

ESTIMATED = "estimated from the compiled program"
_STEPS_KEPT = 12


def find(job: Job) -> Program:
  """The program that a job names."""
  candidates = (
    programs.suite(job.suite) if job.config is None else _with_config(job)
  )
  found = [p for p in candidates if p.key == job.key]
  if not found:
    raise ValueError(f"{job.suite}: no program is called {job.key}")
  return found[0]


def _with_config(job: Job) -> Sequence[Program]:
  from pallas_gemma.kernels import OPS

  name, case_name, *_ = job.key.split("/")
  return [
    program
    for op in OPS
    for case in op.benches + op.tests
    if (op.name, case.name) == (name, case_name)
    for program in programs.of_case(op, case, "pallas", job.config)
  ]


def estimate(program: Program) -> Row:
  """Compiles a program and estimates its time, as `v5e.estimate` does."""
  built = program.build()
  found = v5e.estimate(*built, free_layouts=program.free_layouts)
  bound_cycles, bound_by = programs.bound(program.costs)
  steps = sorted(found.steps, key=lambda s: -s.cycles * s.times)
  return Row(
    op=program.op,
    case=program.case,
    which=program.which,
    implementation=program.implementation,
    method=ESTIMATED,
    seconds=v5e.V5E.seconds(found.cycles),
    cycles=found.cycles,
    lower_bound=found.lower_bound,
    bound_cycles=bound_cycles,
    bound_by=bound_by,
    flops=sum(cost.flops for cost in program.costs),
    least_bytes=sum(cost.hbm_bytes for cost in program.costs),
    shapes=[list(spec.shape) for spec in built.specs],
    hbm_bytes=found.hbm_bytes,
    temp_bytes=found.temp_bytes,
    peak_bytes=found.peak_bytes,
    vmem_bytes=found.vmem.total if found.vmem else None,
    spill_bytes=found.vmem.spilled if found.vmem else None,
    compile_seconds=round(found.compile_seconds, 2),
    steps=[dataclasses.asdict(step) for step in steps[:_STEPS_KEPT]],
    collectives=[dataclasses.asdict(c) for c in found.collectives],
    code=found.code,
    model_flops=program.model_flops,
    notes=found.notes,
  )


def versions() -> Mapping[str, str]:
  """Of what a number depends on."""
  return {name: metadata.version(name) for name in ("jax", "libtpu")}


def main() -> None:
  """Reads a job from the command line; prints a marked line of JSON."""
  job = Job.from_json(json.loads(sys.argv[1]))
  row = dataclasses.replace(
    estimate(find(job)), config=job.config, versions=versions()
  )
  static = v5e.static_model() if job.ask_compiler else None
  result = Result(row, static=static)
  print(MARK + json.dumps(result.to_json()), flush=True)


if __name__ == "__main__":
  main()
