"""Files and folders to documents."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence

from .._arguments import path_of, several
from .._errors import UserError
from .._files import remote_url
from . import formats
from .remote import Remote


@dataclasses.dataclass(frozen=True)
class Document:
  """One text and where it came from."""

  name: str
  text: str


Skipped = dict[str, list[str]]
"""Names of files that were not read, by the reason."""


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents, and what was skipped: the names of files by the reason."""

  documents: tuple[Document, ...]
  skipped: Skipped

  @property
  def fingerprint(self) -> str:
    """A hash of the texts in their order; their names do not count."""
    fingerprint = Fingerprint()
    for document in self.documents:
      fingerprint.extend(document.text.encode())
      fingerprint.end()
    return fingerprint.text()


class Fingerprint:
  """Becomes a hash of texts in their order."""

  def __init__(self) -> None:
    self._digest = hashlib.sha256()
    self._size = 0

  def copy(self) -> Fingerprint:
    """One that goes on from here by itself."""
    copied = Fingerprint()
    copied._digest, copied._size = self._digest.copy(), self._size
    return copied

  def extend(self, piece: bytes) -> None:
    """Takes in a part of a document."""
    self._digest.update(piece)
    self._size += len(piece)

  def end(self) -> None:
    """The document ends here."""
    self._digest.update(self._size.to_bytes(8, "little"))
    self._size = 0

  def text(self) -> str:
    """The hash, 16 characters."""
    return self._digest.hexdigest()[:16]


def read_corpus(
  paths: Sequence[str | pathlib.Path], *, text_field: str | None = "text"
) -> Corpus:
  """Reads text files and folders; if none are given, Python's documentation.

  A file named by the user must be text.  Of a folder everything is read, its
  own folders too, but for hidden files, for links to folders and for what is
  not text, judged by its suffix and its content.  JSONL, JSON, tables,
  notebooks, HTML and compressed files are read as `_data/formats.py` says.

  All the text is held in memory; `pallas-gemma train` does not do that.

  Args:
    paths: files and folders.
    text_field: the field of a JSON object, or the column of a table, that holds
      the text.  None: such files, notebooks and HTML are text as they stand.

  Raises:
    UserError: for a missing or unreadable path, a named file that is not
      UTF-8 text or has no such field, or no text at all.
  """
  skipped: Skipped = {}
  found: list[Document] = []
  for source in find_sources(paths, skipped):
    texts: list[str] = []
    with reading(source, skipped) as attempt:
      texts = ["".join(pieces) for pieces in source.documents(text_field)]
    texts = [without_surrogates(text) for text in texts]
    some = [text for text in texts if text.strip()]
    if not attempt.failed:
      note_empty(source, len(texts), len(some), skipped)
    names = [source.name] * len(some)
    if len(texts) > 1:
      names = [f"{source.name}#{i + 1}" for i in range(len(some))]
    found += map(Document, names, some)
  if not found:
    raise no_text(paths, skipped)
  return Corpus(tuple(found), skipped)


@dataclasses.dataclass(frozen=True)
class Source:
  """A file, or a text of Python's documentation.

  Attributes:
    name: for messages.
    path: of the file.
    text: of what has no file.
    named: the user gave this file's own name.
    part: which of the given paths it belongs to.
  """

  name: str
  path: pathlib.Path | Remote | None = None
  text: str = ""
  named: bool = False
  part: int = 0

  def documents(self, text_field: str | None) -> Iterator:
    """Each document as an iterable of pieces of its text."""
    if self.path is None:
      return iter([[self.text]])
    return formats.documents(self.path, text_field)


class reading:
  """A context in which a source is read: what is not text is noted, or raised.

  Args:
    source: that is read.
    skipped: the reason is added here, if the source was found in a folder.

  Attributes:
    failed: whether it is not text.

  Raises:
    UserError: if the user named the file.
  """

  def __init__(self, source: Source, skipped: Skipped):
    self._source, self._skipped = source, skipped
    self.failed = False

  def __enter__(self) -> reading:
    """Begins."""
    return self

  def __exit__(self, kind, error, trace) -> bool:
    """Takes a `NotText`, and nothing else."""
    if not isinstance(error, formats.NotText):
      return False
    self.failed = True
    if self._source.named:
      raise UserError(f"data {self._source.name}: {error}") from error
    name = f"{self._source.name}{error.where}"
    self._skipped.setdefault(error.reason, []).append(name)
    return True


def note_empty(source: Source, all: int, some: int, skipped: Skipped) -> None:
  """Notes a file without text, or how many of its records have none."""
  if some == 0:
    skipped.setdefault("empty", []).append(source.name)
  elif some < all:
    name = f"{source.name} ({all - some:,} of {all:,} records)"
    skipped.setdefault("empty", []).append(name)


def no_text(paths: Sequence[str | pathlib.Path], skipped: Skipped) -> UserError:
  """The error for data of which nothing is left."""
  why = "".join(f"; {reason}: {names[0]}" for reason, names in skipped.items())
  return UserError(
    f"data {' '.join(map(str, paths))}: no text in it{why}; give --data text "
    "files, or folders that hold some"
  )


def without_surrogates(text: str) -> str:
  """The text, with U+FFFD for half a surrogate pair."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
  return text


def find_sources(
  paths: Sequence[str | pathlib.Path], skipped: Skipped
) -> Iterator[Source]:
  """Every source in `paths`, in order; others are added to `skipped`."""
  if not paths:
    from pydoc_data import topics  # what `help("for")` prints

    for name, text in sorted(topics.topics.items()):
      yield Source(name, text=text)
  for part, given in enumerate(several("data", paths, "paths")):
    url = remote_url(path_of("data", given))
    path = pathlib.Path(given) if url is None else Remote(url)
    if not path.exists():
      raise UserError(f"data {path}: no such file or folder; check --data")
    if path.is_dir():
      before, some = _count(skipped), False
      for source in _folder(path, skipped):
        some = True
        yield dataclasses.replace(source, part=part)
      if not some and _count(skipped) == before:
        skipped.setdefault("a folder without files", []).append(str(path))
    else:
      yield Source(str(path), path, named=True, part=part)


def _count(skipped: Skipped) -> int:
  return sum(map(len, skipped.values()))


def _folder(root: pathlib.Path | Remote, skipped: Skipped) -> Iterator[Source]:
  if isinstance(root, Remote):
    for remote in root.files():
      if formats.has_text_suffix(remote):
        yield Source(str(remote), remote)
      else:
        skipped.setdefault("no text suffix", []).append(str(remote))
    return

  def refuse(error: OSError) -> None:
    raise UserError(f"data {error.filename}: {error.strerror}") from error

  for folder, folders, files in os.walk(root, onerror=refuse):
    folders[:] = sorted(f for f in folders if not f.startswith("."))
    for name in folders:  # which a walk does not follow: they may go in circles
      path = pathlib.Path(folder, name)
      if path.is_symlink():
        skipped.setdefault("a link to a folder", []).append(str(path))
    for file in sorted(f for f in files if not f.startswith(".")):
      path = pathlib.Path(folder, file)
      if not formats.has_text_suffix(path):
        skipped.setdefault("no text suffix", []).append(str(path))
      elif path.exists() and not path.is_file():  # a pipe would be waited for
        skipped.setdefault("not a file", []).append(str(path))
      else:
        yield Source(str(path), path)
