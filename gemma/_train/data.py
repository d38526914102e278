"""From text files to batches of token rows.

    files -> documents -> train | held-out -> token ids -> rows -> batches

Documents are joined end to end and cut into rows of one length:

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
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from .._errors import UserError
from .._files import local_path
from .._tokenizer import Tokenizer

TEXT_SUFFIXES = frozenset(
  ".txt .text .md .markdown .rst .org .tex .html .htm .xml .json .jsonl .csv "
  ".tsv .yaml .yml .toml .ini .cfg .py .pyi .ipynb .c .h .cc .cpp .hpp .cu .go "
  ".rs .java .kt .scala .js .jsx .ts .tsx .css .sh .bash .lua .rb .php .pl .r "
  ".jl .hs .ml .lisp .el .sql .swift .m".split()
)

Batch = dict[str, np.ndarray]
"""Some rows of `Rows`: its fields by name."""

# Characters from which a paragraph that stands in two documents is taken for a
# copy.  Shorter ones, such as "See also:", unrelated texts share as well.
_COPIED_PARAGRAPH = 64


@dataclasses.dataclass(frozen=True)
class Document:
  """One text and where it came from."""

  name: str
  text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents, and what was skipped: the names of files by the reason."""

  documents: tuple[Document, ...]
  skipped: dict[str, list[str]]

  @property
  def fingerprint(self) -> str:
    """A hash of the texts in their order; their names do not count."""
    digest = hashlib.sha256()
    for document in self.documents:
      text = document.text.encode()
      digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()[:16]


# --- reading ---


def read_corpus(paths: Sequence[str | pathlib.Path]) -> Corpus:
  """Reads text files and folders; if none are given, Python's documentation.

  A file named by the user must be text.  Of a folder everything is read, its
  own folders too, but for hidden files and for what is not text, judged by its
  suffix and its content.

  Raises:
    UserError: for a missing or unreadable path, a named file that is not
      UTF-8 text, or no text at all.
  """
  skipped: dict[str, list[str]] = {}
  documents = []
  for document, reason in _documents(paths):
    if not reason and not document.text.strip():
      reason = "empty"
    if reason:
      skipped.setdefault(reason, []).append(document.name)
    else:
      documents.append(document)
  if not documents:
    why = "".join(
      f"; {reason}: {names[0]}" for reason, names in skipped.items()
    )
    raise UserError(
      f"data {' '.join(map(str, paths))}: no text in it{why}; give --data text "
      "files, or folders that hold some"
    )
  return Corpus(tuple(documents), skipped)


def _documents(
  paths: Sequence[str | pathlib.Path],
) -> Iterator[tuple[Document, str]]:
  """Every document in `paths`, with the reason to skip it, or "" for none."""
  if not paths:
    from pydoc_data import topics  # what `help("for")` prints

    for name, text in sorted(topics.topics.items()):
      yield Document(name, text), ""
  for path in (local_path(path, "data") for path in paths):
    if not path.exists():
      raise UserError(f"data {path}: no such file or folder; check --data")
    if not path.is_dir():
      text, problem = _read_text(path)
      if problem:
        raise UserError(f"data {path}: {problem}; give UTF-8 text files")
      yield Document(str(path), text), ""
    else:
      yield from _folder(path)


def _folder(root: pathlib.Path) -> Iterator[tuple[Document, str]]:
  def refuse(error: OSError) -> None:
    raise UserError(f"data {error.filename}: {error.strerror}") from error

  for folder, folders, files in os.walk(root, onerror=refuse):
    folders[:] = sorted(f for f in folders if not f.startswith("."))
    for file in sorted(f for f in files if not f.startswith(".")):
      path = pathlib.Path(folder, file)
      if path.suffix.lower() not in TEXT_SUFFIXES:
        yield Document(str(path), ""), "no text suffix"
      else:
        text, problem = _read_text(path)
        yield Document(str(path), text), problem


def _read_text(path: pathlib.Path) -> tuple[str, str]:
  """The text of a file and "", or "" and the reason why it has no text."""
  try:
    content = path.read_bytes()
  except OSError as error:
    return "", str(error.strerror)
  if b"\0" in content:
    return "", "binary, not text"
  try:
    return content.decode("utf-8-sig"), ""
  except UnicodeDecodeError as error:
    return "", f"not UTF-8 text (byte {error.start})"


# --- splitting ---


@dataclasses.dataclass(frozen=True)
class Split:
  """Documents to train on, and documents never trained on.

  Attributes:
    copied: characters taken out of the training documents because the same
      paragraph stands in a held-out one.
  """

  train: tuple[Document, ...]
  held_out: tuple[Document, ...]
  copied: int


def split_documents(
  documents: Sequence[Document], fraction: float, seed: int
) -> Split:
  """Holds out about `fraction` of the text: whole documents if it can.

  The order in which documents are considered depends on their text and the seed
  alone.  If no document is small enough, the end of one is held out.

  Paragraphs that also stand in a held-out document are removed from the
  training documents.  Otherwise the held-out loss would measure what the model
  knows by heart: a third of Python's documentation topics is paragraphs copied
  from other topics.
  """
  if not 0 < fraction < 1:
    raise UserError(
      f"held-out fraction {fraction}: wanted more than 0 and less than 1"
    )
  budget = fraction * sum(len(d.text) for d in documents)
  train: list[Document] = []
  held_out: list[Document] = []
  for document in sorted(documents, key=lambda d: _draw(d.text, seed)):
    if len(document.text) <= budget and len(held_out) < len(documents) - 1:
      held_out.append(document)
      budget -= len(document.text)
    else:
      train.append(document)
  if not held_out:
    head, tail = _cut(train.pop(), fraction)
    train.append(head)
    held_out.append(tail)
  kept, copied = _without_copies(train, held_out)
  if not kept:
    raise UserError(
      "data: nothing but copies of the held-out text is left to train on; give "
      "more text"
    )
  return Split(tuple(kept), tuple(held_out), copied)


def _draw(text: str, seed: int) -> bytes:
  key = seed.to_bytes(8, "little", signed=True)
  return hashlib.blake2b(text.encode(), key=key).digest()


def _cut(document: Document, fraction: float) -> tuple[Document, Document]:
  """A document in two, at the end of a line; the tail is about `fraction`."""
  text = document.text.strip()
  if len(text) < 2:
    raise UserError(
      "data: one character cannot be split into training and held-out text; "
      "give more text"
    )
  at = min(max(int(len(text) * (1 - fraction)), 1), len(text) - 1)
  at = text.rfind("\n", 1, at) + 1 or at
  head, tail = text[:at], text[at:]
  return Document(document.name, head), Document(f"{document.name} (end)", tail)


def _without_copies(
  train: Sequence[Document], held_out: Sequence[Document]
) -> tuple[list[Document], int]:
  seen = {key for d in held_out for p in _paragraphs(d) if (key := _key(p))}
  kept, copied = [], 0
  for document in train:
    text = "\n\n".join(p for p in _paragraphs(document) if _key(p) not in seen)
    copied += len(document.text) - len(text)
    if text.strip():
      kept.append(Document(document.name, text))
  return kept, copied


def _paragraphs(document: Document) -> list[str]:
  return document.text.split("\n\n")


def _key(paragraph: str) -> str:
  """Equal for copies, also if their white space differs; "" for a short one."""
  words = " ".join(paragraph.split())
  return words if len(words) >= _COPIED_PARAGRAPH else ""


# --- packing ---


@dataclasses.dataclass(frozen=True)
class Rows:
  """Packed rows of T tokens; see the top of this file.

  Attributes:
    tokens: [rows, T] int32.
    labels: [rows, T] int32, the next token.
    segment_ids: [rows, T] int32; 0 is padding, documents are 1, 2, ...
    weights: [rows, T] float32; 1 where the label belongs to the same document.
  """

  tokens: np.ndarray
  labels: np.ndarray
  segment_ids: np.ndarray
  weights: np.ndarray

  def __len__(self) -> int:
    """The number of rows."""
    return len(self.tokens)

  def __getitem__(self, index: Any) -> Batch:
    """One row or some, as `index` picks from the first axis."""
    return {
      f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)
    }

  def take(self, index: np.ndarray) -> Rows:
    """The rows of these numbers."""
    return Rows(**self[index])

  @property
  def num_labels(self) -> int:
    """How many tokens are predicted: those whose label has weight 1."""
    return int(self.weights.sum())


def tokenize(
  documents: Sequence[Document], tokenizer: Tokenizer
) -> list[np.ndarray]:
  """Each document as BOS, its tokens, EOS: int32 arrays."""
  return [
    np.array(tokenizer.encode(d.text, add_bos=True, add_eos=True), np.int32)
    for d in documents
  ]


def pack(
  documents: Sequence[np.ndarray], sequence_length: int, pad_id: int = 0
) -> Rows:
  """Joins documents and cuts them into rows; the last row is padded."""
  if sequence_length < 1:
    raise UserError(f"sequence length {sequence_length}: wanted 1 or more")
  total = sum(map(len, documents))
  num_rows = -(-total // sequence_length)
  # One token more than the rows hold: the last token's label.
  tokens = np.full(num_rows * sequence_length + 1, pad_id, np.int32)
  document = np.zeros(tokens.shape, np.int32)  # 0 is padding
  tokens[:total] = np.concatenate(documents)
  lengths = [len(d) for d in documents]
  document[:total] = np.repeat(np.arange(1, len(lengths) + 1), lengths)

  shape = num_rows, sequence_length
  inside = (document[:-1] == document[1:]) & (document[:-1] > 0)
  rows = document[:-1].reshape(shape)
  return Rows(
    tokens=tokens[:-1].reshape(shape),
    labels=tokens[1:].reshape(shape),
    segment_ids=np.where(rows > 0, rows - rows[:, :1] + 1, 0).astype(np.int32),
    weights=inside.reshape(shape).astype(np.float32),
  )


# --- batching ---


def training_batches(
  rows: Rows, batch_size: int, seed: int
) -> Callable[[int], Batch]:
  """A function from a step's number to its batch.

  The batch depends on the rows, the seed and the step alone.
  Each pass over the rows is in another order.
  """
  source = grain.MapDataset.source(rows).seed(seed)
  batches = source.shuffle().repeat().batch(batch_size)

  def batch(step: int) -> Batch:
    found = batches[step]
    assert found is not None  # only a filter leaves gaps, and there is none
    return found

  return batch


def evaluation_batches(rows: Rows, batch_size: int) -> Iterator[Batch]:
  """Every row once, in order.

  All batches have `batch_size` rows: the last one is filled up with rows whose
  weights are 0.
  """
  for start in range(0, len(rows), batch_size):
    index = np.arange(start, start + batch_size)
    batch = rows[np.minimum(index, len(rows) - 1)]
    batch["weights"] = batch["weights"] * (index < len(rows))[:, None]
    yield batch


def unigram_loss(train: Rows, held_out: Rows, vocab_size: int) -> float:
  """The held-out loss of a model that ignores the context.

  It gives each token the probability that it has among the training labels,
  after one is added to every count, so that no probability is zero.

  Returns:
    Nats per token; its exponential is the unigram perplexity.
  """

  def counts(rows: Rows) -> np.ndarray:
    return np.bincount(rows.labels[rows.weights > 0], minlength=vocab_size)

  smoothed = counts(train) + 1
  log_probability = np.log(smoothed / smoothed.sum())
  wanted = counts(held_out)
  return float(-(wanted * log_probability).sum() / wanted.sum())
