"""The model on a mesh whose axes are Explicit, JAX's default.

There every array's type says how it is split, and each operation must say how
its result is.  The model does not: what its arguments' types say is kept for
the kernels, and inside, the axes are Auto, so that the compiler splits what
lies between the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from ._weights import name_of
from .ops import sharding

# Letters of the parameters' dimensions that kernels can be split over.  Weights
# that are split over others, or over the axes that split the rows, are stored
# in parts and gathered before they are used.
_LETTERS = {
  "embedding": "V-",
  "q": "-N--",
  "gate": "--F",
  "k": "-BSK-",  # of a cache
}


def automatic(
  function: Callable[..., Any], out: Any, model: Any, *arrays: Any
) -> Any:
  """`function(model, *arrays)`, inside which all axes are Auto.

  Args:
    function: of pytrees.
    out: the letters of each result's dimensions, in a pytree of the results'
      structure: "BTD".  Those over which the first array, "BT", is split, are
      split in the results, and V where the table is.
    model: its parameters may be split in any way.
    *arrays: the first is tokens, [B, ...]; others may be a cache.
  """
  mesh = _explicit_mesh((model, arrays))
  if mesh is None:
    return function(model, *arrays)
  rules = _rules((model, arrays), arrays[0])
  specs = jax.tree.map(
    lambda letters: PartitionSpec(*map(rules.get, letters)), out
  )

  def run(model: Any, *arrays: Any) -> Any:
    automatic_mesh: Any = jax.sharding.get_abstract_mesh()
    with sharding(automatic_mesh, rules):
      return function(model, *arrays)

  with jax.sharding.use_abstract_mesh(mesh):
    return jax.sharding.auto_axes(run, out_sharding=specs)(model, *arrays)


def _explicit_mesh(tree: Any) -> Any:
  """The mesh of arrays whose axes are all Explicit; None if there is none."""
  for x in jax.tree.leaves(tree):
    mesh = jax.typeof(x).sharding.mesh
    if not mesh.empty and set(mesh.axis_types) == {AxisType.Explicit}:
      return mesh
  return None


def _rules(tree: Any, tokens: jax.Array) -> dict[str, tuple[str, ...]]:
  """For `kernels.sharding`: the axes of each letter."""
  rules = dict(_split(tokens, "BT"))
  taken = {axis for axes in rules.values() for axis in axes}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    names = [name_of(key) for key in path]
    letters = next((_LETTERS[n] for n in names if n in _LETTERS), "")
    for letter, axes in _split(x, letters):
      if not taken & set(axes):
        rules.setdefault(letter, axes)
  return rules


def _split(x: jax.Array, letters: str) -> Iterator[tuple[str, tuple[str, ...]]]:
  """The letters of dimensions that are split, and the axes of each."""
  for letter, entry in zip(letters, jax.typeof(x).sharding.spec, strict=False):
    if entry is not None and letter != "-":
      yield letter, (entry,) if isinstance(entry, str) else tuple(entry)
