"""From files to token ids on disk: what `train` does before the first step.

    files known by name, size and time?  ---------------------> fingerprint
      else read them all, once, into one scratch file ------------^
    tokens of this text, tokenizer and split in the cache?  --> done
      else split, look for copies, learn a tokenizer, encode, keep

Text is held a block at a time, whatever its size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import sentencepiece

from .._errors import UserError
from .._tokenizer import Tokenizer
from .cache import FORMAT, Cache, digest, full_disk_is_said, key_of
from .copies import Report, Watch, silent
from .encode import encoded, learning_texts
from .read import Skipped, find_sources, no_text
from .remote import Remote
from .rows import Tokens, begins_bit, count_labels, token_dtype
from .spans import Spans
from .split import split_texts
from .texts import FileBytes, Texts, write_texts

# Two writes within this time may leave a file with the same times.
_CLOCK_STEP = 2.0  # seconds


@dataclasses.dataclass(frozen=True)
class Summary:
  """What text there is.

  Attributes:
    documents: how many.
    characters: in all of them.
    fingerprint: of the texts in their order, as `Corpus.fingerprint`.
    skipped: names of files that were not read, by the reason.
    parts: where in the text each of the given paths ends, in bytes.
  """

  documents: int
  characters: int
  fingerprint: str
  skipped: Skipped
  parts: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Token ids, ready to be packed into rows.

  Attributes:
    tokenizer: of all of them.
    train: to train on.
    held_out: to evaluate on.
    report: what both have in common.
    directory: where they lie.
    size: bytes there.
  """

  tokenizer: Tokenizer
  train: Tokens
  held_out: Tokens
  report: Report
  directory: pathlib.Path
  size: int


class TextFiles:
  """The text of some files.

  Args:
    paths: files and folders; Python's documentation if there is none.
    text_field: as `read_corpus` takes it.
    seed: of the order of documents.
    cache: where results are kept.
    folder: for scratch, as long as this is used.
    watch: is told what takes time.
    apart: whether the tokens of each path are to follow each other.

  Attributes:
    summary: what text there is.
  """

  def __init__(
    self,
    paths: Sequence[pathlib.Path],
    text_field: str | None,
    seed: int,
    cache: Cache,
    folder: pathlib.Path,
    watch: Watch = silent,
    apart: bool = False,
  ):
    self._apart = apart
    self._paths, self._text_field, self._seed = paths, text_field, seed
    self._cache, self._folder, self._watch = cache, folder, watch
    self._texts: Texts | None = None
    skipped: Skipped = {}
    sources = list(find_sources(paths, skipped))
    files = [source.path for source in sources if source.path is not None]
    name = f"files/{self._files_key(files, skipped)}.json"
    known = self._cache.read_json(name) if files else None
    # (That of an earlier version does not know the parts.)
    if known is not None and (not apart or known.get("parts")):
      self.summary = self._of_all_paths(Summary(**known))
      return
    begun = time.time()
    self.summary = self._of_all_paths(self._read(sources, skipped))
    # Only of files that have not been written to of late: see _CLOCK_STEP.
    if files and _newest(files) < begun - _CLOCK_STEP:
      cache.write_json(name, dataclasses.asdict(self.summary))

  def _of_all_paths(self, summary: Summary) -> Summary:
    """With the ends of the last paths too, if there was nothing in them."""
    parts = list(summary.parts)
    missing = len(self._paths) - len(parts)
    return dataclasses.replace(summary, parts=[*parts, *parts[-1:] * missing])

  def _files_key(
    self, files: Sequence[pathlib.Path | Remote], skipped: Skipped
  ) -> str:
    """Of all that tells whether files have changed, short of their content."""
    states = []
    for path in files:
      if isinstance(path, Remote):
        size, told = path.state()
        states.append([str(path), size, told or time.time_ns()])
        continue
      with contextlib.suppress(OSError):
        found = path.stat()
        times = found.st_mtime_ns, found.st_ctime_ns
        place = str(path.absolute()), found.st_dev, found.st_ino
        # A pipe is gone once it was read: never the same again.
        once = 0 if path.is_file() else time.time_ns()
        states.append([*place, found.st_size, *times, once])
    given = list(map(str, self._paths))
    return key_of([FORMAT, self._text_field, given, skipped, states])

  def _read(self, sources: Sequence, skipped: Skipped) -> Summary:
    sizes = [_size(source.path) for source in sources]
    done = self._watch("reading text", sum(sizes))

    def watched() -> Iterator:
      for source, size in zip(sources, sizes, strict=True):
        yield source
        done(size)

    texts = write_texts(
      self._folder / "text.bin",
      watched(),
      self._text_field,
      self._seed,
      skipped,
    )
    if not len(texts.ends):
      raise no_text(self._paths, skipped)
    self._texts = texts
    return Summary(
      len(texts.ends),
      int(texts.characters.sum()),
      texts.fingerprint,
      skipped,
      texts.parts,
    )

  def _text(self) -> Texts:
    """The text itself, read now unless it was already."""
    if self._texts is None:
      skipped: Skipped = {}
      sources = list(find_sources(self._paths, skipped))
      now = self._read(sources, skipped)
      if now.fingerprint != self.summary.fingerprint:
        raise UserError(
          "data: it changed while it was read; start again when it is complete"
        )
    assert self._texts is not None
    return self._texts

  def close(self) -> None:
    """Closes the scratch file."""
    if self._texts is not None and isinstance(self._texts.content, FileBytes):
      self._texts.content.close()

  def prepare(
    self, tokenizer: Tokenizer | None, vocab_size: int, fraction: float
  ) -> Prepared:
    """The text as tokens, from the cache or made now.

    Args:
      tokenizer: None to learn one from the training text.
      vocab_size: pieces of the one that is learnt.
      fraction: of the text, to be held out.

    Raises:
      UserError: if there is too little text.
    """
    split = [FORMAT, self.summary.fingerprint, self._seed, fraction]
    parts = list(self.summary.parts) if self._apart else []
    found: tuple[Spans, Spans, Report] | None = None
    if tokenizer is None:
      name = key_of([*split, vocab_size, sentencepiece.__version__])
      model = self._cache.read_model(name)
      if model is None:
        found = split_texts(self._text(), fraction, self._watch)
        self._watch("learning a tokenizer", 0)
        learning = learning_texts(self._text(), found[0], self._seed)
        model = Tokenizer.train(learning, vocab_size).model
        self._cache.write_model(name, model)
      tokenizer = Tokenizer(model)
    key = key_of([*split, digest(tokenizer.model), *parts])
    entry = self._cache.read_entry(key)
    if entry is None:
      found = found or split_texts(self._text(), fraction, self._watch)
      self._encode(key, tokenizer, *found)
      entry = self._cache.read_entry(key)
    if entry is None:
      raise UserError(
        f"cache {self._cache.directory}: what was written cannot be read "
        "again; give --cache-dir another place"
      )
    return _prepared(tokenizer, *entry)

  def _encode(
    self,
    key: str,
    tokenizer: Tokenizer,
    train: Spans,
    held_out: Spans,
    report: Report,
  ) -> None:
    meta: dict[str, Any] = {"report": dataclasses.asdict(report)}
    done = self._watch("text to tokens", train.size + held_out.size)
    counts = []
    with self._cache.making_entry(key, meta) as folder:
      for name, spans in (("train", train), ("held_out", held_out)):
        whole = [spans]
        if self._apart and name == "train":
          whole = spans.apart(self.summary.parts)
        path = folder / f"{name}.bin"
        ends, count = self._write_tokens(path, whole, tokenizer, done)
        meta[name] = {"size": ends[-1], "documents": spans.num_documents}
        if len(whole) > 1:
          meta[name]["parts"] = ends
        counts.append(count)
      np.save(folder / "counts.npy", np.stack(counts))

  def _write_tokens(
    self,
    path: pathlib.Path,
    parts: Sequence[Spans],
    tokenizer: Tokenizer,
    done: Callable[[int], None],
  ) -> tuple[list[int], np.ndarray]:
    """Encodes parts into a file; where each ends, and how often each id is."""
    size, ends, vocabulary = 0, [], tokenizer.vocab_size
    counts = np.zeros(vocabulary, np.int64)
    bit = begins_bit(token_dtype(vocabulary))
    with open(path, "wb") as file:
      for spans in parts:
        for stored, of_bytes in encoded(self._text(), spans, tokenizer):
          file.write(stored.tobytes())
          size += len(stored)
          counts += count_labels(stored & (bit - 1), stored >= bit, vocabulary)
          done(of_bytes)
        ends.append(size)
    return ends, counts


@contextlib.contextmanager
def text_files(
  paths: Sequence[pathlib.Path],
  text_field: str | None,
  seed: int,
  cache: Cache,
  watch: Watch = silent,
  apart: bool = False,
) -> Iterator[TextFiles]:
  """`TextFiles`, whose scratch is removed in the end."""
  with full_disk_is_said(cache), cache.scratch() as folder:
    text = TextFiles(paths, text_field, seed, cache, folder, watch, apart)
    try:
      yield text
    finally:
      text.close()


def _prepared(
  tokenizer: Tokenizer, folder: pathlib.Path, meta: dict[str, Any]
) -> Prepared:
  counts = np.load(folder / "counts.npy")
  dtype = token_dtype(tokenizer.vocab_size)
  train, held_out = (
    Tokens(
      FileBytes(folder / f"{name}.bin"), dtype, **meta[name], label_counts=count
    )
    for name, count in zip(("train", "held_out"), counts, strict=True)
  )
  size = sum(known["size"] for known in meta["files"].values())
  return Prepared(
    tokenizer, train, held_out, Report(**meta["report"]), folder, size
  )


def _size(path: pathlib.Path | Remote | None) -> int:
  if isinstance(path, Remote):
    return path.state()[0]
  try:
    return path.stat().st_size if path is not None else 0
  except OSError:
    return 0


def _newest(files: Sequence[pathlib.Path | Remote]) -> float:
  newest = 0.0
  for path in files:
    if isinstance(path, Remote):  # its clock is another
      continue
    with contextlib.suppress(OSError):
      found = path.stat()
      newest = max(newest, found.st_mtime, found.st_ctime)
  return newest
