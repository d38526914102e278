"""Token ids of documents, joined end to end and cut into rows of one length.

    documents   [bos a a a a eos] [bos b b eos] [bos c c c c eos]
    row 0       bos a   a   a   a   eos bos b
    labels      a   a   a   a   eos .   b   b        . has weight 0
    segments    1   1   1   1   1   1   2   2
    row 1       b   eos bos c   c   c   c   eos
    labels      eos .   c   c   c   c   eos .
    segments    1   1   2   2   2   2   2   2

Every token is an input once, and every token but BOS is a label once.  No label
belongs to another document than its input, and attention that is given the
segments does not reach into other documents either.

Tokens are stored as unsigned integers whose highest bit says that a document
begins: a row can be made from its own tokens and the one after it, and the rest
stays on disk.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .._arguments import instance, whole
from .._errors import UserError
from .._tokenizer import Tokenizer
from .read import Document
from .texts import Bytes, MemoryBytes

Batch = dict[str, np.ndarray]
"""Some rows of `Rows`: its fields by name."""

_BLOCK = 1 << 20  # tokens


def token_dtype(vocab_size: int) -> np.dtype:
  """In which ids below `vocab_size` are stored, with a bit to spare."""
  return np.dtype("<u2" if vocab_size <= 1 << 15 else "<u4")


def begins_bit(dtype: np.dtype) -> int:
  """Set in the first token of a document."""
  return 1 << (8 * dtype.itemsize - 1)


@dataclasses.dataclass(frozen=True)
class Tokens:
  """The ids of documents, one after the other.

  Attributes:
    content: as `token_dtype` and `begins_bit` say, little-endian.
    dtype: of one token.
    size: tokens.
    documents: how many there are.
    label_counts: int64 [vocabulary], how often each id is a label; None if
      nobody has counted yet.
    parts: the token after the last of each part, if there are parts.
  """

  content: Bytes
  dtype: np.dtype
  size: int
  documents: int
  label_counts: np.ndarray | None = None
  parts: Sequence[int] = ()

  def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids from `start` to `stop`, int32, and where documents begin."""
    item = self.dtype.itemsize
    found = np.frombuffer(
      self.content.read(start * item, min(stop, self.size) * item), self.dtype
    )
    bit = begins_bit(self.dtype)
    return (found & (bit - 1)).astype(np.int32), found >= bit


class Rows:
  """Packed rows of T tokens, made when they are asked for.

  Args:
    source: all the tokens.
    sequence_length: T.
    pad_id: fills up the last row.
    chosen: which of the rows there are; None for all.

  Raises:
    UserError: if T is not positive.
  """

  def __init__(
    self,
    source: Tokens,
    sequence_length: int,
    pad_id: int = 0,
    chosen: np.ndarray | None = None,
  ):
    if sequence_length < 1:
      raise UserError(f"sequence length {sequence_length}: wanted 1 or more")
    self.source = source
    self.sequence_length = sequence_length
    self.pad_id = pad_id
    self.chosen = chosen

  @property
  def use(self) -> float:
    """The share of the rows' tokens that is text and not padding."""
    rows = -(-self.source.size // self.sequence_length)
    return self.source.size / max(rows * self.sequence_length, 1)

  def parts(self) -> list[Rows]:
    """The rows of each part of the tokens, those that begin in it.

    A row that reaches into the next part is of the former.
    """
    ends = [-(-end // self.sequence_length) for end in self.source.parts]
    edges = [0, *ends]
    return [
      self.take(np.arange(a, b)) for a, b in zip(edges, ends, strict=False)
    ]

  def take(self, index: np.ndarray) -> Rows:
    """The rows of these numbers."""
    rows = index if self.chosen is None else self.chosen[index]
    return Rows(self.source, self.sequence_length, self.pad_id, rows)

  def __len__(self) -> int:
    """The number of rows."""
    if self.chosen is not None:
      return len(self.chosen)
    return -(-self.source.size // self.sequence_length)

  def __getitem__(self, index: Any) -> Batch:
    """One row or some, as `index` picks from the first axis: by name,

    tokens: [rows, T] int32.
    labels: [rows, T] int32, the next token.
    segment_ids: [rows, T] int32; 0 is padding, documents are 1, 2, ...
    weights: [rows, T] float32; 1 where the label belongs to the same document.
    """
    chosen = np.arange(len(self))[index] if isinstance(index, slice) else index
    chosen = np.asarray(chosen)
    if chosen.dtype == bool:
      chosen = np.flatnonzero(chosen)
    flat = chosen.reshape(-1)
    flat = np.where(flat < 0, flat + len(self), flat)
    if flat.size and not (0 <= flat.min() and flat.max() < len(self)):
      raise IndexError(f"row {index} of {len(self)}")
    flat = flat if self.chosen is None else self.chosen[flat]
    shape = (*chosen.shape, self.sequence_length)
    return {
      name: value.reshape(shape) for name, value in self._batch(flat).items()
    }

  def _batch(self, index: np.ndarray) -> Batch:
    length, size = self.sequence_length, self.source.size
    # One token more than the rows hold: the last token's label.
    tokens = np.full((len(index), length + 1), self.pad_id, np.int32)
    begins = np.zeros((len(index), length + 1), bool)
    for i, row in enumerate(index.tolist()):
      ids, first = self.source.read(row * length, (row + 1) * length + 1)
      tokens[i, : len(ids)], begins[i, : len(ids)] = ids, first
    real = index[:, None] * length + np.arange(length + 1) < size
    # The document that a row begins in is its first.
    count = np.cumsum(begins[:, :-1], axis=1, dtype=np.int32)
    segments = count + 1 - begins[:, :1]
    return {
      "tokens": tokens[:, :-1],
      "labels": tokens[:, 1:],
      "segment_ids": np.where(real[:, :-1], segments, 0).astype(np.int32),
      "weights": (real[:, 1:] & ~begins[:, 1:]).astype(np.float32),
    }

  def _all(self, name: str) -> np.ndarray:
    return self[:][name]

  @property
  def tokens(self) -> np.ndarray:
    """[rows, T] int32, all of them, in memory."""
    return self._all("tokens")

  @property
  def labels(self) -> np.ndarray:
    """[rows, T] int32, likewise."""
    return self._all("labels")

  @property
  def segment_ids(self) -> np.ndarray:
    """[rows, T] int32, likewise."""
    return self._all("segment_ids")

  @property
  def weights(self) -> np.ndarray:
    """[rows, T] float32, likewise."""
    return self._all("weights")

  @property
  def num_labels(self) -> int:
    """How many tokens are predicted: those whose label has weight 1."""
    if self.chosen is not None:
      return sum(int(part["weights"].sum()) for part in self._parts())
    return self.source.size - self.source.documents

  def _parts(self) -> Iterator[Batch]:
    """All rows, some at a time."""
    step = max(_BLOCK // self.sequence_length, 1)
    return (self[i : i + step] for i in range(0, len(self), step))

  def label_counts(self, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size], how often each id is a label of weight 1."""
    counts = np.zeros(vocab_size, np.int64)
    if self.chosen is not None:
      for part in self._parts():
        labels = part["labels"][part["weights"] > 0]
        counts += np.bincount(labels, minlength=vocab_size)
      return counts
    if self.source.label_counts is not None:
      known = self.source.label_counts
      counts[: len(known)] = known[:vocab_size]
      return counts
    for start in range(0, self.source.size, _BLOCK):
      ids, first = self.source.read(start, start + _BLOCK)
      counts += count_labels(ids, first, vocab_size)
    return counts


def count_labels(
  ids: np.ndarray, begins: np.ndarray, vocab_size: int
) -> np.ndarray:
  """int64 [vocab_size]: how often each id stands not at a document's begin."""
  return np.bincount(ids[~begins], minlength=vocab_size)


def tokenize(
  documents: Sequence[Document], tokenizer: Tokenizer
) -> list[np.ndarray]:
  """Each document as BOS, its tokens, EOS: int32 arrays."""
  instance("tokenizer", tokenizer, Tokenizer)
  return [
    np.array(tokenizer.encode(d.text, add_bos=True, add_eos=True), np.int32)
    for d in documents
  ]


def pack(
  documents: Sequence[np.ndarray], sequence_length: int, pad_id: int = 0
) -> Rows:
  """Joins documents and cuts them into rows; the last row is padded."""
  sequence_length = whole("sequence_length", sequence_length, 1, sys.maxsize)
  dtype = token_dtype(1 << 31)
  parts = [marked(d, dtype) for d in documents if len(d)]
  content = b"".join(part.tobytes() for part in parts)
  size = sum(map(len, parts))
  tokens = Tokens(MemoryBytes(content), dtype, size, len(parts))
  return Rows(tokens, sequence_length, pad_id)


def marked(ids: Any, dtype: np.dtype) -> np.ndarray:
  """Ids as they are stored: the first begins a document."""
  stored = np.array(ids, dtype)
  stored[:1] |= dtype.type(begins_bit(dtype))
  return stored
