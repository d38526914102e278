"""Queues of work beside the bundles: the matrix units and the copies."""

from __future__ import annotations

import collections
import re

from ._chip import Chip

Flag = int | bool | None  # its address, None where that is not known

_UNIT = re.compile(r"\.(mxu|xlu)(\d+)")
_QUEUE_CYCLES = 32  # work that a matrix unit accepts ahead of time


def unit_of(opcode: str) -> str | None:
  """Name of the matrix or transpose unit that an opcode addresses."""
  match = _UNIT.search(opcode)
  return match[1] + match[2] if match else None


def matmul_cycles(opcode: str) -> int:
  """Cycles that a `vmatmul` or `vmatpush` occupies its matrix unit, 0 for none.

  A packed bfloat16 operand is 16 rows of 128 and takes a cycle for each; a
  float32 register, or half of a packed one (`lmr`), is 8.
  """
  if opcode.startswith("vmatmul"):
    return 16 if "bf16" in opcode and ".lmr." not in opcode else 8
  return 0


class MatrixUnits:
  """Matrix units: each works through what it was given, in order."""

  def __init__(self) -> None:
    self.stall = 0
    self._free: dict[str, int] = collections.defaultdict(int)

  def issue(self, unit: str, cycles: int, now: int) -> int:
    """Gives a unit work; returns when the bundle that does so can issue."""
    wait = max(0, self._free[unit] - now - _QUEUE_CYCLES)
    self.stall += wait
    start = now + wait
    self._free[unit] = max(self._free[unit], start) + cycles
    return start


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
  ) -> None:
    """Starts a copy of `size` bytes that adds `granules` to a flag."""
    self.bytes[kind] += size
    start = max(now + self._chip.dma_latency, self._hbm_free)
    end = start + size / self._chip.hbm_bytes_per_cycle
    if "hbm" in kind or kind == "general":
      self._hbm_free = end
    if flag is not None:
      self._flags[flag].expect(int(end) + 1, granules)

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
