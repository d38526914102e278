"""Loads a program's overlays into the instruction memory.

A program that is longer than the instruction memory is cut into overlays
(overlays.py).  How fast and how far ahead a v5e loads them is not published.
The model:

- To load an overlay is a copy from HBM, with the latency of any other and all
  of HBM's bandwidth, unless another copy is under way.
- One is loaded ahead.  As the program enters an overlay, the loading of the
  next starts: of that which followed it the last time, or, the first time, of
  that which stands behind it.
- One that was not foreseen is loaded when it is entered.
- Nothing else is kept: a loop over several overlays loads them at every turn.

`CodeMemory` loads the overlays of one listing while it is executed; `Route`
adds up those that a whole program runs through.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

from .chip import Chip
from .copies import Copies

CODE = "hbm_to_code"  # the kind of copy


def load_cycles(overlay: range, chip: Chip) -> float:
  """Cycles that it takes to load an overlay, with HBM to itself."""
  return Loads(1, len(overlay) * chip.bundle_bytes).unhidden(chip)


@dataclasses.dataclass(frozen=True)
class Part:
  """The overlays that a listing lies in, as it starts to run.

  Attributes:
    overlays: in their order, counted from the listing's first bundle; the first
      may start before it, and the last end behind it.
    is_ahead: whether the second is there already.
  """

  overlays: tuple[range, ...]
  is_ahead: bool = False


class CodeMemory:
  """The overlay that runs and the one that is loaded ahead.

  Attributes:
    present: bundles of the overlay that runs.
    entered: the cycle in which it was entered.
    count: overlays that were loaded.
  """

  def __init__(self, part: Part, copies: Copies, chip: Chip):
    """The first of the overlays is loaded; they follow one another."""
    self._overlays, self._copies, self._chip = part.overlays, copies, chip
    self._starts = [overlay.start for overlay in part.overlays]
    self._followed: dict[int, int] = {}
    self._ahead: tuple[int, int] | None = None  # which, and when it is there
    self._current = 0
    self.present, self.entered = part.overlays[0], 0
    self.count = 0
    if part.is_ahead:
      self._ahead = 1, 0
      self.count += 1
      copies.bytes[CODE] += self._size(1)
    else:
      self._load_ahead(0)

  def enter(self, bundle: int, now: int) -> int:
    """Goes on at a bundle outside of `present`; returns when it can."""
    index = bisect.bisect_right(self._starts, bundle) - 1
    self._followed[self._current] = index
    if self._ahead is None or self._ahead[0] != index:
      self._ahead = index, self._load(index, now)
    now = max(now, self._ahead[1])
    self._current = index
    self.present, self.entered = self._overlays[index], now
    self._load_ahead(now)
    return now

  def _load_ahead(self, now: int) -> None:
    following = self._followed.get(self._current, self._current + 1)
    if following < len(self._overlays):
      self._ahead = following, self._load(following, now)

  def _load(self, index: int, now: int) -> int:
    self.count += 1
    return self._copies.issue(CODE, self._size(index), 0, None, now)

  def _size(self, index: int) -> int:
    return len(self._overlays[index]) * self._chip.bundle_bytes


@dataclasses.dataclass
class Loads:
  """What loading amounts to.

  Attributes:
    count: overlays that are loaded.
    nbytes: that they are.
    cycles: that the program waits for them.
  """

  count: int = 0
  nbytes: int = 0
  cycles: float = 0.0

  def add(self, other: Loads, times: int = 1) -> None:
    """Adds others, so many times."""
    self.count += times * other.count
    self.nbytes += times * other.nbytes
    self.cycles += times * other.cycles

  def unhidden(self, chip: Chip) -> float:
    """Cycles that it would wait if it did nothing else meanwhile."""
    transfer = self.nbytes / chip.hbm_bytes_per_cycle
    return self.count * chip.read_latency + transfer


@dataclasses.dataclass
class Stay:
  """A stretch of time in one overlay.

  Attributes:
    overlay: its bundles.
    cycles: how long.
    is_counted: whether the step into it is counted elsewhere: within an
      instruction, `CodeMemory` counts it.
  """

  overlay: range
  cycles: float
  is_counted: bool = False


@dataclasses.dataclass
class Route:
  """The overlays that a program, or a turn of a loop in it, runs through."""

  stays: list[Stay] = dataclasses.field(default_factory=list)

  def run(
    self, overlays: Sequence[range], cycles: float, in_last: float
  ) -> None:
    """An instruction is run.

    Args:
      overlays: that it lies in.
      cycles: that it takes.
      in_last: cycles since it entered the last of them.
    """
    if len(overlays) > 1:
      self._append(Stay(overlays[0], cycles - in_last))
      self._append(Stay(overlays[-1], in_last, is_counted=True))
    elif overlays:
      self._append(Stay(overlays[0], cycles))

  def extend(self, other: Route) -> None:
    """Goes on as another route does."""
    for stay in other.stays:
      self._append(dataclasses.replace(stay))

  def _append(self, stay: Stay) -> None:
    if self.stays and self.stays[-1].overlay == stay.overlay:
      self.stays[-1].cycles += stay.cycles
    else:
      self.stays.append(stay)

  def loads(self, chip: Chip, *, around: bool = False) -> Loads:
    """What its steps from overlay to overlay load, the first one not.

    Args:
      chip: whose bandwidth and latency to assume.
      around: whether it starts again where it ends, as a loop does; the step
        back is then among them.
    """
    found = Loads()
    for before, after in self._steps(around):
      if after.overlay == before.overlay or after.is_counted:
        continue
      nbytes = len(after.overlay) * chip.bundle_bytes
      waits = load_cycles(after.overlay, chip) - before.cycles
      found.add(Loads(1, nbytes, max(0.0, waits)))
    return found

  def since_entered(self, overlay: range) -> float:
    """Cycles since an overlay was entered, 0 if another one runs."""
    if not self.stays or self.stays[-1].overlay != overlay:
      return 0.0
    return self.stays[-1].cycles

  def _steps(self, around: bool) -> Iterator[tuple[Stay, Stay]]:
    yield from zip(self.stays, self.stays[1:], strict=False)
    if around and self.stays:
      yield self.stays[-1], self.stays[0]
