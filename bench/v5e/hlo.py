"""Reads the text of an optimised, scheduled HLO module."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_DEFINITION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_METADATA = re.compile(r",? (?:metadata=\{[^}]*\}|channel_id=\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLS = re.compile(
  r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
  "send",
  "recv",
)
FREE_TARGETS = frozenset({"AllocateBuffer", "ConcatBitcast"})  # custom calls
FREE = frozenset(
  "parameter constant tuple get-tuple-element bitcast after-all partition-id "
  "replica-id opt-barrier optimization-barrier add-dependency".split()
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One HLO instruction.

  Attributes:
    name: unique within its module.
    opcode: such as `fusion`, `while`, `copy-start`.
    type: the text of its result's shape and layout.
    operands: names of the instructions it reads.
    text: its whole definition.
  """

  name: str
  opcode: str
  type: str
  operands: tuple[str, ...]
  text: str

  @property
  def target(self) -> str | None:
    """What a `custom-call` calls."""
    match = _TARGET.search(self.text)
    return match[1] if match else None

  @property
  def source(self) -> str:
    """The operation of the program that it is of, empty if it is not told."""
    match = _SOURCE.search(self.text)
    return match[1] if match else ""

  @property
  def is_free(self) -> bool:
    """Whether it takes no time: it names, allocates or views memory."""
    return self.opcode in FREE or self.target in FREE_TARGETS

  def called(self, role: str) -> str | None:
    """The computation that it calls as its `body`, its `condition`, ..."""
    match = re.search(rf"\b{role}=%?([\w.\-]+)", self.text)
    return match[1] if match else None

  @property
  def calls(self) -> list[str]:
    """Computations that it runs: the body of a loop, the branches of a case."""
    branches = _BRANCHES.search(self.text)
    if branches:
      return [name.strip(" %") for name in branches[1].split(",")]
    return _CALLS.findall(self.text)

  @property
  def arrays(self) -> list[Array]:
    """The arrays of its result."""
    return [Array(*match) for match in _ARRAY.findall(self.type)]


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a type: `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`."""

  dtype: str
  dims: str
  layout: str

  @property
  def size(self) -> int:
    """How many elements it has."""
    return math.prod(map(int, filter(None, self.dims.split(","))))

  @property
  def nbytes(self) -> int:
    """Its size in bytes, without padding."""
    bits = re.search(r"\d+", self.dtype)
    return self.size * (int(bits[0]) if bits else 8) // 8

  @property
  def in_hbm(self) -> bool:
    """Whether it lives in HBM, not in a memory of the core."""
    return "S(" not in self.layout


@dataclasses.dataclass(frozen=True)
class Module:
  """A program.

  Attributes:
    computations: the instructions of each computation, in the order in which
      they run.
    entry: name of the computation that runs first.
  """

  computations: Mapping[str, tuple[Instruction, ...]]
  entry: str

  @functools.cached_property
  def instructions(self) -> Mapping[str, Instruction]:
    """Every instruction by name."""
    return {i.name: i for body in self.computations.values() for i in body}

  @property
  def fuses_collectives(self) -> bool:
    """Whether products go on while collectives do, in one instruction."""
    return any(
      instruction.target == "AsyncCollectiveStart"
      for instruction in self.instructions.values()
    )

  def communicates(self, instruction: Instruction) -> bool:
    """Whether it is a fusion that does what a collective does, or begins one.

    Or waits for one that was begun so.
    """
    if instruction.opcode in ("async-done", "async-update"):
      begun = (self.instructions.get(name) for name in instruction.operands)
      return any(i is not None and self.communicates(i) for i in begun)
    return instruction.opcode in ("fusion", "async-start") and any(
      inner.opcode in COLLECTIVES
      for name in instruction.calls
      for inner in self.computations.get(name, ())
    )

  def trip_count(self, loop: Instruction) -> int | None:
    """How often a `while` runs, None if neither compiler nor text tells.

    The text tells of a loop that counts: its condition compares an element of
    the loop's tuple with a constant, its body adds a constant to it, and what
    it starts from is a constant.
    """
    if known := _TRIPS.search(loop.text):
      return int(known[1])
    condition, body = (
      self._root(loop.called(role)) for role in ("condition", "body")
    )
    if condition is None or body is None or body.opcode != "tuple":
      return None
    if condition.opcode != "compare" or "direction=LT" not in condition.text:
      return None
    count, end = condition.operands
    index = self._element(count)
    if index is None:
      return None
    initial = self.instructions[loop.operands[0]]
    addition = self._original(body.operands[index])
    if initial.opcode != "tuple" or addition.opcode != "add":
      return None
    before, step = addition.operands
    if self._element(before) != index:
      return None
    numbers = [
      self._constant(name) for name in (initial.operands[index], end, step)
    ]
    start, stop, by = numbers
    if start is None or stop is None or not by:
      return None
    return max(0, -((start - stop) // by))

  def _root(self, computation: str | None) -> Instruction | None:
    """What a computation results in."""
    body = self.computations.get(computation or "")
    return body[-1] if body else None

  def _original(self, name: str) -> Instruction:
    """An instruction, or that which it is a copy of."""
    instruction = self.instructions[name]
    if instruction.opcode in ("copy", "bitcast"):
      return self._original(instruction.operands[0])
    return instruction

  def _element(self, name: str) -> int | None:
    """Which element of a computation's tuple an instruction is."""
    instruction = self._original(name)
    match = re.search(r"get-tuple-element\(.*\), index=(\d+)", instruction.text)
    return int(match[1]) if match else None

  def _constant(self, name: str) -> int | None:
    """The integer that an instruction is."""
    instruction = self._original(name)
    match = re.search(r"\bconstant\((-?\d+)\)", instruction.text)
    return int(match[1]) if match else None

  def signature(self, instruction: Instruction) -> str:
    """What an instruction computes, whatever it and its operands are called.

    The compiler prints one listing for instructions that agree in it.
    """
    text = _METADATA.sub("", instruction.text)
    for operand in instruction.operands:
      known = self.instructions.get(operand)
      text = text.replace(f"%{operand}", known.type if known else "?", 1)
    names: dict[str, str] = {}
    parts = [text] + list(self._bodies(instruction))
    return _NAME.sub(
      lambda m: names.setdefault(m[1], f"#{len(names)}"), "\n".join(parts)
    )

  def _bodies(self, instruction: Instruction) -> Iterator[str]:
    for name in instruction.calls:
      for inner in _by_use(self.computations.get(name, ())):
        yield _METADATA.sub("", f"%{inner.name} = {inner.text}")
        yield from self._bodies(inner)


def _by_use(body: Sequence[Instruction]) -> list[Instruction]:
  """From the operands of the last, the root, on: of equal bodies, the same.

  As printed, what does not depend on each other stands in any order.
  """
  by_name = {instruction.name: instruction for instruction in body}
  found: dict[str, Instruction] = {}
  waiting = [(instruction, False) for instruction in body]
  while waiting:
    instruction, is_ready = waiting.pop()
    if instruction.name in found:
      continue
    if is_ready:
      found[instruction.name] = instruction
      continue
    waiting.append((instruction, True))
    operands = (by_name.get(name) for name in reversed(instruction.operands))
    waiting += [(operand, False) for operand in operands if operand]
  return list(found.values())


def parse(text: str) -> Module:
  """The module in an HLO text.

  Raises:
    ValueError: if it has no entry computation.
  """
  computations: dict[str, tuple[Instruction, ...]] = {}
  entry, name = "", ""
  body: list[Instruction] = []
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      name, body = head[2], []
      entry = name if head[1] else entry
    elif line.rstrip() == "}":
      computations[name] = tuple(body)
    elif definition := _DEFINITION.match(line):
      body.append(_instruction(*definition.groups()))
  if not entry:
    raise ValueError("HLO text without an entry computation")
  return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
  end = _balanced(text) if text.startswith("(") else text.find(" ")
  opcode = _OPCODE.match(text, end)
  if opcode is None:
    raise ValueError(f"HLO instruction {name} without an opcode: {text[:200]}")
  start = opcode.end() - 1
  inside = text[start : start + _balanced(text[start:])]
  return Instruction(
    name, opcode[1], text[:end], tuple(_NAME.findall(inside)), text
  )


def _balanced(text: str) -> int:
  """Length of the bracketed group that `text` starts with."""
  depth = 0
  for i, char in enumerate(text):
    depth += (char == "(") - (char == ")")
    if depth == 0:
      return i + 1
  return len(text)
