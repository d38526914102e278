"""The links between chips, and how long a collective takes on them.

Of a v5e: each chip has four links in its slice (ICI), two along each dimension
of a grid of at most 16 x 16; a dimension of 16 closes into a ring.  A link is
taken to carry 45 GB/s each way (jax-ml.github.io/scaling-book, "How to Think
About TPUs"; the 1,600 Gbit/s a chip of cloud.google.com/tpu/docs/v5e would be
50).  Between slices a chip has its part of the 6.4 Tbit/s that the same page
gives a pod of 256 for its network (DCN): 3.125 GB/s.

With w bytes a second that a chip can send to, and as many that it can receive
from, its group of n chips:

    all-gather of S bytes, its result            S (n - 1) / n / w
    reduce-scatter of S bytes, its operand       S (n - 1) / n / w
    all-reduce of S bytes                        twice that
    all-to-all of s bytes a chip                 s n / 8 / (w / 2)
    permute of s bytes a chip over h links       s h / 45 GB/s

where w is 45 GB/s for each direction of each ring that the group can be laid
in: two for a closed dimension or a path that goes round both, one along a line.
A group of several slices goes through DCN.  Latencies are left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

_LINK = 45e9  # bytes per second of one link, one way
_NETWORK = 3.125e9  # of a chip's share of the network between slices
_CLOSED = 16  # chips of a dimension that closes into a ring


class Place(NamedTuple):
  """Where a chip is: its slice, and its place in the slice's grid."""

  slice: int
  x: int
  y: int


@dataclasses.dataclass(frozen=True)
class Move:
  """What one run of a collective moves.

  Attributes:
    kind: its HLO opcode, without -start.
    nbytes: S or s of the formulas.
    group: the chips of one group, the first; for a permute, pairs of chips that
      send and receive.
  """

  kind: str
  nbytes: int
  group: Sequence[Place] | Sequence[tuple[Place, Place]]

  @property
  def is_between_slices(self) -> bool:
    """Whether it goes through DCN."""
    places = itertools.chain.from_iterable(
      [p] if isinstance(p, Place) else p for p in self.group
    )
    return len({place.slice for place in places}) > 1

  @property
  def seconds(self) -> float:
    """How long it takes if nothing else uses the links."""
    if self.kind == "collective-permute":
      return self._permute()
    places = [place for place in self.group if isinstance(place, Place)]
    n = len(places)
    if n < 2:
      return 0.0
    speed = _speed(places)
    if self.kind in ("all-to-all", "ragged-all-to-all"):
      return self.nbytes * n / 8 / (speed / 2)
    passes = 2 if self.kind == "all-reduce" else 1
    return passes * self.nbytes * (n - 1) / n / speed

  def _permute(self) -> float:
    pairs = [pair for pair in self.group if not isinstance(pair, Place)]
    if self.is_between_slices:
      return self.nbytes / _NETWORK
    hops = max((_hops(*pair) for pair in pairs), default=0)
    return self.nbytes * hops / _LINK


def _speed(places: Sequence[Place]) -> float:
  """Bytes a second that each chip of a group sends, and receives."""
  if len({place.slice for place in places}) > 1:
    return _NETWORK
  sizes = len({p.x for p in places}), len({p.y for p in places})
  closed = sum(size == _CLOSED for size in sizes)
  directions = 2 * closed if closed else 2 if min(sizes) > 1 else 1
  return directions * _LINK


def _hops(a: Place, b: Place) -> int:
  """Links between two chips of a slice, by the shortest way."""

  def along(distance: int) -> int:
    # The other way round is shorter in a ring alone: no other dimension is long
    # enough for that.
    return min(distance, _CLOSED - distance)

  return along(abs(a.x - b.x)) + along(abs(a.y - b.y))


# --- as HLO says it -----------------------------------------------------------

_MESH = re.compile(r"mesh\[([^\]]*)\] \{([^}]*)\}")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(
  r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{}]*)\}")


def first_group(text: str) -> list[int]:
  """The devices of an instruction's first group, by their number.

  Args:
    text: the instruction's definition.
  """
  if named := _MESH.search(text):
    sizes = {
      name.strip(" '"): int(size)
      for name, _, size in (p.partition("=") for p in named[1].split(","))
    }
    chosen = {name.strip(" '") for name in named[2].split(",")}
    ranges = [range(n if a in chosen else 1) for a, n in sizes.items()]
    return [
      _flat(at, tuple(sizes.values())) for at in itertools.product(*ranges)
    ]
  if iota := _IOTA.search(text):
    groups, shape = _numbers(iota[1]), _numbers(iota[2])
    order = _numbers(iota[3]) if iota[3] else list(range(len(shape)))
    moved = itertools.islice(
      itertools.product(*(range(shape[i]) for i in order)),
      math.prod(groups[1:]),
    )
    return [
      _flat([at[order.index(i)] for i in range(len(shape))], shape)
      for at in moved
    ]
  if listed := _LISTED.search(text):
    return _numbers(listed[1][1:].partition("}")[0])
  return []


def pairs_of(text: str) -> list[tuple[int, int]]:
  """The devices between which a permute moves."""
  found = _PAIRS.search(text)
  numbers = _numbers(re.sub(r"[{}]", "", found[1])) if found else []
  return list(zip(numbers[::2], numbers[1::2], strict=True))


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",") if number]


def _flat(at: Sequence[int], shape: Sequence[int]) -> int:
  index = 0
  for i, size in zip(at, shape, strict=True):
    index = index * size + i
  return index
