"""Which text is trained on and which is held out.

draw      documents are taken in an order drawn from their text and the seed
hold out  as many as the share allows; if none is small enough, the end of
          one
copies    what stands on both sides is taken out of one: see `copies`
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence

import numpy as np

from .._arguments import instance, several, whole
from .._errors import UserError
from .copies import Report, Watch, silent, without_copies
from .read import Document
from .spans import Spans, group
from .texts import Texts, texts_in_memory

# However much text there is, more is not held out, in characters: evaluations
# have no use for it, and what is known of it is in memory.
MOST_HELD_OUT = 1 << 27


@dataclasses.dataclass(frozen=True)
class Split:
  """Documents to train on, and documents never trained on.

  Attributes:
    train: in the order that was drawn.
    held_out: likewise.
    report: what was taken out and what remains in both; see `Report`.
  """

  train: tuple[Document, ...]
  held_out: tuple[Document, ...]
  report: Report

  @property
  def copied(self) -> int:
    """Characters taken out of the training documents as copies."""
    return self.report.copied


def split_documents(
  documents: Sequence[Document], fraction: float, seed: int
) -> Split:
  """Holds out about `fraction` of the text: whole documents if it can.

  The order in which documents are considered depends on their text and the seed
  alone.  If no document is small enough, the end of one is held out.  At most
  134 million characters are.

  Text that stands in both is taken out of the training documents.  Otherwise
  the held-out loss would measure what the model knows by heart: a third of
  Python's documentation topics is copied from other topics.  The module
  `_data/copies.py` tells what counts as a copy.
  """
  given = several("documents", documents, "documents")
  documents = [
    d for d in given if instance("documents", d, Document).text.strip()
  ]
  if not documents:
    raise UserError("documents: none has text; give some that have")
  seed = whole("seed", seed, -(1 << 63), (1 << 63) - 1)
  texts = texts_in_memory(documents, seed)
  train, held_out, report = split_texts(texts, fraction)

  def documents_of(spans: Spans, tail: bool) -> tuple[Document, ...]:
    found = []
    for i, parts in group(spans):
      text = b"".join(texts.content.read(a, b) for a, b in parts).decode()
      name = documents[i].name + " (end)" * (tail and i in trained)
      found.append(Document(name, text))
    return tuple(found)

  trained = {*train.document.tolist()} & {*held_out.document.tolist()}
  return Split(documents_of(train, False), documents_of(held_out, True), report)


def split_texts(
  texts: Texts, fraction: float, watch: Watch = silent
) -> tuple[Spans, Spans, Report]:
  """The spans to train on, those held out, and what was found in both.

  Raises:
    UserError: if there is too little text.
  """
  if not (isinstance(fraction, numbers.Real) and 0 < fraction < 1):
    raise UserError(
      f"held-out fraction {fraction}: wanted more than 0 and less than 1"
    )
  order = np.argsort(texts.draws, kind="stable")
  held = held_out_documents(texts.characters[order], fraction)
  if held.any():
    train = Spans.of_documents(texts, order[~held])
    held_out = Spans.of_documents(texts, order[held])
  else:
    *others, last = order
    start, at, end = cut(texts, int(last), fraction)
    train = Spans.of_documents(texts, np.array(others, np.int64))
    train = train.joined(Spans.of_one(int(last), start, at))
    held_out = Spans.of_one(int(last), at, end)
  train, held_out, report = without_copies(texts, train, held_out, watch)
  if not len(train):
    raise UserError(
      "data: nothing but copies of the held-out text is left to train on; give "
      "more text"
    )
  return train, held_out, report


def held_out_documents(sizes: np.ndarray, fraction: float) -> np.ndarray:
  """Which of the documents are held out: each that the budget still allows.

  Args:
    sizes: int64 [documents], characters of each, in the order they are taken.
    fraction: of all characters, at most `MOST_HELD_OUT`.

  Returns:
    bool [documents].  One document at least is left to train on.
  """
  total = int(sizes.sum())
  budget = min(fraction * total, MOST_HELD_OUT)
  held = np.zeros(len(sizes), bool)
  left = np.arange(len(sizes))
  while True:
    left = left[sizes[left] <= budget]
    if not len(left):
      break
    taken = int(np.searchsorted(np.cumsum(sizes[left]), budget, "right"))
    held[left[:taken]] = True
    budget -= int(sizes[left[:taken]].sum())
    left = left[taken:]
  most = len(sizes) - 1
  held[np.flatnonzero(held)[most:]] = False
  return held


def cut(texts: Texts, document: int, fraction: float) -> tuple[int, int, int]:
  """Cuts a document at the end of a line; the tail is about `fraction`.

  Returns:
    Its first byte, the first of the tail, and the end, without the white space
    around it.
  """
  start, end = _stripped(
    texts, int(texts.starts[document]), int(texts.ends[document])
  )
  count = _characters(texts, start, end)
  if count < 2:
    raise UserError(
      "data: one character cannot be split into training and held-out text; "
      "give more text"
    )
  at = max(int(count * (1 - fraction)), count - MOST_HELD_OUT)
  at = min(max(at, 1), count - 1)
  at = _byte_of(texts, start, end, at)
  second = _byte_of(texts, start, end, 1)
  # The last line end before the place, but not at the very beginning.
  stop = at
  while stop > second:
    begin = max(second, stop - _BLOCK)
    found = texts.content.read(begin, stop).rfind(b"\n")
    if found >= 0:
      return start, begin + found + 1, end
    stop = begin
  return start, at, end


_BLOCK = 1 << 20


def _stripped(texts: Texts, start: int, end: int) -> tuple[int, int]:
  """A span without white space at its ends."""
  while start < end:
    text = texts.content.read(start, min(start + _BLOCK, end))
    text = text[: _whole_characters(text)]
    rest = text.decode().lstrip().encode()
    start += len(text) - len(rest)
    if rest:
      break
  while start < end:
    begin = max(start, end - _BLOCK)
    text = texts.content.read(begin, end)
    first = next(i for i, b in enumerate(text) if b & 0xC0 != 0x80)
    rest = text[first:].decode().rstrip().encode()
    end -= len(text) - first - len(rest)
    if rest:
      break
  return start, end


def _whole_characters(text: bytes) -> int:
  """How many bytes of `text` are whole characters: its end may be cut."""
  for back in range(1, min(len(text), 4) + 1):
    byte = text[-back]
    if byte & 0xC0 != 0x80:
      size = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
      return len(text) - (back if back < size else 0)
  return len(text)


def _begins(text: bytes) -> np.ndarray:
  """Which bytes begin a character."""
  return (np.frombuffer(text, np.uint8) & 0xC0) != 0x80


def _characters(texts: Texts, start: int, end: int) -> int:
  return sum(
    int(_begins(texts.content.read(a, min(a + _BLOCK, end))).sum())
    for a in range(start, end, _BLOCK)
  )


def _byte_of(texts: Texts, start: int, end: int, character: int) -> int:
  """The byte at which a character of a span begins."""
  for a in range(start, end, _BLOCK):
    begins = np.flatnonzero(
      _begins(texts.content.read(a, min(a + _BLOCK, end)))
    )
    if character < len(begins):
      return a + int(begins[character])
    character -= len(begins)
  return end
