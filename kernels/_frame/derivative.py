"""A linear function by two programs, one for each direction.

Where an op is differentiated, JAX is given its tangents as one primitive,
linear in them.  Reverse mode transposes it, and so comes to the op's own
backward pass.  Forward mode keeps it, and lowers it as plain jnp; where the
kernel would run, for TPU, it is refused, for there is no kernel of it.

(`jax.custom_vjp` would refuse forward mode everywhere.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir

from .lowering import guarded, off_tpu
from .manual import vary_alike, varying_like

Leaves = Sequence[Any]
# Of residuals and tangents, or of residuals and cotangents.
Linear = Callable[[Leaves, Leaves], Leaves]

_linear = jax.extend.core.Primitive("pallas_gemma_linear")
_linear.multiple_results = True


def linear(
  function: Linear,
  transpose: Linear,
  residuals: Leaves,
  tangents: Leaves,
  outs: Leaves,
  refusal: str | None = None,
) -> Leaves:
  """function(residuals, tangents), which reverse mode takes for `transpose`.

  Args:
    function: linear in the tangents; plain jnp.
    transpose: maps residuals and cotangents of the result to cotangents of the
      tangents.
    residuals: arrays.
    tangents: arrays.
    outs: arrays of the result's types.
    refusal: says what there is no kernel of, where it is lowered for TPU; None
      if `function` may be lowered there too.
  """
  types = tuple(out if _is_type(out) else jax.typeof(out) for out in outs)
  return _linear.bind(
    *residuals,
    *tangents,
    residuals=len(residuals),
    function=function,
    transpose=transpose,
    types=types,
    refusal=refusal,
  )


def _is_type(out: Any) -> bool:
  return isinstance(out, jax.core.ShapedArray)


def _evaluate(*args: Any, residuals: int, function: Linear, **_: Any) -> Leaves:
  return function(args[:residuals], args[residuals:])


def _as_jitted(*args: Any, **params: Any) -> Leaves:
  """Outside of jit; the platform is known where it is lowered."""
  return jax.jit(functools.partial(_linear.bind, **params))(*args)


def _lower_for_tpu(ctx: Any, *args: Any, **params: Any) -> Any:
  if params["refusal"] is not None:
    raise NotImplementedError(params["refusal"])
  return _lower(ctx, *args, **params)


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
  tangents = [ad.instantiate_zeros(t) for t in tangents]
  function = functools.partial(_linear_on_any_platform, **params)
  _, d_outs = jax.jvp(function, tuple(primals), tuple(tangents))
  # The result itself stays a linear function with its own transpose.
  return _linear.bind(*primals, **params), d_outs


def _linear_on_any_platform(
  *args: Any, refusal: str | None, **params: Any
) -> Leaves:
  """As jnp, for JAX to differentiate once more; refused for TPU as well."""
  outs = _evaluate(*args, **params)
  if refusal is None:
    return outs
  return [off_tpu(refusal, out) for out in outs]


def _transpose(
  cotangents: Any, *args: Any, residuals: int, transpose: Linear, **params: Any
) -> Any:
  del params["function"], params["refusal"]
  cotangents = [
    jnp.zeros(t.shape, t.dtype) if type(c) is ad.Zero else c
    for c, t in zip(cotangents, params["types"], strict=True)
  ]
  grads = transpose(args[:residuals], cotangents)
  return [*[None] * residuals, *grads]


def _batch(
  args: Any,
  dims: Any,
  *,
  residuals: int,
  function: Linear,
  transpose: Linear,
  types: Any,
  refusal: str | None,
) -> Any:
  size = next(
    x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None
  )
  moved = [
    x if d is None else jnp.moveaxis(x, d, 0)
    for x, d in zip(args, dims, strict=True)
  ]
  # Tangents all have the new axis: so each has a cotangent with it.
  tangents = [
    jnp.broadcast_to(x, (size, *x.shape)) if d is None else x
    for x, d in zip(moved[residuals:], dims[residuals:], strict=True)
  ]
  axes = [None if d is None else 0 for d in dims[:residuals]]

  def mapped(one: Linear) -> Linear:
    def many(res: Leaves, other: Leaves) -> Leaves:
      run = jax.vmap(lambda r, o: list(one(r, o)), (axes, 0), axis_size=size)
      return run(list(res), list(other))

    return many

  outs = _linear.bind(
    *moved[:residuals],
    *tangents,
    residuals=residuals,
    function=mapped(function),
    transpose=mapped(transpose),
    types=tuple(_with_axis(t, size) for t in types),
    refusal=refusal,
  )
  return outs, [0] * len(outs)


def _with_axis(t: Any, size: int) -> Any:
  return jax.typeof(
    jax.ShapeDtypeStruct(
      (size, *t.shape), t.dtype, manual_axis_type=t.manual_axis_type
    )
  )


_linear.def_impl(_as_jitted)
_linear.def_abstract_eval(lambda *_, types, **__: types)
ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
_lower = mlir.lower_fun(_evaluate, multiple_results=True)
mlir.register_lowering(_linear, _lower)
mlir.register_lowering(_linear, _lower_for_tpu, platform="tpu")


def refused(message: str, tangents: Leaves, outs: Leaves) -> Leaves:
  """In place of what no kernel gives: linear in `tangents`, typed as `outs`.

  It can be traced, and transposed, but not lowered.  Off TPU the branch that
  holds it is dropped before that.
  """

  def refuse(_: Leaves, __: Leaves) -> Leaves:
    raise NotImplementedError(message)

  # Types: tangents are gone when reverse mode comes back.
  types = tuple(map(jax.typeof, tangents))

  def transpose(_: Leaves, cotangents: Leaves) -> Leaves:
    return refused(message, cotangents, types)

  return linear(refuse, transpose, (), tangents, outs, message)


# --- of an op -----------------------------------------------------------------


def _primal(op: Any, problem: Any, arrays: Any) -> Any:
  return op.run(problem, arrays, keep=False)[0]


def _op_jvp(op: Any, problem: Any, primals: Any, tangents: Any) -> Any:
  (arrays,), (tangents,) = primals, tangents
  outs, kept = op.run(problem, arrays, keep=True)
  outs, kept = op.named(outs), op.named(kept)
  wanted = jax.tree.map(is_perturbed, tangents)
  wanted = wanted._replace(**dict.fromkeys(op.constants(arrays), False))
  saved = op.saved(arrays, outs, kept)
  residuals, saved_tree = jax.tree.flatten(saved)
  # Integers among the results have no tangent, and None for a cotangent.
  floats = outs._replace(
    **{n: None for n, x in outs._asdict().items() if not _is_float(x)}
  )
  out_leaves, out_tree = jax.tree.flatten(floats)

  def restored(residuals: Any, d_outs: Any) -> tuple[Any, Any]:
    saved = jax.tree.unflatten(saved_tree, residuals)
    pair = vary_alike((saved, jax.tree.unflatten(out_tree, d_outs)))
    return pair[0]._replace(wanted=wanted), pair[1]

  def transpose(residuals: Any, d_outs: Any) -> Any:
    saved, d_outs = restored(residuals, d_outs)
    return jax.tree.leaves(op.run_backward(problem, saved, d_outs))

  def forward(residuals: Any, tangents: Any) -> Any:
    # What reverse mode does in plain jnp, the other way round: so it needs no
    # more of the forward pass than is saved for that.
    def back(*d_outs: Any) -> Any:
      saved, d = restored(residuals, d_outs)
      return jax.tree.leaves(op.plain_gradients(problem, saved, d))

    types = [varying_like(x, x.shape, x.dtype) for x in out_leaves]
    return list(jax.linear_transpose(back, *types)(list(tangents)))

  pairs = zip(jax.tree.leaves(tangents), jax.tree.leaves(wanted), strict=True)
  perturbed = [d for d, want in pairs if want]
  message = (
    f"{op.name}: the kernel has no forward-mode derivative (jvp, jacfwd, "
    f"linearize); pass implementation='xla'"
  )
  d_outs = linear(forward, transpose, residuals, perturbed, out_leaves, message)
  return outs, with_integers(outs, jax.tree.unflatten(out_tree, d_outs))


def _is_float(x: Any) -> bool:
  return x is not None and jnp.issubdtype(x.dtype, jnp.inexact)


def with_integers(outs: Any, d_outs: Any) -> Any:
  """Tangents or cotangents of a record of results, as JAX wants them.

  Those of integers, None in ours, are of a type of their own.
  """
  missing = {
    name: np.zeros(x.shape, jax.dtypes.float0)
    for name, x in outs._asdict().items()
    if x is not None and not _is_float(x)
  }
  return d_outs._replace(**missing)


def is_perturbed(tangent: Any) -> bool:
  """Whether a tangent is more than a zero known as such."""
  return not isinstance(tangent, SymbolicZero)


differentiable = jax.custom_jvp(_primal, nondiff_argnums=(0, 1))
differentiable.defjvp(_op_jvp, symbolic_zeros=True)


def without_derivatives(
  op: str, implementation: Any, kernel: Callable[..., Any]
) -> Callable[..., Any]:
  """The kernel, which is refused in words where JAX would differentiate it.

  That is by a second derivative.  With the implementation left open it may be
  the reference that runs, whose derivatives JAX has: then it is refused where
  the kernel is lowered.
  """
  message = (
    f"{op}: the kernel has a gradient, but no second derivative; pass "
    f"implementation='xla'"
  )

  @jax.custom_jvp
  def run(*args: Any) -> Any:
    return kernel(*guarded(op, args))

  def jvp(primals: Any, tangents: Any) -> Any:
    if implementation == "pallas":
      raise NotImplementedError(message)
    outs, tree = jax.tree.flatten(run(*primals))
    perturbed = [d for d in jax.tree.leaves(tangents) if is_perturbed(d)]
    d_outs = refused(message, perturbed, outs)
    return jax.tree.unflatten(tree, outs), jax.tree.unflatten(tree, d_outs)

  run.defjvp(jvp, symbolic_zeros=True)
  return run
