"""Kernels under a sharded jit.

XLA cannot partition a Pallas kernel, so each op runs its kernel on every
device's own block of the arrays, inside `jax.shard_map`.  Which dimension is
split over which mesh axes comes from

  * the arrays' types, on a mesh whose axes are Explicit: nothing to do;
  * `with kernels.sharding(mesh, rules)`, on a mesh whose axes are Auto.

Dimensions go by the letters of the package's legend, one character each.  An op
says in a `Split` which of them it can split: those over which its rows are
independent, or which it can sum over afterwards.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

Axes = tuple[str, ...]
_Rules = tuple[Any, Mapping[str, Axes]]
_RULES: contextvars.ContextVar[_Rules | None] = contextvars.ContextVar(
  "pallas_gemma_sharding", default=None
)


def _as_axes(entry: Any) -> Axes:
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


@contextlib.contextmanager
def sharding(
  mesh: jax.sharding.Mesh, rules: Mapping[str, str | Sequence[str] | None]
) -> Iterator[None]:
  """Says how the kernels traced inside are split over a mesh of Auto axes.

  Args:
    mesh: the mesh of the surrounding `jit`.
    rules: mesh axis or axes for each letter that is split, for example
      `{"B": "data", "N": "model", "F": "model"}`.  Letters: B batch (the first
      dimension of an activation), T query length (the second), N query heads,
      K key/value heads, F feed-forward, V vocabulary.

  Raises:
    ValueError: if a rule names an axis that the mesh does not have.
  """
  clean = {letter: _as_axes(axes) for letter, axes in rules.items()}
  for letter, axes in clean.items():
    for axis in axes:
      if axis not in mesh.axis_names:
        raise ValueError(
          f"sharding: rule {letter!r} wants a mesh axis among "
          f"{mesh.axis_names}, got {axis!r}"
        )
  token = _RULES.set((mesh, clean))
  try:
    yield
  finally:
    _RULES.reset(token)


@dataclasses.dataclass(frozen=True)
class Split:
  """How the arrays and the results of an op may be split.

  What is not split is replicated, and its cotangent is summed over the devices.
  Of two letters split over the same mesh axis, the first keeps it.

  Attributes:
    arrays: the op's record of arrays, with the letters of each one's dimensions
      in its place: "BTNH"; None where it has None.
    outs: the same of the results, as each device has them.
    over: the letters over which the op may be split.
    gathers: the letters over which arrays may come split, as weights that are
      stored so, but which the op needs whole.
    alone: letters that must not share a mesh axis with another.
  """

  arrays: Any
  outs: Any
  over: str
  gathers: str = ""
  alone: str = ""


# Letters of the leading dimensions of an activation.
_LEADING = "BT23456789"


def leading_dims(ndim: int) -> str:
  """Letters for the leading dimensions of an activation: B, T, then others."""
  return _LEADING[:ndim].ljust(ndim, "-")


def per_device(
  op: str,
  function: Callable[[Any, Mapping[str, Axes]], Any],
  arrays: Any,
  split: Split,
) -> Any:
  """Runs `function` on each device's block of `arrays`.

  Args:
    op: the op's name, for errors.
    function: maps a record of blocks, and the mesh axes of each letter that is
      split, to the record of blocks of the results.  Over a letter that the
      results lack, it sums: `jax.lax.psum(y, axes["F"])`.
    arrays: the record of arrays.
    split: how it may be split.

  Raises:
    ValueError: if a letter is split that must not be.
  """
  leaves, letters = jax.tree.leaves(arrays), jax.tree.leaves(split.arrays)
  mesh, found = _split_axes(op, leaves, letters)
  if mesh is None:
    return function(arrays, {})
  axes = _allowed(op, found, split)

  def spec(letters: str) -> PartitionSpec:
    return PartitionSpec(*(axes.get(letter) or None for letter in letters))

  in_specs = jax.tree.map(spec, split.arrays)
  if any(kind == AxisType.Explicit for kind in mesh.axis_types):
    arrays = jax.tree.map(jax.sharding.reshard, arrays, in_specs)
  return jax.shard_map(
    lambda blocks: function(blocks, axes),
    mesh=mesh,
    in_specs=(in_specs,),
    out_specs=jax.tree.map(spec, split.outs),
  )(arrays)


def _split_axes(
  op: str, arrays: Sequence[jax.Array], dims: Sequence[str]
) -> tuple[Any, dict[str, Axes]]:
  """The mesh and, for each letter, the mesh axes that split it.

  Returns:
    (None, {}) where nothing is split, as inside a shard_map.

  Raises:
    ValueError: if two arguments split the same letter differently.
  """
  found: dict[str, Axes] = {}
  mesh = None
  for array, letters in zip(arrays, dims, strict=True):
    here = jax.typeof(array).sharding
    explicit = {
      name
      for name, kind in zip(
        here.mesh.axis_names, here.mesh.axis_types, strict=True
      )
      if kind == AxisType.Explicit
    }
    for letter, entry in zip(letters, here.spec, strict=True):
      axes = tuple(axis for axis in _as_axes(entry) if axis in explicit)
      if axes and found.setdefault(letter, axes) != axes:
        raise ValueError(
          f"{op}: dimension {letter} is split over {found[letter]} in one "
          f"argument and over {axes} in another; use jax.sharding.reshard"
        )
    if explicit:
      mesh = here.mesh
  rules = _RULES.get()
  if mesh is None and rules is not None and not _inside_shard_map(arrays):
    mesh, by_letter = rules
    known = {letter for letters in dims for letter in letters}
    found = {k: v for k, v in by_letter.items() if v and k in known}
  return (mesh, found) if found else (None, {})


def _inside_shard_map(arrays: Sequence[jax.Array]) -> bool:
  return any(
    kind == AxisType.Manual
    for a in arrays
    for kind in jax.typeof(a).sharding.mesh.axis_types
  )


def _allowed(
  op: str, found: Mapping[str, Axes], split: Split
) -> dict[str, Axes]:
  """The mesh axes of each letter that stays split, if the op can do it."""
  axes: dict[str, Axes] = {}
  for letter, names in found.items():
    if letter in split.gathers:
      continue
    for other, used in axes.items():
      both = sorted(set(names) & set(used))
      if both and {letter, other} & set(split.alone):
        raise ValueError(
          f"{op}: wanted different mesh axes for {other} and {letter}, got "
          f"both split over {both}; use jax.sharding.reshard"
        )
    taken = {axis for used in axes.values() for axis in used}
    axes[letter] = tuple(axis for axis in names if axis not in taken)
    # The dimensions of an activation after the first are all lengths.
    known = "T" if letter in _LEADING[1:] else letter
    if axes[letter] and known not in split.over:
      raise ValueError(
        f"{op}: can be split over {', '.join(split.over)} only, but dimension "
        f"{letter} is split over {axes[letter]}; use jax.sharding.reshard"
      )
  return axes


def vary_alike(tree: Any) -> Any:
  """Inside a shard_map, makes all arrays vary over the same mesh axes.

  A kernel reads them together, and a custom VJP must return each cotangent
  with its argument's type; the cast's own transpose sums over the axes.
  """

  def varying(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying

  union = frozenset().union(*map(varying, jax.tree.leaves(tree)))

  def cast(x: Any) -> Any:
    missing = tuple(sorted(union - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(cast, tree)


def varying_like(array: Any, shape: Sequence[int], dtype: Any) -> Any:
  """The type of a kernel's result that varies over the axes `array` does."""
  return jax.ShapeDtypeStruct(
    tuple(shape),
    dtype,
    manual_axis_type=jax.typeof(array).manual_axis_type,
  )
