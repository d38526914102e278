"""Queues of work beside the bundles: the matrix and transpose units.

A unit works through what it is given in order.  A bundle that gives it more
than its queue holds waits; so does a `vpop` of a result that is not there yet.
How long units take is read off the critical paths that the compiler's own
static model prints.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

_UNIT = re.compile(r"\.((?:mxu|xlu)\d+)")
_QUEUE_CYCLES = 32  # work that a unit accepts ahead of time
_MATMUL_LATENCY = 125  # to the first 8 rows of a product
_LANES_LATENCY = {"xlu2": 92}  # to the result of a reduction or rotation
_OTHER_LANES_LATENCY = 115
_TRANSPOSE_LATENCY = {8: 44, 16: 58}  # from the last operand to 8 rows
_ROWS = 8  # rows of a register, at one of which per cycle units work


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
  """What an instruction gives a unit to do.

  Attributes:
    pipe: the part of the unit that does it.
    cycles: that it occupies it.
    results: the queue that its results go to.
    ready: when each result is there, in cycles from the start.
  """

  pipe: str
  cycles: int
  results: str = ""
  ready: tuple[int, ...] = ()


def work(opcode: str, transposed: Mapping[str, int]) -> Work | None:
  """What an opcode gives a matrix or transpose unit to do, None for nothing.

  A packed bfloat16 operand is 16 rows of 128 and takes a cycle for each; a
  float32 register, or half of a packed one (`lmr`), is 8.  One of int8 is 32
  rows, two a cycle.

  Args:
    opcode: of the instruction.
    transposed: results of one transposition, by unit.
  """
  match = _UNIT.search(opcode)
  if match is None or opcode.startswith("vpop"):
    return None
  unit = match[1]
  if opcode.startswith("vmatmul"):
    if ".s8." in opcode:
      ready = tuple(_MATMUL_LATENCY + _ROWS * i for i in range(4))
      return Work(unit, 2 * _ROWS, f"mrf.{unit}", ready)
    halves = 2 if "bf16" in opcode and ".lmr." not in opcode else 1
    ready = tuple(_MATMUL_LATENCY + _ROWS * i for i in range(halves))
    return Work(unit, _ROWS * halves, f"mrf.{unit}", ready)
  if opcode.startswith("vmatpush"):
    if ".s8." in opcode:
      return Work(f"{unit}.push", 32 if "xpose" in opcode else 8)
    if "xpose" in opcode:
      return Work(f"{unit}.push", 8)
    return Work(f"{unit}.push", 4 if "bf16" in opcode else 2)
  if opcode.startswith("vxpose"):
    cycles = 16 if "b16" in opcode else 8
    first = _TRANSPOSE_LATENCY[cycles]
    count = transposed.get(unit, 1) if opcode.endswith(".end") else 0
    ready = tuple(first + _ROWS * i for i in range(count))
    return Work(unit, cycles, f"trf.{unit}", ready)
  if ".xlane" in opcode or opcode.startswith(("vrot", "vperm")):
    kind = "xlane" if ".xlane" in opcode else "permute"
    latency = _LANES_LATENCY.get(unit, _OTHER_LANES_LATENCY)
    return Work(unit, _ROWS, f"{kind}.{unit}", (latency,))
  return None


def popped(opcode: str) -> str | None:
  """The queue of results that a `vpop` takes from, None for another opcode."""
  if not opcode.startswith("vpop."):
    return None
  match = re.search(r"(mrf|trf|xlane|permute)\.((?:mxu|xlu)\d+)$", opcode)
  return match[0] if match else None


def results_of_transpositions(opcodes: Iterable[str]) -> dict[str, int]:
  """How many results one transposition has, by unit.

  They are queued while the next transposition is under way, and a listing does
  not tell which is whose: but every result is popped once, so there are as many
  as it has pops for each end.
  """
  pops: collections.Counter[str] = collections.Counter()
  ends: collections.Counter[str] = collections.Counter()
  for opcode in opcodes:
    unit = _UNIT.search(opcode)
    if unit and opcode.startswith("vpop.trf"):
      pops[unit[1]] += 1
    elif unit and opcode.startswith("vxpose") and opcode.endswith(".end"):
      ends[unit[1]] += 1
  return {unit: max(1, pops[unit] // ends[unit]) for unit in ends}


State = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]


class Units:
  """Matrix and transpose units.

  Attributes:
    queue_stall: cycles in which a bundle waited for room in a queue.
    result_stall: cycles in which it waited for a result.
  """

  def __init__(self) -> None:
    """All of them idle."""
    self.queue_stall = 0
    self.result_stall = 0
    self._free: dict[str, int] = collections.defaultdict(int)
    self._results: dict[str, collections.deque[int]] = collections.defaultdict(
      lambda: collections.deque(maxlen=4096)
    )

  def state(self, now: int) -> State:
    """What the time of later work depends on, seen from `now`.

    What is free or ready already might as well have become so just now.
    """
    return (
      tuple(max(0, free - now) for free in self._free.values()),
      tuple(
        tuple(max(0, ready - now) for ready in waiting)
        for waiting in self._results.values()
      ),
    )

  def restore(self, state: State, now: int) -> None:
    """Puts the units into a state that they had been in before."""
    free, results = state
    for pipe, cycles in zip(self._free, free, strict=True):
      self._free[pipe] = now + cycles
    for waiting, ready in zip(self._results.values(), results, strict=True):
      waiting.clear()
      waiting.extend(now + cycles for cycles in ready)

  def issue(self, task: Work, now: int) -> int:
    """Gives a unit work; returns when the bundle that does so can issue."""
    free = self._free[task.pipe]
    wait = max(0, free - now - _QUEUE_CYCLES)
    self.queue_stall += wait
    now += wait
    start = max(free, now)
    self._free[task.pipe] = start + task.cycles
    self._results[task.results].extend(start + r for r in task.ready)
    return now

  def pop(self, results: str, now: int) -> int:
    """Takes a result; returns when it is there."""
    waiting = self._results[results]
    ready = max(waiting.popleft(), now) if waiting else now
    self.result_stall += ready - now
    return ready
