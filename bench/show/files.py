"""Files of results: a row in each line, with the command that made it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence

from ..run.row import Row


@dataclasses.dataclass(frozen=True)
class Line:
  """A row, and the command that made it."""

  row: Row
  command: str


def write(path: pathlib.Path, rows: Sequence[Row], command: str) -> None:
  """Writes rows as JSON lines."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
    "".join(
      json.dumps(row.to_json() | {"command": command}) + "\n" for row in rows
    )
  )


def read(paths: Iterable[pathlib.Path]) -> list[Line]:
  """The lines of files, and of every `*.json` of folders.

  Raises:
    ValueError: if a file is not there, or holds anything else.
  """
  lines = []
  for path in paths:
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
      lines += _read_file(file)
  return lines


def _read_file(path: pathlib.Path) -> list[Line]:
  if not path.exists():
    raise ValueError(f"results: no such file or folder, {path}")
  try:
    objects = [json.loads(text) for text in path.read_text().splitlines()]
    return [
      Line(
        command=fields["command"],
        row=Row.from_json({k: v for k, v in fields.items() if k != "command"}),
      )
      for fields in objects
    ]
  except (TypeError, KeyError, ValueError) as error:
    raise ValueError(
      f"results: wanted lines of pallas-gemma-bench --json in {path}, got "
      f"{type(error).__name__}: {error}"
    ) from error
