"""Shows what becomes of an op: jaxpr, Mosaic, HLO and bundles, hottest first.

    python -P tools/dump.py rms_norm gemma_2b_8k
    python -P tools/dump.py flash_attention gemma_2b_8k --which fwd+bwd --out d

Writes everything into a folder, and prints how the program is cut for the
instruction memory and what it takes to load it; then, for each HLO instruction
that costs, its stalls, what its hottest loop gives each unit to do, and where
the loop stands in the listing.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import re
import shutil

import jax
import rich.console
import rich.table
import tyro
from pallas_gemma import bench

_UNITS = (  # the first pattern that an opcode matches names its unit
  ("matrix unit", r"vmatmul|vmatpush|vpop.*\.mxu|vllmr"),
  ("transpose unit", r".*\.xlu"),
  ("load", r"vld"),
  ("store", r"vst(\.|$)"),
  ("extended (exp, tanh, ...)", r"vexp|vpow|vtanh|vrcp|vrsqrt|verf|vpop\.e"),
  ("copies", r"dma|vsync"),
  ("vector", r"v"),
  ("scalar", r""),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
  """Dumps one program of the benchmark's list."""

  op: tyro.conf.Positional[str]
  """Name in the registry."""

  case: tyro.conf.Positional[str]
  """Name of one of its bench cases."""

  which: str = "fwd"
  """Pass: fwd or fwd+bwd."""

  implementation: str = "pallas"
  """pallas, xla or a baseline."""

  suite: str = "registry"
  """List that the program is on: registry, baselines, gemma, or a file."""

  out: pathlib.Path = pathlib.Path("runs/dump")
  """Folder to write to; what it holds is replaced."""


def unit(opcode: str) -> str:
  """The unit that executes an opcode."""
  return next(name for name, pattern in _UNITS if re.match(pattern, opcode))


def loops(listing: bench.Listing) -> list[range]:
  """Bundles between a branch's target and the branch, if it jumps back."""
  found = []
  for i, bundle in enumerate(listing.bundles):
    for instruction in bundle:
      if instruction.opcode == "sbr.rel":
        region = instruction.keywords["target"].removeprefix("$region")
        start = listing.regions[int(region)]
        if start <= i:
          found.append(range(start, min(i + 5, len(listing.bundles))))
  return found


def hottest(listing: bench.Listing, cycles: bench.Cycles) -> range:
  """The innermost loop in which most bundles are issued, or the whole."""

  def issued(bundles: range) -> int:
    return sum(cycles.visits[i] for i in bundles)

  whole = range(len(listing.bundles))
  candidates = sorted(loops(listing), key=len)
  return next(
    (loop for loop in candidates if 2 * issued(loop) > issued(whole)), whole
  )


def show_code(console: rich.console.Console, code: bench.Code) -> None:
  """Prints a program's size, and what loading it costs."""
  console.print(
    f"code: {code.bundles:,} bundles in {code.overlays} overlays; "
    f"{code.loaded_bytes / 2**20:,.1f} MiB are loaded while it runs, which "
    f"takes {code.cycles:,} of the cycles; {code.best_cycles:,} if all of it "
    f"is hidden, {code.worst_cycles:,} if nothing is"
  )
  for loop in code.loops:
    console.print(bench.describe_loop(loop))
  if not code.loops:
    console.print("every loop stays in one overlay")


def show(
  console: rich.console.Console, listing: bench.Listing, cycles: bench.Cycles
) -> None:
  """Prints an instruction's stalls and the work of its hottest loop."""
  loop = hottest(listing, cycles)
  rounds = max(cycles.visits[i] for i in loop)
  console.print(
    f"\n[bold]{listing.name}[/bold]: {cycles.total:,} cycles; "
    f"{cycles.bundles:,} bundles; waits: {cycles.copy_stall:,} for copies, "
    f"{cycles.queue_stall:,} for room in a unit's queue, "
    f"{cycles.result_stall:,} for results"
  )
  console.print(
    f"hottest loop: bundles {loop.start:#x} to {loop.stop - 1:#x}, "
    f"{len(loop):,} bundles, {rounds:,} rounds"
  )
  work: collections.Counter[str] = collections.Counter()
  busy: collections.Counter[str] = collections.Counter()
  for i in loop:
    units = [unit(instruction.opcode) for instruction in listing.bundles[i]]
    work.update(units)
    busy.update(set(units))
  table = rich.table.Table("unit", box=None, pad_edge=False)
  for heading in ("instructions", "per bundle", "bundles in use"):
    table.add_column(heading, justify="right")
  for name, count in work.most_common():
    used = busy[name] / len(loop)
    table.add_row(name, f"{count:,}", f"{count / len(loop):.2f}", f"{used:.0%}")
  idle = sum(not listing.bundles[i] for i in loop)
  table.add_row("(empty)", f"{idle:,}", "", f"{idle / len(loop):.0%}")
  console.print(table)


def main() -> None:
  """Entry point."""
  arguments = tyro.cli(Arguments, prog="dump")
  console = rich.console.Console()
  key = "/".join(
    (arguments.op, arguments.case, arguments.which, arguments.implementation)
  )
  programs = {p.key: p for p in bench.suite(arguments.suite)}
  if key not in programs:
    raise SystemExit(f"dump: no program is called {key}")
  out = arguments.out
  shutil.rmtree(out, ignore_errors=True)
  out.mkdir(parents=True)
  built = programs[key].build()
  (out / "jaxpr.txt").write_text(
    str(jax.make_jaxpr(built.function)(*built.specs))
  )
  mosaic = out.resolve() / "mosaic"
  os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_mosaic_dump_to={mosaic} " + os.environ.get("LIBTPU_INIT_ARGS", "")
  )
  job = bench.Job(arguments.suite, key)
  with bench.compiler_output(job) as (printed, row):
    shutil.copytree(printed, out / "compiler")
  for path in (out / "compiler").glob("*-TLP-hlo.txt"):
    shutil.copy(path, out / "hlo.txt")
  operands = bench.kernel_operands(built.function, built.specs, built.values)
  counted = []
  for name, path in bench.find_listings(out / "compiler").items():
    if name.startswith("<") or name == "TLP":
      continue
    text = path.read_text(errors="replace")
    listing = bench.parse_listing(text, name)
    values = next((v for k, v in operands.items() if k in name), None)
    cycles = bench.count_cycles(listing, values)
    hot = [listing.texts[i] for i in hottest(listing, cycles)]
    (out / f"{name}.bundles.txt").write_text(
      "\n".join(["Hottest loop:", *hot, "", "Whole program:", text])
    )
    counted.append((listing, cycles))
  if row.code:
    show_code(console, row.code)
  for listing, cycles in sorted(counted, key=lambda pair: -pair[1].total):
    show(console, listing, cycles)
  console.print(f"\nwrote jaxpr, Mosaic, HLO and listings to {out}")


if __name__ == "__main__":
  main()
