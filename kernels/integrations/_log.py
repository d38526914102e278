"""What runs in each layer, as it was found when the layer was traced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class Layer(NamedTuple):
  """One part of one layer, as it was last traced in this way.

  Attributes:
    library: the integration's name, such as "gemma".
    path: of the layer in the model, such as "layer_0/attn".
    part: "norm", "attention", "feed_forward" or "loss".
    runs: the op that runs, such as "flash_attention", or "the library's own".
    why: what it does, or why it is the library's own.
  """

  library: str
  path: str
  part: str
  runs: str
  why: str


OWN = "the library's own"


class Report(tuple[Layer, ...]):
  """The layers that were traced, in the order in which they first were.

  Printed, it has a line for each part that runs in the same way, with the
  layers it stands for.
  """

  @property
  def left_alone(self) -> tuple[Layer, ...]:
    """The layers in which a part is the library's own."""
    return tuple(layer for layer in self if layer.runs == OWN)

  def __str__(self) -> str:
    """A line for each library that is swapped, then one for each way to run."""
    lines = [f"{name}: {state}" for name, state in _states.items()]
    if not lines:
      return "nothing is swapped: no apply() was called"
    ways: dict[tuple[str, str, str, str], list[str]] = {}
    for library, path, part, runs, why in self:
      ways.setdefault((library, part, runs, why), []).append(path)
    for (library, part, runs, why), paths in ways.items():
      lines.append(f"{library} {part}: {runs}, {why}: {_briefly(paths)}")
    if not ways:
      lines.append("no layer was traced since")
    return "\n".join(lines)


def _briefly(paths: list[str]) -> str:
  if len(paths) <= 4:
    return ", ".join(paths)
  return f"{paths[0]}, {paths[1]}, ... {paths[-1]} ({len(paths)} layers)"


_layers: dict[Layer, None] = {}
_states: dict[str, str] = {}


def report() -> Report:
  """What runs in each layer that was traced since `apply()`, and why not.

  A layer that is traced in two ways, as in training and in decoding, stands
  there twice.  An op that runs is its kernel where the program is lowered for
  TPU and its reference elsewhere, unless `apply` was told an implementation.
  """
  return Report(_layers)


def note(library: str, path: Any, part: str, runs: str, why: str) -> None:
  """Writes down what runs in a layer."""
  name = path if isinstance(path, str) else "/".join(map(str, path))
  _layers[Layer(library, name or "(the model)", part, runs, why)] = None


def begin(library: str, state: str) -> None:
  """A library is swapped."""
  end(library)
  _states[library] = state


def end(library: str) -> None:
  """A library is as it was."""
  _states.pop(library, None)
  gone: Iterable[Layer] = [x for x in _layers if x.library == library]
  for layer in gone:
    del _layers[layer]
