"""The files that a program's number depends on.

They follow from the rooms: a file, or a folder with its own `__init__`, and all
that its modules import from their own package.  How results are chosen, kept
and shown is imported by none of them.
"""

from __future__ import annotations

import ast
import functools
import pathlib
from collections.abc import Iterable, Iterator

# kernels/, gemma/ and bench/ stand side by side, in a checkout as installed.
HOME = pathlib.Path(__file__).resolve().parents[2]


@functools.cache
def sources(
  suite: str, op: str, home: pathlib.Path = HOME
) -> frozenset[pathlib.Path]:
  """What a number of a suite's program depends on.

  Args:
    suite: as `suites.program.suite` reads it.
    op: what the program computes.
    home: the folder that holds kernels/, gemma/ and bench/.
  """
  bench, kernels = home / "bench", home / "kernels"
  starts = [*(bench / "v5e").rglob("*.py"), bench / "run" / "worker.py"]
  if not suite.endswith(".py"):
    starts.append(bench / "suites" / f"{suite}.py")
  files = closure(starts, bench)
  if suite.endswith(".py"):
    files.add(pathlib.Path(suite))
  module = module_of(op) if suite == "registry" else None
  if module is None:
    files |= {*kernels.rglob("*.py"), *kernels.rglob("*.json")}
    files |= set((home / "gemma").rglob("*.py"))
  else:
    files |= closure(_room(module, kernels), kernels)
    files |= set(kernels.glob(f"tuned/{op}.json"))
  return frozenset(files)


def module_of(op: str) -> str | None:
  """The module of a registered op's public function, below `kernels`."""
  from pallas_gemma import kernels

  for known in kernels.OPS:
    if known.name == op:
      return known.function.__module__.removeprefix(f"{kernels.__name__}.")
  return None


def _room(module: str, kernels: pathlib.Path) -> Iterable[pathlib.Path]:
  """The modules of the file or the folder in which a module lives."""
  room = kernels / module.partition(".")[0]
  return room.rglob("*.py") if room.is_dir() else [room.with_suffix(".py")]


def closure(
  starts: Iterable[pathlib.Path], package: pathlib.Path
) -> set[pathlib.Path]:
  """Modules of a package, and all of it that they import, and that these do.

  The package's own `__init__`, its door, is left out: it imports everything.
  """
  found: set[pathlib.Path] = set()
  waiting = list(starts)
  while waiting:
    path = waiting.pop()
    inside = package in path.parents and path != package / "__init__.py"
    if inside and path not in found:
      found.add(path)
      waiting += [*_imported(path), *_inits(path)]
  return found


def _inits(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """The `__init__`s that an import of a module runs first."""
  for folder in path.parents:
    if not (folder / "__init__.py").exists():
      return
    yield folder / "__init__.py"


def _imported(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """The modules that a file imports by a relative import."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.level:
      folder = path.parents[node.level - 1]
      target = folder.joinpath(*(node.module or "").split("."))
      for module in (target, *(target / alias.name for alias in node.names)):
        for file in (module.with_suffix(".py"), module / "__init__.py"):
          if file.exists():
            yield file
