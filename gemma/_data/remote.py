"""Text on other machines: gs://, s3://, https:// and the like, by fsspec."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from .._remote import failures_said, reached

# What file systems tell of a file by which it is known to be another one.
_TOLD = "mtime updated LastModified last_modified created ETag etag md5Hash"
_TOLD += " crc32c generation"
_BLOCK = 1 << 20  # bytes that are read together


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
    """Opens the file for reading, in which an error is no end of the text."""
    with self._reached() as (files, path):
      return io.BufferedReader(_Raw(self.url, files.open(path, "rb")), _BLOCK)

  def exists(self) -> bool:
    """Whether there is something; an error is no absence."""
    with self._reached() as (files, path):
      try:
        files.info(path)  # for `exists` of some, all that fails is not there
      except FileNotFoundError as error:
        if error.__cause__ is not None:  # why it was not found, as by HTTP
          raise error.__cause__ from None
        return False
      return True

  def is_dir(self) -> bool:
    """Whether it is a folder."""
    with self._reached() as (files, path):
      return bool(files.isdir(path))

  def files(self) -> list[Remote]:
    """Those of a folder and of its own folders, in order; no hidden ones."""
    with self._reached() as (files, path):
      found = [str(files.unstrip_protocol(name)) for name in _in(files, path)]
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


class _Raw(io.RawIOBase):
  """A file whose errors are a `UserError`, and not one of its format.

  What fails on the way would else be taken for damage, and the file left out of
  a folder's text.

  Args:
    name: its URL.
    file: as fsspec opened it.
  """

  def __init__(self, name: str, file: Any):
    self.name, self._file = name, file

  def readable(self) -> bool:
    """True."""
    return True

  def seekable(self) -> bool:
    """Whether all of it can be reached in any order."""
    return bool(self._file.seekable())

  def readinto(self, buffer: Any, /) -> int:
    """Reads up to so many bytes."""
    with failures_said(self.name, "data"):
      block = self._file.read(len(buffer))
    buffer[: len(block)] = block
    return len(block)

  def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
    """Goes to a position."""
    with failures_said(self.name, "data"):
      return int(self._file.seek(offset, whence))

  def tell(self) -> int:
    """The position."""
    return int(self._file.tell())

  def close(self) -> None:
    """Closes it."""
    if not self.closed:
      self._file.close()
    super().close()


def _in(files: Any, folder: str) -> Iterable[str]:
  """The files of a folder and of its own folders.

  A store lists them at once.  fsspec's own way for all others takes a folder
  that cannot be listed for an empty one.
  """
  spec = importlib.import_module("fsspec.spec").AbstractFileSystem
  asynchronous = importlib.import_module("fsspec.asyn").AsyncFileSystem
  walks = type(files).find is spec.find
  if files.async_impl:
    walks = getattr(type(files), "_find", None) is asynchronous._find
  return _walk(files, folder) if walks else files.find(folder)


def _walk(files: Any, folder: str) -> Iterator[str]:
  for info in files.ls(folder, detail=True):
    name = str(info["name"]).rstrip("/")
    if info["type"] != "directory":
      yield name
    elif name != folder.rstrip("/"):
      yield from _walk(files, name)
