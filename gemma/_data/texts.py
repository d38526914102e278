"""The text of many documents as one run of bytes, in a file or in memory.

Everything that is done with text of any size reads it from here, a block at a
time.  `Texts` knows where each document ends; the bytes stay on disk.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from .read import (
  Document,
  Fingerprint,
  Skipped,
  Source,
  note_empty,
  reading,
  without_surrogates,
)


class Bytes(Protocol):
  """Something that parts can be read of."""

  def read(self, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop`."""
    ...


class FileBytes:
  """A file of which parts are read.

  It is not mapped into memory: the pages that a process has read by a map count
  as its own, and in the end it would seem to hold the whole file.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    self._lock = threading.Lock()

  def __reduce__(self) -> tuple:
    """For another process: it opens the file itself."""
    return FileBytes, (self.path,)

  def read(self, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop`; threads may call it together."""
    if hasattr(os, "pread"):
      return os.pread(self._file, stop - start, start)
    with self._lock:
      os.lseek(self._file, start, os.SEEK_SET)
      return os.read(self._file, stop - start)

  def close(self) -> None:
    """Closes the file."""
    if self._file >= 0:
      os.close(self._file)
      self._file = -1

  def __del__(self) -> None:
    """Closes the file, if it was opened."""
    if hasattr(self, "_file"):
      self.close()


class MemoryBytes:
  """Bytes in memory."""

  def __init__(self, content: bytes):
    self._content = content

  def read(self, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop`."""
    return self._content[start:stop]


@dataclasses.dataclass(frozen=True)
class Texts:
  """Documents, one after the other.

  Attributes:
    content: their UTF-8 text.
    ends: int64 [documents], the byte after the last of each.
    characters: int64 [documents].
    draws: uint64 [documents], by which they are ordered: a hash of text and
      seed.
    fingerprint: of the texts in their order, as `Corpus.fingerprint`.
    parts: the byte after the last of what each path gave that the user named,
      as far as there is text.
  """

  content: Bytes
  ends: np.ndarray
  characters: np.ndarray
  draws: np.ndarray
  fingerprint: str
  parts: tuple[int, ...] = ()

  @property
  def starts(self) -> np.ndarray:
    """int64 [documents], the first byte of each."""
    return np.concatenate([[0], self.ends[:-1]]).astype(np.int64)


class Writer:
  """Takes documents in and tells what a `Texts` must know.

  Args:
    write: takes the next bytes.
    seed: of the order that is drawn.
  """

  def __init__(self, write: Callable[[bytes], object], seed: int):
    self._write = write
    self._key = seed.to_bytes(8, "little", signed=True)
    self._fingerprint = Fingerprint()
    self._ends = array.array("q")
    self._characters = array.array("q")
    self._draws = array.array("Q")
    self.size = 0

  def add(self, pieces: Iterable[str]) -> bool:
    """Takes a document in; False for one without text, which it leaves out."""
    before, begin = self._fingerprint.copy(), self.size
    draw = hashlib.blake2b(key=self._key)
    characters, blank = 0, True
    for piece in pieces:
      piece = without_surrogates(piece)
      content = piece.encode()
      self._write(content)
      self._fingerprint.extend(content)
      draw.update(content)
      self.size += len(content)
      characters += len(piece)
      blank = blank and not piece.strip()
    if blank:
      self._fingerprint, self.size = before, begin
      return False
    self._fingerprint.end()
    self._ends.append(self.size)
    self._characters.append(characters)
    self._draws.append(int.from_bytes(draw.digest()[:8], "big"))
    return True

  def mark(self) -> tuple[int, int, Fingerprint]:
    """This moment, for `back`."""
    return len(self._ends), self.size, self._fingerprint.copy()

  def back(self, mark: tuple[int, int, Fingerprint]) -> None:
    """Forgets what came after `mark`; what was written must be cut by hand."""
    count, self.size, self._fingerprint = mark
    for values in (self._ends, self._characters, self._draws):
      del values[count:]

  def texts(self, content: Bytes) -> Texts:
    """All that was taken in; `content` has what was written."""
    return Texts(
      content,
      np.array(self._ends, np.int64),
      np.array(self._characters, np.int64),
      np.array(self._draws, np.uint64),
      self._fingerprint.text(),
    )


def texts_in_memory(documents: Sequence[Document], seed: int) -> Texts:
  """`Texts` of documents that are in memory; none may be empty."""
  parts: list[bytes] = []
  writer = Writer(parts.append, seed)
  for document in documents:
    writer.add([document.text])
  return writer.texts(MemoryBytes(b"".join(parts)))


def write_texts(
  path: pathlib.Path,
  sources: Iterable[Source],
  text_field: str | None,
  seed: int,
  skipped: Skipped,
) -> Texts:
  """Writes the text of all sources into one file.

  Args:
    path: of the file.
    sources: are read once.
    text_field: as `read_corpus` takes it.
    seed: of the order that is drawn.
    skipped: what is not text is added.

  Raises:
    UserError: as `read_corpus`.
  """
  parts: list[int] = []
  with open(path, "wb") as file:
    writer = Writer(file.write, seed)
    for source in sources:
      mark, count, some = writer.mark(), 0, 0
      with reading(source, skipped) as attempt:
        for pieces in source.documents(text_field):
          kept = writer.add(pieces)
          count, some = count + 1, some + kept
          if not kept:
            file.seek(writer.size)
      if attempt.failed:
        writer.back(mark)
        file.seek(writer.size)
      else:
        note_empty(source, count, some, skipped)
      # Paths before this one that had no source end where it begins.
      parts += [mark[1]] * (source.part - len(parts))
      parts[source.part :] = [writer.size]
    file.truncate(writer.size)
  texts = writer.texts(FileBytes(path))
  return dataclasses.replace(texts, parts=tuple(parts))
