"""Text on other machines: gs://, s3://, https:// and the like, by fsspec.

What a scheme needs besides, such as gcsfs for gs://, is a package of its own;
one that is missing is named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from .._errors import UserError

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

  @contextlib.contextmanager
  def _reached(self) -> Iterator[tuple[Any, str]]:
    """The file system and the path in it; what goes wrong is said."""
    try:
      yield importlib.import_module("fsspec").core.url_to_fs(self.url)
    except ModuleNotFoundError as error:
      raise UserError(
        f"data {self.url}: needs {error.name}; pip install "
        "'pallas-gemma[remote]', or copy it to this machine"
      ) from error
    except ImportError as error:  # fsspec says what to install
      raise UserError(
        f"data {self.url}: {error}; or copy it to this machine"
      ) from error
    except Exception as error:  # of any of their libraries
      raise UserError(
        f"data {self.url}: cannot be read: {error or type(error).__name__}"
      ) from error
