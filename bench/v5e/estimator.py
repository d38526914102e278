"""From a function to its time: compile, read, execute, add up."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from . import compiler
from .chip import V5E, V5E_AS_COMPILED
from .collectives import Collective
from .compiler import ONE_CHIP, Placement
from .listing import ListingError, find_listings, parse_listing
from .machine import count_cycles
from .module import Step, estimate_module
from .operands import kernel_operands
from .overlays import parse_log
from .program_code import Code


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What one run of a compiled program costs.

  Attributes:
    cycles: in all, collectives left out.
    lower_bound: whether the truth may be more; `notes` say why.
    hbm_bytes: traffic between HBM and the core.
    temp_bytes: HBM for temporaries at the peak.
    peak_bytes: HBM for arguments, results and temporaries at the peak.
    vmem: of the instruction that needs most, None where it was not printed.
    compile_seconds: that the compilation took.
    steps: HLO instructions, in the order in which they run.
    collectives: communication that `cycles` leaves out.
    notes: what could not be decided, and where.
    code: what it takes to load the program's instructions.
  """

  cycles: int
  lower_bound: bool
  hbm_bytes: int
  temp_bytes: int
  peak_bytes: int
  vmem: compiler.Vmem | None
  compile_seconds: float
  steps: tuple[Step, ...]
  collectives: tuple[Collective, ...]
  notes: tuple[str, ...]
  code: Code | None


def estimate(
  function: Callable[..., Any],
  specs: Sequence[jax.ShapeDtypeStruct],
  values: Sequence[np.ndarray | None] | None = None,
  placement: Placement = ONE_CHIP,
  *,
  free_layouts: bool = False,
) -> Estimate:
  """Compiles a function for a v5e and estimates the time of a run on a chip.

  The process must have been started with the variables of
  `environment(folder)`, `folder` being empty, and compile nothing else for a
  TPU: the compiler reads its flags once, and names what it prints after
  instructions, so that two programs in one folder could not be told apart.

  Args:
    function: of arrays alone.
    specs: of its arguments.
    values: of its integer arguments, on which kernels may branch; None, as for
      each of the others, where there is none.
    placement: the chips, and how arrays lie on them; one chip by default.
    free_layouts: whether the compiler chooses how arguments and results lie in
      memory; row-major if not.

  Raises:
    RuntimeError: if the process was not started so, or has compiled before.
    ListingError: if the compiler printed nothing that is known.
  """
  folder = compiler.output_folder()
  if find_listings(folder):
    raise RuntimeError(
      f"v5e.estimate: wanted an empty {folder}, got the listings of an earlier "
      "compilation; estimate one program per process, each in its own folder"
    )
  with compiler.recorded(folder):
    compiled = compiler.compile_program(
      function, specs, placement, free_layouts=free_layouts
    )
  cut = parse_log(compiler.compiler_log(folder))
  with jax.sharding.use_abstract_mesh(placement.mesh().abstract_mesh):
    operands = kernel_operands(function, specs, values or [None] * len(specs))
  total = estimate_module(
    compiled.text,
    _listings(folder),
    operands,
    cut=cut,
    places=placement.places(),
  )
  return Estimate(
    cycles=total.cycles,
    lower_bound=total.lower_bound,
    hbm_bytes=total.hbm_bytes,
    temp_bytes=compiled.temp_bytes,
    peak_bytes=compiled.peak_bytes,
    vmem=compiler.vmem(folder),
    compile_seconds=compiled.seconds,
    steps=tuple(total.steps),
    collectives=tuple(total.collectives),
    notes=tuple(total.notes),
    code=total.code,
  )


def _listings(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  found = find_listings(folder)
  if not found:
    raise ListingError(
      "this libtpu printed no bundle listings: either it was loaded before "
      "LIBTPU_INIT_ARGS was set, or its flags have changed, and "
      "pallas-gemma-bench does not know the new ones"
    )
  return found


@dataclasses.dataclass(frozen=True)
class StaticModel:
  """Cycles of the instructions that the compiler profiled, by three models.

  Attributes:
    compiler: its own static model, which unrolls every loop.
    model: this package's.
    model_as_compiled: this package's, with copies as the compiler's has them.
  """

  compiler: int
  model: int
  model_as_compiled: int


def static_model() -> StaticModel:
  """The compiler's own estimate of what this process compiled, beside ours.

  Wants a process started with `environment(folder, ask_compiler=True)`, after
  its compilation.
  """
  folder = compiler.output_folder()
  profiled = compiler.profiled_cycles(folder)
  listings = [
    parse_listing(path.read_text(errors="replace"), name)
    for name, path in _listings(folder).items()
    if name in profiled
  ]
  model, as_compiled = (
    sum(count_cycles(listing, chip=chip).total for listing in listings)
    for chip in (V5E, V5E_AS_COMPILED)
  )
  return StaticModel(
    compiler=sum(profiled[listing.name] for listing in listings),
    model=model,
    model_as_compiled=as_compiled,
  )
