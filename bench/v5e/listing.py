"""Reads the TPU compiler's bundle listings.

The compiler prints the final VLIW program of every HLO instruction and of
every Pallas kernel: one line per bundle, whose slots are separated by `;;`:

    0x6 LB: > { %s22 = sadd.s32 1, %s43  ;;  %v9 = vld [vmem:[%s8]] } /* ... */

One bundle issues per cycle.  Comments mark where regions start; branches name
regions.  A `(%p1)` or `(!%p1)` before the operands predicates an instruction.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from importlib import metadata

# The oldest and the newest compiler whose listings are known to be read.  From
# one to the other opcodes got other names (`smov`, then `smov.u32`), and loops
# another schedule.
KNOWN_LIBTPU = ("0.0.42.1", "0.0.52")


class ListingError(ValueError):
  """A listing that does not look as this module expects."""

  def __str__(self) -> str:
    """The problem, and the compiler that it may be a problem of."""
    try:
      found = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
      found = "none"
    oldest, newest = KNOWN_LIBTPU
    return (
      f"{super().__str__()} (found libtpu {found}; its listings are known from "
      f"{oldest} to {newest})"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
  """One slot of a bundle.

  Attributes:
    opcode: such as `sadd.s32`, `dma.hbm_to_vmem`, `vmatmul.bf16.gmra.mxu0`.
    dest: the register it writes, None for none.
    predicate: (register, wanted value) under which it executes, None always.
    operands: the rest, split at its top-level commas, keywords left out.
    keywords: operands that the listing names, as in `/*hbm=*/%s9`.
  """

  opcode: str
  dest: str | None
  predicate: tuple[str, bool] | None
  operands: tuple[str, ...]
  keywords: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Listing:
  """The program of one HLO instruction.

  Attributes:
    name: of the HLO instruction.
    bundles: the instructions of each bundle, in the order of issue.
    regions: index of each region's first bundle.
    texts: each bundle as it was printed, for people.
  """

  name: str
  bundles: tuple[tuple[Instruction, ...], ...]
  regions: Mapping[int, int]
  texts: tuple[str, ...]


_BUNDLE = re.compile(
  r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:[\s>]*\{", re.MULTILINE
)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_TARGET = re.compile(r"target = \$region(\d+)")
_KEYWORD = re.compile(r"/\*(\w+)=\*/")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_INSTRUCTION = re.compile(
  r"(?:(?P<dest>%\w+) = )?(?P<opcode>[a-z_][\w.\-]*)\s*"
  r"(?:\[thread:\S+\]\s*)?"
  r"(?:\((?P<negated>!?)(?P<predicate>%\w+)\),?\s*)?"
  r"(?P<rest>.*)$"
)
_FILE = re.compile(
  r"\d+-(?P<name>.*?)-\d+-(?P<analysis>schedule-analysis_)?final_bundles\.txt$"
)


def find_listings(directory: pathlib.Path) -> dict[str, pathlib.Path]:
  """The listing of every HLO instruction that the compiler printed there."""
  found: dict[str, pathlib.Path] = {}
  for path in sorted(directory.glob("*-final_bundles.txt")):
    match = _FILE.match(path.name)
    if match and not match["analysis"]:
      found.setdefault(match["name"], path)
  return found


def parse_listing(text: str, name: str = "listing") -> Listing:
  """The program in a listing's text.

  An empty region that stands behind all others has no bundle with whose comment
  it could start: it is that of the last bundle, as the compiler's log has it.

  Raises:
    ListingError: if no bundle, or a slot that is not an instruction, is found.
  """
  heads = list(_BUNDLE.finditer(text))
  if not heads:
    raise ListingError(
      f"{name}: no bundles found; this libtpu prints a format that "
      "pallas-gemma-bench does not know"
    )
  ends = [head.start() for head in heads[1:]] + [len(text)]
  bundles: list[tuple[Instruction, ...]] = []
  texts: list[str] = []
  regions: dict[int, int] = {}
  for head, end in zip(heads, ends, strict=True):
    body = text[head.end() : end]
    for region in _REGION.findall(body):
      regions.setdefault(int(region), len(bundles))
    bundles.append(_bundle(body, name))
    texts.append(text[head.start() : end].rstrip())
  if regions:
    for target in _TARGET.findall(text):
      regions.setdefault(int(target), len(bundles) - 1)
  return Listing(name, tuple(bundles), regions, tuple(texts))


def count_bundles(text: str) -> int:
  """How many bundles a listing's text has, without reading them."""
  return sum(1 for _ in _BUNDLE.finditer(text))


def branch_target(instruction: Instruction) -> int | None:
  """The region to which an instruction branches, None if it is no branch.

  Raises:
    ListingError: if it branches to anything else.
  """
  if instruction.opcode != "sbr.rel":
    return None
  region = instruction.keywords.get("target", "").removeprefix("$region")
  if not region.isdigit():
    raise ListingError(f"a branch to no region: {instruction}")
  return int(region)


def _bundle(body: str, name: str) -> tuple[Instruction, ...]:
  plain = _COMMENT.sub(" ", _KEYWORD.sub(r" \1=", body))
  plain, brace, _ = plain.rpartition("}")
  if not brace:
    raise ListingError(f"{name}: a bundle without its closing brace: {body!r}")
  slots = (" ".join(slot.split()) for slot in plain.split(";;"))
  return tuple(_instruction(slot, name) for slot in slots if slot)


def _instruction(text: str, name: str) -> Instruction:
  match = _INSTRUCTION.match(text)
  if match is None:
    raise ListingError(f"{name}: not an instruction: {text!r}")
  register = match["predicate"]
  operands, keywords = [], {}
  for part in _split(match["rest"]):
    key, equals, value = part.partition("=")
    if equals and key.strip().isidentifier():
      keywords[key.strip()] = value.strip()
    else:
      operands.append(part)
  return Instruction(
    match["opcode"],
    match["dest"],
    (register, match["negated"] != "!") if register else None,
    tuple(operands),
    keywords,
  )


def _split(text: str) -> list[str]:
  """`text` split at the commas outside its brackets."""
  if "," not in text:
    return [text] if text else []
  parts, depth, start = [], 0, 0
  for i, char in enumerate(text):
    if char in "([":
      depth += 1
    elif char in ")]":
      depth -= 1
    elif char == "," and depth == 0:
      parts.append(text[start:i].strip())
      start = i + 1
  parts.append(text[start:].strip())
  return [part for part in parts if part]
