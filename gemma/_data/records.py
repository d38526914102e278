"""Parquet and ArrayRecord: files of records that a library reads.

The libraries are extras, `parquet` and `arrayrecord`; without one its files are
refused, with what to install.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from .._errors import UserError
from .._files import json_of
from .not_text import NotText, field_of

_TOGETHER = 1024  # records that are read at once


def parquet(file: BinaryIO, suffix: str, field: str) -> Iterator[list[str]]:
  """One document a row: a column of texts."""
  arrow = _library("pyarrow", "Parquet", "parquet")
  reader = _library("pyarrow.parquet", "Parquet", "parquet")
  if not field:
    raise NotText("Parquet", " is no text as it stands", "give --text-field")
  try:
    table = reader.ParquetFile(file)
    names = table.schema_arrow.names
    if field not in names:
      raise NotText(
        f"no column {field!r}",
        f" (it has: {', '.join(names)[:200]})",
        "give --text-field one of its columns",
      )
    for batch in table.iter_batches(_TOGETHER, columns=[field]):
      for text in batch.column(0).to_pylist():
        yield [field_of({field: text}, field, "a row")]
  except (arrow.ArrowException, OSError) as error:
    if getattr(error, "errno", None) is not None:  # of the disk, not of Arrow
      raise
    # Its message may have more lines, and some are of the library's inside.
    what = str(error).partition("\n")[0]
    raise NotText("not Parquet", f" ({what})", "get it anew") from error


def array_record(
  file: BinaryIO, suffix: str, field: str
) -> Iterator[list[str]]:
  """One document a record: UTF-8 text, or a JSON object's field."""
  module = _library(
    "array_record.python.array_record_module", "ArrayRecord", "arrayrecord"
  )
  try:
    with _on_disk(file) as path:
      reader = module.ArrayRecordReader(path)
      count = reader.num_records()
      if not count:  # what it says of a damaged file, too
        raise NotText(
          "not ArrayRecord, or without records", advice="get it anew"
        )
      for start in range(0, count, _TOGETHER):
        stop = min(start + _TOGETHER, count)
        for number, record in enumerate(reader.read(start, stop), start + 1):
          yield [_text(record, field, f"record {number}")]
  except UserError:  # the file could not be fetched
    raise
  except (RuntimeError, ValueError) as error:
    what = str(error).partition("\n")[0]
    raise NotText("not ArrayRecord", f" ({what})", "get it anew") from error


@contextlib.contextmanager
def _on_disk(file: BinaryIO) -> Iterator[str]:
  """The path of a file, or of a copy of one that is not on this machine."""
  if isinstance(file, io.BufferedReader) and os.path.exists(file.name):
    yield os.fspath(file.name)
    return
  with tempfile.NamedTemporaryFile(suffix=".arrayrecord") as copy:
    shutil.copyfileobj(file, copy, 1 << 22)
    copy.flush()
    yield copy.name


def _text(record: bytes, field: str, where: str) -> str:
  if b"\0" in record:
    raise NotText(
      "binary, not text", f" in {where}", "write records of UTF-8 text or JSON"
    )
  try:
    text = record.decode()
  except UnicodeDecodeError as error:
    raise NotText(
      f"not UTF-8 text (byte {error.start})",
      f" in {where}",
      "write records of UTF-8 text or JSON",
    ) from error
  if field and text.lstrip()[:1] == "{":
    try:
      found = json_of(text)
    except ValueError:
      return text
    return field_of(found, field, where)
  return text


def _library(module: str, what: str, extra: str) -> Any:
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    package = (error.name or module).partition(".")[0]
    raise NotText(
      f"{what}, which needs {package}",
      advice=f"pip install 'pallas-gemma[{extra}]'",
    ) from error
