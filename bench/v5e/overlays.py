"""How the compiler cuts a program to fit the instruction memory.

A v5e runs its program from a memory of some 65,000 bundles.  A longer one is
cut into *overlays*, of which a third of the memory is the regular size.  A loop
within one overlay is loaded once; the code of a loop over several is loaded
again at every turn.

The cut is in the compiler's log, if the compiler is asked for it.  This module
reads that log:

    OverlayPartitioner::Run for program with control flow:
    ControlFlow (85011 bundles):
       165 : [branch from 84886]
       213 : branch to 84875 (cond)
     84886 : branch to 165 (cond)
    Initial partitions:
    (more of the kind, and how they are merged)
    Partitions:
    OverlayPartitioner (regular/jumbo/hlo overlay size 21744/65232/48928, ...):
    OverlayPartition 35: [0, 165):165, kind=0, fallthrough, cond branch ...

Bundles are counted over the whole program.  Its HLO instructions stand in it
one behind the other, in place of a call; or they are functions behind it, each
in an overlay of its own (`Call entry [1464, 1634)`, and `378 : branch to 1464
(uncond)` where it is called).  `place` finds out where each one is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from .listing import Listing, ListingError, branch_target

MODULE = "overlay_partitioner"  # of the compiler, as its log names it
PROGRAM = "TLP"  # the listing of what calls all instructions
BRANCH_LENGTH = 5  # bundles: the branch and those that run before it is taken

_LINE = re.compile(rf"{MODULE}\.cc:\d+\] (.*)")
_BUNDLES = re.compile(r"ControlFlow \((\d+) bundles\)")
_BRANCH = re.compile(r"branch to (\d+)")
_POINT = re.compile(r"\s*(\d+) : ")
_OVERLAY = re.compile(r"OverlayPartition \d+: \[(\d+), (\d+)\)")
_FUNCTION = re.compile(r"Call entry \[(\d+), (\d+)\)")
_CALL = re.compile(
  r"= (?:inlined_)?call [^/]*/\* (?:%([\w.\-]+) = |(<[\w\-]+>))"
)


@dataclasses.dataclass(frozen=True)
class Loop:
  """Bundles that a branch leads back over.

  Attributes:
    bundles: from where the branch leads to, to its end.
    overlays: that they lie in.
  """

  bundles: range
  overlays: tuple[range, ...]

  @property
  def is_reloaded(self) -> bool:
    """Whether a turn loads code."""
    return len(self.overlays) > 1


@dataclasses.dataclass(frozen=True)
class Overlays:
  """The cut of a program.

  Attributes:
    overlays: bundles of each, in their order.
    branches: the bundle of each branch, and that which it leads to.
    functions: bundles of the HLO instructions that are functions.
  """

  overlays: tuple[range, ...]
  branches: frozenset[tuple[int, int]]
  functions: frozenset[range] = frozenset()

  @property
  def bundles(self) -> int:
    """Of the whole program."""
    return self.overlays[-1].stop

  @property
  def loops(self) -> tuple[Loop, ...]:
    """Every loop of the program."""
    found = []
    for source, target in sorted(self.branches):
      if target <= source:
        bundles = range(target, min(source + BRANCH_LENGTH, self.bundles))
        found.append(Loop(bundles, self.over(bundles)))
    return tuple(found)

  def over(self, bundles: range) -> tuple[range, ...]:
    """The overlays in which bundles lie."""
    return tuple(
      overlay
      for overlay in self.overlays
      if overlay.start < bundles.stop and overlay.stop > bundles.start
    )


WHOLE = Overlays((range(0),), frozenset())  # of a program of no bundles


def parse_log(text: str) -> Overlays:
  """The cut of the one program whose compilation is logged.

  Raises:
    ListingError: if the log has none, or several, or is of another form.
  """
  lines = _LINE.findall(text)
  programs = [i for i, line in enumerate(lines) if "::Run for program" in line]
  if len(programs) != 1:
    raise ListingError(
      f"the compiler's log says of {len(programs)} programs, wanted one, how "
      "they are cut into overlays: either it was not asked to, or its log has "
      "a format that pallas-gemma-bench does not know"
    )
  (start,) = programs
  flow = lines[start:]
  try:
    first, last = flow.index("Initial partitions:"), flow.index("Partitions:")
  except ValueError:
    raise _unknown("no partitions") from None
  bundles = _BUNDLES.match(flow[1])
  overlays = sorted(_ranges(_OVERLAY, flow[last:]), key=lambda o: o.start)
  ends = [0, *(overlay.stop for overlay in overlays)]
  if bundles is None or ends[-1] != int(bundles[1]):
    raise _unknown(f"overlays end at {ends[-1]}, after {flow[1]!r}")
  if [overlay.start for overlay in overlays] != ends[:-1]:
    raise _unknown("overlays with gaps between them")
  points = [line for line in flow[2:first] if not _FUNCTION.match(line)]
  functions = _ranges(_FUNCTION, flow[2:first])
  return Overlays(
    tuple(overlays), frozenset(_branches(points)), frozenset(functions)
  )


def _ranges(pattern: re.Pattern[str], lines: Sequence[str]) -> list[range]:
  found = filter(None, map(pattern.match, lines))
  return [range(int(match[1]), int(match[2])) for match in found]


def _branches(lines: Sequence[str]) -> list[tuple[int, int]]:
  found = []
  for line in lines:
    point = _POINT.match(line)
    if point is None:
      raise _unknown(f"wanted a point of the control flow, got {line!r}")
    found += [(int(point[1]), int(b)) for b in _BRANCH.findall(line)]
  return found


def _unknown(what: str) -> ListingError:
  return ListingError(
    f"the compiler's log of overlays has a format that pallas-gemma-bench does "
    f"not know: {what}"
  )


def place(
  program: Listing, lengths: Callable[[str], int | None], cut: Overlays
) -> Mapping[str, range]:
  """Where each HLO instruction stands in its program.

  The compiler prints a listing of its own, `TLP`, for what is left of a program
  without its instructions: loops, conditions, copies between memories, and a
  bundle `call ... /* %NAME = ... */` for each instruction.  If the log has a
  branch to a function there, that is the instruction; if not, its bundles stand
  in place of that one.

  Args:
    program: the listing `TLP`.
    lengths: bundles of an HLO instruction by its name, None if it was not
      printed.
    cut: of the same program.

  Raises:
    ListingError: if listings and log do not agree.
  """
  functions = {function.start: function for function in cut.functions}
  called = {
    source: functions[target]
    for source, target in cut.branches
    if target in functions
  }
  places: dict[str, range] = {}
  starts: list[int] = []
  position = 0
  for text in program.texts:
    starts.append(position)
    call = _CALL.search(text)
    if call is None:
      position += 1
      continue
    name = call[1] or call[2]
    length = lengths(name)
    if length is None:
      raise ListingError(f"{name}: called, but no listing of it was printed")
    function = called.get(position)
    if function is None:
      places[name] = range(position, position + length)
      position += length
    elif length == len(function):
      places[name] = function
      position += 1
    else:
      raise ListingError(
        f"{name}: {length} bundles, but {len(function)} by the compiler's log"
      )
  _check_branches(program, starts, cut)
  return places


def _check_branches(
  program: Listing, starts: Sequence[int], cut: Overlays
) -> None:
  """Raises if the branches of `TLP` are not those of the log.

  Args:
    program: the listing `TLP`.
    starts: where each of its bundles stands in the program.
    cut: of the program.
  """
  for start, bundle in zip(starts, program.bundles, strict=True):
    for instruction in bundle:
      region = branch_target(instruction)
      if region is None:
        continue
      branch = start, starts[program.regions[region]]
      if branch not in cut.branches:
        raise ListingError(
          f"a branch from bundle {branch[0]} to {branch[1]} of the program is "
          "not in the compiler's log: its instructions stand elsewhere"
        )
