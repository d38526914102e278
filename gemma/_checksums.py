"""Size and CRC-32 of every file of a folder, in a file there."""

from __future__ import annotations

import json
import pathlib
import zlib
from collections.abc import Iterator

from ._errors import UserError
from ._files import write_atomically

CHECKSUMS = "checksums.json"


def write_checksums(root: pathlib.Path) -> None:
  """Writes those of all that is in `root`."""
  sums = json.dumps(_checksums(root), indent=2)
  write_atomically(root / CHECKSUMS, sums.encode())


def verify(root: pathlib.Path, fix: str) -> None:
  """Compares them with what is in `root`.

  Raises:
    UserError: naming the file that differs, and `fix`.
  """
  try:
    checksums = json.loads((root / CHECKSUMS).read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"checkpoint {root / CHECKSUMS}: damaged; {fix}") from error
  for name, (size, crc) in checksums.items():
    path = root / name
    if not path.is_file():
      problem = "missing"
    elif path.stat().st_size != size:
      problem = f"cut, {path.stat().st_size:,} of {size:,} bytes"
    elif _crc32(path) != crc:
      problem = "damaged, its checksum differs"
    else:
      continue
    raise UserError(f"checkpoint {path}: {problem}; {fix}")


def _checksums(step: pathlib.Path) -> dict[str, list[int]]:
  """Size and CRC-32 of every file under `step`, by relative path."""
  return {
    str(path.relative_to(step)): [path.stat().st_size, _crc32(path)]
    for path in sorted(step.rglob("*"))
    if path.is_file() and path.name != CHECKSUMS
  }


def _crc32(path: pathlib.Path) -> int:
  crc = 0
  for block in _blocks(path):
    crc = zlib.crc32(block, crc)
  return crc


def _blocks(path: pathlib.Path) -> Iterator[bytes]:
  with open(path, "rb") as file:
    while block := file.read(1 << 22):
      yield block
