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
from typing import Any, NamedTuple

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

from . import switches
from .lowering import guarded, off_tpu
from .manual import vary_alike, varying_like, zeros_of
from .room import Places
from .rule import examples_first, is_perturbed, with_rule

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
  return switches.compiled(lambda *args: _linear.bind(*args, **params))(*args)


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
    zeros_of(t) if type(c) is ad.Zero else c
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
  size, moved, axes = examples_first(args, dims)
  # Tangents all have the new axis: so each has a cotangent with it.
  tangents = [
    jnp.broadcast_to(x, (size, *x.shape)) if d is None else x
    for x, d in zip(moved[residuals:], dims[residuals:], strict=True)
  ]
  axes = axes[:residuals]

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


def _primal(op: Any, problem: Any, arrays: Any, places: Any) -> Any:
  """The results, and the op's stores in a scan over layers, if it has any."""
  outs, _, _ = op.run(problem, arrays, keep=False)
  return outs, None if places is None else places.stacks


def _op_jvp(op: Any, problem: Any, primals: Any, tangents: Any) -> Any:
  (arrays, places), (tangents, d_places) = primals, tangents
  outs, kept, stacks = op.run(problem, arrays, keep=True, places=places)
  outs, kept = op.named(outs), op.named(kept)
  wanted = jax.tree.map(is_perturbed, tangents)
  wanted = wanted._replace(**dict.fromkeys(op.constants(arrays), False))
  layer = None if places is None else places.layer
  residuals, saved_tree = jax.tree.flatten(
    (op.saved(arrays, outs, kept), layer)
  )
  # Integers among the results have no tangent, and None for a cotangent.
  floats = outs._replace(
    **{n: None for n, x in outs._asdict().items() if not _is_float(x)}
  )
  out_leaves, out_tree = jax.tree.flatten((floats, stacks))
  d_stacks = [] if places is None else jax.tree.leaves(d_places.stacks)
  pairs = zip(jax.tree.leaves(tangents), jax.tree.leaves(wanted), strict=True)
  own = [d for d, want in pairs if want]
  derivative = _Derivative(
    op=op,
    problem=problem,
    wanted=wanted,
    saved_tree=saved_tree,
    outs=jax.tree.map(lambda x: varying_like(x, x.shape, x.dtype), floats),
    stacks=jax.tree.map(lambda x: varying_like(x, x.shape, x.dtype), stacks),
    moving=[is_perturbed(d) for d in d_stacks],
    own=len(own),
  )
  message = (
    f"{op.name}: the kernel has no forward-mode derivative (jvp, jacfwd, "
    f"linearize); pass implementation='xla'"
  )
  d_outs = linear(
    derivative.forward,
    derivative.transpose,
    residuals,
    own + list(filter(is_perturbed, d_stacks)),
    out_leaves,
    message,
  )
  d_outs, d_stacks = jax.tree.unflatten(out_tree, d_outs)
  return (outs, stacks), (with_integers(outs, d_outs), d_stacks)


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


class _Derivative(NamedTuple):
  """An op's two linear functions, of residuals and leaves.

  Attributes:
    op: the op.
    problem: its problem.
    wanted: as `Saved` has it.
    saved_tree: of the residuals, what is saved and the layer of stores.
    outs: types of the results.
    stacks: types of the op's stores, by name; None if it has none.
    moving: for each of them whether it has a tangent.
    own: how many of the arrays have one.
  """

  op: Any
  problem: Any
  wanted: Any
  saved_tree: Any
  outs: Any
  stacks: Any
  moving: list[bool]
  own: int

  def _restored(self, residuals: Any, d_outs: Any) -> tuple[Any, Any, Any]:
    """What is saved, the cotangents as a record, and the layer."""
    saved, layer = jax.tree.unflatten(self.saved_tree, residuals)
    d_outs = jax.tree.unflatten(jax.tree.structure(self.outs), d_outs)
    saved, d_outs = vary_alike((saved, d_outs))
    return saved._replace(wanted=self.wanted), d_outs, layer

  def transpose(self, residuals: Any, cotangents: Any) -> Any:
    count = len(jax.tree.leaves(self.outs))
    d_outs, full = cotangents[:count], cotangents[count:]
    saved, d_outs, layer = self._restored(residuals, d_outs)
    if full:
      # The cotangents of stores are the stores; they go on to the layer before.
      names = jax.tree.structure(self.stacks)
      places = Places(layer, jax.tree.unflatten(names, full))
      saved = saved._replace(places=places)
    grads = jax.tree.leaves(self.op.run_backward(self.problem, saved, d_outs))
    onward = zip(full, self.moving, strict=True)
    return [*grads, *(stack for stack, moves in onward if moves)]

  def forward(self, residuals: Any, tangents: Any) -> Any:
    # What reverse mode does in plain jnp, the other way round: so it needs no
    # more of the forward pass than is saved for that.
    def back(*d_outs: Any) -> Any:
      saved, d, _ = self._restored(residuals, d_outs)
      return jax.tree.leaves(self.op.plain_gradients(self.problem, saved, d))

    types = jax.tree.leaves(self.outs)
    own, rest = list(tangents[: self.own]), iter(tangents[self.own :])
    d_outs = jax.linear_transpose(back, *types)(own)
    stacks = zip(jax.tree.leaves(self.stacks), self.moving, strict=True)
    d_stacks = [next(rest) if moves else zeros_of(x) for x, moves in stacks]
    return [*d_outs, *d_stacks]


def differentiable(op: Any, problem: Any, arrays: Any, places: Any) -> Any:
  """What `_primal` gives, with the op's derivative."""
  run = with_rule(
    functools.partial(_primal, op, problem),
    functools.partial(_op_jvp, op, problem),
    functools.partial(_of_examples, op, problem),
  )
  return run(arrays, places)


def _of_examples(
  op: Any, problem: Any, size: int, batched: Any, arrays: Any, places: Any
) -> Any:
  """Of examples that share a layer's weights in a stack, if they do.

  To a port comes the sum of their gradients, so it is not a port of each.
  """
  which, which_places = batched
  ports = [b for f in op.passes if (b := getattr(which, f)) is not None]
  if not ports or any(ports):
    return None
  own, passing = op.apart(arrays)
  axes = {f: 0 if getattr(which, f) else None for f in own._fields}
  run = jax.vmap(
    lambda own: differentiable(op, problem, own, None)[0],
    (own._replace(**axes),),
    axis_size=size,
  )
  outs = run(own)._replace(**passing)
  is_batched = {f: getattr(which, f) for f in passing}
  which_outs = jax.tree.map(lambda _: True, outs)._replace(**is_batched)
  if places is None:
    return (outs, None), (which_outs, None)
  return (outs, places.stacks), (which_outs, which_places.stacks)


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

  def if_allowed(*args: Any) -> Any:
    return kernel(*guarded(op, args))

  def jvp(primals: Any, tangents: Any) -> Any:
    if implementation == "pallas":
      raise NotImplementedError(message)
    outs, tree = jax.tree.flatten(run(*primals))
    perturbed = [d for d in jax.tree.leaves(tangents) if is_perturbed(d)]
    d_outs = refused(message, perturbed, outs)
    return jax.tree.unflatten(tree, outs), jax.tree.unflatten(tree, d_outs)

  run = with_rule(if_allowed, jvp)
  return run
