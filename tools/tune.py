"""Searches the block sizes of an op by the cycles of the compiled program.

    python -P tools/tune.py flash_attention gemma_2b_8k
    python -P tools/tune.py rms_norm gemma_2b_8k --start '{"rows": 64}'
    python -P tools/tune.py feed_forward gemma_2b_8k --which fwd \\
      --start '{"forward": {"rows": 1024, "cols": 512}}'

Starts from a config, and changes one field at a time, integers to their double
and half, for as long as that helps.  A config that is refused, or that does not
fit the chip, is passed over.  The best goes into `kernels/tuned/OP.json`, under
the key that the op itself asks its table for; where an op asks for each of its
kernels, that of a kernel is the part of the config that is named in the key.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import tyro
from pallas_gemma import bench
from pallas_gemma.kernels import OPS, Case, Op
from pallas_gemma.kernels._frame import tuned

Config = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arguments:
  """Finds the fastest config of an op on one of its bench cases."""

  op: tyro.conf.Positional[str]
  """Name in the registry."""

  case: tyro.conf.Positional[str]
  """Name of one of its bench cases."""

  which: str = "fwd+bwd"
  """Pass to make fast; an op without a gradient has `fwd` alone."""

  start: str | None = None
  """Config to start from, as JSON; default: the config's own defaults."""

  fix: tuple[str, ...] = ()
  """Fields to leave as they are."""

  jobs: Annotated[int, tyro.conf.arg(aliases=["-j"])] = os.cpu_count() or 1
  """Compilations at a time."""

  dry_run: bool = False
  """Print the entry, but do not write the table."""


def find(arguments: Arguments) -> tuple[Op, Case]:
  """The op and the case that are meant.

  Raises:
    ValueError: if there is no such op or case.
  """
  for op in OPS:
    if op.name == arguments.op:
      for case in op.benches:
        if case.name == arguments.case:
          return op, case
      names = ", ".join(case.name for case in op.benches)
      raise ValueError(f"tune: case must be one of {names}")
  raise ValueError(f"tune: op must be one of {', '.join(o.name for o in OPS)}")


def neighbours(config: Config, fixed: tuple[str, ...]) -> Iterator[Config]:
  """Configs that differ in one field."""
  for name, value in config.items():
    if name in fixed:
      continue
    if isinstance(value, dict):
      for part in neighbours(value, fixed):
        yield config | {name: part}
    elif isinstance(value, bool):
      yield config | {name: not value}
    elif isinstance(value, int):
      yield config | {name: value * 2}
      if value % 2 == 0:
        yield config | {name: value // 2}


def estimate(
  arguments: Arguments, configs: list[Config | None]
) -> list[bench.Row]:
  """The times of configs, None for the one that the op picks itself."""
  which = arguments.which
  jobs = [
    bench.Job(
      "registry", f"{arguments.op}/{arguments.case}/{which}/pallas", config
    )
    for config in configs
  ]
  results = bench.run_jobs(
    jobs, workers=arguments.jobs, cache=bench.cache_directory()
  )
  return [result.row for result in results]


def search(arguments: Arguments, start: Config) -> tuple[Config, int]:
  """Coordinate descent; returns the best config and its cycles."""
  seen = {json.dumps(start): estimate(arguments, [start])[0]}
  best, cycles = start, _cycles(seen[json.dumps(start)])
  print(f"{cycles or 'refused'}: {start}", flush=True)
  while True:
    new = [
      config
      for config in neighbours(best, arguments.fix)
      if json.dumps(config) not in seen
    ]
    rows = estimate(arguments, [*new])
    seen |= {json.dumps(c): r for c, r in zip(new, rows, strict=True)}
    better = [
      (_cycles(row), config)
      for config, row in zip(new, rows, strict=True)
      if _cycles(row) and (not cycles or _cycles(row) < cycles)
    ]
    if not better:
      return best, cycles
    cycles, best = min(better, key=lambda pair: pair[0])
    print(f"{cycles:,}: {best}", flush=True)


def _cycles(row: bench.Row) -> int:
  """0 for a config that was refused or is not known well enough."""
  return 0 if row.error or row.lower_bound else row.cycles


def table_keys(op: Op, case: Case, which: str) -> list[dict[str, Any]]:
  """What the op asks its tuned table for in a pass of a case, if anything."""
  programs = bench.of_case(op, case, "pallas")
  built = next(p for p in programs if p.which == which).build()
  with tuned.asked_keys() as asked:
    jax.eval_shape(built.function, *built.specs)
  keys = [dict(sorted(key.items())) for name, key in asked if name == op.name]
  return [key for i, key in enumerate(keys) if key not in keys[:i]]


def entries(
  keys: list[dict[str, Any]], config: Config, **facts: Any
) -> list[dict[str, Any]]:
  """The table's entries for a config, or for its parts if the keys name them.

  A part that is None was the op's own choice, and gets no entry.
  """
  parts = [
    (key, config[key["which"]] if "which" in key else config) for key in keys
  ]
  return [{"key": k, "config": part, **facts} for k, part in parts if part]


def main() -> None:
  """Entry point."""
  arguments = tyro.cli(Arguments, prog="tune")
  op, case = find(arguments)
  defaults = bench.config_class(op)
  start = (
    json.loads(arguments.start)
    if arguments.start
    else dataclasses.asdict(defaults())
  )
  if not any(neighbours(start, arguments.fix)):
    sys.exit(f"tune: there is no number to change in {start}; give --start")
  (own,) = estimate(arguments, [None])
  best, cycles = search(arguments, start)
  if not cycles:
    sys.exit("tune: every config was refused; give another with --start")
  if own.error:
    print(f"the op's own choice fails: {own.error}")
  else:
    gain = own.cycles / cycles - 1
    print(f"the op's own choice takes {own.cycles:,} cycles, {gain:+.2%}")
  keys = table_keys(op, case, arguments.which)
  if not keys:
    print(f"{op.name} asks no tuned table: nothing to write")
  for entry in entries(keys, best, cycles=cycles, **own.versions):
    print(json.dumps(entry))
    if not arguments.dry_run:
      print(f"wrote {tuned.write_entry(op.name, entry)}")


if __name__ == "__main__":
  main()
