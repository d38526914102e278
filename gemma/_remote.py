"""Places on other machines: gs://, s3:// and the like, by fsspec.

What a scheme needs besides, such as gcsfs for gs://, is a package of its own;
one that is missing is named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ._arguments import path_of
from ._errors import UserError
from ._files import remote_url

_OTHERWISE = "copy it to this machine"
_ONLY_READ = ("http://", "https://")


@contextlib.contextmanager
def reached(
  url: str, what: str, otherwise: str = _OTHERWISE
) -> Iterator[tuple[Any, str]]:
  """The file system and the path in it; what goes wrong inside is said.

  Args:
    url: such as gs://bucket/file.
    what: it is, for the message.
    otherwise: what else can be done where a package is missing.

  Raises:
    UserError: for every error but those that are one already.
  """
  with failures_said(url, what, otherwise):
    yield importlib.import_module("fsspec").core.url_to_fs(url)


@contextlib.contextmanager
def failures_said(
  url: str, what: str, otherwise: str = _OTHERWISE
) -> Iterator[None]:
  """As `reached`, for what is done with something that was reached before."""
  try:
    yield
  except UserError:
    raise
  except ModuleNotFoundError as error:
    raise UserError(
      f"{what} {url}: needs {error.name}; pip install "
      f"'pallas-gemma[remote]', or {otherwise}"
    ) from error
  except ImportError as error:  # fsspec says what to install
    raise UserError(f"{what} {url}: {error}; or {otherwise}") from error
  except Exception as error:  # of any of their libraries
    raise UserError(
      f"{what} {url}: cannot be reached: {error or type(error).__name__}"
    ) from error


@dataclasses.dataclass(frozen=True)
class Place:
  """A folder (or file) on another machine, and what can be done in it.

  Names are relative to it, with slashes.  All raise a `UserError` where it
  cannot be reached.

  Attributes:
    url: such as gs://bucket/run, without a slash at its end.
    what: it is, for messages.
  """

  url: str
  what: str

  def __str__(self) -> str:
    """The URL."""
    return self.url

  def check(self, written: bool = False) -> None:
    """Finds out at the door whether it can be used.

    Args:
      written: whether it is to be written to as well.

    Raises:
      UserError: if its scheme only gives, or needs a package that is missing.
    """
    if written and self.url.lower().startswith(_ONLY_READ):
      raise UserError(
        f"{self.what} {self.url}: cannot be written to; give a path of this "
        "machine, or a place such as gs://bucket/folder"
      )
    with self._reached():
      pass

  def content(self) -> bytes:
    """What is in it, if it is a file.

    Raises:
      UserError: if there is no such file.
    """
    content = self.read("")
    if content is None:
      raise UserError(f"{self.what} {self.url}: no such file")
    return content

  def read(self, name: str) -> bytes | None:
    """What is in a file; None if there is no such file."""
    with self._reached() as (files, path):
      try:
        return bytes(files.cat_file(_join(path, name)))
      except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None

  def write(self, name: str, content: bytes) -> None:
    """Replaces a file, in one step where the file system has such."""
    with self._reached() as (files, path):
      target = _join(path, name)
      self._make_parents(files, [target])
      if not _is_local(files):  # objects of a store are replaced whole
        files.pipe_file(target, content)
        return
      temporary = _join(path, f"{name}.part")
      files.pipe_file(temporary, content)
      os.replace(temporary, target)

  def create(self, name: str, content: bytes) -> bool:
    """Writes a file that is not there yet; False if there is one.

    Where the file system can, of two who do it at a time one succeeds.
    """
    with self._reached() as (files, path):
      target = _join(path, name)
      self._make_parents(files, [target])
      try:
        if _is_local(files):
          with files.open(target, "xb") as file:
            file.write(content)
        else:
          files.pipe_file(target, content, mode="create")
      except FileExistsError:
        return False
      except (TypeError, ValueError, NotImplementedError):
        # It knows nothing of this, so it is looked for, and written.
        if files.exists(target):
          return False
        files.pipe_file(target, content)
      return True

  def upload(self, sources: Mapping[str, pathlib.Path]) -> None:
    """Writes files of this machine, by the names that they get."""
    if not sources:
      return
    with self._reached() as (files, path):
      targets = [_join(path, name) for name in sources]
      self._make_parents(files, targets)
      files.put([str(source) for source in sources.values()], targets)

  def download(self, targets: Mapping[str, pathlib.Path]) -> None:
    """Writes files to this machine.

    Raises:
      FileNotFoundError: if one is not there.
    """
    if not targets:
      return
    for target in targets.values():
      target.parent.mkdir(parents=True, exist_ok=True)
    with _missing_is_raised(), self._reached() as (files, path):
      names = [_join(path, name) for name in targets]
      try:
        files.get(names, [str(target) for target in targets.values()])
      except FileNotFoundError as error:
        raise _MissingError(*error.args) from error

  def listed(self, folder: str = "") -> list[str]:
    """What is in a folder, in order; nothing if there is no such folder."""
    with self._reached() as (files, path):
      path = _join(path, folder)
      files.invalidate_cache(path)
      try:
        found = files.ls(path, detail=False)
      except (FileNotFoundError, NotADirectoryError):
        return []
    names = [str(name).rstrip("/") for name in found]
    # Some stores have an object for the folder itself.
    return sorted(n.rpartition("/")[2] for n in names if n != path.rstrip("/"))

  def remove(self, name: str) -> None:
    """Removes a file, if it is there."""
    with self._reached() as (files, path):
      with contextlib.suppress(FileNotFoundError):
        files.rm_file(_join(path, name))

  def remove_folder(self, name: str) -> None:
    """Removes a folder with all that is in it, if it is there."""
    with self._reached() as (files, path):
      path = _join(path, name)
      files.invalidate_cache(path)
      with contextlib.suppress(FileNotFoundError):
        files.rm(path, recursive=True)

  def _reached(self) -> contextlib.AbstractContextManager[tuple[Any, str]]:
    return reached(self.url, self.what, "give a path of this machine")

  def _make_parents(self, files: Any, targets: list[str]) -> None:
    # A store of objects has no folders, and might make a bucket.
    if not files.async_impl:
      for parent in {target.rpartition("/")[0] for target in targets}:
        files.makedirs(parent, exist_ok=True)


def place_of(path: str | os.PathLike[str], what: str) -> Place | None:
  """The place that a path with a scheme means; None for one of this machine.

  Raises:
    UserError: if nothing follows the scheme; without its slashes it would be a
      folder of this machine.
  """
  url = remote_url(path_of(what, path))
  if url is None:
    return None
  if not url.partition("://")[2].strip("/"):
    raise UserError(f"{what} {url}: wanted a bucket or folder after {url}")
  return Place(url.rstrip("/"), what)


class _MissingError(UserError):
  """Stands for a FileNotFoundError where others become a `UserError`."""


@contextlib.contextmanager
def _missing_is_raised() -> Iterator[None]:
  try:
    yield
  except _MissingError as error:
    raise FileNotFoundError(*error.args) from error


def _is_local(files: Any) -> bool:
  return bool(getattr(files, "local_file", False))


def _join(path: str, name: str) -> str:
  return f"{path.rstrip('/')}/{name}" if name else path
