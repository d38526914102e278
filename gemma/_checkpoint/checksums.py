"""Size and CRC-32 of every file of a step."""

from __future__ import annotations

import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping

from .._errors import UserError
from .._files import json_of, sync_folder, write_atomically

CHECKSUMS = "checksums.json"


def write_checksums(step: pathlib.Path) -> None:
  """Writes those of all files under `step`, and puts all of them on disk."""
  put_checksums(step, checksums_of(step))


def checksums_of(
  folder: pathlib.Path, pattern: str = "*"
) -> dict[str, tuple[int, int]]:
  """Size and CRC-32 of all files under `folder`, and puts them on disk."""
  files = sorted(path for path in folder.rglob(pattern) if path.is_file())
  checksums = {
    path.relative_to(folder).as_posix(): (path.stat().st_size, _crc32(path))
    for path in files
  }
  for path in files:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
  return checksums


def put_checksums(
  step: pathlib.Path, checksums: Mapping[str, tuple[int, int]]
) -> None:
  """Writes checksums of files, and puts on disk which files there are."""
  for path in (*step.rglob("*"), step):
    if path.is_dir():
      sync_folder(path)
  text = json.dumps(checksums, indent=2)
  write_atomically(step / CHECKSUMS, text.encode())


def verify(step: pathlib.Path, fix: str, only: str | None = None) -> None:
  """Compares the files of a step with their checksums.

  Args:
    step: its folder.
    fix: what to do if one differs, for the message.
    only: the one file to compare; all by default.  If the step never had it,
      there is nothing to compare.

  Raises:
    UserError: naming the first file that is missing, cut or changed.
  """
  try:
    items = checksums_in((step / CHECKSUMS).read_bytes())
  except (OSError, ValueError) as error:
    raise UserError(f"checkpoint {step / CHECKSUMS}: damaged; {fix}") from error
  for file, known in items.items():
    if only not in (None, file):
      continue
    if problem := problem_of(step / file, known):
      raise UserError(f"checkpoint {step / file}: {problem}; {fix}")


def checksums_in(content: bytes) -> dict[str, tuple[int, int]]:
  """Size and CRC-32 of each file, by the content of checksums.json.

  Raises:
    ValueError: if it is damaged.
  """
  try:
    items = json_of(content).items()
    known = {str(name): (int(size), int(crc)) for name, (size, crc) in items}
  except (TypeError, AttributeError, OverflowError) as error:
    raise ValueError(str(error)) from error
  for name in known:
    path = pathlib.PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
      # What is fetched by it would be written there.
      raise ValueError(f"{name!r} is outside of the step")
  return known


def problem_of(path: pathlib.Path, known: tuple[int, int]) -> str:
  """How a file differs from its size and CRC-32; nothing if it does not."""
  size, crc = known
  if not path.is_file():
    return "missing"
  if path.stat().st_size != size:
    return f"cut, {path.stat().st_size:,} of {size:,} bytes"
  return "" if _crc32(path) == crc else "damaged, its checksum differs"


def _crc32(path: pathlib.Path) -> int:
  crc = 0
  for block in _blocks(path):
    crc = zlib.crc32(block, crc)
  return crc


def _blocks(path: pathlib.Path) -> Iterator[bytes]:
  with open(path, "rb") as file:
    while block := file.read(1 << 22):
      yield block
