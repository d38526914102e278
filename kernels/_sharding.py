"""Kernels under a sharded jit.

XLA cannot partition a Pallas kernel, so each op runs its kernel on every
device's own block of the arrays, inside `jax.shard_map`.  Which dimension is
split over which mesh axes comes from

  * the arrays' types, on a mesh whose axes are Explicit: nothing to do;
  * `with kernels.sharding(mesh, rules)`, on a mesh whose axes are Auto.

Dimensions go by the letters of the package's legend.  An op lists the letters
it can split: those over which its rows are independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from ._frame.sharding import _RULES, Axes, _as_axes


def leading_dims(ndim: int) -> tuple[str, ...]:
  """Letters for the leading dimensions of an activation: B, T, then others."""
  return ("B", "T", *(f"T{i}" for i in range(2, ndim)))[:ndim]


def split_axes(
  op: str, args: Sequence[jax.Array], dims: Sequence[Sequence[str]]
) -> tuple[Any, dict[str, Axes]]:
  """The mesh and, for each letter, the mesh axes that split it.

  Returns:
    (None, {}) where nothing is split, as inside a shard_map.

  Raises:
    ValueError: if two arguments split the same letter differently.
  """
  found: dict[str, Axes] = {}
  mesh = None
  for array, letters in zip(args, dims, strict=True):
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
  if mesh is None and rules is not None and not _inside_shard_map(args):
    mesh, by_letter = rules
    known = {letter for letters in dims for letter in letters}
    found = {k: v for k, v in by_letter.items() if v and k in known}
  return (mesh, found) if found else (None, {})


def _inside_shard_map(args: Sequence[jax.Array]) -> bool:
  return any(
    kind == AxisType.Manual
    for a in args
    for kind in jax.typeof(a).sharding.mesh.axis_types
  )


def per_device(
  op: str,
  function: Callable[..., Any],
  args: Sequence[jax.Array],
  dims: Sequence[Sequence[str]],
  out_dims: Any,
  *,
  splits: str,
  gathers: Sequence[str] = (),
  finish: Callable[[Any, Mapping[str, Axes]], Any] | None = None,
) -> Any:
  """Runs `function` on each device's block of `args`.

  Args:
    op: the op's name, for errors.
    function: maps blocks of the arguments to blocks of the results.  What is
      not split is replicated, and its cotangent is summed over the devices.
      Of two letters split over the same mesh axis, the first keeps it.
    args: the arrays.
    dims: letters of each argument's dimensions.
    out_dims: letters of the result's dimensions, or a tuple of such.
    splits: the letters over which the op may be split.
    gathers: the letters over which arguments may come split, as weights that
      are stored so, but which the op needs whole.
    finish: maps the blocks of the results, and the mesh axes of each letter
      that is split, to the final blocks; the place for a sum over a letter that
      the results do not have, as `jax.lax.psum(y, axes["F"])`.

  Raises:
    ValueError: if another letter is split.
  """
  mesh, found = split_axes(op, args, dims)
  if mesh is None:
    return function(*vary_alike(*args))
  axes: dict[str, Axes] = {}
  for letter, names in found.items():
    taken = {axis for used in axes.values() for axis in used}
    if letter not in gathers:
      axes[letter] = tuple(axis for axis in names if axis not in taken)
  for letter in axes:
    if axes[letter] and letter[0] not in splits:
      raise ValueError(
        f"{op}: can be split over {', '.join(splits)} only, but dimension "
        f"{letter} is split over {axes[letter]}; use jax.sharding.reshard"
      )

  def spec(letters: Sequence[str]) -> PartitionSpec:
    return PartitionSpec(*(axes.get(letter) or None for letter in letters))

  in_specs = tuple(spec(letters) for letters in dims)
  several = isinstance(out_dims[0], tuple)
  out_specs = tuple(map(spec, out_dims)) if several else spec(out_dims)
  if any(kind == AxisType.Explicit for kind in mesh.axis_types):
    args = [
      jax.sharding.reshard(a, s) for a, s in zip(args, in_specs, strict=True)
    ]

  def finished(*blocks):
    assert finish is not None
    return finish(function(*vary_alike(*blocks)), axes)

  # Without the check of varying axes, cotangents of replicated arguments are
  # summed over the mesh, which is what a replicated scale or weight needs.  The
  # check leaves that to the casts of vary_alike, and then a sum over the mesh
  # in `finish` is not summed once more on the way back.
  mapped = jax.shard_map(
    finished if finish else function,
    mesh=mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=finish is not None,
  )
  return mapped(*args)


def vary_alike(*args: jax.Array) -> tuple[jax.Array, ...]:
  """Inside a shard_map, makes all arguments vary over the same mesh axes.

  A kernel reads them together, and a custom VJP must return each cotangent
  with its argument's type; the cast's own transpose sums over the axes.
  """
  varying = [jax.typeof(a).manual_axis_type.varying for a in args]
  union = frozenset().union(*varying)
  return tuple(
    jax.lax.pcast(a, tuple(sorted(union - have)), to="varying")
    if union - have
    else a
    for a, have in zip(args, varying, strict=True)
  )


def like(shape: Sequence[int], dtype: Any, array: jax.Array):
  """The type of a kernel's output that varies over the axes `array` does."""
  return jax.ShapeDtypeStruct(
    tuple(shape),
    dtype,
    manual_axis_type=jax.typeof(array).manual_axis_type,
  )
