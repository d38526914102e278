"""The documents of a file, by its format.

    .txt .md .py ...   the whole file
    .jsonl .ndjson     one document a line: a string, or an object's field
    .json              an array of such, or one object
    .csv .tsv          one document a row: a column, by the name in the header
    .ipynb             the sources of a notebook's cells
    .html .htm         what a reader sees
    .parquet           one document a row: a column
    .arrayrecord       one document a record: a text, or a JSON object's field
    .gz .bz2 .xz       any of these, compressed

All text is UTF-8.  A byte order mark is dropped; line ends stay as they are.  A
NUL byte means that a file is not text; one that JSON escapes stays.  Half of a
surrogate pair, which only JSON can hold, becomes U+FFFD.

A document is an iterator over pieces of its text, so that a file of any size is
read in little memory.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import itertools
import json
import lzma
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from .._files import json_of
from . import records
from .html import visible_text
from .not_text import NotText, field_of, names_of, refuse_other_unicode
from .remote import Remote

_BLOCK = 1 << 20  # bytes

_OPENERS: dict[str, Callable[..., Any]] = {
  ".gz": gzip.open,
  ".bz2": bz2.open,
  ".xz": lzma.open,
}

_PLAIN = frozenset(
  ".txt .text .md .markdown .rst .org .tex .xml .yaml .yml .toml .ini .cfg .py "
  ".pyi .c .h .cc .cpp .hpp .cu .go .rs .java .kt .scala .js .jsx .ts .tsx "
  ".css .sh .bash .lua .rb .php .pl .r .jl .hs .ml .lisp .el .sql .swift "
  ".m".split()
)

_UNPACK = "which is not read; unpack it first"
_CONVERT = "which is not read; convert it to JSONL or UTF-8 text"

# What is text, but in a form that is not read: why, and what to do.
_REFUSED = {
  ".zst": "Zstandard, which is not read; unpack it first: zstd -d FILE",
  ".arrow": f"Arrow, {_CONVERT}",
  ".feather": f"Feather, {_CONVERT}",
  ".avro": f"Avro, {_CONVERT}",
  ".pdf": f"PDF, {_CONVERT}",
  ".docx": f"a Word document, {_CONVERT}",
  ".epub": f"EPUB, {_CONVERT}",
  ".zip": f"a ZIP archive, {_UNPACK}",
  ".tar": f"a tar archive, {_UNPACK}",
  ".tgz": f"a tar archive, {_UNPACK}",
  ".7z": f"a 7z archive, {_UNPACK}",
}


def has_text_suffix(path: pathlib.Path | Remote) -> bool:
  """Whether a file in a folder is looked at."""
  suffix = _suffix(path)
  known = (_PLAIN, _READERS, _RECORDS, _REFUSED)
  return any(suffix in suffixes for suffixes in known)


def documents(
  path: pathlib.Path | Remote, text_field: str | None
) -> Iterator[Iterable[str]]:
  """Each document of a file, as pieces of text, to be read in order.

  Args:
    path: a file.
    text_field: the field of a JSON object, or the column of a table, that holds
      the text.  None: JSON, tables, notebooks, HTML and records are text as
      they stand.

  Raises:
    NotText: now or while the pieces are read.
  """
  suffix = _suffix(path)
  if suffix in _REFUSED:
    reason, _, advice = _REFUSED[suffix].partition("; ")
    raise NotText(reason, advice=advice)
  read = _READERS.get(suffix, _whole) if text_field is not None else _whole
  read = _RECORDS.get(suffix, read)
  unpack = _OPENERS.get(_name(path).suffix.lower(), contextlib.nullcontext)
  with (
    _said_in_words(),
    path.open() if isinstance(path, Remote) else open(path, "rb") as raw,
    unpack(raw) as file,
  ):
    for pieces in read(file, suffix, text_field or ""):
      yield _guarded(pieces)


def _guarded(pieces: Iterable[str]) -> Iterator[str]:
  """The same, for whoever reads them outside of `documents`."""
  with _said_in_words():
    yield from pieces


@contextlib.contextmanager
def _said_in_words() -> Iterator[None]:
  """Inside, a file that cannot be read or unpacked raises `NotText`."""
  try:
    yield
  except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
    raise NotText("damaged archive", f" ({error})", "get it anew") from error
  except UnicodeDecodeError as error:  # of texts that a library decodes
    raise NotText(f"not UTF-8 text (byte {error.start})") from error
  except OSError as error:
    if error.errno is None:  # what bz2 raises for damage
      raise NotText("damaged archive", f" ({error})", "get it anew") from error
    raise NotText(str(error.strerror)) from error


def _name(path: pathlib.Path | Remote) -> pathlib.PurePath:
  return path.name if isinstance(path, Remote) else path


def _suffix(path: pathlib.Path | Remote) -> str:
  """In lower case; of a compressed file, that of its content."""
  suffixes = [s.lower() for s in _name(path).suffixes[-2:]]
  if suffixes and suffixes[-1] in _OPENERS:
    return suffixes[0] if len(suffixes) == 2 else ".txt"
  return suffixes[-1] if suffixes else ""


# --- text ---


def _whole(file: BinaryIO, suffix: str, field: str) -> Iterator[Iterable[str]]:
  yield _pieces(file)


def _pieces(file: BinaryIO) -> Iterator[str]:
  """The text of a file, a block after the other."""
  decoder = codecs.getincrementaldecoder("utf-8")()
  position = 0  # of the first byte that is not decoded yet
  block = file.read(_BLOCK)
  refuse_other_unicode(block)
  more = bool(block)
  if block.startswith(codecs.BOM_UTF8):
    block, position = block[3:], 3
  while True:
    if b"\0" in block:
      raise NotText("binary, not text")
    waiting = len(decoder.getstate()[0])
    try:
      piece = decoder.decode(block, final=not more)
    except UnicodeDecodeError as error:
      at = position - waiting + error.start
      raise NotText(f"not UTF-8 text (byte {at})") from error
    position += len(block)
    yield piece
    if not more:
      return
    block = file.read(_BLOCK)
    more = bool(block)


# --- records ---


def _jsonl(file: BinaryIO, suffix: str, field: str) -> Iterator[Iterable[str]]:
  position = 0
  for number, line in enumerate(file, 1):
    if number == 1:
      refuse_other_unicode(line)
    if b"\0" in line:
      raise NotText("binary, not text")
    try:
      text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
      at = position + error.start
      raise NotText(
        f"not UTF-8 text (byte {at})", f", line {number}"
      ) from error
    position += len(line)
    if not text:
      continue
    try:
      record = json_of(text)
    except ValueError as error:
      raise NotText(
        "not JSON", f" in line {number} ({error})", "mend the line"
      ) from error
    yield [field_of(record, field, f"line {number}")]


def _json(file: BinaryIO, suffix: str, field: str) -> Iterator[Iterable[str]]:
  values = _Values(_pieces(file))
  if values.peek() != "[":
    record = values.take()
    if not isinstance(record, dict) or field not in record:
      raise NotText(
        f"neither an array of records nor an object with {field!r}",
        f" (its fields: {names_of(record)})"
        if isinstance(record, dict)
        else "",
        "write one JSON object a line, as .jsonl, or give --text-field",
      )
    yield [field_of(record, field, "the object")]
  else:
    values.skip()
    number, end = 0, values.peek() == "]"
    while not end:
      number += 1
      yield [field_of(values.take(), field, f"record {number}")]
      end = values.peek() == "]"
      if not end and values.peek() != ",":
        raise NotText("not JSON", f" after record {number}", "mend the file")
      values.skip()
    if number == 0:
      values.skip()
  if values.peek():
    raise NotText("not JSON", " (something follows its end)", "mend the file")


class _Values:
  """JSON values of a text of which only a part is held at a time."""

  def __init__(self, pieces: Iterator[str]):
    self._pieces = pieces
    self._text, self._at = "", 0
    self._decode = json.JSONDecoder().raw_decode

  def _grow(self) -> bool:
    """Twice as much text, or what there is; False at its end."""
    parts, wanted = [self._text[self._at :]], len(self._text) - self._at
    for piece in self._pieces:
      parts.append(piece)
      wanted -= len(piece)
      if piece and wanted <= 0:
        break
    self._text, self._at = "".join(parts), 0
    return len(self._text) > len(parts[0])

  def peek(self) -> str:
    """The next character that is no white space; "" at the end."""
    while True:
      while self._at < len(self._text):
        if self._text[self._at] not in " \t\r\n":
          return self._text[self._at]
        self._at += 1
      if not self._grow():
        return ""

  def skip(self) -> None:
    """Goes past the character that was peeked at."""
    self._at += 1

  def take(self) -> Any:
    """The next value."""
    self.peek()
    while True:
      try:
        value, end = self._decode(self._text, self._at)
      except (ValueError, RecursionError) as error:
        if self._grow():
          continue
        raise NotText("not JSON", f" ({error})", "mend the file") from error
      # A number may go on in the text that is not read yet.
      if end == len(self._text) and self._grow():
        continue
      self._at = end
      return value


def _table(file: BinaryIO, suffix: str, field: str) -> Iterator[Iterable[str]]:
  rows = _table_rows(file, suffix, field)
  header = next(rows, None)
  if header is None:
    return
  if field not in header:
    raise NotText(
      f"no column {field!r}",
      f" in line 1 (it has: {', '.join(header)[:200]})",
      "give --text-field one of its columns",
    )
  column = header.index(field)
  for row in rows:
    yield [row[column] if column < len(row) else ""]


def _table_rows(file: BinaryIO, suffix: str, field: str) -> Iterator[list[str]]:
  lines = _lines(_pieces(file))
  first = next(lines, None)
  if first is None:
    return
  delimiter = "\t" if suffix == ".tsv" else ","
  for other in ";\t":  # what spreadsheets write where 0,5 is a half
    if delimiter not in first and other in first:
      delimiter = other
  csv.field_size_limit(1 << 30)
  reader = csv.reader(
    itertools.chain([first], lines), delimiter=delimiter, strict=True
  )
  try:
    yield from filter(None, reader)
  except csv.Error as error:
    where = f" in line {reader.line_num} ({error})"
    raise NotText("not a table", where, "mend the line") from error


def _lines(pieces: Iterator[str]) -> Iterator[str]:
  """Lines with their ends; of \\n alone, so that \\r\\n stays together."""
  rest = ""
  for piece in pieces:
    *whole, rest = (rest + piece).split("\n")
    for line in whole:
      yield line + "\n"
  if rest:
    yield rest


def _notebook(
  file: BinaryIO, suffix: str, field: str
) -> Iterator[Iterable[str]]:
  notebook = _Values(_pieces(file)).take()
  try:
    sheets = notebook.get("worksheets", [notebook])  # until version 3
    cells = [cell for sheet in sheets for cell in sheet["cells"]]
    sources = [cell.get("source", cell.get("input", "")) for cell in cells]
    texts = ["".join(source) for source in sources]
  except (AttributeError, KeyError, TypeError) as error:
    raise NotText("not a notebook", advice="save it anew") from error
  yield ["\n\n".join(text for text in texts if text.strip())]


def _html(file: BinaryIO, suffix: str, field: str) -> Iterator[Iterable[str]]:
  yield [visible_text(_pieces(file))]


# What is no text as it stands, whatever the field.
_RECORDS: dict[str, Callable[..., Iterator[Iterable[str]]]] = {
  ".parquet": records.parquet,
  ".arrayrecord": records.array_record,
  ".array_record": records.array_record,
}
_READERS: dict[str, Callable[..., Iterator[Iterable[str]]]] = {
  ".jsonl": _jsonl,
  ".ndjson": _jsonl,
  ".json": _json,
  ".csv": _table,
  ".tsv": _table,
  ".ipynb": _notebook,
  ".html": _html,
  ".htm": _html,
}
