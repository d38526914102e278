"""Compiles for a TPU that is described, not attached.

libtpu brings the whole compiler.  What it prints, and where, is chosen by
environment variables, which it reads once, when a process first compiles:
`environment` makes them for a subprocess, `output_folder` finds in them where
this process's compiler prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import overlays
from .links import Place


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program after compilation.

  Attributes:
    text: its optimised HLO.
    seconds: that the compilation took.
    temp_bytes: HBM for temporaries at the peak.
    argument_bytes: HBM for arguments.
    output_bytes: HBM for results, those left out that lie where arguments lay.
  """

  text: str
  seconds: float
  temp_bytes: int
  argument_bytes: int
  output_bytes: int

  @property
  def peak_bytes(self) -> int:
    """HBM at the peak, the program's own code left out."""
    return self.argument_bytes + self.output_bytes + self.temp_bytes


_OUTPUT_FLAG = "--xla_jf_dump_to="
_PROFILES = "static"  # folder of the compiler's own estimates
_LOG = "compiler.log"


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
    f"--vmodule={overlays.MODULE}=10",
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
    # The cut into overlays is told to the log alone; `recorded` keeps it.
    "TPU_MIN_LOG_LEVEL": "0",
    "TPU_STDERR_LOG_LEVEL": "0",
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


def compiler_log(folder: pathlib.Path) -> str:
  """What `recorded` has kept in a folder, empty if it has kept nothing."""
  path = folder / _LOG
  return path.read_text(errors="replace") if path.exists() else ""


@contextlib.contextmanager
def recorded(folder: pathlib.Path) -> Iterator[None]:
  """Keeps what the compiler logs meanwhile.

  It logs to the process's standard error, descriptor 2.  What others write
  there meanwhile is kept too: where a compilation ends the process, the reason.
  """
  sys.stderr.flush()
  usual = os.dup(2)
  try:
    with (folder / _LOG).open("ab") as file:
      os.dup2(file.fileno(), 2)
    yield
  finally:
    sys.stderr.flush()
    os.dup2(usual, 2)
    os.close(usual)


def describe(topology: str = "v5e:1x1", slices: int = 1) -> Sequence[Any]:
  """The chips of a slice, or of several, that are not there."""
  rows, columns = map(int, topology.partition(":")[2].split("x"))
  # A slice of one chip is no host's usual share, and has to be said.
  bounds = (1, 1, 1) if rows * columns == 1 else None
  options: dict[str, Any] = {}
  if bounds is not None:
    options["chips_per_host_bounds"] = bounds
  if slices > 1:
    options["num_slices"] = slices
  return topologies.get_topology_desc(
    platform="tpu", topology_name=topology, **options
  ).devices


AXIS = "chips"  # of the mesh of all chips of a slice


def _in_a_row(chips: Sequence[Any]) -> Mesh:
  return Mesh(list(chips), (AXIS,))


@dataclasses.dataclass(frozen=True)
class Placement:
  """The chips that a program is compiled for, and how its arrays lie on them.

  Attributes:
    topology: a slice, such as "v5e:2x4".
    arguments: how each argument is split over the mesh, by default over `AXIS`
      of all chips in a row; None if each chip has all of them.
    results: the same of the results, a prefix of their tree.
    donated: indices of the arguments whose memory results may take.
    options: of the compiler, by name, that are not its defaults.
    slices: how many such slices there are, joined by the network.
    arrange: makes the mesh of all chips, of which arguments and results tell.
  """

  topology: str = "v5e:1x1"
  arguments: tuple[PartitionSpec, ...] | None = None
  results: Any = PartitionSpec()
  donated: tuple[int, ...] = ()
  options: tuple[tuple[str, str], ...] = ()
  slices: int = 1
  arrange: Callable[[Sequence[Any]], Mesh] = _in_a_row

  def mesh(self) -> Mesh:
    """All chips."""
    return self.arrange(list(describe(self.topology, self.slices)))

  def places(self) -> list[Place]:
    """Where the chips are, in the order in which a program numbers them."""
    return [
      Place(getattr(chip, "slice_index", 0) or 0, *chip.coords[:2])
      for chip in self.mesh().devices.flat
    ]


ONE_CHIP = Placement()


def compile_program(
  function: Callable[..., Any],
  specs: Sequence[jax.ShapeDtypeStruct],
  placement: Placement = ONE_CHIP,
  *,
  free_layouts: bool = False,
) -> Compiled:
  """`function` compiled for a v5e; the sizes are one chip's.

  Args:
    function: of arrays.
    specs: of its arguments.
    placement: the chips, and how arrays lie on them.
    free_layouts: whether the compiler chooses how they, and the results, lie in
      the memory of a chip.
  """
  mesh = placement.mesh()

  def placed(partition: PartitionSpec) -> Any:
    # Either says that an array is on the chips, and how it lies there.
    sharding = NamedSharding(mesh, partition)
    return Format(Layout.AUTO, sharding) if free_layouts else sharding

  arguments = placement.arguments or (PartitionSpec(),) * len(specs)
  jitted = jax.jit(
    function,
    in_shardings=tuple(map(placed, arguments)),
    out_shardings=jax.tree.map(placed, placement.results),
    donate_argnums=placement.donated,
  )
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jitted.lower(*specs)
    start = time.perf_counter()
    compiled = lowered.compile(dict(placement.options) or None)
    seconds = time.perf_counter() - start
  memory: Any = compiled.memory_analysis()
  arguments = memory.argument_size_in_bytes
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Compiled(
    text=compiled.as_text() or "",
    seconds=seconds,
    temp_bytes=_temp_bytes(memory, arguments + results),
    argument_bytes=arguments,
    output_bytes=results,
  )


def _temp_bytes(memory: Any, others: int) -> int:
  """HBM for temporaries.

  Of a TPU's program the size that JAX gives has the gaps of its heap twice; the
  sum of all, where it is given, has them once, as the compiler's log has.
  """
  total = getattr(memory, "total_allocation_bytes", 0)  # from JAX 0.12 on
  if not total:
    return memory.temp_size_in_bytes
  return max(0, min(memory.temp_size_in_bytes, total - others))


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
