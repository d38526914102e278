"""Text on other machines: gs://, s3://, https:// and the like, by fsspec."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from typing import Any, BinaryIO

from .._remote import reached

# What file systems tell of a file by which it is known to be another one.
_TOLD = "mtime updated LastModified last_modified created ETag etag md5Hash"
_TOLD += " crc32c generation"


@dataclasses.dataclass(frozen=True)
class Remote:
  """A file or folder that fsspec reads.

  Attributes:
    url: such as gs://bucket/file.jsonl.
  """

  url: str

  def __str__(self) -> str:
    """The URL."""
    return self.url

  @property
  def name(self) -> pathlib.PurePosixPath:
    """For its suffixes."""
    return pathlib.PurePosixPath(self.url.partition("://")[2])

  def check(self) -> None:
    """Raises a `UserError` if a package is missing that reads it."""
    with self._reached():
      pass

  def open(self) -> BinaryIO:
    """Opens the file for reading."""
    with self._reached() as (files, path):
      return files.open(path, "rb")

  def exists(self) -> bool:
    """Whether there is something."""
    with self._reached() as (files, path):
      return bool(files.exists(path))

  def is_dir(self) -> bool:
    """Whether it is a folder."""
    with self._reached() as (files, path):
      return bool(files.isdir(path))

  def files(self) -> list[Remote]:
    """Those of a folder and of its own folders, in order; no hidden ones."""
    with self._reached() as (files, path):
      found = [str(files.unstrip_protocol(name)) for name in files.find(path)]
    inside = len(self.name.parts)
    named = [Remote(url) for url in sorted(found)]
    return [
      file
      for file in named
      if not any(part.startswith(".") for part in file.name.parts[inside:])
    ]

  def state(self) -> tuple[int, list[str]]:
    """Bytes, and what tells this content from a later one, if anything does."""
    with self._reached() as (files, path):
      info = files.info(path)
    told = [f"{key}={info[key]}" for key in _TOLD.split() if info.get(key)]
    return int(info.get("size") or 0), told

  def _reached(self) -> contextlib.AbstractContextManager[tuple[Any, str]]:
    return reached(self.url, "data")
