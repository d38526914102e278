"""What a program's collectives move, how long that takes, and what covers it.

One that begins and ends in the same place of the schedule stops the core.  One
that begins earlier goes on behind what is computed until it is waited for,
several of them one after the other; of it, only what is left then is exposed.
The compiler writes the second as a pair, `-start` and `-done`, itself or around
a computation that has it, or as fusions with products: the first starts it,
each next one carries on with it, the last waits.  The time of such a product
cannot be told from that of the communication in its bundles, and is taken as
its FLOPs at the chip's peak.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Sequence

from . import hlo
from .chip import Chip
from .copies import InFlight
from .links import Move, Place, first_group, pairs_of

_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """Communication with other chips, which the total leaves out.

  Attributes:
    name: of its HLO instruction.
    opcode: of that.
    times: how often the program runs it.
    nbytes: of its arrays, on one chip.
    kind: what it does, as HLO names it: a fusion of an all-reduce with a slice
      is a reduce-scatter.
    source: of which operation of the program it is.
    seconds: of one run on the links alone.
    exposed: of these, seconds in which the core waits.
    between_slices: whether it goes through the data centre's network.
  """

  name: str
  opcode: str
  times: int
  nbytes: int
  kind: str = ""
  source: str = ""
  seconds: float = 0.0
  exposed: float = 0.0
  between_slices: bool = False


class Links:
  """The collectives of a program, met in the order in which they run.

  Attributes:
    met: those so far.
    under_way: seconds of links that each of those that have begun still takes.
  """

  def __init__(self, module: hlo.Module, places: Sequence[Place], chip: Chip):
    """None so far, of a program for chips at these places."""
    self._module, self._places, self._chip = module, places, chip
    # By channel or name, as each will be when all of it is exposed.
    self._begun: dict[str, Collective] = {}
    self.met: list[Collective] = []
    self.under_way = InFlight()

  def meet(self, instruction: hlo.Instruction, times: int) -> None:
    """Adds one."""
    inner = self._inner(instruction)
    if instruction.opcode != "fusion":
      self._meet_alone(instruction, times)
    elif self._has(instruction, "AsyncCollectiveStart"):
      self._begin(_channel(inner), self._collective(instruction, inner, times))
    elif self._has(instruction, "AsyncCollectiveDone"):
      self._end(_channel(inner))
    elif _channel(inner) in self._begun:
      self.pass_time(self._product_seconds(instruction))
    else:
      self.met.append(self._collective(instruction, inner, times))

  def pass_time(self, seconds: float) -> None:
    """Lets what is under way go on."""
    self.under_way.pass_time(seconds)

  def copy(self) -> Links:
    """The same, to go on with one branch of several."""
    twin = copy.copy(self)
    twin._begun, twin.met = dict(self._begun), list(self.met)
    twin.under_way = copy.deepcopy(self.under_way)
    return twin

  def _meet_alone(self, instruction: hlo.Instruction, times: int) -> None:
    found = self._collective(instruction, self._inner(instruction), times)
    if instruction.opcode.endswith("-start"):
      self._begin(instruction.name, found)
    elif instruction.opcode.endswith("-done"):
      for name in instruction.operands:
        self._end(name)
    elif not instruction.opcode.endswith("-update"):
      self.met.append(found)

  def _begin(self, key: str, collective: Collective) -> None:
    self._begun[key] = collective
    self.under_way.remaining[key] = collective.seconds

  def _end(self, key: str) -> None:
    if key in self._begun:
      exposed = self.under_way.finish(key)
      begun = self._begun.pop(key)
      self.met.append(dataclasses.replace(begun, exposed=exposed))

  def _collective(
    self, instruction: hlo.Instruction, inner: hlo.Instruction, times: int
  ) -> Collective:
    """All of it exposed."""
    move = self._move(instruction, inner)
    # What begins one also has its operand, and what says that it has ended.
    of = inner if instruction.opcode == "async-start" else instruction
    return Collective(
      instruction.name,
      instruction.opcode,
      times,
      sum(array.nbytes for array in of.arrays),
      move.kind,
      instruction.source or inner.source,
      move.seconds,
      exposed=move.seconds,
      between_slices=move.is_between_slices,
    )

  def _move(self, instruction: hlo.Instruction, inner: hlo.Instruction) -> Move:
    kind = re.sub(r"-start$", "", inner.opcode)
    sizes = [array.nbytes for array in inner.arrays] or [0]
    if inner.opcode.endswith("-start"):
      nbytes = max(sizes)  # operand and result
    else:
      nbytes = sum(sizes)
    if kind == "collective-permute":
      pairs = [(self._at(a), self._at(b)) for a, b in pairs_of(inner.text)]
      return Move(kind, nbytes, pairs)
    group = [self._at(i) for i in first_group(inner.text)] or self._places
    if kind == "reduce-scatter":
      nbytes *= len(group)
    is_slice = instruction is not inner and nbytes == len(group) * sum(
      array.nbytes for array in instruction.arrays
    )
    if kind == "all-reduce" and is_slice:
      kind = "reduce-scatter"
    return Move(kind, nbytes, group)

  def _at(self, device: int) -> Place:
    return self._places[device] if self._places else Place(0, 0, device)

  def _inner(self, instruction: hlo.Instruction) -> hlo.Instruction:
    """The collective that a computation does; itself if it calls none."""
    called = instruction.opcode in ("fusion", "async-start")
    for name in instruction.calls if called else ():
      for inner in self._module.computations.get(name, ()):
        if inner.opcode in hlo.COLLECTIVES:
          return inner
    return instruction

  def _has(self, instruction: hlo.Instruction, target: str) -> bool:
    return any(
      inner.target == target
      for name in instruction.calls
      for inner in self._module.computations.get(name, ())
    )

  def _product_seconds(self, instruction: hlo.Instruction) -> float:
    """Of the products in a fusion, at the chip's peak."""
    flops = sum(
      self._flops(inner)
      for name in instruction.calls
      for inner in self._module.computations.get(name, ())
      if inner.opcode in ("convolution", "dot")
    )
    return flops / self._chip.peak_flops

  def _flops(self, product: hlo.Instruction) -> float:
    # Of [M, K] x [K, N] the sizes of all three arrays multiply to (M K N)^2.
    arrays = [
      self._module.instructions[name].arrays for name in product.operands[:2]
    ]
    sizes = [a[0].size for a in [*arrays, product.arrays] if a]
    return 2 * math.sqrt(math.prod(sizes))


def _channel(inner: hlo.Instruction) -> str:
  found = _CHANNEL.search(inner.text)
  return f"channel {found[1]}" if found else inner.name
