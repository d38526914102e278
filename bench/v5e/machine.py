"""Counts the cycles of a listing by executing its scalar side.

A program's time is the bundles that it issues, one per cycle, and its stalls:

    delays   `vdelay n` is n idle cycles
    copies   `dma.done.wait` blocks until the bytes have arrived (copies.py)
    units    a bundle waits while the queue of a matrix or transpose unit is
             full, and for results that are not there yet (units.py)
    code     where the compiler has cut the program into overlays, the next has
             to be loaded before it runs (loading.py)

A branch takes effect four bundles after it was issued.
Stretches of bundles without branches and copies are looked at once
(stretches.py).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping

import numpy as np

from .chip import V5E, Chip
from .copies import Copies
from .listing import Instruction, Listing, ListingError, branch_target
from .loading import CodeMemory, Part
from .scalar import Scalars, signed
from .stretches import Bundle, Stretch, ends_of_stretches, runs_of_idle
from .units import (
  Units,
  Work,
  popped,
  results_of_transpositions,
  work,
)

BRANCH_DELAY = 4
GRANULE_BYTES = 32  # unit of the listing's `size_in_granules`
_MAX_BUNDLES = 400_000_000
_SHORTEST_STRETCH = 32  # bundles; to look a stretch up has its own cost


class Undecidable(Exception):
  """Control flow that depends on a value which is not known."""


@dataclasses.dataclass(frozen=True)
class Cycles:
  """What one run of a program costs.

  Attributes:
    total: cycles.
    bundles: issued bundles, delays included.
    copy_stall: cycles in which it waited for copies.
    queue_stall: cycles in which it waited for room in a unit's queue.
    result_stall: cycles in which it waited for a unit's result.
    copied: bytes by kind of copy.
    visits: how often each bundle was issued.
    loads: overlays that were loaded.
    in_last_overlay: cycles since the overlay in which it ends was entered.
    notes: what the model did not know; the total may then be too low.
  """

  total: int
  bundles: int
  copy_stall: int
  queue_stall: int
  result_stall: int
  copied: Mapping[str, int]
  visits: tuple[int, ...] = dataclasses.field(repr=False)
  loads: int
  in_last_overlay: int
  notes: tuple[str, ...]

  @property
  def hbm_bytes(self) -> int:
    """Bytes that crossed the HBM interface."""
    return sum(
      size
      for kind, size in self.copied.items()
      if "hbm" in kind or kind == "general"
    )


def count_cycles(
  listing: Listing,
  operands: Mapping[int, np.ndarray] | None = None,
  chip: Chip = V5E,
  part: Part | None = None,
) -> Cycles:
  """Executes a listing.

  Args:
    listing: the program.
    operands: values of its integer operands, by index, where they are known.
    chip: whose bandwidth and latencies to assume.
    part: the overlays that it lies in; None if all of it is loaded already.

  Raises:
    Undecidable: if a branch depends on a value that is not known.
  """
  return _Machine(listing, operands, chip, part).run()


class _Machine:
  def __init__(
    self,
    listing: Listing,
    operands: Mapping[int, np.ndarray] | None,
    chip: Chip,
    part: Part | None,
  ):
    self._scalars = Scalars(operands)
    self._copies = Copies(chip)
    self._units = Units()
    self._regions = listing.regions
    self._now = 0
    self._branch: int | None = None  # where the bundle that issues jumps to
    self._transposed = results_of_transpositions(
      i.opcode for bundle in listing.bundles for i in bundle
    )
    self._code = [self._bundle(bundle) for bundle in listing.bundles]
    part = part or Part((range(len(self._code)),))
    self._memory = CodeMemory(part, self._copies, chip)
    cuts = {overlay.start for overlay in part.overlays}
    self._idle_ahead = runs_of_idle(self._code, cuts)
    self._ends = ends_of_stretches(self._code, cuts)
    self._stretches: dict[int, Stretch] = {}

  def run(self) -> Cycles:
    pc = bundles = 0
    entered = [0] * (len(self._code) + 1)  # of runs: +1 at the start, -1 after
    countdown, target, jumped = 0, 0, False
    while pc < len(self._code):
      if pc not in self._memory.present:
        self._now = self._memory.enter(pc, self._now)
      step = self._idle_ahead[pc]
      if not countdown and self._ends[pc] - pc >= _SHORTEST_STRETCH:
        step = self._ends[pc] - pc
        self._run_stretch(pc)
      elif step:
        step = min(step, countdown) if countdown else step
        self._now += step
      else:
        step = 1
        self._issue(self._code[pc], jumped)
        self._now += 1
      jumped = False
      entered[pc] += 1
      entered[pc + step] -= 1
      bundles += step
      pc += step
      if countdown:
        countdown -= step
        if not countdown:
          pc, jumped = target, True
      if self._branch is not None:
        countdown, target, self._branch = BRANCH_DELAY, self._branch, None
      if bundles > _MAX_BUNDLES:
        raise Undecidable(f"more than {_MAX_BUNDLES:,} bundles")
    notes = set(self._scalars.unknown)
    if self._copies.unmatched:
      notes.add("waits without a copy")
    return Cycles(
      total=self._now,
      bundles=bundles,
      copy_stall=self._copies.stall,
      queue_stall=self._units.queue_stall,
      result_stall=self._units.result_stall,
      copied=dict(self._copies.bytes),
      visits=tuple(itertools.accumulate(entered[:-1])),
      loads=self._memory.count,
      in_last_overlay=self._now - self._memory.entered,
      notes=tuple(sorted(notes)),
    )

  def _issue(self, bundle: Bundle, jumped: bool) -> None:
    if bundle.phis:
      self._scalars.assign_phis(bundle.phis, jumped)
    for step in bundle.steps:
      step()

  def _run_stretch(self, pc: int) -> None:
    """The bundles from one on to the end of its stretch."""
    stretch = self._stretches.get(pc)
    if stretch is None:
      stretch = Stretch.of(self._code[pc : self._ends[pc]])
      self._stretches[pc] = stretch
    for step in stretch.scalar:
      step()
    units, start = self._units, self._now
    before = units.state(start)
    known = stretch.seen.get(before)
    if known is None:
      queue_stall, result_stall = units.queue_stall, units.result_stall
      for gap, step in stretch.timed:
        self._now += gap
        step()
      self._now += stretch.rest
      stretch.seen[before] = (
        self._now - start,
        units.queue_stall - queue_stall,
        units.result_stall - result_stall,
        units.state(self._now),
      )
    else:
      cycles, queue_stall, result_stall, after = known
      self._now += cycles
      units.queue_stall += queue_stall
      units.result_stall += result_stall
      units.restore(after, self._now)

  # --- what a bundle has to execute, found once -------------------------------

  def _bundle(self, instructions: tuple[Instruction, ...]) -> Bundle:
    phis = [i for i in instructions if i.opcode in ("sphi", "pphi")]
    steps, scalar, timed = [], [], []
    is_plain = not phis
    for i in instructions:
      if i in phis:
        continue
      if step := self._timed(i):
        timed.append(step)
        is_plain &= i.predicate is None
      elif step := self._ordered(i):
        is_plain = False
      elif step := self._scalar(i):
        scalar.append(step)
      if step:
        steps.append(step)
    return Bundle(phis, steps, scalar, timed, is_plain)

  def _timed(self, instruction: Instruction) -> Callable[[], None] | None:
    """What takes time by itself, whatever the scalars are."""
    opcode = instruction.opcode
    if opcode == "vdelay":
      return functools.partial(self._delay, int(instruction.operands[0]))
    if results := popped(opcode):
      return functools.partial(self._pop, results)
    if task := work(opcode, self._transposed):
      return functools.partial(self._work, instruction, task)
    return None

  def _ordered(self, instruction: Instruction) -> Callable[[], None] | None:
    """What depends on the scalars and on the time: branches and copies."""
    opcode = instruction.opcode
    if opcode == "sbr.rel":
      target = self._target(instruction)
      return functools.partial(self._jump, instruction, target)
    if opcode == "dma.done.wait":
      return functools.partial(self._wait, instruction)
    if opcode.startswith("dma."):
      return functools.partial(self._copy, instruction)
    if opcode in ("vsyncadd", "vsyncpa"):
      return functools.partial(self._synchronise, instruction)
    return None

  def _scalar(self, instruction: Instruction) -> Callable[[], None] | None:
    """What changes the scalars alone."""
    opcode, dest = instruction.opcode, instruction.dest
    if opcode.startswith("v"):
      if dest and dest.startswith(("%s", "%p")):
        return functools.partial(self._scalars.forget, dest)
      return None
    if opcode in ("sfence", "shalt.err"):
      return None
    return functools.partial(self._scalars.execute, instruction)

  def _target(self, branch: Instruction) -> int:
    region = branch_target(branch)
    if region is None or region not in self._regions:
      raise ListingError(f"a branch to no known region: {branch}")
    return self._regions[region]

  def _delay(self, cycles: int) -> None:
    self._now += cycles

  def _work(self, instruction: Instruction, task: Work) -> None:
    if self._scalars.holds(instruction) is not False:
      self._now = self._units.issue(task, self._now)

  def _pop(self, results: str) -> None:
    self._now = self._units.pop(results, self._now)

  def _jump(self, instruction: Instruction, target: int) -> None:
    taken = self._scalars.holds(instruction)
    if taken is None:
      unknown = ", ".join(sorted(self._scalars.unknown))
      raise Undecidable(
        f"a branch depends on {instruction.predicate}, which is not known"
        + (f"; nor is: {unknown}" if unknown else "")
      )
    if taken:
      self._branch = target

  def _copy(self, instruction: Instruction) -> None:
    scalars, keywords = self._scalars, instruction.keywords
    holds = scalars.holds(instruction)
    kind = instruction.opcode.removeprefix("dma.")
    if holds is None:
      scalars.unknown.add(f"whether a {kind} copy happens")
    if not holds:
      return
    granules = scalars.value(keywords["size_in_granules"])
    if granules is None:
      scalars.unknown.add(f"the size of a {kind} copy")
      return
    if kind.endswith("_to_smem"):
      source = keywords.get("hbm", keywords.get("vmem", ""))
      words = granules * GRANULE_BYTES // 4
      scalars.load_smem(
        scalars.value(source), scalars.value(keywords["smem"]), words
      )
    flag = keywords.get("dst_syncflagno")
    self._copies.issue(
      kind,
      granules * GRANULE_BYTES,
      granules,
      scalars.value(flag) if flag else None,
      self._now,
    )

  def _synchronise(self, instruction: Instruction) -> None:
    """`vsyncadd` adds to a flag, `vsyncpa` sets it."""
    if not self._scalars.holds(instruction):
      return
    address, amount = map(self._scalars.value, instruction.operands[:2])
    if amount is None:
      self._scalars.unknown.add("what is added to a flag")
      return
    flag = self._copies.flag(address)
    if instruction.opcode == "vsyncadd":
      flag.add(signed(amount))
    else:
      flag.set(amount)

  def _wait(self, instruction: Instruction) -> None:
    if not self._scalars.holds(instruction):
      return
    flag, granules = (self._scalars.value(x) for x in instruction.operands[:2])
    if granules is None:
      self._scalars.unknown.add("the size of a wait")
      return
    self._now = self._copies.wait(flag, granules, self._now)
