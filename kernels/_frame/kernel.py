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
    the VJP          what `backward` reads is saved, under names for `remat`
    the platform     the kernel where the computation is lowered for TPU,
                     the reference elsewhere, by the caller's choice or by JAX's
    vmap             of the kernels; the reference is jnp
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap, sequential_vmap
from jax.custom_derivatives import SymbolicZero

from .sharding import Split, per_device, vary_alike

# A kernel under vmap: one more axis of its grid, as Pallas does it; a larger
# first dimension of all its arrays; or one example after the other.
Vmap = Literal["grid", "batch", "loop"]


class Saved(NamedTuple):
  """What a backward pass is given of the forward pass.

  Attributes:
    arrays: the op's arrays, None for what it does not save.
    outs: the op's results, likewise.
    kept: what `forward` returned beside its results, None if the op keeps none.
    wanted: as arrays, whether the gradient of each is asked for.  What is
      returned for the others does not matter.
  """

  arrays: Any
  outs: Any
  kept: Any
  wanted: Any


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

  def __call__(self, problem: Any, arrays: Any) -> Any:
    """The op on arrays of any sharding; its door has checked them."""
    empty = any(array.size == 0 for array in jax.tree.leaves(arrays))
    if problem.implementation == "xla" or empty:
      return self.reference(problem, arrays)

    def on_device(block: Any, axes: Any) -> Any:
      if self.around is None:
        return self.on_device(problem, block)
      return self.around(self.on_device, problem, block, axes)

    return per_device(self.name, on_device, arrays, self.split(problem, arrays))

  def on_device(self, problem: Any, arrays: Any) -> Any:
    """The differentiable op on one device's arrays."""
    return _differentiable(self, problem, vary_alike(arrays))

  def run(self, problem: Any, arrays: Any, keep: bool) -> tuple[Any, Any]:
    """(outs, kept) by whichever implementation it is to be."""

    def either(function: Callable[..., Any], arrays: Any) -> tuple[Any, Any]:
      if self.keeps:
        return function(problem, arrays, keep=keep)
      return function(problem, arrays), None

    return _dispatch(
      problem.implementation,
      _mapped(self.vmap[0], functools.partial(either, self.forward)),
      functools.partial(either, self.plain_forward or self.reference),
      arrays,
    )

  def run_backward(self, problem: Any, saved: Saved, d_outs: Any) -> Any:
    """The gradients that are wanted, None for the other arrays."""
    wanted = saved.wanted

    def either(function: Callable[..., Any], saved: Saved, d_outs: Any) -> Any:
      grads = function(problem, saved._replace(wanted=wanted), d_outs)
      pairs = zip(wanted, grads, strict=True)
      return type(grads)(*(g if want is True else None for want, g in pairs))

    return _dispatch(
      problem.implementation,
      _mapped(self.vmap[1], functools.partial(either, self.backward)),
      functools.partial(either, self.plain_backward or self.reference_vjp),
      saved._replace(wanted=None),
      d_outs,
    )

  def reference_vjp(self, problem: Any, saved: Saved, d_outs: Any) -> Any:
    """The gradients of what stands for the kernel off TPU, by JAX."""
    floats = jax.tree.map(
      lambda want, x: x if want else None, saved.wanted, saved.arrays
    )

    def of_floats(floats: Any) -> Any:
      arrays = jax.tree.map(
        lambda x, new: x if new is None else new,
        saved.arrays,
        floats,
        is_leaf=lambda x: x is None,
      )
      plain_forward = self.plain_forward or self.reference
      if self.keeps:
        return plain_forward(problem, arrays, keep=False)[0]
      return plain_forward(problem, arrays)

    return jax.vjp(of_floats, floats)[1](d_outs)[0]

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

  def saved(self, record: Any) -> Any:
    """The record with None for what the backward pass does not read."""
    return record._replace(
      **{field: None for field in record._fields if field not in self.saves}
    )


# --- the platform -------------------------------------------------------------


def _dispatch(implementation: Any, kernel: Any, plain: Any, *args: Any) -> Any:
  """The kernel by the caller's choice, else where it is lowered for TPU.

  The platform is the one that the computation is lowered for, not the one that
  traces it: ahead-of-time compilation for TPU on a CPU host gets the kernel.
  """
  if implementation == "pallas":
    return kernel(*args)
  return jax.lax.platform_dependent(*args, tpu=kernel, default=plain)


# --- the VJP ------------------------------------------------------------------


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
  """A value known when a program is traced, among what a VJP saves."""

  value: Any


def _primal(op: kernel_op, problem: Any, arrays: Any) -> Any:
  return op.run(problem, arrays, keep=False)[0]


def _forward(op: kernel_op, problem: Any, primals: Any) -> tuple[Any, Any]:
  arrays = jax.tree.map(lambda p: p.value, primals)
  wanted = jax.tree.map(
    lambda p: p.perturbed and jnp.issubdtype(p.value.dtype, jnp.floating),
    primals,
  )
  outs, kept = op.run(problem, arrays, keep=True)
  outs, kept = op.named(outs), op.named(kept)
  saved = op.saved(arrays), op.saved(outs)
  return outs, Saved(*saved, kept=kept, wanted=_Static(wanted))


def _backward(op: kernel_op, problem: Any, saved: Saved, d_outs: Any) -> Any:
  wanted = saved.wanted.value
  d_outs = jax.tree.map(
    lambda d: jnp.zeros(d.shape, d.dtype) if _is_zero(d) else d, d_outs
  )
  saved, d_outs = vary_alike((saved._replace(wanted=None), d_outs))
  saved = saved._replace(wanted=wanted)
  return (op.run_backward(problem, saved, d_outs),)


def _is_zero(cotangent: Any) -> bool:
  return isinstance(cotangent, SymbolicZero)


_differentiable = jax.custom_vjp(_primal, nondiff_argnums=(0, 1))
_differentiable.defvjp(_forward, _backward, symbolic_zeros=True)


# --- vmap ---------------------------------------------------------------------


def _mapped(vmap: Vmap, kernel: Callable[..., Any]) -> Callable[..., Any]:
  match vmap:
    case "grid":
      return kernel
    case "loop":
      return sequential_vmap(kernel)
    case "batch":
      return _as_batch(kernel)


def _as_batch(kernel: Callable[..., Any]) -> Callable[..., Any]:
  """`kernel` of arrays [B, ...] that vmap maps by a larger B."""
  mapped = custom_vmap(kernel)

  @mapped.def_vmap
  def rule(axis_size: int, in_batched: Any, *args: Any) -> Any:
    def merged(x: jax.Array, batched: bool) -> jax.Array:
      if not batched:
        x = jnp.broadcast_to(x, (axis_size, *x.shape))
      return x.reshape(-1, *x.shape[2:])

    outs = mapped(*jax.tree.map(merged, args, tuple(in_batched)))
    outs = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), outs)
    return outs, jax.tree.map(lambda _: True, outs)

  return mapped
