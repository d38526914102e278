"""What one subprocess is asked to do, and the name of its result in a cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from .sources import HOME, sources

MARK = "pallas-gemma-bench-result: "  # starts the line that holds the result


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile.

  Attributes:
    suite: which list it is on, as `suites.program.suite` reads it.
    key: its name there.
    config: fields of the kernel's config, None for the op's own choice.
    ask_compiler: whether the compiler is asked for its own estimate too.
  """

  suite: str
  key: str
  config: Mapping[str, Any] | None = None
  ask_compiler: bool = False

  def to_json(self) -> dict[str, Any]:
    """The fields, as JSON can hold them."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, fields: Mapping[str, Any]) -> Job:
    """The inverse of `to_json`."""
    return cls(**fields)

  def digest(self, home: pathlib.Path = HOME) -> str:
    """A name for the result: changes when anything that it depends on does.

    Args:
      home: the folder that holds kernels/, gemma/ and bench/.
    """
    op = self.key.partition("/")[0]
    facts = [
      json.dumps(self.to_json(), sort_keys=True),
      *(f"{p} {metadata.version(p)}" for p in ("jax", "jaxlib", "libtpu")),
      f"{sys.version_info[:2]}",
      _hash(sources(self.suite, op, home), home),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def _hash(paths: Iterable[pathlib.Path], home: pathlib.Path) -> str:
  total = hashlib.sha256()
  for path in sorted(paths):
    inside = path.is_relative_to(home)
    name = str(path.relative_to(home)) if inside else path.name
    total.update(name.encode() + b"\0" + path.read_bytes())
  return total.hexdigest()
