"""Every stretch of 50 characters in a text, by its hash, a block at a time.

White space counts as one space, if that is wanted, so that a copy is one
however it is indented, wrapped, or its lines end.  Stretches do not reach from
one span into the next.
A stretch of 50 characters can be found in two ways:

    by `short`   the hashes of the 11 stretches of 40 characters in it; asking
                 an inexact table for all of them makes it exact enough
    by `long`    its own hash
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from .spans import Spans
from .texts import Texts

LONG = 50
SHORT = 40  # = 32 + 8

_BLOCK = 1 << 18  # bytes
# Read past a block, for stretches that begin in it: 50 characters of 4 bytes
# and some white space.  One with more white space at such a border is missed.
_PAST = 4096

_BASE = 0x9E3779B97F4A7C15 | 1
_MIX = np.uint64(0xD6E8FEB86659FD93)


@dataclasses.dataclass(frozen=True)
class Block:
  """The characters of a part of a text.

  Attributes:
    codes: uint64 [n], code points.
    start: int64 [n], the first byte of each.
    end: int64 [n], the byte after it, or after the first of white space.
    apart: bool [n], where another span begins.
    stop: stretches that begin at this byte or later are of the next block.
    line_ends: int64, the byte after each newline.
  """

  codes: np.ndarray
  start: np.ndarray
  end: np.ndarray
  apart: np.ndarray
  stop: int
  line_ends: np.ndarray

  @functools.cached_property
  def _powers(self) -> dict[int, np.ndarray]:
    """Hashes of the stretches of 1, 2, 4, ... 32 characters from each on."""
    hashes = {1: self.codes + np.uint64(1)}
    for size in (1, 2, 4, 8, 16):
      half = hashes[size]
      first, second = half[: max(len(half) - size, 0)], half[size:]
      hashes[2 * size] = first * _power(size) + second
    return hashes

  @functools.cached_property
  def _hash_short(self) -> np.ndarray:
    count = max(len(self.codes) - SHORT + 1, 0)
    long, rest = self._powers[32], self._powers[8]
    return long[:count] * _power(8) + rest[32:][:count]

  @property
  def short(self) -> np.ndarray:
    """uint64 [n - 39], the hash of the stretch from each character on."""
    return mixed(self._hash_short)

  @property
  def long(self) -> np.ndarray:
    """uint64 [n - 49], likewise."""
    count = max(len(self.codes) - LONG + 1, 0)
    hashes = self._hash_short[:count] * _power(8) + self._powers[8][40:][:count]
    return mixed(hashes * _power(2) + self._powers[2][48:][:count])

  def whole(self, size: int) -> np.ndarray:
    """bool [n - size + 1]: the stretch is of one span and of this block."""
    count = max(len(self.codes) - size + 1, 0)
    begun = np.cumsum(self.apart, dtype=np.int32)
    same = begun[size - 1 :][:count] == begun[:count]
    return same & (self.start[:count] < self.stop)


def mixed(hashes: np.ndarray) -> np.ndarray:
  """Hashes of which each bit depends on every character."""
  hashes = (hashes ^ (hashes >> np.uint64(31))) * _MIX
  return hashes ^ (hashes >> np.uint64(29))


@functools.cache
def _power(exponent: int) -> np.uint64:
  return np.uint64(pow(_BASE, exponent, 1 << 64))


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one block is to be read from.

  Attributes:
    spans: those that have a part in it, in the order of the bytes.
    begin: the first byte.
    stop: the byte after its last.
  """

  spans: Spans
  begin: int
  stop: int

  @property
  def size(self) -> int:
    """Bytes."""
    return self.stop - self.begin


def plans(spans: Spans) -> Iterator[Plan]:
  """The blocks that hold all spans."""
  if not len(spans):
    return
  spans = spans[np.argsort(spans.start, kind="stable")]
  for begin in range(int(spans.start[0]), int(spans.end[-1]), _BLOCK):
    stop = min(begin + _BLOCK, int(spans.end[-1]))
    first = int(np.searchsorted(spans.end, begin, "right"))
    last = int(np.searchsorted(spans.start, stop, "left"))
    if first < last:
      yield Plan(spans[np.arange(first, last)], begin, stop)


def read_block(texts: Texts, plan: Plan, collapse: bool = True) -> Block:
  """Reads the characters of a block, and some past it.

  Args:
    texts: where to read.
    plan: what to read.
    collapse: white space is one space.  Otherwise every character counts, and
      only those near a run of white space are there: elsewhere both agree.
  """
  spans = plan.spans
  end = min(int(spans.end[-1]), plan.stop + _PAST)
  text = texts.content.read(plan.begin, end)
  # A character that the border cuts belongs to the block before it.
  head = 0
  while head < len(text) and text[head] & 0xC0 == 0x80:
    head += 1
  codes, places = _characters(text[head:], plan.begin + head)
  # In characters, as are all indices from here on.
  first, last = (
    np.searchsorted(places, x).clip(0, len(codes))
    for x in (spans.start, spans.end)
  )
  change = np.zeros(len(codes) + 1, np.int8)
  np.add.at(change, first, 1)
  np.add.at(change, last, -1)
  inside = np.cumsum(change[:-1], dtype=np.int8) > 0
  apart = np.zeros(len(codes), bool)
  apart[first[first < last]] = True
  # Of a run of white space, its first character stays, as a space.
  space = _is_space(codes)
  if collapse:
    stays = ~space | apart
    stays[1:] |= ~space[:-1]
    kept = np.flatnonzero(inside & stays)
    found = np.where(space[kept], np.uint64(32), codes[kept])
  else:
    kept = np.flatnonzero(inside & _near_runs(space))
    found = codes[kept].astype(np.uint64)
    apart[kept[1:][np.diff(kept) > 1]] = True
  return Block(
    found,
    places[kept],
    places[kept + 1],
    apart[kept],
    plan.stop,
    places[np.flatnonzero((codes == 10) & inside) + 1],
  )


def _characters(text: bytes, begin: int) -> tuple[np.ndarray, np.ndarray]:
  """The code points of a text [n], and their first bytes and its end [n + 1].

  A character that is cut off at the end is left out.
  """
  if text.isascii():
    codes = np.frombuffer(text, np.uint8)
    return codes, np.arange(begin, begin + len(codes) + 1)
  decoded = text.decode(errors="ignore")
  codes = np.frombuffer(decoded.encode("utf-32-le"), np.uint32)
  sizes = np.ones(len(codes), np.int64)
  for least in (0x80, 0x800, 0x10000):
    sizes += codes >= least
  return codes, begin + np.concatenate([[0], np.cumsum(sizes)])


def _near_runs(space: np.ndarray) -> np.ndarray:
  """Which characters a stretch with a run of white space can have."""
  run = np.zeros(len(space) + 2 * LONG, np.int32)
  run[LONG + 1 : LONG + len(space)] = space[1:] & space[:-1]
  before = np.cumsum(run)
  return before[2 * LONG - 1 : -1] > before[: len(space)]


_SPACES = np.array(
  [i for i in range(0x80, 0x3001) if chr(i).isspace()], np.uint32
)


def _is_space(codes: np.ndarray) -> np.ndarray:
  """What `str.split` divides at, and control characters."""
  space = codes <= 32
  if codes.dtype != np.uint8 and len(codes):
    space |= np.isin(codes, _SPACES)
  return space
