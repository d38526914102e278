"""What a program's own instructions take to load, as it is added up.

    cycles        of the estimate: each overlay is loaded while the one before
                  it runs, and waited for as far as that does not last
    best_cycles   if all of it were hidden: HBM has to move the code besides the
                  data, so that the program takes at least
                  (bytes of data + bytes of code) / bandwidth
    worst_cycles  if nothing were hidden: bytes of code / bandwidth, and the
                  latency of a read for each overlay

The first overlay is loaded with the program and is not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from .chip import Chip
from .loading import CODE, Loads, Part, Route, load_cycles
from .machine import Cycles
from .overlays import Overlays


@dataclasses.dataclass(frozen=True)
class CodeLoop:
  """A loop that loads code at every turn.

  Attributes:
    name: of the HLO instruction that it is, or that it is in.
    bundles: of the loop.
    overlays: that they lie in.
    turns: in one run of the program.
    bytes_a_turn: of the overlays.
  """

  name: str
  bundles: int
  overlays: int
  turns: int
  bytes_a_turn: int


@dataclasses.dataclass(frozen=True)
class Code:
  """A program's instructions, and what it takes to load them.

  Attributes:
    bundles: of the program.
    overlays: that they are cut into.
    loaded_bytes: of one run, the first overlay left out.
    cycles: of the estimate that it waits for them.
    best_cycles: that loading costs if all of it is hidden.
    worst_cycles: that it costs if nothing is.
    loops: those that load code at every turn.
  """

  bundles: int
  overlays: int
  loaded_bytes: int
  cycles: int
  best_cycles: int
  worst_cycles: int
  loops: tuple[CodeLoop, ...]

  @classmethod
  def from_json(cls, fields: Mapping[str, Any]) -> Code:
    """From the fields, as `dataclasses.asdict` and JSON leave them."""
    loops = tuple(CodeLoop(**loop) for loop in fields["loops"])
    return cls(**{**fields, "loops": loops})


class CodeSum:
  """The loads of a program, while its instructions are gone through.

  Attributes:
    between: loads between the program's instructions, so far.
    within: loads within them.
  """

  def __init__(self, cut: Overlays, places: Mapping[str, range], chip: Chip):
    """Nothing has run yet.

    Args:
      cut: of the program.
      places: of its HLO instructions.
      chip: whose bandwidth and latency to assume.
    """
    self._cut, self._places, self._chip = cut, places, chip
    self._route = Route()
    self._loops: list[CodeLoop] = []
    self.between, self.within = Loads(), Loads()

  def part(self, name: str) -> Part:
    """What of the program an instruction lies in, as it starts to run."""
    place = self._places.get(name, range(0))
    overlays = self._cut.over(place)
    is_ahead = len(overlays) > 1 and (
      self._route.since_entered(overlays[0])
      >= load_cycles(overlays[1], self._chip)
    )
    shifted = (
      range(overlay.start - place.start, overlay.stop - place.start)
      for overlay in overlays
    )
    return Part(tuple(shifted), is_ahead)

  def run(
    self, name: str, times: int, cycles: Cycles, if_loaded: Cycles
  ) -> None:
    """An instruction is run, so many times in all.

    Args:
      name: of the instruction.
      times: how often.
      cycles: of a run.
      if_loaded: the same, if all of its code were loaded already.
    """
    place = self._places.get(name)
    if place is None:
      return
    overlays = self._cut.over(place)
    self._route.run(overlays, cycles.total, cycles.in_last_overlay)
    if len(overlays) > 1:
      nbytes, waits = cycles.copied[CODE], cycles.total - if_loaded.total
      self.within.add(Loads(cycles.loads, nbytes, waits), times)
      self._add_loops(name, place, times, cycles)

  def _add_loops(
    self, name: str, place: range, times: int, cycles: Cycles
  ) -> None:
    for loop in self._cut.loops:
      inside = loop.bundles.start >= place.start
      if loop.is_reloaded and inside and loop.bundles.stop <= place.stop:
        turns = times * cycles.visits[loop.bundles.start - place.start]
        self._add_loop(name, len(loop.bundles), loop.overlays, turns)

  def _add_loop(
    self, name: str, bundles: int, overlays: tuple[range, ...], turns: int
  ) -> None:
    nbytes = sum(map(len, overlays)) * self._chip.bundle_bytes
    self._loops.append(CodeLoop(name, bundles, len(overlays), turns, nbytes))

  @contextlib.contextmanager
  def loop(self, name: str, turns: int, times: int) -> Iterator[None]:
    """What runs meanwhile is one turn of a loop that runs `times` times."""
    outside, self._route = self._route, Route()
    yield
    turn, self._route = self._route, outside
    again = turn.loads(self._chip, around=True)
    self.between.add(again, times * (turns - 1))
    outside.extend(turn)
    if again.nbytes:
      self._add_loop(name, *self._around(turn), times * turns)

  def _around(self, turn: Route) -> tuple[int, tuple[range, ...]]:
    """Bundles and overlays of the loop whose turn runs through overlays.

    It is the smallest of the program that does; or, if these are of functions,
    all that it calls.
    """
    overlays = {stay.overlay: None for stay in turn.stays}
    around = [
      loop for loop in self._cut.loops if set(overlays) <= set(loop.overlays)
    ]
    if around:
      loop = min(around, key=lambda loop: len(loop.bundles))
      return len(loop.bundles), loop.overlays
    return sum(map(len, overlays)), tuple(overlays)

  @contextlib.contextmanager
  def branch(self) -> Iterator[Route]:
    """What runs meanwhile may not be what the program does.

    Yields:
      The route of it, to `follow` if it is.
    """
    outside, self._route = self._route, Route()
    yield self._route
    self._route = outside

  def follow(self, route: Route) -> None:
    """The program does what ran within `branch`."""
    self._route.extend(route)

  def end(self) -> None:
    """The program has ended."""
    self.between.add(self._route.loads(self._chip))
    self._route = Route()

  def total(self, cycles: float, hbm_bytes: float) -> Code:
    """What loading costs.

    Args:
      cycles: of the program, with what it waits for code.
      hbm_bytes: that it moves, code among it.
    """
    loads = Loads()
    loads.add(self.between)
    loads.add(self.within)
    per_cycle = self._chip.hbm_bytes_per_cycle
    if_loaded = cycles - loads.cycles
    return Code(
      bundles=self._cut.bundles,
      overlays=len(self._cut.overlays),
      loaded_bytes=loads.nbytes,
      cycles=round(loads.cycles),
      best_cycles=round(max(0.0, hbm_bytes / per_cycle - if_loaded)),
      worst_cycles=round(loads.unhidden(self._chip)),
      loops=tuple(self._loops),
    )
