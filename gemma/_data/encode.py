"""Text of any size to token ids, on all cores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .._tokenizer import Tokenizer
from .parallel import in_order
from .rows import marked, token_dtype
from .spans import Spans, group
from .texts import Texts

_TOGETHER = 1 << 18  # bytes of short documents that one call encodes
_LONGEST = 1 << 20  # bytes of a document that are encoded at once
_LOOK_BACK = 1 << 12  # bytes searched for a place to cut it

_LEARNT = 10_000_000  # bytes of text that a tokenizer is learnt from, at most
_PASSAGE = 1 << 12  # bytes of one passage of more text

Part = tuple[bool, bool, list[tuple[int, int]]]
"""Of a document: whether it is its beginning, its end, and where it lies."""


def encoded(
  texts: Texts, spans: Spans, tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, int]]:
  """All tokens in order, as `Rows` stores them, and the bytes they stand for.

  They are those of `Tokenizer.encode`, a document at a time with BOS and EOS.
  Long documents are encoded in parts, cut where no piece of the vocabulary has
  the two characters beside the cut: the tokens are the same.  (If there is no
  such place within 4096 bytes, it is cut all the same.)
  """
  dtype = token_dtype(tokenizer.vocab_size)

  def encode(parts: list[Part]) -> tuple[np.ndarray, int]:
    ids, size = [], 0
    for first, last, ranges in parts:
      content = b"".join(texts.content.read(a, b) for a, b in ranges)
      found = tokenizer.encode(content.decode(), add_bos=first, add_eos=last)
      ids.append(marked(found, dtype) if first else np.array(found, dtype))
      size += len(content)
    return np.concatenate(ids), size

  return in_order(encode, _work(texts, spans, tokenizer))


def _work(
  texts: Texts, spans: Spans, tokenizer: Tokenizer
) -> Iterator[list[Part]]:
  """Parts to be encoded by one call."""
  inside: frozenset[str] | None = None  # found when it is first needed
  together: list[Part] = []
  size = 0
  for _, ranges in group(spans):
    length = sum(b - a for a, b in ranges)
    if size + length > _TOGETHER and together:
      yield together
      together, size = [], 0
    if length <= _LONGEST:
      together.append((True, True, ranges))
      size += length
      continue
    if inside is None:
      inside = tokenizer.pairs()
    parts = list(_in_parts(texts, ranges, inside))
    for i, part in enumerate(parts):
      yield [(i == 0, i == len(parts) - 1, part)]
  if together:
    yield together


def _in_parts(
  texts: Texts, ranges: list[tuple[int, int]], inside: frozenset[str]
) -> Iterator[list[tuple[int, int]]]:
  """A long document in parts of at most `_LONGEST` bytes."""
  part: list[tuple[int, int]] = []
  room = _LONGEST
  for start, end in ranges:
    while end - start > room:
      at = _place(texts, start, start + room, inside)
      yield [*part, (start, at)] if at > start else part
      part, room, start = [], _LONGEST, at
    part.append((start, end))
    room -= end - start
  yield part


def _place(texts: Texts, start: int, end: int, inside: frozenset[str]) -> int:
  """Where to cut, shortly before `end`."""
  begin = max(start, end - _LOOK_BACK)
  content = texts.content.read(begin, end)
  head = next((i for i, b in enumerate(content) if b & 0xC0 != 0x80), 0)
  text = content[head:].decode(errors="ignore")
  for i in range(len(text) - 1, 0, -1):
    if text[i - 1 : i + 1] not in inside:
      return begin + head + len(text[:i].encode())
  return begin + head + len(text.encode())


def learning_texts(texts: Texts, spans: Spans, seed: int) -> Iterator[str]:
  """What a tokenizer is learnt from: all documents, or passages of them.

  If there are more than 10 MB, passages of 4 kB are drawn from all of the text
  alike, and begin and end with a line if they can: learning takes the memory of
  these alone.
  """
  if spans.size <= _LEARNT:
    for _, ranges in group(spans):
      yield _text(texts, ranges)
    return
  place = np.cumsum(spans.end - spans.start)
  generator = np.random.default_rng(seed % (1 << 64))
  drawn = generator.integers(0, spans.size, _LEARNT // _PASSAGE)
  for at in np.sort(drawn).tolist():
    i = int(np.searchsorted(place, at, "right"))
    stop = int(spans.end[i])
    start = stop - (int(place[i]) - at)
    yield _passage(texts, start, min(start + _PASSAGE, stop))


def _text(texts: Texts, ranges: Sequence[tuple[int, int]]) -> str:
  return b"".join(texts.content.read(a, b) for a, b in ranges).decode()


def _passage(texts: Texts, start: int, stop: int) -> str:
  text = texts.content.read(start, stop).decode(errors="ignore")
  first, last = text.find("\n") + 1, text.rfind("\n") + 1
  return text[first:last] if first < last else text
