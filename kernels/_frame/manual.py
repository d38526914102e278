"""What JAX asks of code inside a `shard_map`.

There a value is the same on all devices of a mesh axis, or varies over it, and
its type says which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Axes = tuple[str, ...]

# --- what varies --------------------------------------------------------------


def vary_alike(tree: Any) -> Any:
  """Inside a shard_map, makes all arrays vary over the same mesh axes.

  A kernel reads them together, and a custom VJP must return each cotangent
  with its argument's type; the cast's own transpose sums over the axes.
  """

  union = frozenset().union(*map(_varying, jax.tree.leaves(tree)))
  return jax.tree.map(lambda x: _varying_over(x, sorted(union)), tree)


def vary_as_all(some: Any, tree: Any) -> bool:
  """Whether `some` arrays are left as they are where all must vary alike."""
  union = frozenset().union(*map(_varying, jax.tree.leaves(tree)))
  return all(_varying(x) == union for x in jax.tree.leaves(some))


def _varying(x: Any) -> frozenset[str]:
  return jax.typeof(x).manual_axis_type.varying


def _varying_over(x: jax.Array, axes: Sequence[str]) -> jax.Array:
  missing = tuple(axis for axis in axes if axis not in _varying(x))
  return jax.lax.pcast(x, missing, to="varying") if missing else x


def varying_like(array: Any, shape: Sequence[int], dtype: Any) -> Any:
  """The type of a kernel's result that varies over the axes `array` does."""
  return jax.ShapeDtypeStruct(
    tuple(shape),
    dtype,
    manual_axis_type=jax.typeof(array).manual_axis_type,
  )


def zeros_of(kind: Any) -> jax.Array:
  """Zeros of a type, or `jax.ShapeDtypeStruct`: split and varying as it is."""
  zeros = jnp.zeros(kind.shape, kind.dtype)
  if is_explicit(kind):
    where = NamedSharding(kind.sharding.mesh, kind.sharding.spec)
    zeros = jax.sharding.reshard(zeros, where)
  return _varying_over(zeros, sorted(varying_axes(kind)))


def is_explicit(kind: Any) -> bool:
  """Whether a type says how an array is split over a mesh."""
  mesh = getattr(kind.sharding, "mesh", None)
  return mesh is not None and AxisType.Explicit in mesh.axis_types


def varying_axes(kind: Any) -> frozenset[str]:
  """The mesh axes over which a type says that an array varies."""
  return getattr(kind.manual_axis_type, "varying", frozenset())


# --- what XLA's partitioner does ----------------------------------------------


def partitioned(
  function: Callable[..., jax.Array], spec: Sequence[Any]
) -> Callable[..., jax.Array]:
  """`function` of trees of arrays, plain jnp, of which a mesh asks no types.

  On a mesh with Explicit axes each operation would have to say how its result
  is split; here XLA's partitioner says so, as it does where axes are Auto.

  Args:
    function: gives one array.
    spec: how the dimensions of its result are split, as a type says it.
  """
  kinds = jax.sharding.get_abstract_mesh().axis_types
  if AxisType.Explicit not in kinds:
    return function
  by_xla: Any = jax.sharding.auto_axes(
    function, out_sharding=PartitionSpec(*spec)
  )
  return by_xla


# --- one inside another ------------------------------------------------------


def nested(
  function: Callable[[Any], Any],
  kinds: Any,
  in_specs: Any,
  out_specs: Any,
  names: Axes,
) -> Callable[[Any], Any]:
  """A shard_map over the axes that a surrounding one has left.

  JAX cannot lower the gradient of one: it takes what is saved to be split over
  the outer axes once more.  So what is saved leaves the inner one as a result,
  every device's under an index of its own.
  """
  mapped = functools.partial(jax.shard_map, axis_names=set(names))
  own, whole = PartitionSpec(names), PartitionSpec()

  def is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)

  def floats_of(tree: Any, arrays: Any) -> Any:
    return jax.tree.map(lambda x, a: x if is_float(a) else None, tree, arrays)

  @jax.custom_vjp
  def run(arrays: Any) -> Any:
    return mapped(function, in_specs=(in_specs,), out_specs=out_specs)(arrays)

  def forward(arrays: Any) -> Any:
    def on_block(block: Any) -> Any:
      def of_floats(floats: Any) -> Any:
        return function(replaced(block, floats))

      outs, back = jax.vjp(of_floats, floats_of(block, block))
      leaves, tree = jax.tree.flatten(back)
      is_apart = [not _varying(x).isdisjoint(names) for x in leaves]
      layout.append((tree, is_apart))
      pairs = list(zip(leaves, is_apart, strict=True))
      apart = [_varying_over(x, names)[None] for x, is_one in pairs if is_one]
      return outs, apart, [x for x, is_one in pairs if not is_one]

    layout: list[Any] = []
    outs, apart, same = mapped(
      on_block, in_specs=(in_specs,), out_specs=(out_specs, own, whole)
    )(arrays)
    tree, is_apart = layout[-1]
    apart, same = map(_Apart, apart), iter(same)
    leaves = [next(apart) if is_one else next(same) for is_one in is_apart]
    return outs, jax.tree.unflatten(tree, leaves)

  def backward(back: Any, d_outs: Any) -> Any:
    specs = _map_saved(lambda _: own, lambda _: whole, back)

    def on_block(back: Any, d_outs: Any) -> Any:
      back = _map_saved(lambda x: x.array[0], lambda x: x, back)
      return back(d_outs)[0]

    d_arrays = floats_of(in_specs, kinds)
    run_back = mapped(on_block, in_specs=(specs, out_specs), out_specs=d_arrays)
    return (run_back(back, d_outs),)

  run.defvjp(forward, backward)
  return run


def replaced(tree: Any, new: Any) -> Any:
  """The tree, with what `new` has of its structure; None leaves the tree's."""
  return jax.tree.map(
    lambda x, other: x if other is None else other,
    tree,
    new,
    is_leaf=lambda x: x is None,
  )


class _Apart(NamedTuple):
  """Of what is saved, an array that every device has its own of: [1, ...]."""

  array: Any


def _map_saved(apart: Any, same: Any, tree: Any) -> Any:
  return jax.tree.map(
    lambda x: apart(x) if isinstance(x, _Apart) else same(x),
    tree,
    is_leaf=lambda x: isinstance(x, _Apart),
  )
