"""What is known only when a program is lowered: for what, and over what.

The same traced program may be lowered for a CPU or a TPU, for one device or for
many.  So what cannot be done there is refused there, by primitives that leave
nothing in the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.interpreters import ad, batching, mlir

from . import switches
from .manual import is_explicit, varying_axes, zeros_of


def _identity(name: str, refusal: Any) -> jax.extend.core.Primitive:
  """A primitive that gives its argument, if refusal(ctx, **params) is None."""
  primitive = jax.extend.core.Primitive(name)
  primitive.def_impl(
    lambda x, **params: switches.compiled(_bind(primitive, params))(x)
  )
  primitive.def_abstract_eval(lambda x, **_: x)

  def lower(ctx: Any, x: Any, **params: Any) -> Any:
    error = refusal(ctx, **params)
    if error is not None:
      raise error
    return [x]

  def batch(args: Any, dims: Any, **params: Any) -> Any:
    return primitive.bind(args[0], **params), dims[0]

  mlir.register_lowering(primitive, lower)
  batching.primitive_batchers[primitive] = batch
  ad.deflinear2(
    primitive, lambda ct, _, **params: [primitive.bind(ct, **params)]
  )
  return primitive


def _bind(primitive: jax.extend.core.Primitive, params: Any) -> Any:
  return lambda x: primitive.bind(x, **params)


# --- what a kernel needs ------------------------------------------------------


def _why_not(ctx: Any, op: str) -> Exception | None:
  module = ctx.module_context
  if len(module.platforms) > 1:
    return ValueError(
      f"{op}: a kernel can be exported for one platform at a time, got "
      f"{', '.join(module.platforms)}; export for platforms=['tpu'] and for "
      f"the others apart, or pass implementation='xla'"
    )
  if "tpu" not in module.platforms or not _is_split(module.axis_context):
    return None
  return ValueError(
    f"{op}: XLA cannot split a Pallas kernel over the devices of a mesh by "
    f"itself; trace it inside `with pallas_gemma.kernels.sharding(mesh, "
    f"rules)`, on a mesh of Explicit axes, or in a jax.shard_map over all axes"
  )


def _is_split(axis_context: Any) -> bool:
  """Whether XLA is to divide this part of the program among devices."""
  manual = getattr(axis_context, "manual_axes", None)
  if manual is None:
    return getattr(axis_context, "num_devices", 1) not in (1, None)
  mesh = axis_context.mesh
  manual = set(manual) | set(getattr(mesh, "manual_axes", ()))
  return bool(manual) and manual != set(mesh.axis_names)


_guard = _identity("pallas_gemma_guard", _why_not)


def guarded(op: str, tree: Any) -> Any:
  """The arrays of a kernel, if it can be lowered; else the op's own words."""
  return jax.tree.map(lambda x: _guard.bind(x, op=op), tree)


# --- what is plain jnp --------------------------------------------------------

_off_tpu = _identity(
  "pallas_gemma_off_tpu",
  lambda ctx, message: (
    NotImplementedError(message)
    if "tpu" in ctx.module_context.platforms
    else None
  ),
)


def off_tpu(message: str, x: jax.Array) -> jax.Array:
  """x, refused where it is lowered for TPU, in place of something slower."""
  return _off_tpu.bind(x, message=message)


# --- memory that is not set ---------------------------------------------------

_unset = jax.extend.core.Primitive("pallas_gemma_unset")
_unset.def_abstract_eval(lambda **params: jax.core.ShapedArray(**params))
_unset.def_impl(
  lambda **params: switches.compiled(lambda: _unset.bind(**params))()
)


def unset(kind: Any) -> jax.Array:
  """An array of a type, to be written.

  `jax.lax.empty` is zeros on a TPU, which take as long to write as anything.
  """
  if is_explicit(kind) or varying_axes(kind):
    return zeros_of(kind)
  return _unset.bind(shape=tuple(kind.shape), dtype=jnp.dtype(kind.dtype))


def _empty(shape: Sequence[int], dtype: Any) -> jax.Array:
  return jax.lax.empty(shape, dtype)


def _allocated(shape: Sequence[int], dtype: Any) -> jax.Array:
  """By a kernel that does nothing."""
  return pl.pallas_call(
    lambda _: None,
    out_specs=pl.BlockSpec(memory_space=pl.ANY),
    out_shape=jax.ShapeDtypeStruct(shape, dtype),
    name="unset",
  )()


def _lower_unset_for_tpu(ctx: Any, **params: Any) -> Any:
  # XLA would not know how to split the kernel.
  split = _is_split(ctx.module_context.axis_context)
  make = _empty if split else _allocated
  return mlir.lower_fun(make, multiple_results=False)(ctx, **params)


mlir.register_lowering(_unset, mlir.lower_fun(_empty, multiple_results=False))
mlir.register_lowering(_unset, _lower_unset_for_tpu, platform="tpu")
