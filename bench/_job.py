"""What one subprocess is asked to do, and the name of its result in a cache."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata, util
from typing import Any

MARK = "pallas-gemma-bench-row: "  # starts the line that holds the result

# What a number does not depend on: how it is shown, chosen and kept.
_PRESENTATION = {
  "__init__",
  "_cli",
  "_measured",
  "_sweep",
  "_table",
  "bench_ops",
  "conftest",
  "report",
}
_SUITES = {"_registry", "_baselines", "_gemma", "_calibration"}


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile.

  Attributes:
    suite: which list it is on, as `_program.suite` reads it.
    key: its name there.
    config: fields of the kernel's config, None for the op's own choice.
    static: also ask the compiler for its own estimate.
  """

  suite: str
  key: str
  config: Mapping[str, Any] | None = None
  static: bool = False

  def to_json(self) -> dict[str, Any]:
    """The fields, as JSON can hold them."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, fields: Mapping[str, Any]) -> Job:
    """The inverse of `to_json`."""
    return cls(**fields)

  def digest(self) -> str:
    """A name for the result: changes when anything that it depends on does."""
    name = self.key.partition("/")[0]
    facts = [
      json.dumps(self.to_json(), sort_keys=True),
      *(f"{p} {metadata.version(p)}" for p in ("jax", "jaxlib", "libtpu")),
      f"{sys.version_info[:2]}",
      _hash(_sources(self.suite, name)),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def _hash(paths: Iterable[pathlib.Path]) -> str:
  total = hashlib.sha256()
  for path in sorted(paths):
    total.update(path.name.encode() + b"\0" + path.read_bytes())
  return total.hexdigest()


@functools.cache
def _sources(suite: str, op: str) -> frozenset[pathlib.Path]:
  """The files that a program's number depends on."""
  bench = pathlib.Path(__file__).parent
  others = _PRESENTATION | _SUITES - {f"_{suite}"}
  if suite == "gemma":
    others -= {"_baselines"}  # its splash attention
  files = {p for p in bench.glob("*.py") if p.stem not in others}
  kernels, gemma = _folder("kernels"), _folder("gemma")
  if suite.endswith(".py"):
    files.add(pathlib.Path(suite))
  own = _module_of(op) if suite == "registry" else None
  if own is None:
    files |= {*kernels.glob("*.py"), *kernels.glob("tuned/*.json")}
    files |= set(gemma.glob("*.py"))
  else:
    files |= _closure(own)
    files |= set(kernels.glob(f"tuned/{op}.json"))
  return frozenset(files)


def _folder(package: str) -> pathlib.Path:
  spec = util.find_spec(f"pallas_gemma.{package}")
  assert spec is not None and spec.origin is not None, package
  return pathlib.Path(spec.origin).parent


def _module_of(op: str) -> pathlib.Path | None:
  """The file of a registered op's public function."""
  from pallas_gemma.kernels import OPS

  for known in OPS:
    if known.name == op:
      module = sys.modules[known.function.__module__]
      return pathlib.Path(str(module.__file__))
  return None


def _closure(path: pathlib.Path) -> set[pathlib.Path]:
  """A file and all that it imports from its own folder."""
  seen, waiting = set(), [path]
  while waiting:
    current = waiting.pop()
    if current in seen:
      continue
    seen.add(current)
    for node in ast.walk(ast.parse(current.read_text())):
      if isinstance(node, ast.ImportFrom) and node.level == 1:
        names = [node.module] if node.module else [a.name for a in node.names]
        for name in names:
          other = path.parent / f"{name}.py"
          if other.exists():
            waiting.append(other)
  return seen
