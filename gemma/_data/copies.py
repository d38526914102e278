"""What stands both in the training and in the held-out text.

A held-out loss says how a model does on text it has not seen.  It says less the
more of that text stands in the training text too: a model of any size knows
such text by heart.  So copies are looked for by content, whatever the format:
every stretch of 50 characters of the held-out text, white space aside, is looked
up in the training text.  The rule:

  1. A stretch that stands in the training text at most 16 times is taken out of
     the training text.  What is left of a line beside it goes too if it is
     shorter than a stretch.
  2. A stretch that stands there more often, such as the head of every file or
     a phrase of the trade, is taken out of the held-out text instead, so that
     the training text keeps it.
  3. If rule 2 would take more than half of the held-out text, the text repeats
     itself throughout.  Such stretches are then taken out of the training text,
     if that leaves more than half of it, and else stay in both.

Then the share of the held-out stretches that remain in the training text is
measured, by other hashes than those of the search, and reported: of up to
262,144 stretches exactly, of more by a sample of that size.

Memory: one table of at most 512 MiB, of a byte for each of 4 slots per held-out
character; a slot says how often its stretch stands in the training text.  Two
stretches may share one; that 11 in a row (see `windows`) all share theirs by
chance happens once in 10^7 characters at the worst.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from .parallel import in_order
from .spans import Spans, group, merged
from .texts import Texts
from .windows import LONG, SHORT, Block, plans, read_block

# A stretch that stands in the training text more often is not a copy of one
# text but part of the language of many.
OFTEN = 16

_FEWEST_SLOTS, _MOST_SLOTS = 1 << 16, 1 << 29
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
      f"left out  {report.copied:,} characters of training text that are copies "
      "of held-out text"
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
  table = _table(texts, held_out)
  phase = watch("looking for copies", 2 * train.size)
  _count(texts, train, table, phase)
  rare, often = _stretches(texts, train, table, phase)
  _, repeated = _stretches(texts, held_out, table, silent("", 0))
  holes = repeated
  if 2 * _size(repeated) > held_out.size:
    holes = repeated[:0]
    both = merged(np.concatenate([rare, often]))
    rare = both if 2 * _size(both) < train.size else rare
  del table
  copied, taken = _characters(texts, rare), _characters(texts, holes)
  train = _with_text(texts, train.without(rare))
  held_out = _with_text(texts, held_out.without(holes))
  shared, measured, exact = shared_share(texts, train, held_out, watch)
  return train, held_out, Report(copied, taken, shared, measured, exact)


def _size(ranges: np.ndarray) -> int:
  return int((ranges[:, 1] - ranges[:, 0]).sum())


# --- the table: 0 for what is not held out, else 1 + times in training ---


def _slots(block: Block, table: np.ndarray) -> np.ndarray:
  bits = int(len(table)).bit_length() - 1
  return block.short >> np.uint64(64 - bits)


def _table(texts: Texts, held_out: Spans) -> np.ndarray:
  wanted = min(max(4 * held_out.size, _FEWEST_SLOTS), _MOST_SLOTS)
  table = np.zeros(1 << (wanted - 1).bit_length(), np.uint8)

  def enter(plan) -> None:
    block = read_block(texts, plan)
    table[_slots(block, table)[block.whole(SHORT)]] = 1

  for _ in in_order(enter, plans(held_out)):
    pass
  return table


def _hits(block: Block, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Which stretches of 50 characters are held out, and the slots of all."""
  slots = _slots(block, table)
  found = (table[slots] > 0) & block.whole(SHORT)
  # A stretch that begins in this block may end past it, in the part of `whole`
  # that is the next block's.
  past = block.start[: len(found)] >= block.stop
  if past.any():
    found[past] = table[slots[past]] > 0
  for step in (1, 2, 4, 3):  # of 1 in a row: 2, 4, 8, 11 in a row
    found = found[: max(len(found) - step, 0)] & found[step:]
  found &= block.whole(LONG)
  return np.flatnonzero(found), slots


def _count(
  texts: Texts, train: Spans, table: np.ndarray, done: Callable[[int], None]
) -> None:
  """Adds to each slot how often the stretch stands in the training text."""

  def count(plan) -> tuple[np.ndarray, np.ndarray, int]:
    hits, slots = _hits(read_block(texts, plan), table)
    return *np.unique(slots[hits], return_counts=True), plan.size

  for slots, counts, size in in_order(count, plans(train)):
    table[slots] = np.minimum(table[slots] + counts, 255)
    done(size)


def _stretches(
  texts: Texts, spans: Spans, table: np.ndarray, done: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
  """Ranges of bytes that stand in both parts: rare ones and frequent ones.

  Returns:
    Two times int64 [n, 2].
  """

  def find(plan) -> tuple[np.ndarray, np.ndarray, int]:
    block = read_block(texts, plan)
    hits, slots = _hits(block, table)
    frequent = table[slots[hits]] > 1 + OFTEN
    rare = _to_line_ends(block, _ranges(hits[~frequent]))
    often = _bytes(block, _ranges(hits[frequent]))
    return rare, often, plan.size

  parts: list[tuple[np.ndarray, np.ndarray]] = []
  for rare, often, size in in_order(find, plans(spans)):
    parts.append((rare, often))
    done(size)
  empty = np.zeros((0, 2), np.int64)
  kinds = list(zip(*parts, strict=True)) or [(), ()]
  first, second = (merged(np.concatenate([empty, *k])) for k in kinds)
  return first, second


def _ranges(hits: np.ndarray) -> np.ndarray:
  """Ranges of characters that the stretches at `hits` cover: int64 [n, 2]."""
  if not len(hits):
    return np.zeros((0, 2), np.int64)
  breaks = np.flatnonzero(np.diff(hits) > LONG)
  first = np.concatenate([hits[:1], hits[breaks + 1]])
  last = np.concatenate([hits[breaks], hits[-1:]])
  return np.stack([first, last + LONG], axis=1)


def _bytes(block: Block, ranges: np.ndarray) -> np.ndarray:
  """Ranges of characters as ranges of bytes, without the space at their ends.

  So what stands before and after remains apart, and indented as it was.
  """
  if not len(ranges):
    return ranges
  space = block.codes == 32
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
  done = watch("measuring what is left of them", train.size)
  for hashes, size in in_order(sample, plans(train)):
    at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
    found[at[wanted[at] == hashes]] = True
    done(size)
  total = int(times.sum())
  return float(times[found].sum() / total), total, every == 1
