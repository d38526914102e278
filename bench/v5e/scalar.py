"""Executes the scalar instructions of a listing: control flow and addresses.

Vector values are never computed.  A register whose value is not known holds
None, and everything computed from it is None too.

Addresses are opaque: every allocation and operand lies in a range of its own
that no integer of the program reaches, so that offsets can be added to it,
shifted and compared.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .listing import Instruction

Value = int | bool | None

_WORD = 0xFFFFFFFF
_RANGE = 1 << 60
_LOWEST_POINTER = _RANGE >> 8

_INDEX = re.compile(r"index: (\d+)")
_ADDRESS = re.compile(r"\[\w+:\[(?P<address>.*?)\]\]\s*(?P<rest>.*)$")
_CONDITIONAL_MOVE = re.compile(r"^\((!?)(%\w+), (.*)\)$")

_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
  "eq": operator.eq,
  "ne": operator.ne,
  "lt": operator.lt,
  "le": operator.le,
  "gt": operator.gt,
  "ge": operator.ge,
}
_LOGIC: Mapping[str, Callable[..., bool]] = {
  "por": lambda a, b: bool(a or b),
  "pand": lambda a, b: bool(a and b),
  "pnand": lambda a, b: not (a and b),
  "pnor": lambda a, b: not (a or b),
  "pxor": lambda a, b: bool(a) != bool(b),
  "pneg": lambda a: not a,
}


def signed(x: int) -> int:
  """A 32-bit word as a signed number; addresses stay as they are."""
  return x - (1 << 32) if x < _LOWEST_POINTER and x & 0x80000000 else x


def _is_pointer(x: int) -> bool:
  return x >= _LOWEST_POINTER


def _arithmetic(name: str, kind: str, a: int, b: int) -> Value:
  """Two operands, 32 bits, or a pointer and an offset; None if unknown."""
  pointer = _is_pointer(a) or _is_pointer(b)
  mask = -1 if pointer else _WORD
  match name:
    case "sadd":
      return (signed(a) + signed(b)) if pointer else (a + b) & _WORD
    case "ssub":
      return (a - b) & mask
    case "smul":
      return (a * b) & _WORD
    case "smulhi":  # the upper word: division by a constant
      if kind == "u32":
        return (a * b) >> 32
      return ((signed(a) * signed(b)) >> 32) & _WORD
    case "sand":
      return a & b
    case "sor":
      return a | b
    case "sxor":
      return a ^ b
    case "sshll":
      return (a << b) & mask
    case "sshrl":
      return a >> b
    case "sshra":
      return (signed(a) >> b) & mask
    case "smin" | "smax":
      pick = min if name == "smin" else max
      if kind == "u32":
        return pick(a, b)
      return pick(signed(a), signed(b)) & mask
    case "sc":  # the carry of an addition
      return a + b > _WORD
  return None


class Scalars:
  """Registers and SMEM.

  Args:
    operands: values of integer operands, by index; they enter SMEM by a copy,
      or are passed by value.

  Attributes:
    unknown: opcodes met that are not modelled, and what else stayed unknown.
  """

  def __init__(self, operands: Mapping[int, np.ndarray] | None = None):
    """Nothing known but integer operands, by their index."""
    self._operands = dict(operands or {})
    self._registers: dict[str, Value] = {}
    self._smem: dict[int, Value] = {}
    self._bases: dict[str, int] = {}
    self._quotients: dict[str, list[int | None]] = {}
    self.unknown: set[str] = set()

  # --- values -----------------------------------------------------------------

  def _base(self, name: str) -> int:
    return self._bases.setdefault(name, _RANGE * (len(self._bases) + 1))

  def value(self, token: str) -> Value:
    """Value of a register, number or `[#allocation + offset]`."""
    if token.startswith("%"):
      return self._registers.get(token.partition(" ")[0])
    if token.startswith("["):
      return self.address(token.strip("[]"))
    try:
      return int(token.lstrip("$"), 0)
    except ValueError:
      return None

  def address(self, text: str) -> int | None:
    """Sum of `#allocation + %register + $0x8`, in words of its memory."""
    total = 0
    for part in text.partition(" sm:")[0].split(" + "):
      part = part.strip()
      value = self._base(part) if part[0] == "#" else self.value(part)
      if value is None:
        return None
      total += value
    return total

  def holds(self, instruction: Instruction) -> bool | None:
    """Whether an instruction's predicate lets it execute."""
    if instruction.predicate is None:
      return True
    register, wanted = instruction.predicate
    value = self._registers.get(register)
    return None if value is None else bool(value) == wanted

  def forget(self, register: str) -> None:
    """Notes that a register holds a value that the model does not know."""
    self._registers[register] = None

  def assign_phis(
    self, phis: list[Instruction], arrived_by_branch: bool
  ) -> None:
    """Loop variables take their first value, or that of the last round."""
    which = 1 if arrived_by_branch else 0
    new = [(phi.dest, self.value(phi.operands[which])) for phi in phis]
    self._registers.update((dest, value) for dest, value in new if dest)

  # --- execution --------------------------------------------------------------

  def execute(self, instruction: Instruction) -> None:
    """Runs one scalar instruction."""
    opcode, dest = instruction.opcode, instruction.dest
    name, _, kind = opcode.partition(".")
    match name:
      case "smov" | "pmov":
        self._move(instruction)
        return
      case "sld" | "sst":
        self._memory(instruction)
        return
      case "sdivrem":
        self._divide(instruction)
        return
    holds = self.holds(instruction)
    if holds is False:
      return
    if dest is not None:
      value = self._evaluate(instruction, name, kind)
      self._registers[dest] = value if holds else None
    elif name not in ("shalt", "sfence", "compiler", "reloc", "inlined_call"):
      self.unknown.add(opcode)

  def _evaluate(self, instruction: Instruction, name: str, kind: str) -> Value:
    operands = instruction.operands
    if name in ("inlined_call_operand", "scalar_parameter_address") or (
      name.startswith("scalar_parameter")
    ):
      return self._operand(instruction)
    if name == "int_to_ptr":
      return self.value(operands[-1].split()[-1])
    if name == "scalar_select":
      chosen = self.value(instruction.keywords["predicate"])
      if chosen is None:
        return None
      return self.value(
        instruction.keywords["on_true" if chosen else "on_false"]
      )
    if name == "spop":
      waiting = self._quotients.get(operands[0])
      return waiting.pop(0) if waiting else None
    values = [self.value(operand) for operand in operands]
    if None in values:
      return None
    if name == "scalar_lea":
      return sum(int(value or 0) for value in values[:2])
    if name in _LOGIC:
      return _LOGIC[name](*values)
    if name == "scmp":
      comparison, _, rest = kind.partition(".")
      a, b = (int(v or 0) for v in values)
      if rest.startswith("s32"):
        a, b = signed(a), signed(b)
      return _COMPARE[comparison](a, b)
    if len(values) == 2:
      a, b = (int(v or 0) for v in values)
      result = _arithmetic(name, kind, a, b)
      if result is not None:
        return result
    self.unknown.add(instruction.opcode)
    return None

  def _operand(self, instruction: Instruction) -> Value:
    text = " ".join(instruction.operands + tuple(instruction.keywords))
    match = _INDEX.search(text)
    if match is None:
      return self._base(f"{instruction.dest}")
    index = int(match[1])
    by_value = "no memory space" in instruction.opcode + text
    if by_value and index in self._operands:
      return int(np.asarray(self._operands[index]).item())
    return self._base(f"operand{index}")

  def _move(self, instruction: Instruction) -> None:
    """`smov a`, or `smov (%p, a), b`: b where the predicate holds, else a."""
    dest, operands = instruction.dest or "", instruction.operands
    conditional = _CONDITIONAL_MOVE.match(operands[0])
    if conditional:
      negated, register, other = conditional.groups()
      p = self._registers.get(register)
      if p is None:
        self._registers[dest] = None
        return
      chosen = bool(p) != (negated == "!")
      self._registers[dest] = self.value(operands[1] if chosen else other)
      return
    holds = self.holds(instruction)
    if holds is not False:
      self._registers[dest] = self.value(operands[0]) if holds else None

  def _memory(self, instruction: Instruction) -> None:
    where = _ADDRESS.match(instruction.operands[0])
    address = self.address(where["address"]) if where else None
    if instruction.opcode.startswith("sld"):
      if instruction.dest is not None:
        known = None if address is None else self._smem.get(address)
        self._registers[instruction.dest] = known
      return
    rest = where["rest"] if where else ""
    predicated = re.match(r"\((!?)(%\w+)\),?\s*", rest)
    if predicated:
      holds = self._registers.get(predicated[2])
      if holds is None or bool(holds) == (predicated[1] == "!"):
        return
    source = instruction.operands[1:] or (
      rest[predicated.end() if predicated else 0 :],
    )
    if address is not None:
      self._smem[address] = self.value(source[-1])

  def _divide(self, instruction: Instruction) -> None:
    values = [self.value(operand) for operand in instruction.operands]
    a, b = (None if v is None else int(v) for v in values)
    results: list[int | None] = [None, None]
    if a is not None and b:
      results = [*divmod(a, b)]
    self._quotients[instruction.dest or ""] = results

  # --- copies into SMEM -------------------------------------------------------

  def load_smem(self, source: Value, target: Value, words: int) -> None:
    """Copies an operand into SMEM, as the chip lays it out.

    What is not known of it stays unknown there.  One dimension is tiles of 128
    words whose narrow types pack tile rows; more are rows padded to 128
    words whose narrow types pack array rows.
    """
    if target is None:
      self.unknown.add("where a copy to SMEM goes")
      return
    contents = self._words(source)
    self._smem.update(
      (int(target) + i, contents[i] if i < len(contents) else None)
      for i in range(words)
    )

  def _words(self, source: Value) -> list[int]:
    """An operand's words from an address on, none where it is not known."""
    for index, array in self._operands.items():
      base = self._bases.get(f"operand{index}")
      if source is None or base is None:
        continue
      # Copies address HBM in units of 1/16 of a word of 512 bytes.
      offset = int(source) - (base << 4)
      if source == base or 0 <= offset < array.size:
        return _layout(array) if offset <= 0 else []
    return []


def _layout(array: np.ndarray) -> list[int]:
  """An integer array's words in SMEM."""
  pack, bits = 4 // array.dtype.itemsize, 8 * array.dtype.itemsize
  flat = np.arange(array.size)
  if array.ndim <= 1:
    word, lane = flat // (128 * pack) * 128 + flat % 128, flat // 128 % pack
  else:
    row, column = np.divmod(flat, array.shape[-1])
    width = -(-array.shape[-1] // 128) * 128
    word, lane = row // pack * width + column, row % pack
  fields = array.reshape(-1).astype(np.int64) & ((1 << bits) - 1)
  words = np.zeros(int(word.max(initial=-1)) + 1, np.int64)
  np.bitwise_or.at(words, word, fields << (bits * lane))
  return words.tolist()
