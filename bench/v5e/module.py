"""The time of a whole program: the sum over its HLO instructions.

    loops         their body times the trip count
    conditionals  the longest branch, and a note
    async copies  use the bandwidth that the instructions between their start
                  and their end leave, each turn of a loop among them; what is
                  left is waited for
    code          an overlay is loaded while the one before it runs
    collectives   apart, each with its time on the links and what covers it
    duplicates    instructions that compute the same are printed once; the
                  listing of one serves all

What cannot be decided is noted with its instruction, and the total is then a
lower bound.
"""

from __future__ import annotations

import copy
import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from . import hlo, listing, machine, ragged
from .chip import V5E, Chip
from .collectives import Collective, Links
from .copies import InFlight
from .links import Place
from .loading import Part
from .overlays import PROGRAM, WHOLE, Overlays, place
from .program_code import Code, CodeSum

Operands = Mapping[str, Mapping[int, np.ndarray]]
_CHEAP = (
  "iota",
  "copy",
  "broadcast",
)  # not printed where there is little to do


@dataclasses.dataclass(frozen=True)
class Step:
  """One HLO instruction's share of the time.

  Attributes:
    name: of the instruction.
    opcode: its HLO opcode.
    times: how often the program runs it.
    cycles: of one run.
    copy_stall: cycles of one run spent waiting for copies.
    unit_stall: cycles of one run spent waiting for matrix and transpose units.
    hbm_bytes: of one run.
  """

  name: str
  opcode: str
  times: int
  cycles: int
  copy_stall: int
  unit_stall: int
  hbm_bytes: int


@dataclasses.dataclass
class Total:
  """The time of a program, as it adds up.

  Attributes:
    cycles: in all, collectives left out.
    hbm_bytes: traffic in all.
    steps: its instructions, in the order in which they run.
    collectives: what was left out.
    notes: what could not be decided, and where.
    lower_bound: whether the truth may be more, because of one of the notes.
    code: what it takes to load its instructions, None if that is not known.
  """

  cycles: int = 0
  hbm_bytes: int = 0
  steps: list[Step] = dataclasses.field(default_factory=list)
  collectives: list[Collective] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)
  lower_bound: bool = False
  code: Code | None = None


def estimate_module(
  module_text: str,
  listings: Mapping[str, pathlib.Path],
  operands: Operands | None = None,
  chip: Chip = V5E,
  cut: Overlays | None = None,
  places: Sequence[Place] = (),
) -> Total:
  """The time of a compiled program, from what the compiler printed of it.

  Args:
    module_text: its optimised HLO.
    listings: the bundle listings that the compiler printed with it.
    operands: values of integer operands by kernel name and operand index.
    chip: what it runs on.
    cut: how it is cut into overlays; None if all of it is loaded already.
    places: of the chips that it runs on, in the order of the program's numbers.
  """
  return _Module(module_text, listings, operands or {}, chip, cut, places).run()


class _Module:
  def __init__(
    self,
    text: str,
    listings: Mapping[str, pathlib.Path],
    operands: Operands,
    chip: Chip,
    cut: Overlays | None,
    places: Sequence[Place],
  ):
    self._module = hlo.parse(text)
    self._listings, self._operands, self._chip = listings, operands, chip
    self._counted: dict[tuple[str, Part | None], machine.Cycles | None] = {}
    self._twins: dict[str, str] | None = None
    self._flight = InFlight()
    self._links = Links(self._module, places, chip)
    self._result = Total()
    lie: Mapping[str, range] = {}
    try:
      lie = {} if cut is None else self._places(cut)
    except listing.ListingError as error:
      # The compiler does not print each of the pieces into which it takes
      # products that it fuses with collectives.
      if not self._module.fuses_collectives:
        raise
      self._note(f"its code is taken as loaded: {error}")
      cut = None
    self._is_cut = cut is not None
    self._code = CodeSum(cut or WHOLE, lie, chip)

  def run(self) -> Total:
    cycles = self._walk(self._module.entry, 1)
    self._code.end()
    self._result.collectives = self._links.met
    between, result = self._code.between, self._result
    cycles += between.cycles
    result.cycles = round(cycles)
    result.hbm_bytes += between.nbytes
    result.notes = sorted(set(result.notes))
    if self._is_cut:
      result.code = self._code.total(cycles, result.hbm_bytes)
    return result

  def _places(self, cut: Overlays) -> Mapping[str, range]:
    """Where the instructions stand in a program that is cut so."""
    path = self._listings.get(PROGRAM)
    if path is None:
      raise listing.ListingError(f"no listing of the program, {PROGRAM}")
    text = path.read_text(errors="replace")
    return place(listing.parse_listing(text, PROGRAM), self._length, cut)

  def _length(self, name: str) -> int | None:
    """Bundles of an instruction, None if they were not printed."""
    printed = self._printed(name)
    if printed is None:
      return None
    return listing.count_bundles(
      self._listings[printed].read_text(errors="replace")
    )

  def _note(self, text: str, *, lower_bound: bool = True) -> None:
    self._result.notes.append(text)
    self._result.lower_bound |= lower_bound

  def _walk(self, computation: str, times: int) -> float:
    """Cycles of one run of a computation that runs `times` times in all."""
    return sum(
      self._step(instruction, times)
      for instruction in self._module.computations[computation]
    )

  def _step(self, instruction: hlo.Instruction, times: int) -> float:
    opcode = instruction.opcode
    base = re.sub(r"-(start|done|update)$", "", opcode)
    if base in hlo.COLLECTIVES or self._module.communicates(instruction):
      self._links.meet(instruction, times)
      return 0.0
    control: Mapping[str, Callable[..., float]] = {
      "while": self._loop,
      "conditional": self._conditional,
      "call": self._call,
    }
    if opcode in control:
      return control[opcode](instruction, times)
    if opcode.endswith("-start"):
      return self._start(instruction, times)
    if opcode.endswith("-done"):
      return self._done(instruction)
    return self._compute(instruction, times)

  # --- control flow -----------------------------------------------------------

  def _loop(self, instruction: hlo.Instruction, times: int) -> float:
    body = instruction.called("body")
    trips = self._module.trip_count(instruction)
    if trips is None:
      self._note(f"{instruction.name}: trip count unknown, counted once")
      trips = 1
    if body is None:
      return 0.0
    # What is under way from before the loop uses what its turns leave.
    outside, self._flight = self._flight, InFlight()
    moving, self._links.under_way = self._links.under_way, InFlight()
    with self._code.loop(instruction.name, trips, times):
      cycles = self._walk(body, times * trips)
    outside.pass_time(trips * self._flight.unused)
    moving.pass_time(trips * self._links.under_way.unused)
    self._flight, self._links.under_way = outside, moving
    return trips * cycles

  def _conditional(self, instruction: hlo.Instruction, times: int) -> float:
    before, flight, links = self._result, self._flight, self._links
    choices = []
    for branch in instruction.calls:
      self._result, self._flight = Total(), copy.deepcopy(flight)
      self._links = links.copy()
      with self._code.branch() as route:
        cycles = self._walk(branch, times)
      choices.append((cycles, self._result, self._flight, self._links, route))
    cycles, taken, self._flight, self._links, route = max(
      choices, key=lambda c: c[0]
    )
    self._code.follow(route)
    self._result = before
    before.steps += taken.steps
    before.hbm_bytes += taken.hbm_bytes
    before.notes += taken.notes
    before.lower_bound |= taken.lower_bound
    if len(choices) > 1:
      self._note(
        f"{instruction.name}: the longest branch is counted", lower_bound=False
      )
    return cycles

  def _call(self, instruction: hlo.Instruction, times: int) -> float:
    return sum(self._walk(name, times) for name in instruction.calls)

  # --- instructions -----------------------------------------------------------

  def _compute(self, instruction: hlo.Instruction, times: int) -> float:
    if_loaded = cycles = self._count(instruction)
    part = self._code.part(instruction.name)
    if len(part.overlays) > 1:
      cycles = self._count(instruction, part)
    if cycles is None or if_loaded is None:
      return 0.0
    self._code.run(instruction.name, times, cycles, if_loaded)
    step = Step(
      instruction.name,
      instruction.opcode,
      times,
      cycles.total,
      cycles.copy_stall,
      cycles.queue_stall + cycles.result_stall,
      cycles.hbm_bytes,
    )
    self._result.steps.append(step)
    self._result.hbm_bytes += times * step.hbm_bytes
    capacity = cycles.total * self._chip.hbm_bytes_per_cycle
    self._flight.pass_time(max(0.0, capacity - step.hbm_bytes))
    self._links.pass_time(self._chip.seconds(cycles.total))
    return cycles.total

  def _start(self, instruction: hlo.Instruction, times: int) -> float:
    if instruction.name in self._listings:
      return self._compute(instruction, times)
    # The result is (destination, source, context); both ends may be in HBM.
    arrays = instruction.arrays[:2]
    if not arrays:
      return 0.0
    moved = min(array.nbytes for array in arrays)
    traffic = moved * sum(array.in_hbm for array in arrays)
    self._result.hbm_bytes += times * traffic
    self._flight.remaining[instruction.name] = traffic
    return 0.0

  def _done(self, instruction: hlo.Instruction) -> float:
    lacking = sum(self._flight.finish(name) for name in instruction.operands)
    return lacking / self._chip.hbm_bytes_per_cycle

  # --- listings ---------------------------------------------------------------

  def _count(
    self, instruction: hlo.Instruction, part: Part | None = None
  ) -> machine.Cycles | None:
    """One run of an instruction, from its own listing or that of its twin."""
    name = instruction.name
    if name not in self._listings and instruction.is_free:
      return None
    printed = self._printed(name)
    if printed is None:
      # What a program does not call is done in its own few bundles.
      if not self._is_cut and instruction.opcode not in _CHEAP:
        what = instruction.target or instruction.opcode
        self._note(f"{name}: no listing for this {what}")
      return None
    key = printed, part
    if key not in self._counted:
      self._counted[key] = self._execute(printed, part)
    cycles = self._counted[key]
    for note in cycles.notes if cycles else ():
      self._note(f"{name}: {note}")
    return cycles

  def _execute(self, name: str, part: Part | None) -> machine.Cycles | None:
    text = self._listings[name].read_text(errors="replace")
    try:
      return machine.count_cycles(
        listing.parse_listing(text, name),
        self._kernel_operands(name),
        self._chip,
        part,
      )
    except machine.Undecidable as error:
      self._note(f"{name}: not counted, {error}")
      return None

  def _kernel_operands(self, name: str) -> Mapping[int, np.ndarray] | None:
    """Those of the kernel that an instruction is named for.

    Differentiation adds to the name: `jvp_rms_norm_fwd_.1`.
    """
    sizes = self._operands.get(ragged.TABLES)
    if sizes is not None and ragged.PRODUCT in name:
      text = self._module.instructions[name].text
      return ragged.operands_of(text, sizes[0])
    names = [kernel for kernel in self._operands if kernel in name]
    return self._operands[max(names, key=len)] if names else None

  def _printed(self, name: str) -> str | None:
    """The instruction whose listing is that of another: itself or its twin."""
    if name in self._listings:
      return name
    instruction = self._module.instructions.get(name)
    if instruction is None:
      return None
    if self._twins is None:
      self._twins = {
        self._module.signature(known): printed
        for printed in self._listings
        if (known := self._module.instructions.get(printed))
      }
    return self._twins.get(self._module.signature(instruction))
