"""Paths that are on this machine, and files that a crash cannot halve."""

from __future__ import annotations

import json
import os
import pathlib
import re
from typing import Any

from ._arguments import path_of
from ._errors import UserError

# As `pathlib` leaves it, which makes gs://b/x into gs:/b/x, and gs:// into gs:.
# One letter before the colon is a drive of Windows.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/|\Z)")


def remote_url(path: str | os.PathLike[str]) -> str | None:
  """gs://bucket/x of such a path, also as `pathlib` leaves it; else None."""
  text = os.fspath(path)
  if isinstance(text, bytes):
    text = os.fsdecode(text)
  if match := _SCHEME.match(text.lstrip()):
    rest = text.lstrip()[match.end() :].lstrip("/")
    root = "/" if match[1].lower() == "file" else ""  # it has no host
    return f"{match[1]}://{root}{rest}"
  return None


def local_path(
  path: str | os.PathLike[str], what: str = "path"
) -> pathlib.Path:
  """The path, if it is one of this machine's file system.

  Without this, gs://bucket/run would be a folder named "gs:" where the program
  was started.

  Args:
    path: as the user gave it, or as `pathlib.Path` made it.
    what: whose path it is, for the message.

  Raises:
    UserError: for SCHEME://..., such as gs://, s3:// and https://.
  """
  url = remote_url(path_of(what, path))
  if url is not None:
    raise UserError(
      f"{what} {url}: wanted a path of this machine; mount it, or write here "
      "and copy"
    )
  return pathlib.Path(path)


def write_atomically(path: pathlib.Path, content: bytes) -> None:
  """Replaces the file in one step: a reader finds the old or the new content.

  The content is on disk before the name points to it, so that this also holds
  when the process is killed or the machine loses power in between.
  """
  temporary = path.with_name(f".{path.name}.part")
  with open(temporary, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
  sync_folder(path.parent)


def json_of(content: str | bytes) -> Any:
  """What a file holds that may be damaged.

  Raises:
    ValueError: if it is no JSON, or nested more deeply than Python follows.
  """
  try:
    return json.loads(content)
  except RecursionError as error:
    raise ValueError(str(error)) from error


def sync_folder(folder: pathlib.Path) -> None:
  """Puts on disk which names the folder has, so that a rename lasts."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError:  # some file systems have no such request
    pass
  finally:
    os.close(descriptor)
