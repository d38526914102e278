"""Copies between memories, and the flags that tell of their end."""

from __future__ import annotations

import collections
import dataclasses

from .chip import Chip

Flag = int | bool | None  # the flag's address, None where that is not known


class _SyncFlag:
  """A counter that copies raise as they end, and programs read and set."""

  def __init__(self) -> None:
    self._value = 0
    self._coming: collections.deque[tuple[int, int]] = collections.deque()

  def set(self, value: int) -> None:
    """Gives it a value."""
    self._value = value

  def add(self, amount: int) -> None:
    """Adds to its value, at once."""
    self._value += amount

  def expect(self, when: int, amount: int) -> None:
    """Adds to its value, once a copy has ended."""
    self._coming.append((when, amount))

  def reach(self, value: int, now: int) -> int | None:
    """When it reaches a value, None if no copy will raise it so far."""
    ready = now
    while self._value < value:
      if not self._coming:
        return None
      when, amount = self._coming.popleft()
      ready = max(ready, when)
      self._value += amount
    return ready


class Copies:
  """Copies between memories, and the flags that tell of their end.

  Those that touch HBM share one channel and go in the order of their issue.

  Attributes:
    bytes: moved so far, by kind, such as `hbm_to_vmem`.
    stall: cycles that waits have cost.
    unmatched: waits for which no copy was issued.
  """

  def __init__(self, chip: Chip):
    """None under way, to and from a chip's memory."""
    self._chip = chip
    self._hbm_free = 0.0
    self._flags: dict[Flag, _SyncFlag] = collections.defaultdict(_SyncFlag)
    self.bytes: collections.Counter[str] = collections.Counter()
    self.stall = 0
    self.unmatched = 0

  def flag(self, address: Flag) -> _SyncFlag:
    """The flag at an address."""
    return self._flags[address]

  def issue(
    self, kind: str, size: int, granules: int, flag: Flag, now: int
  ) -> int:
    """Starts a copy of `size` bytes that adds `granules` to a flag.

    Returns:
      When it ends.
    """
    self.bytes[kind] += size
    chip = self._chip
    reads = kind.startswith("hbm")
    latency = chip.read_latency if reads else chip.write_latency
    start = max(now + latency, self._hbm_free)
    end = start + size / chip.hbm_bytes_per_cycle
    if chip.shared_channel and ("hbm" in kind or kind == "general"):
      self._hbm_free = end
    if flag is not None:
      self._flags[flag].expect(int(end) + 1, granules)
    return int(end) + 1

  def wait(self, flag: Flag, granules: int, now: int) -> int:
    """Blocks until a flag has reached `granules`; returns the time."""
    ready = self._flags[flag].reach(granules, now)
    if ready is None:
      self.unmatched += 1
      # The wait is over one day: what it waits for is taken as arrived.
      self._flags[flag].set(granules)
      ready = now
    self.stall += ready - now
    return ready


@dataclasses.dataclass
class InFlight:
  """Copies that instructions of a program start and later ones wait for.

  Attributes:
    remaining: bytes that each has still to move, the oldest first.
    unused: bytes that could have been moved, but nothing was left to move.
  """

  remaining: dict[str, float] = dataclasses.field(default_factory=dict)
  unused: float = 0.0

  def pass_time(self, spare_bytes: float) -> None:
    """Moves that many bytes, oldest copy first."""
    for name, left in list(self.remaining.items()):
      moved = min(left, spare_bytes)
      spare_bytes -= moved
      self.remaining[name] = left - moved
    self.unused += spare_bytes

  def finish(self, name: str) -> float:
    """Takes a copy and those before it off; returns the bytes they lacked."""
    if name not in self.remaining:
      return 0.0
    lacking = 0.0
    for earlier in list(self.remaining):
      lacking += self.remaining.pop(earlier)
      if earlier == name:
        break
    return lacking
