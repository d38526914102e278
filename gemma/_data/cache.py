"""What is kept of a text between runs, so that it is read once.

    CACHE/files/KEY.json           of files by name, size and time: what text
                                   is in them
    CACHE/tokenizers/KEY-SUM.model learnt from a text
    CACHE/tokens/KEY/              of a text, a tokenizer and a split:
      train.bin, held_out.bin        ids, as `rows` stores them
      counts.npy                     how often each is a label, in both
      meta.json                      what they are, with sizes and checksums

An entry is made under another name and renamed when it is complete and on disk:
whoever looks finds all of it or nothing.  Two who make the same entry at the
same time both succeed, and the later one uses the former's.  An entry that is
damaged is made again.  What a killed process has left is removed by the next.

Everything may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import platform
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

from .._errors import UserError
from .._files import json_of, write_atomically

# Of all that the entries depend on in this package: how text is read, split,
# searched for copies, encoded and stored.
FORMAT = 1

_META = "meta.json"


def default_directory() -> pathlib.Path:
  """$PALLAS_GEMMA_CACHE, else where the system has its users' caches."""
  if chosen := os.environ.get("PALLAS_GEMMA_CACHE"):
    return pathlib.Path(chosen).expanduser()
  home = os.environ.get("XDG_CACHE_HOME", "")
  if home and os.path.isabs(home):
    return pathlib.Path(home) / "pallas-gemma"
  if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
    return pathlib.Path(os.environ["LOCALAPPDATA"], "pallas-gemma", "cache")
  return pathlib.Path("~/.cache/pallas-gemma").expanduser()


class Cache:
  """A folder of entries.

  Args:
    directory: is made.
    also: another cache, which is read where this one has nothing.

  Raises:
    OSError: if it cannot be made or written.
  """

  def __init__(self, directory: pathlib.Path, also: pathlib.Path | None = None):
    self.directory = directory.absolute()
    self._read = [self.directory] + ([also.absolute()] if also else [])
    for name in ("files", "tokenizers", "tokens"):
      (self.directory / name).mkdir(parents=True, exist_ok=True)
    with self.scratch():
      pass  # it can be written
    self._remove_remains()

  def read_json(self, name: str) -> Any:
    """An entry's content, or None if it is missing or damaged."""
    found = (_json_in(directory / name) for directory in self._read)
    return next((content for content in found if content is not None), None)

  def write_json(self, name: str, content: Any) -> None:
    """Writes an entry."""
    wrapped = {"content": content, "crc32": _checksum(content)}
    self._put(self.directory / name, json.dumps(wrapped).encode())

  def read_model(self, key: str) -> bytes | None:
    """A tokenizer's model, or None if it is missing or damaged."""
    for directory in self._read:
      for path in (directory / "tokenizers").glob(f"{key}-*.model"):
        with contextlib.suppress(OSError):
          model = path.read_bytes()
          if path.stem == f"{key}-{digest(model)}":
            return model
    return None

  def write_model(self, key: str, model: bytes) -> None:
    """Keeps a tokenizer's model."""
    name = f"{key}-{digest(model)}.model"
    self._put(self.directory / "tokenizers" / name, model)

  def _put(self, path: pathlib.Path, content: bytes) -> None:
    with self.scratch() as folder:  # two may put the same file at a time
      write_atomically(folder / path.name, content)
      os.replace(folder / path.name, path)

  def read_entry(self, key: str) -> tuple[pathlib.Path, dict[str, Any]] | None:
    """The folder of an entry and its `meta.json`; None if it is not whole."""
    for directory in self._read:
      folder = directory / "tokens" / key
      meta = _json_in(folder / _META)
      if meta is None:
        continue
      with contextlib.suppress(OSError, KeyError, TypeError):
        files = meta["files"]
        if all(_is_whole(folder / n, k) for n, k in files.items()):
          return folder, meta
    return None

  @contextlib.contextmanager
  def making_entry(
    self, key: str, meta: dict[str, Any]
  ) -> Iterator[pathlib.Path]:
    """A folder to put an entry's files into; at its end the entry is there.

    Args:
      key: of the entry.
      meta: is written into `meta.json`; may be filled inside the context.
    """
    with self.scratch() as scratch:
      yield scratch
      files = sorted(scratch.iterdir())
      meta["files"] = {path.name: _describe(path) for path in files}
      wrapped = {"content": meta, "crc32": _checksum(meta)}
      write_atomically(scratch / _META, json.dumps(wrapped).encode())
      self._publish(scratch, self.directory / "tokens" / key, key)

  def _publish(
    self, scratch: pathlib.Path, target: pathlib.Path, key: str
  ) -> None:
    for _ in range(3):
      with contextlib.suppress(OSError):
        os.rename(scratch, target)
        return
      if self.read_entry(key) is not None:  # another's, made meanwhile
        return
      with self.scratch() as aside, contextlib.suppress(OSError):
        os.rename(target, aside / "damaged")
    raise UserError(f"cache {target}: cannot be replaced; delete it")

  @contextlib.contextmanager
  def scratch(self) -> Iterator[pathlib.Path]:
    """A folder that is removed in the end."""
    prefix = f"{_SCRATCH}{platform.node()}-{os.getpid()}-"
    folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=self.directory))
    try:
      yield folder
    finally:
      shutil.rmtree(folder, ignore_errors=True)

  def _remove_remains(self) -> None:
    """Removes the scratch folders of processes of this machine that ended."""
    prefix = f"{_SCRATCH}{platform.node()}-"
    for folder in self.directory.glob(f"{prefix}*"):
      number = folder.name[len(prefix) :].partition("-")[0]
      if number.isdigit() and not _runs(int(number)):
        shutil.rmtree(folder, ignore_errors=True)


_SCRATCH = ".part-"


def open_cache(asked: pathlib.Path | None, work_dir: pathlib.Path) -> Cache:
  """The cache the user asked for, else the default, else one in `work_dir`.

  One that others fill, and that can only be read here, is read; what is made
  goes to the one in `work_dir`.

  Raises:
    UserError: if the one asked for is none yet, and cannot be made.
  """
  chosen = asked or default_directory()
  try:
    return Cache(chosen)
  except OSError as error:
    is_filled = _has_entries(chosen)
    if asked is not None and not is_filled:
      raise UserError(
        f"cache {asked}: cannot write: {error}; give --cache-dir another place"
      ) from error
  # Where checkpoints can be written.
  return Cache(work_dir / "cache", also=chosen if is_filled else None)


def _has_entries(directory: pathlib.Path) -> bool:
  try:
    return any((directory / "tokens").iterdir())
  except OSError:
    return False


def _json_in(path: pathlib.Path) -> Any:
  """What an entry's file holds, or None if it is missing or damaged."""
  try:
    wrapped = json_of(path.read_bytes())
    content = wrapped["content"]
    return content if wrapped["crc32"] == _checksum(content) else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


@contextlib.contextmanager
def full_disk_is_said(cache: Cache) -> Iterator[None]:
  """Inside, a full disk, or one that has failed, is the user's to mend."""
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise UserError(
        f"cache {cache.directory}: {error}; give --cache-dir another place"
      ) from error
    raise UserError(
      f"cache {cache.directory}: {error.strerror}; make room, or give "
      "--cache-dir another place (while text is read first it takes as much as "
      "the text and two to four bytes a token)"
    ) from error


def digest(content: bytes) -> str:
  """16 characters that tell one content from another."""
  return hashlib.sha256(content).hexdigest()[:16]


def key_of(content: Any) -> str:
  """A name for what JSON can say."""
  return digest(json.dumps(content, sort_keys=True).encode())


def _checksum(content: Any) -> int:
  return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _describe(path: pathlib.Path) -> dict[str, int]:
  with open(path, "rb+") as file:
    os.fsync(file.fileno())
  crc = _file_checksum(path)
  return {"crc32": crc, **_state(path)}


def _state(path: pathlib.Path) -> dict[str, int]:
  """What changes when somebody writes into a file."""
  found = path.stat()
  return {
    "size": found.st_size,
    "mtime_ns": found.st_mtime_ns,
    "ctime_ns": found.st_ctime_ns,
  }


def _is_whole(path: pathlib.Path, known: dict[str, int]) -> bool:
  """Whether a file is as it was; it is read only if its times have changed."""
  state = _state(path)
  if state["size"] != known["size"]:
    return False
  unchanged = all(state[name] == known[name] for name in state)
  return unchanged or _file_checksum(path) == known["crc32"]


def _file_checksum(path: pathlib.Path) -> int:
  crc = 0
  with open(path, "rb") as file:
    while block := file.read(1 << 20):
      crc = zlib.crc32(block, crc)
  return crc


def _runs(number: int) -> bool:
  """Whether there is a process of this number."""
  try:
    os.kill(number, 0)
  except ProcessLookupError:
    return False
  except OSError:  # it is another user's
    return True
  return True
