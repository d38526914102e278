"""How a library's classes are swapped, and put back.

An integration says which attributes of which classes and modules it replaces,
and for which versions of the library it knows what stands there.  All swaps of
a library are made together and undone together.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from .._frame.check import Implementation, check_implementation
from . import _log


class Swap(NamedTuple):
  """One attribute of a class or a module, and what stands there instead."""

  owner: Any
  name: str
  replacement: Any


@dataclasses.dataclass(frozen=True)
class Choice:
  """What the caller of `apply` wants.

  Attributes:
    implementation: as every op takes it.
    parts: those to swap.
  """

  implementation: Implementation
  parts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Library:
  """A library that can be swapped.

  Attributes:
    name: of the integration.
    distribution: as pip knows it.
    versions: those whose classes are known here.
    parts: what can be swapped.
    swaps: the swaps of a choice; imports the library.
    beyond: what of the library stays as it is, in words.
  """

  name: str
  distribution: str
  versions: tuple[str, ...]
  parts: tuple[str, ...]
  swaps: Callable[[Choice], Iterable[Swap]]
  beyond: str

  def apply(
    self, implementation: Implementation, parts: Sequence[str] | None
  ) -> None:
    """Swaps the parts; those of an earlier call are put back before."""
    choice = self._checked(implementation, parts)
    self.undo()
    swaps = list(self.swaps(choice))
    _applied[self.name] = [
      Swap(owner, name, vars(owner)[name]) for owner, name, _ in swaps
    ]
    _set(swaps)
    version = importlib.metadata.version(self.distribution)
    _log.begin(
      self.name,
      f"{self.distribution} {version}, swapped: {', '.join(choice.parts)}; "
      f"{self.beyond}",
    )

  def undo(self) -> None:
    """Puts back what stood there; nothing if `apply` was not called."""
    originals = _applied.pop(self.name, None)
    if originals is not None:
      _set(originals)
    _log.end(self.name)

  def _checked(self, implementation: Any, parts: Any) -> Choice:
    where = f"integrations.{self.name}"
    check_implementation(where, implementation)
    chosen = self.parts if parts is None else tuple(parts)
    if isinstance(parts, str) or not set(chosen) <= set(self.parts):
      raise ValueError(
        f"{where}: parts must be some of {', '.join(self.parts)}, got {parts!r}"
      )
    try:
      version = importlib.metadata.version(self.distribution)
    except importlib.metadata.PackageNotFoundError:
      raise ValueError(
        f"{where}: wants {self._wanted()}, which is not installed: "
        f"pip install {self.distribution}=={self.versions[-1]}"
      ) from None
    if version not in self.versions:
      raise ValueError(
        f"{where}: knows the classes of {self._wanted()}, got {version}; "
        f"pip install {self.distribution}=={self.versions[-1]}, or call the "
        "ops of pallas_gemma.kernels yourself"
      )
    return Choice(implementation, chosen)

  def _wanted(self) -> str:
    return f"{self.distribution} {' or '.join(self.versions)}"


_applied: dict[str, list[Swap]] = {}


def _set(swaps: Iterable[Swap]) -> None:
  """Makes swaps, and forgets the programs that were traced before.

  A jitted function, such as a model's own `__call__`, would go on as it was.
  """
  for owner, name, value in swaps:
    setattr(owner, name, value)
  jax.clear_caches()


def module(name: str) -> Any:
  """A module of a library, whose types nobody need know here."""
  return importlib.import_module(name)
