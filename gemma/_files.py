"""Files that a crash cannot leave half written."""

from __future__ import annotations

import os
import pathlib


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
