"""Compiles for a TPU that is described, not attached.

libtpu brings the whole compiler.  What it prints, and where, is chosen by
environment variables, which it reads once, when a process first compiles:
`environment` makes them for a subprocess, `output_folder` finds in them where
this process's compiler prints.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program after compilation.

  Attributes:
    text: its optimised HLO.
    seconds: that the compilation took.
    temp_bytes: HBM for temporaries at the peak.
    argument_bytes: HBM for arguments.
    output_bytes: HBM for results.
  """

  text: str
  seconds: float
  temp_bytes: int
  argument_bytes: int
  output_bytes: int


_OUTPUT_FLAG = "--xla_jf_dump_to="
_PROFILES = "static"  # folder of the compiler's own estimates


def environment(
  folder: pathlib.Path, *, ask_compiler: bool = False
) -> dict[str, str]:
  """Variables for a process that compiles and prints into `folder`.

  Args:
    folder: where listings go; must be empty.
    ask_compiler: also print the compiler's own estimate; it unrolls every loop,
      which takes minutes for large kernels.
  """
  flags = [
    f"{_OUTPUT_FLAG}{folder}",
    "--xla_jf_dump_llo_text=true",
    "--xla_jf_dump_llo_pass_label_regex=final_bundles",
  ]
  if ask_compiler:
    profiles = folder / _PROFILES
    flags.append(f"--xla_jf_dump_static_llo_profile_to={profiles}")
  return {
    **os.environ,
    "LIBTPU_INIT_ARGS": " ".join(
      [*flags, os.environ.get("LIBTPU_INIT_ARGS", "")]
    ),
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    # Else two compilers side by side die on a lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }


def output_folder() -> pathlib.Path:
  """Where the compiler of this process prints.

  Raises:
    RuntimeError: if the process was not started with `environment`.
  """
  for flag in os.environ.get("LIBTPU_INIT_ARGS", "").split():
    if flag.startswith(_OUTPUT_FLAG):
      return pathlib.Path(flag.removeprefix(_OUTPUT_FLAG))
  raise RuntimeError(
    "v5e: wanted a process whose compiler prints its programs, got one without "
    f"{_OUTPUT_FLAG} in LIBTPU_INIT_ARGS; start it with the variables of "
    "v5e.environment(folder)"
  )


def describe(topology: str = "v5e:1x1") -> Sequence[Any]:
  """The chips of a slice that is not there."""
  rows, columns = map(int, topology.partition(":")[2].split("x"))
  # A slice of one chip is no host's usual share, and has to be said.
  bounds = (1, 1, 1) if rows * columns == 1 else None
  options = {} if bounds is None else {"chips_per_host_bounds": bounds}
  return topologies.get_topology_desc(
    platform="tpu", topology_name=topology, **options
  ).devices


def compile_program(
  function: Callable[..., Any],
  specs: Sequence[jax.ShapeDtypeStruct],
  *,
  free_layouts: bool = False,
) -> Compiled:
  """`function` compiled for one v5e chip.

  Args:
    function: of arrays.
    specs: of its arguments.
    free_layouts: whether the compiler chooses how they, and the results, lie in
      memory.
  """
  mesh = Mesh([describe()[0]], ("chip",))
  whole = NamedSharding(mesh, PartitionSpec())
  # Either says that the arrays are on the chip, and how they lie there.
  placed: Any = Format(Layout.AUTO, whole) if free_layouts else whole
  jitted = jax.jit(function, in_shardings=placed, out_shardings=placed)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jitted.lower(*specs)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
  memory: Any = compiled.memory_analysis()
  return Compiled(
    text=compiled.as_text() or "",
    seconds=seconds,
    temp_bytes=memory.temp_size_in_bytes,
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
  )


@dataclasses.dataclass(frozen=True)
class Vmem:
  """VMEM of the instruction that needs most, in bytes."""

  total: int
  spilled: int


def vmem(folder: pathlib.Path) -> Vmem | None:
  """What the compiler reports of VMEM, None if it printed no report."""
  instructions = [
    instruction
    for path in folder.glob("*-vmem_report.html")
    for instruction in _report(path.read_text()).values()
  ]
  if not instructions:
    return None
  return Vmem(
    total=max(i.get("total_size", 0) for i in instructions),
    spilled=max(map(_spilled, instructions)),
  )


def _report(html: str) -> Mapping[str, Any]:
  """The data that the report's page draws."""
  start = re.search(r"const DATA\s*=\s*", html)
  if start is None:
    return {}
  data, _ = json.JSONDecoder().raw_decode(html, start.end())
  return data.get("hlo_breakdowns", {})


def _spilled(instruction: Mapping[str, Any]) -> int:
  return sum(
    allocation.get("size", 0)
    for block in instruction.get("blocks", ())
    for allocation in block.get("allocations", ())
    if allocation.get("tag") == "SPILL"
  )


def profiled_cycles(folder: pathlib.Path) -> dict[str, int]:
  """The compiler's own estimate of each instruction that it profiled."""
  found = {}
  for path in (folder / _PROFILES).glob("*_static_llo_profile.textproto"):
    text = path.read_text(errors="replace")
    name = re.search(r'hlo_op_name: "(.*?)"', text)
    cycles = re.search(r"estimated_cycles: (\d+)", text)
    if name and cycles and int(cycles[1]):
      found[name[1]] = int(cycles[1])
  return found
