"""What stands both in the training and in the held-out text.

A held-out loss says how a model does on text it has not seen.  It says less the
more of that text stands in the training text too: a model of any size knows
such text by heart.  So copies are looked for by content, whatever the format:
every stretch of 50 characters of the held-out text is looked up in the training
text.  The rule:

  1. A stretch that stands in the training text at most 16 times is taken out of
     the training text.  What is left of a line beside it goes too if it is
     shorter than a stretch.
  2. A stretch that stands there more often, such as the head of every file or
     a phrase of the trade, is taken out of the held-out text instead, so that
     the training text keeps it.
  3. If rule 2 would leave less than a tenth of the held-out text, the text
     repeats itself throughout.  Then such stretches stay in both.

All this is done twice: with white space as one space, however long, and with
every character as it is.  (Two stretches of 50 characters may agree in their
indentation more than in the words.)

Then the share of the held-out stretches that remain in the training text, white
space as one space, is measured by other hashes than those of the search, and
reported: of up to 262,144 stretches exactly, of more by a sample of that size.

Memory: at most 128 MiB for a table of bits, 8 for each held-out character, that
says which stretches are held out, and 128 MiB to count them.  Two stretches may
share a bit; that 11 in a row (see `windows`) all share theirs by chance happens
once in 10^10 characters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from .parallel import in_order
from .spans import Spans, group, merged
from .texts import Texts
from .windows import LONG, SHORT, Block, Plan, plans, read_block

# A stretch that stands in the training text more often is not a copy of one
# text but part of the language of many.
OFTEN = 16

_FEWEST_BITS, _MOST_BITS = 1 << 16, 1 << 30
_MOST_COUNTS = 1 << 27
# Of 11 stretches in a row, two are at places that this divides: only where two
# such places follow each other are the others looked up.
_STEP = 5
_SAMPLE = 1 << 18

Watch = Callable[[str, int], Callable[[int], None]]
"""Told a phase and its size in bytes; gives what is told of bytes done."""


def silent(phase: str, size: int) -> Callable[[int], None]:
  """A `Watch` that shows nothing."""
  return lambda done: None


@dataclasses.dataclass(frozen=True)
class Report:
  """What was found in both parts of a text.

  Attributes:
    copied: characters taken out of the training text.
    repeated: characters taken out of the held-out text, since they stand often
      in the training text.
    shared: of the held-out stretches of 50 characters, the share that stands
      in the training text after all; None if there is no such stretch.
    measured: how many stretches that was measured on.
    exact: whether these are all.
  """

  copied: int
  repeated: int
  shared: float | None
  measured: int
  exact: bool


def describe_copies(report: Report) -> Iterator[str]:
  """The lines about copies that are printed at the start of training."""
  if report.copied:
    yield (
      f"left out  {report.copied:,} characters of training text that are "
      "copies of held-out text"
    )
  if report.repeated:
    yield (
      f"left out  {report.repeated:,} characters of held-out text that stand "
      f"over {OFTEN} times in the training text"
    )
  if report.shared is not None:
    how = "" if report.exact else f" (of a sample of {report.measured:,})"
    yield (
      f"copies    {report.shared:.2%} of the held-out text's {LONG}-character "
      f"stretches remain in the training text{how}"
    )


def without_copies(
  texts: Texts, train: Spans, held_out: Spans, watch: Watch = silent
) -> tuple[Spans, Spans, Report]:
  """Both parts of a text after the rule above.  Documents may have gone."""
  extent = sum(plan.size for plan in plans(train))
  done = watch("looking for copies", 4 * extent)
  found = [_in_both(texts, train, held_out, way, done) for way in (True, False)]
  rare, often = (
    merged(np.concatenate(kind)) for kind in zip(*found, strict=True)
  )
  if 10 * (held_out.size - _size(often)) < held_out.size:
    often = often[:0]
  copied, repeated = _characters(texts, rare), _characters(texts, often)
  train = _with_text(texts, train.without(rare))
  held_out = _with_text(texts, held_out.without(often))
  share = shared_share(texts, train, held_out, watch)
  return train, held_out, Report(copied, repeated, *share)


def _in_both(
  texts: Texts,
  train: Spans,
  held_out: Spans,
  collapse: bool,
  done: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
  """What to take out of the training text, and out of the held-out text."""
  search = _Search(texts, held_out, collapse)
  search.count(train, done)
  rare, _ = search.stretches(train, done)
  _, often = search.stretches(held_out, silent("", 0))
  return rare, often


def _size(ranges: np.ndarray) -> int:
  return int((ranges[:, 1] - ranges[:, 0]).sum())


class _Search:
  """Looks for the stretches of a held-out text.

  Args:
    texts: of which all spans are parts.
    held_out: what is looked for.
    collapse: white space is one space.
  """

  def __init__(self, texts: Texts, held_out: Spans, collapse: bool):
    self._texts, self._collapse = texts, collapse
    bits = _power_of_two(8 * held_out.size, _FEWEST_BITS, _MOST_BITS)
    self._bits = np.zeros(bits // 8, np.uint8)
    self._shift = np.uint64(65 - bits.bit_length())
    # How often a stretch stands in the training text, up to 255.
    counts = _power_of_two(held_out.size, _FEWEST_BITS, _MOST_COUNTS)
    self._counts = np.zeros(counts, np.uint8)

    def places(plan: Plan) -> np.ndarray:
      block = self._read(plan)
      return block.short[block.whole(SHORT)] >> self._shift

    for found in in_order(places, plans(held_out)):
      for bit in range(8):
        of_bit = found[(found & np.uint64(7)) == bit] >> np.uint64(3)
        self._bits[of_bit] |= np.uint8(1 << bit)

  def _read(self, plan: Plan) -> Block:
    return read_block(self._texts, plan, self._collapse)

  def _held_out(self, hashes: np.ndarray) -> np.ndarray:
    """Which short stretches are, or share a bit with one that is."""
    places = hashes >> self._shift
    found = self._bits[places >> np.uint64(3)]
    return (found >> (places & np.uint64(7)).astype(np.uint8)) & 1 > 0

  def _hits(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Which stretches of 50 characters are held out, and where each is counted.

    (Short stretches past the block are part of long ones that begin in it.)
    """
    hashes = block.short
    steps = self._held_out(hashes[::_STEP])
    near = np.zeros(len(steps) + 4, bool)  # groups of _STEP, one ahead
    pairs = np.flatnonzero(steps[:-1] & steps[1:])
    for ahead in range(4):
      near[pairs + ahead] = True
    asked = np.flatnonzero(np.repeat(near[1:], _STEP)[: len(hashes)])
    found = np.zeros(len(hashes), bool)
    found[asked] = self._held_out(hashes[asked])
    for step in (1, 2, 4, 3):  # of 1 in a row: 2, 4, 8, 11 in a row
      found = found[: max(len(found) - step, 0)] & found[step:]
    hits = np.flatnonzero(found & block.whole(LONG))
    return hits, hashes[hits] & np.uint64(len(self._counts) - 1)

  def count(self, train: Spans, done: Callable[[int], None]) -> None:
    """Counts how often held-out stretches stand in the training text."""

    def count(plan: Plan) -> tuple[np.ndarray, np.ndarray, int]:
      _, places = self._hits(self._read(plan))
      return *np.unique(places, return_counts=True), plan.size

    for places, times, size in in_order(count, plans(train)):
      self._counts[places] = np.minimum(self._counts[places] + times, 255)
      done(size)

  def stretches(
    self, spans: Spans, done: Callable[[int], None]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Ranges of bytes that stand in both parts: rare ones and frequent ones.

    Returns:
      Two times int64 [n, 2].
    """

    def find(plan: Plan) -> tuple[np.ndarray, np.ndarray, int]:
      block = self._read(plan)
      hits, places = self._hits(block)
      frequent = self._counts[places] > OFTEN
      # (Where not all characters are read, nor are all line ends.)
      to_bytes = _to_line_ends if self._collapse else _bytes
      rare = to_bytes(block, _ranges(block, hits[~frequent]))
      often = _bytes(block, _ranges(block, hits[frequent]))
      return rare, often, plan.size

    empty = np.zeros((0, 2), np.int64)
    rare, often = [empty], [empty]
    for few, many, size in in_order(find, plans(spans)):
      rare.append(few)
      often.append(many)
      done(size)
    return merged(np.concatenate(rare)), merged(np.concatenate(often))


def _power_of_two(wanted: int, least: int, most: int) -> int:
  """The next power of two, within bounds."""
  return min(max(1 << max(wanted - 1, 0).bit_length(), least), most)


def _ranges(block: Block, hits: np.ndarray) -> np.ndarray:
  """Ranges of characters that the stretches at `hits` cover: int64 [n, 2].

  Each is of one span.
  """
  if not len(hits):
    return np.zeros((0, 2), np.int64)
  span = np.cumsum(block.apart)[hits]
  breaks = np.flatnonzero((np.diff(hits) > LONG) | (np.diff(span) > 0))
  first = np.concatenate([hits[:1], hits[breaks + 1]])
  last = np.concatenate([hits[breaks], hits[-1:]])
  return np.stack([first, last + LONG], axis=1)


def _bytes(block: Block, ranges: np.ndarray) -> np.ndarray:
  """Ranges of characters as ranges of bytes, without the space at their ends.

  So what stands before and after remains apart, and indented as it was.
  """
  if not len(ranges):
    return ranges
  space = block.codes <= 32
  first, last = ranges[:, 0], ranges[:, 1] - 1
  return np.stack(
    [block.start[first + space[first]], block.end[last - space[last]]], axis=1
  )


def _to_line_ends(block: Block, ranges: np.ndarray) -> np.ndarray:
  """Likewise, with what is left of a line beside them if it is short."""
  found = _bytes(block, ranges)
  if not len(found):
    return found
  # The spans that the ranges are in, as far as they were read.
  begins = np.union1d([0], np.flatnonzero(block.apart))
  span = np.searchsorted(begins, ranges[:, 0], "right")
  first = block.start[begins[span - 1]]
  last = block.end[np.append(begins[1:], len(block.end))[span - 1] - 1]
  ends = block.line_ends
  before = np.searchsorted(ends, found[:, 0], "right")
  line = np.maximum(np.concatenate([[0], ends])[before], first)
  after = np.searchsorted(ends, found[:, 1], "left")
  line_end = np.minimum(np.append(ends, last.max())[after], last)
  near = found[:, 0] - line < LONG
  found[near, 0] = line[near]
  near = line_end - found[:, 1] < LONG
  found[near, 1] = line_end[near]
  return found


def _characters(texts: Texts, ranges: np.ndarray) -> int:
  """Characters in ranges of bytes."""
  return sum(
    len(texts.content.read(a, b).decode(errors="replace"))
    for a, b in ranges.tolist()
  )


def _with_text(texts: Texts, spans: Spans) -> Spans:
  """Without the documents of which nothing is left but white space."""
  index, kept = 0, np.ones(len(spans), bool)
  for _, parts in group(spans):
    # Looked at only if it is short: that long ones are blank is unheard of.
    if sum(b - a for a, b in parts) < 4096 and not any(
      texts.content.read(a, b).strip() for a, b in parts
    ):
      kept[index : index + len(parts)] = False
    index += len(parts)
  return spans if kept.all() else spans[kept]


# --- the measure ---


def shared_share(
  texts: Texts, train: Spans, held_out: Spans, watch: Watch = silent
) -> tuple[float | None, int, bool]:
  """Of the held-out stretches of 50 characters, the share in the training text.

  Returns:
    The share, None if there is no stretch; how many were looked for; whether
    these are all.
  """
  every = np.uint64(max(1, -(-held_out.size // _SAMPLE)))

  def sample(plan) -> tuple[np.ndarray, int]:
    block = read_block(texts, plan)
    hashes = block.long[block.whole(LONG)]
    # By their content, so that both sides choose the same.
    return hashes[(hashes >> np.uint64(8)) % every == 0], plan.size

  parts = [hashes for hashes, _ in in_order(sample, plans(held_out))]
  wanted, times = np.unique(
    np.concatenate([np.zeros(0, np.uint64), *parts]), return_counts=True
  )
  if not len(wanted):
    return None, 0, True
  found = np.zeros(len(wanted), bool)
  extent = sum(plan.size for plan in plans(train))
  done = watch("measuring what is left of them", extent)
  for hashes, size in in_order(sample, plans(train)):
    at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
    found[at[wanted[at] == hashes]] = True
    done(size)
  total = int(times.sum())
  return float(times[found].sum() / total), total, bool(every == 1)
