"""Kernels under a sharded jit.

XLA cannot partition a Pallas kernel, so each op runs its kernel on every
device's own block of the arrays, inside `jax.shard_map`.  Which dimension is
split over which mesh axes comes from

  * the arrays' types, on a mesh whose axes are Explicit: nothing to do, and
    rules, if there are any, for what the types leave open;
  * `with kernels.sharding(mesh, rules)`, on a mesh whose axes are Auto.

Dimensions go by the letters of the package's legend, one character each.  An op
says in a `Split` which of them it can split: those over which its rows are
independent, or which it can sum over afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .manual import Axes, nested

# --- what the user says -------------------------------------------------------

# (mesh, rules), as jit's caches see it: who traces under other rules, or none,
# gets another program.
_RULES = jax.make_user_context(None)

# The letters of the package's legend that a rule may name.
_LETTERS = "BTSNKHDFV"


def _as_axes(entry: Any) -> Axes:
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


@contextlib.contextmanager
def sharding(
  mesh: jax.sharding.Mesh, rules: Mapping[str, str | Sequence[str] | None]
) -> Iterator[None]:
  """Says how the kernels traced inside are split over a mesh of Auto axes.

  Inside a `jax.shard_map` that is manual over some axes of the mesh, it says so
  of the others.  Arrays on a mesh of Explicit axes need no rules: they go by
  their types, and by rules where these leave a dimension open.

  Args:
    mesh: the mesh of the surrounding `jit`.
    rules: mesh axis or axes for each letter that is split, for example
      `{"B": "data", "N": "model", "F": "model"}`.  Letters: B batch (the first
      dimension of an activation), T query length (the second), S key length,
      N query heads, K key/value heads (by default split as N is, as far as
      there are enough of them), H head size, D width, F feed-forward, V
      vocabulary.  A length must be a multiple of the devices it is split over.

  Raises:
    ValueError: if a rule has another letter, or names an axis that the mesh
      does not have, or one axis twice.
  """
  if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
    raise ValueError(
      f"sharding: mesh must be a jax.sharding.Mesh, got {mesh!r}"
    )
  try:
    clean = {letter: _as_axes(axes) for letter, axes in dict(rules).items()}
  except (TypeError, ValueError) as error:
    wanted = "rules must be mesh axes by letter, such as {'B': 'data'}"
    raise ValueError(f"sharding: {wanted}, got {rules!r}") from error
  for letter, axes in clean.items():
    if letter not in tuple(_LETTERS):
      raise ValueError(
        f"sharding: a rule's letter must be one of {', '.join(_LETTERS)}, "
        f"got {letter!r}"
      )
    for axis in axes:
      if axis not in mesh.axis_names:
        raise ValueError(
          f"sharding: rule {letter!r} wants a mesh axis among "
          f"{mesh.axis_names}, got {axis!r}"
        )
    if len(set(axes)) < len(axes):
      raise ValueError(
        f"sharding: rule {letter!r} must name each axis once, got {axes}"
      )
  with _RULES((mesh, tuple(sorted(clean.items())))):
    yield


def rules_are_given() -> bool:
  """Whether this is traced inside `sharding`."""
  return _RULES.value is not None


# --- what an op says ----------------------------------------------------------


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
      stored so, but which the op needs whole.  A result is split as they were.
    alone: letters that must not share a mesh axis with another.
    fewer: letters that are split over as many of their axes as divide them, as
      heads that are fewer than the devices.
    follows: a letter of these, and the one whose axes it takes.
    alike: a letter that is split as another one is, and that one, which the
      first alone must not be.
  """

  arrays: Any
  outs: Any
  over: str
  gathers: str = ""
  alone: str = ""
  fewer: str = ""
  follows: tuple[str, str] | None = None
  alike: tuple[str, str] | None = None


# Letters of the leading dimensions of an activation.
_LEADING = "BT23456789"


def leading_dims(ndim: int) -> str:
  """Letters for the leading dimensions of an activation: B, T, then others."""
  return _LEADING[:ndim].ljust(ndim, "-")


# --- one device's part --------------------------------------------------------


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
    ValueError: if a letter is split that must not be, or does not divide.
  """
  leaves, letters = jax.tree.leaves(arrays), jax.tree.leaves(split.arrays)
  where = _Where.of(op, leaves, letters)
  if where is None:
    return function(arrays, {})
  axes = _allowed(op, where, split)
  gathered = {
    letter: where.found[letter]
    for letter in split.gathers
    if where.found.get(letter)
  }

  def spec(letters: str, axes: Mapping[str, Axes] = axes) -> PartitionSpec:
    return PartitionSpec(*(axes.get(letter) or None for letter in letters))

  def on_block(block: Any) -> Any:
    outs = function(block, axes)
    return jax.tree.map(
      lambda letters, out: _own_part(out, letters, gathered), split.outs, outs
    )

  in_specs = jax.tree.map(spec, split.arrays)
  out_specs = jax.tree.map(
    lambda letters: spec(letters, {**gathered, **axes}), split.outs
  )
  arrays = where.resharded(arrays, in_specs)
  if where.mesh is None:
    names = where.axis_names
    kinds = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), arrays)
    return nested(on_block, kinds, in_specs, out_specs, names)(arrays)
  return jax.shard_map(
    on_block, mesh=where.mesh, in_specs=(in_specs,), out_specs=out_specs
  )(arrays)


def is_split(op: str, arrays: Any, split: Split) -> bool:
  """Whether `per_device` would divide the arrays among devices."""
  leaves, letters = jax.tree.leaves(arrays), jax.tree.leaves(split.arrays)
  return _Where.of(op, leaves, letters) is not None


def is_split_over(letter: str, op: str, arrays: Any, split: Split) -> bool:
  """Whether it would do so along a letter."""
  leaves, letters = jax.tree.leaves(arrays), jax.tree.leaves(split.arrays)
  where = _Where.of(op, leaves, letters)
  return where is not None and bool(_allowed(op, where, split).get(letter))


def _own_part(x: jax.Array, letters: str, gathered: Mapping[str, Axes]) -> Any:
  """Of a result over a gathered letter, the part that the device had of it."""
  for dim, letter in enumerate(letters):
    if letter in gathered:
      axes = gathered[letter]
      size = x.shape[dim] // jax.lax.axis_size(axes)
      start = jax.lax.axis_index(axes) * size
      x = jax.lax.dynamic_slice_in_dim(x, start, size, dim)
  return x


@dataclasses.dataclass(frozen=True)
class _Where:
  """The mesh over which an op's arrays may be split.

  Attributes:
    mesh: the mesh; None for that of the context.
    sizes: of all its axes.
    axis_names: of it, those that no surrounding `shard_map` has taken.
    found: for each letter the mesh axes that split it.
    lengths: of each letter's dimension.
    explicit: those by which arrays must be brought to how they are to be split.
  """

  mesh: Any
  sizes: Mapping[str, int]
  axis_names: Axes
  found: Mapping[str, Axes]
  lengths: Mapping[str, int]
  explicit: frozenset[str]

  @classmethod
  def of(
    cls, op: str, arrays: Sequence[jax.Array], dims: Sequence[str]
  ) -> _Where | None:
    """None where nothing is to be split, as in a shard_map over all axes.

    Raises:
      ValueError: if two arguments split the same letter differently.
    """
    types = [jax.typeof(array) for array in arrays]
    kinds = {
      name: (kind, t.sharding.mesh)
      for t in types
      for name, kind in zip(
        t.sharding.mesh.axis_names, t.sharding.mesh.axis_types, strict=True
      )
    }
    lengths: dict[str, int] = {}
    for t, letters in zip(types, dims, strict=True):
      for letter, size in zip(letters, t.shape, strict=True):
        # Another dimension of the letter may have several numbers for each.
        lengths[letter] = min(size, lengths.get(letter, size))
    free = tuple(n for n, (kind, _) in kinds.items() if kind != AxisType.Manual)
    explicit = {
      n for n, (kind, _) in kinds.items() if kind == AxisType.Explicit
    }
    is_inside = len(free) < len(kinds)
    rules = _RULES.value
    if explicit:
      found = _found_in_types(op, types, dims, explicit)
      mesh = next(kinds[name][1] for name in explicit)
      # Rules for the same mesh say it of what the types leave open.
      for letter, axes in rules[1] if rules else ():
        if letter in lengths and set(axes) <= set(free):
          found.setdefault(letter, axes)
    elif rules is None or (is_inside and not free):
      return None
    else:
      mesh, by_letter = rules
      found = {
        letter: tuple(a for a in axes if not is_inside or a in free)
        for letter, axes in by_letter
        if letter in lengths
      }
      if is_inside:
        mesh = next(mesh for _, mesh in kinds.values())
    names = free if is_inside else tuple(mesh.axis_names)
    sizes = dict(mesh.shape)
    where = None if is_inside else mesh
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    known = frozenset(n for n, kind in pairs if kind == AxisType.Explicit)
    return cls(where, sizes, names, found, lengths, known)

  def resharded(self, arrays: Any, specs: Any) -> Any:
    """The arrays, split as `specs` say; on Auto axes that is XLA's to do."""
    if not self.explicit:
      return arrays

    def known(entry: Any) -> Axes | None:
      axes = (axis for axis in _as_axes(entry) if axis in self.explicit)
      return tuple(axes) or None

    def one(x: jax.Array, spec: PartitionSpec) -> jax.Array:
      spec = PartitionSpec(*map(known, spec))
      has_mesh = jax.typeof(x).sharding.mesh.axis_names != ()
      where = spec if has_mesh else NamedSharding(self.mesh, spec)
      return jax.sharding.reshard(x, where)

    return jax.tree.map(one, arrays, specs)

  def devices(self, axes: Axes) -> int:
    """How many share a dimension that is split over `axes`."""
    return math.prod(self.sizes[axis] for axis in axes)


def _found_in_types(
  op: str, types: Sequence[Any], dims: Sequence[str], explicit: set[str]
) -> dict[str, Axes]:
  """For each letter, the Explicit axes that split it."""
  found: dict[str, Axes] = {}
  for t, letters in zip(types, dims, strict=True):
    for letter, entry in zip(letters, t.sharding.spec, strict=True):
      axes = tuple(axis for axis in _as_axes(entry) if axis in explicit)
      if axes and found.setdefault(letter, axes) != axes:
        raise ValueError(
          f"{op}: dimension {letter} is split over {found[letter]} in one "
          f"argument and over {axes} in another; use jax.sharding.reshard"
        )
  return found


def _allowed(op: str, where: _Where, split: Split) -> dict[str, Axes]:
  """The mesh axes of each letter that stays split, if the op can do it."""
  axes: dict[str, Axes] = {}
  found = dict(where.found)
  follower, leader = split.follows or ("", "")
  own = found.pop(follower, ())
  if own:
    found.setdefault(leader, own)
  second, first = split.alike or ("", "")
  if found.get(first):
    of_second = found.pop(second, ()) or found[first]
    if of_second != found[first]:
      raise ValueError(
        f"{op}: wanted the same mesh axes for {first} and {second}, got "
        f"{found[first]} and {of_second}; use jax.sharding.reshard"
      )
  for letter, names in found.items():
    if letter in split.gathers:
      _check_divides(op, where, letter, names)
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
    if letter in split.fewer:
      axes[letter] = _that_divide(where, letter, axes[letter])
    # The dimensions of an activation after the first are all lengths.
    known = "T" if letter in _LEADING[1:] else letter
    if axes[letter] and known not in split.over:
      raise ValueError(
        f"{op}: can be split over {', '.join(split.over)} only, but dimension "
        f"{letter} is split over {axes[letter]}; use jax.sharding.reshard"
      )
    _check_divides(op, where, letter, axes[letter])
  if follower:
    lead = axes.get(leader, ())
    has_own = own and own == lead[: len(own)]
    axes[follower] = _that_divide(where, follower, own if has_own else lead)
  if axes.get(first):
    axes[second] = axes[first]
    _check_divides(op, where, second, axes[second])
  return axes


def _check_divides(op: str, where: _Where, letter: str, axes: Axes) -> None:
  devices = where.devices(axes)
  if where.lengths[letter] % devices:
    raise ValueError(
      f"{op}: dimension {letter} must be a multiple of the {devices} devices "
      f"it is split over, along {axes}, got {where.lengths[letter]}"
    )


def _that_divide(where: _Where, letter: str, axes: Axes) -> Axes:
  """The first of the axes, as many as divide the dimension."""
  while where.lengths[letter] % where.devices(axes):
    axes = axes[:-1]
  return axes
