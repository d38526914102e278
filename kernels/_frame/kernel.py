"""An op is three functions and two records; this makes it a citizen of JAX.

The records are `NamedTuple`s of arrays, with None for what is absent: `Arrays`,
what an op is given, and `Outs`, what it gives.  (Integers may come in records
of their own; floats are fields of `Arrays` itself.)  Everything that is not an
array is the op's `Problem`, frozen and hashable, with at least the field
`implementation`.  The functions are

    reference(problem, arrays) -> outs                     plain jnp
    forward(problem, arrays) -> outs                       Pallas
    backward(problem, saved, d_outs) -> d_arrays           Pallas

and `f = kernel_op(...)` is called as `f(problem, arrays) -> outs`.  On the way
from there to `forward` stand, from the outside in:

    the mesh         each device runs the op on its own block of the arrays
    the derivative   what `backward` reads is saved, under names for `remat`
    the platform     the kernel where the computation is lowered for TPU,
                     the reference elsewhere, by the caller's choice or by JAX's
    vmap             of the kernels; the reference is jnp
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from . import room, switches
from .derivative import (
  differentiable,
  refused,
  with_integers,
  without_derivatives,
)
from .manual import replaced, vary_alike, vary_as_all
from .mapped import Vmap, mapped_kernel, one_by_one, unless_mapped
from .sharding import Split, is_split, per_device


class Saved(NamedTuple):
  """What a backward pass is given of the forward pass.

  Attributes:
    arrays: the op's arrays, None for what it does not save.
    outs: the op's results, likewise.
    kept: what `forward` returned beside its results, None if the op keeps none.
    wanted: as arrays, whether the gradient of each is asked for.  What is
      returned for the others does not matter.
    places: what lies in stacks of all layers, to be read there by the kernel
      and not from `arrays` or `outs`; None if nothing does.
  """

  arrays: Any
  outs: Any
  kept: Any
  wanted: Any
  places: room.Places | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class kernel_op:  # lower case, as jax.custom_vjp
  """`kernel_op(...)(problem, arrays) -> outs`, by either implementation.

  Attributes:
    name: prefix of the names by which remat policies find what is saved.
    reference: the specification, plain jnp; differentiated by JAX.
    forward: the kernel.  With `keeps`, forward(problem, arrays, keep=...)
      returns (outs, kept), where kept is None unless `keep`.
    backward: the kernel of the gradient.
    saves: fields of the arrays and of the outs that `backward` reads.
    names: fields of the outs and of what is kept that have names for remat
      policies: "NAME_FIELD".
    keeps: whether `forward` may keep more for `backward` than its results.
    split: how the arrays of a problem may be split over a mesh.
    vmap: of the forward and the backward kernel.
    around: what a device does with its block, if not the op alone:
      around(op, problem, arrays, axes) -> outs, where op(problem, arrays) is
      the differentiable op and `axes` has the mesh axes of each split letter.
    plain_forward: what takes the place of `forward` off TPU, where it is not
      `reference`, because of `around` or `keeps`.
    plain_backward: what takes the place of `backward` there, where it is not
      the reference's own gradient.
    plain_linear: the same for forward mode, where `plain_backward` is not
      linear in its cotangents.
    constants: names of the fields of a record of arrays that have no gradient,
      for it is another field's.
    passes: fields of the arrays that are fields of the results too, as they
      are; the kernels see their cotangents alone.
    apart: of arrays with such fields, those of an op without, and the fields of
      the results that are known by that.
    stores: of a problem and its arrays, the names of fields of the arrays and
      the results that `backward` can read in a stack of all layers, and the
      form that each has there; see `room`.
  """

  name: str
  _: dataclasses.KW_ONLY
  reference: Callable[..., Any]
  forward: Callable[..., Any]
  backward: Callable[..., Any]
  saves: tuple[str, ...]
  names: tuple[str, ...] = ()
  keeps: bool = False
  split: Callable[[Any, Any], Split]
  vmap: tuple[Vmap, Vmap] = ("grid", "grid")
  around: Callable[..., Any] | None = None
  plain_forward: Callable[..., Any] | None = None
  plain_backward: Callable[..., Any] | None = None
  plain_linear: Callable[..., Any] | None = None
  constants: Callable[[Any], Iterable[str]] = lambda _: ()
  passes: tuple[str, ...] = ()
  apart: Callable[[Any], tuple[Any, Mapping[str, Any]]] | None = None
  stores: Callable[[Any, Any], Mapping[str, room.Form]] = lambda *_: {}

  def __call__(self, problem: Any, arrays: Any) -> Any:
    """The op on arrays of any sharding; its door has checked them."""
    leaves = jax.tree.leaves(arrays)
    is_empty = any(0 in array.shape for array in leaves)
    if problem.implementation == "xla" or is_empty:
      return switches.plain(self.reference)(problem, arrays)
    if any(array.dtype == jnp.float16 for array in leaves):
      return self._in_float32(problem, arrays)
    if not all(isinstance(n, int) for array in leaves for n in array.shape):
      split = self.split(problem, arrays)
      one = functools.partial(self, problem)
      return one_by_one(self.name, one, arrays, split.arrays)
    return self._by_device(problem, arrays)

  def leaves_alone(self, problem: Any, arrays: Any, some: Any) -> bool:
    """Whether the op's kernel is given `some` of the arrays as they are.

    They are not split over a mesh, cast, or made to vary over its axes.
    """
    leaves = jax.tree.leaves(arrays)
    return (
      problem.implementation != "xla"
      and all(isinstance(n, int) and n for x in leaves for n in x.shape)
      and all(x.dtype != jnp.float16 for x in leaves)
      and vary_as_all(some, arrays)
      and not is_split(self.name, arrays, self.split(problem, arrays))
    )

  @switches.plain
  def _in_float32(self, problem: Any, arrays: Any) -> Any:
    """float16, which a TPU does not compute with, by way of float32."""
    reference = functools.partial(self.reference, problem)
    outs = jax.eval_shape(reference, arrays)
    wide = self._by_device(problem, jax.tree.map(_without_float16, arrays))
    return jax.tree.map(lambda x, out: x.astype(out.dtype), wide, outs)

  @switches.plain
  def _by_device(self, problem: Any, arrays: Any) -> Any:
    """The op on each device's block of the arrays."""

    def on_device(block: Any, axes: Any) -> Any:
      if self.around is None:
        return self.on_device(problem, block)
      return self.around(self.on_device, problem, block, axes)

    return per_device(self.name, on_device, arrays, self.split(problem, arrays))

  def on_device(self, problem: Any, arrays: Any) -> Any:
    """The differentiable op on one device's arrays."""
    arrays, here = vary_alike(arrays), room.current()
    forms = {} if here is None else self.stores(problem, arrays)
    if here is None or not forms:
      return differentiable(self, problem, arrays, None)[0]
    start, places = here.places(self._types(problem, arrays, forms))
    outs, stacks = differentiable(self, problem, arrays, places)
    if places is not None:
      here.fill(start, stacks)
      self._note(here, start, forms, outs)
    return outs

  def _note(
    self, here: room.Room, start: int, forms: Mapping[str, room.Form], outs: Any
  ) -> None:
    """Which results lie in stores, for what uses them next."""
    for place, name in enumerate(sorted(forms), start):
      if name in outs._fields:
        here.note(getattr(outs, name), place, forms[name].back)

  def _types(
    self, problem: Any, arrays: Any, forms: Mapping[str, room.Form]
  ) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Of what the op keeps in stores."""
    fields = arrays._asdict()
    if not forms.keys() <= fields.keys():
      plain = functools.partial(self.plain_forward or self.reference, problem)
      fields |= jax.eval_shape(plain, arrays)._asdict()
    return {
      name: jax.eval_shape(form.make, fields[name])
      for name, form in forms.items()
    }

  def run(
    self, problem: Any, arrays: Any, keep: bool, places: Any = None
  ) -> tuple[Any, Any, Any]:
    """(outs, kept, stacks) by whichever implementation it is to be.

    Args:
      problem: the problem.
      arrays: its arrays.
      keep: whether what the backward pass reads is kept.
      places: of the op's stores, which are filled; or None.
    """
    forms = {} if places is None else self.stores(problem, arrays)
    passing = {field: getattr(arrays, field) for field in self.passes}
    arrays = arrays._replace(**dict.fromkeys(passing))

    def put(outs: Any, arrays: Any, places: Any) -> Any:
      return None if places is None else places.put(forms, arrays, outs)

    def either(function: Callable[..., Any], arrays: Any, places: Any) -> Any:
      kept = None
      if self.keeps:
        outs, kept = function(problem, arrays, keep=keep)
      else:
        outs = function(problem, arrays)
      return outs, kept, put(outs, arrays, places)

    def by_kernel(arrays: Any, places: Any) -> Any:
      mapped = mapped_kernel(
        self.vmap[0], lambda arrays: either(self.forward, arrays, None)
      )
      outs, kept, _ = mapped(arrays)
      return outs, kept, put(outs, arrays, places)

    outs, kept, stacks = self._dispatch(
      problem.implementation,
      by_kernel,
      functools.partial(either, self.plain_forward or self.reference),
      arrays,
      places,
    )
    return outs._replace(**passing), kept, stacks

  def run_backward(self, problem: Any, saved: Saved, d_outs: Any) -> Any:
    """The gradients that are wanted, None for the other arrays."""
    wanted = saved.wanted

    def either(function: Callable[..., Any], saved: Saved, d_outs: Any) -> Any:
      saved = saved._replace(wanted=wanted)
      return self._only_wanted(problem, function, saved, d_outs)

    kernel = functools.partial(either, self.backward)
    of_examples = mapped = mapped_kernel(self.vmap[1], kernel)
    if saved.places is not None:  # of several examples there is no such stack
      mapped = unless_mapped(
        kernel, lambda saved, d: of_examples(saved._replace(places=None), d)
      )
    return self._dispatch(
      problem.implementation,
      mapped,
      functools.partial(either, self.plain_backward or self.reference_vjp),
      saved._replace(wanted=None),
      d_outs,
    )

  def _only_wanted(
    self, problem: Any, function: Any, saved: Saved, d_outs: Any
  ) -> Any:
    """What `function` gives, and None for what is not wanted of it."""
    grads = function(problem, saved, d_outs)
    given = {}
    for field, want in saved.wanted._asdict().items():
      given[field] = getattr(grads, field) if want is True else None
      if want is True and given[field] is None:  # not to be taken for zero
        array, leaves = getattr(saved.arrays, field), jax.tree.leaves(d_outs)
        message = (
          f"{self.name}: the kernel has no gradient of {field}; pass "
          f"implementation='xla'"
        )
        if problem.implementation == "pallas" or array is None:
          raise NotImplementedError(message)
        (given[field],) = refused(message, leaves, [array])
    return type(grads)(**given)

  def plain_gradients(self, problem: Any, saved: Saved, d_outs: Any) -> Any:
    """What `run_backward` gives off TPU, linear in the cotangents."""
    plain = self.plain_linear or self.plain_backward or self.reference_vjp
    plain = switches.plain(plain)
    return self._only_wanted(problem, plain, saved, d_outs)

  def reference_vjp(self, problem: Any, saved: Saved, d_outs: Any) -> Any:
    """The gradients of what stands for the kernel off TPU, by JAX."""
    floats = jax.tree.map(
      lambda want, x: x if want else None, saved.wanted, saved.arrays
    )

    def of_floats(floats: Any) -> Any:
      arrays = replaced(saved.arrays, floats)
      plain_forward = self.plain_forward or self.reference
      if self.keeps:
        return plain_forward(problem, arrays, keep=False)[0]
      return plain_forward(problem, arrays)

    outs, vjp = jax.vjp(of_floats, floats)
    return vjp(with_integers(outs, d_outs))[0]

  def _dispatch(
    self, implementation: Any, kernel: Any, reference: Any, *args: Any
  ) -> Any:
    """The kernel by the caller's choice, else where it is lowered for TPU.

    The platform is the one that the computation is lowered for, not the one
    that traces it: ahead-of-time compilation for TPU on a CPU host gets the
    kernel.
    """
    kernel = without_derivatives(self.name, implementation, kernel)
    if implementation == "pallas":
      return kernel(*args)
    reference = switches.plain(reference)
    return jax.lax.platform_dependent(*args, tpu=kernel, default=reference)

  def named(self, record: Any) -> Any:
    """The record, whose fields remat policies can tell by name."""
    if record is None:
      return None
    return record._replace(
      **{
        field: checkpoint_name(value, f"{self.name}_{field}")
        for field, value in record._asdict().items()
        if field in self.names and value is not None
      }
    )

  def saved(self, arrays: Any, outs: Any, kept: Any) -> Saved:
    """What the backward pass reads, and None for the rest."""

    def read(record: Any) -> Any:
      others = [f for f in record._fields if f not in self.saves]
      return record._replace(**dict.fromkeys(others))

    return Saved(read(arrays), read(outs), kept, wanted=None)


def _without_float16(x: jax.Array) -> jax.Array:
  return x.astype(jnp.float32) if x.dtype == jnp.float16 else x
