"""A function whose derivative is a rule of its own, and stays with it.

`jax.custom_jvp` is of one piece until JAX takes a program apart, as it does
with the body of a scan that is differentiated.  Then the rule is lost, and a
second derivative is that of what the function consists of: a kernel has none.
Here the function is a primitive, which JAX moves as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir

# Of primals and tangents, the results and their tangents.
Rule = Callable[[Any, Any], tuple[Any, Any]]
# Of how many examples, which arguments have a dimension for them, their first,
# and the arguments: the results, and which of them have it; or None.
Mapped = Callable[..., tuple[Any, Any] | None]

_ruled = jax.extend.core.Primitive("pallas_gemma_ruled")
_ruled.multiple_results = True


def with_rule(
  function: Callable[..., Any], rule: Rule, mapped: Mapped | None = None
) -> Callable[..., Any]:
  """`function`, differentiated by `rule`.

  Args:
    function: of trees of arrays; it closes over none that is traced.
    rule: as that of a `jax.custom_jvp` with symbolic zeros: it maps the
      function's arguments, and as many tangents, to its results and theirs.
    mapped: what it is under vmap, if it is not None: of functions that have
      derivatives themselves.  Else all results have a dimension for examples.
  """

  def run(*args: Any) -> Any:
    leaves, tree = jax.tree.flatten(args)

    def of_leaves(*leaves: Any) -> Any:
      return function(*jax.tree.unflatten(tree, leaves))

    def rule_of_leaves(primals: Any, tangents: Any) -> Any:
      pair = (jax.tree.unflatten(tree, x) for x in (primals, tangents))
      outs, d_outs = rule(*pair)
      return jax.tree.leaves(outs), jax.tree.leaves(d_outs)

    def mapped_leaves(size: int, batched: Any, leaves: Any) -> Any:
      which, args = (jax.tree.unflatten(tree, x) for x in (batched, leaves))
      found = None if mapped is None else mapped(size, which, *args)
      return found and tuple(map(jax.tree.leaves, found))

    program, outs = jax.make_jaxpr(of_leaves, return_shape=True)(*leaves)
    flat = _ruled.bind(
      *leaves, jaxpr=(program,), rule=rule_of_leaves, mapped=mapped_leaves
    )
    return jax.tree.unflatten(jax.tree.structure(outs), flat)

  return run


def is_perturbed(tangent: Any) -> bool:
  """Whether a tangent is more than a zero known as such."""
  return not isinstance(tangent, SymbolicZero)


# The program is in a tuple of one: by itself, JAX 0.12 would ask this primitive
# how to lower what is high-level in it, and that knows it itself.


def _evaluate(*args: Any, jaxpr: Any, **_: Any) -> Any:
  return jax.extend.core.jaxpr_as_fun(*jaxpr)(*args)


def _jvp(primals: Any, tangents: Any, *, rule: Rule, **_: Any) -> Any:
  outs, d_outs = rule(
    primals,
    [SymbolicZero(t.aval) if type(t) is ad.Zero else t for t in tangents],
  )
  return outs, [
    d if _has_values(d) else _zero_of(out)
    for out, d in zip(outs, d_outs, strict=True)
  ]


def _has_values(tangent: Any) -> bool:
  """Not so of zeros known as such, nor of integers."""
  if tangent is None or not is_perturbed(tangent):
    return False
  return tangent.dtype != jax.dtypes.float0


def _zero_of(x: Any) -> Any:
  return ad.Zero(jax.typeof(x).to_tangent_aval())


def examples_first(args: Any, dims: Any) -> tuple[int, list[Any], list[Any]]:
  """What a batching rule is given, as `jax.vmap` takes it.

  Returns:
    How many examples there are, the arguments with the dimension of examples
    first, and for each 0, or None if it has none.
  """
  pairs = list(zip(args, dims, strict=True))
  size = next(x.shape[d] for x, d in pairs if d is not None)
  moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in pairs]
  return size, moved, [None if d is None else 0 for d in dims]


def _batch(
  args: Any, dims: Any, *, jaxpr: Any, rule: Rule, mapped: Mapped
) -> Any:
  size, moved, axes = examples_first(args, dims)
  found = mapped(size, [a is not None for a in axes], moved)
  if found is not None:
    outs, batched = found
    return outs, [0 if b else None for b in batched]
  one = jax.extend.core.jaxpr_as_fun(*jaxpr)
  many = jax.vmap(one, axes, axis_size=size)

  def rule_of_many(primals: Any, tangents: Any) -> Any:
    moving = [is_perturbed(t) for t in tangents]

    def rule_of_one(primals: Any, moved: Any) -> Any:
      rest = iter(moved)
      tangents = [
        next(rest) if moves else SymbolicZero(_zero_of(x).aval)
        for x, moves in zip(primals, moving, strict=True)
      ]
      outs, d_outs = rule(primals, tangents)
      return outs, [d if _has_values(d) else None for d in d_outs]

    moved_axes = [a for a, moves in zip(axes, moving, strict=True) if moves]
    run = jax.vmap(rule_of_one, (axes, moved_axes), axis_size=size)
    return run(list(primals), list(filter(is_perturbed, tangents)))

  program = jax.make_jaxpr(many)(*moved)
  outs = _ruled.bind(
    *moved, jaxpr=(program,), rule=rule_of_many, mapped=lambda *_: None
  )
  return outs, [0] * len(outs)


def _abstract(*_: Any, jaxpr: Any, **__: Any) -> Any:
  return jaxpr[0].out_avals, jaxpr[0].effects


_ruled.def_impl(_evaluate)
_ruled.def_effectful_abstract_eval(_abstract)
ad.primitive_jvps[_ruled] = _jvp
batching.primitive_batchers[_ruled] = _batch
mlir.register_lowering(_ruled, mlir.lower_fun(_evaluate, multiple_results=True))
