"""Parts of documents, as ranges of bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from .texts import Texts


@dataclasses.dataclass(frozen=True)
class Spans:
  """Parts of documents, in the order in which they are used.

  The parts of one document follow each other.

  Attributes:
    document: int64 [spans], to which each belongs.
    start: int64 [spans], its first byte in `Texts`.
    end: int64 [spans], the byte after its last.
  """

  document: np.ndarray
  start: np.ndarray
  end: np.ndarray

  @classmethod
  def of_documents(cls, texts: Texts, documents: np.ndarray) -> Spans:
    """Whole documents."""
    return cls(documents, texts.starts[documents], texts.ends[documents])

  @classmethod
  def of_one(cls, document: int, start: int, end: int) -> Spans:
    """One part of one document."""
    return cls(*(np.array([n], np.int64) for n in (document, start, end)))

  def __len__(self) -> int:
    """The number of spans."""
    return len(self.start)

  def __getitem__(self, index: np.ndarray) -> Spans:
    """Some of them."""
    return Spans(self.document[index], self.start[index], self.end[index])

  def apart(self, ends: Sequence[int]) -> list[Spans]:
    """Those of each part of the text, in their order.

    Args:
      ends: the byte after the last of each part.
    """
    part = np.searchsorted(np.asarray(ends), self.start, "right")
    return [self[part == i] for i in range(len(ends))]

  def joined(self, other: Spans) -> Spans:
    """These, then those."""
    return Spans(
      np.concatenate([self.document, other.document]),
      np.concatenate([self.start, other.start]),
      np.concatenate([self.end, other.end]),
    )

  @property
  def size(self) -> int:
    """Bytes in all."""
    return int((self.end - self.start).sum())

  @property
  def num_documents(self) -> int:
    """How many documents they are parts of."""
    return len(self) and 1 + int(np.count_nonzero(np.diff(self.document)))

  def without(self, holes: np.ndarray) -> Spans:
    """What is left when ranges of bytes are taken out.

    Args:
      holes: int64 [holes, 2], apart and in the order of the bytes; each within
        one span.
    """
    if not len(holes):
      return self
    # Each span is between two borders, and each hole adds two more; sorted,
    # they are in turn where a part begins and where it ends.
    by_place = np.argsort(self.start, kind="stable")
    start, end = self.start[by_place], self.end[by_place]
    owner = np.searchsorted(start, holes[:, 0], "right") - 1
    # (Where a hole ends and a span begins, the part between has no bytes and
    # belongs to the former: hence the holes first.)
    starts = np.concatenate([holes[:, 1], start])
    ends = np.concatenate([holes[:, 0], end])
    owners = np.concatenate([owner, np.arange(len(start))])
    at = np.argsort(starts, kind="stable")
    starts, owners, ends = starts[at], owners[at], np.sort(ends)
    kept = starts < ends
    starts, ends, owners = starts[kept], ends[kept], owners[kept]
    # Back in the order of the spans.
    rank = by_place[owners]
    order = np.argsort(rank, kind="stable")
    rank = rank[order]
    return Spans(self.document[rank], starts[order], ends[order])


def group(spans: Spans) -> Iterator[tuple[int, list[tuple[int, int]]]]:
  """Each document with the ranges of bytes that are its parts."""
  borders = np.flatnonzero(np.diff(spans.document)) + 1
  edges = [0, *borders.tolist(), len(spans)]
  for a, b in zip(edges, edges[1:], strict=False):
    if a < b:
      ranges = zip(
        spans.start[a:b].tolist(), spans.end[a:b].tolist(), strict=True
      )
      yield int(spans.document[a]), list(ranges)


def merged(ranges: np.ndarray) -> np.ndarray:
  """Ranges of bytes in order, those that overlap as one.

  Ranges that only touch stay apart: they may be of two documents.

  Args:
    ranges: int64 [n, 2].
  """
  if not len(ranges):
    return ranges
  ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
  reach = np.maximum.accumulate(ranges[:, 1])
  first = np.concatenate([[True], ranges[1:, 0] >= reach[:-1]])
  last = np.concatenate([first[1:], [True]])
  return np.stack([ranges[first, 0], reach[last]], axis=1)
