"""Page 6: where q and k are rotated, if RoPE is part of a problem.

Inside the kernels it costs no traffic.  Where they cannot, the op rotates q and
k before, by `apply_rope`, and saves them rotated.  Whether they can depends on
the batch, through VMEM; and vmap makes the batch larger after the op has
decided.  So each pass looks again, at the arrays that it is given.
"""

from __future__ import annotations

from typing import Any, Literal

import jax

from .. import _rope
from .._frame import tpu
from . import memory, tiles
from .spec import Arrays, Problem


def is_inside(p: Problem, a: Arrays) -> bool:
  """Whether the attention kernels do the rotation.

  They rotate a key with the query of its position: on a diagonal, with all the
  keys in one call, and heads of a token that are whole registers or apart.
  """
  x = memory.Sizes.of_problem(p, a)
  forward, backward = tiles.forward_call(p, x), tiles.backward_call(p, x)
  layout = forward.layout
  whole_groups = (
    x.group % tpu.SUBLANES == 0 or x.group == 1 or not layout.is_by_token
  )
  if not (whole_groups and forward.has_diagonal and backward.has_diagonal):
    return False
  return x.s <= min(
    tiles.forward_keys(forward, x), tiles.backward_keys(backward, x)
  )


def before(p: Problem, a: Arrays) -> Arrays:
  """For a pass: q and k rotated by a kernel of their own, unless it is inside.

  What is returned has positions if they are still to be rotated.
  """
  if a.positions is None or is_inside(p, a):
    return a
  q, k = (_rotated(p, a, x) for x in (a.q, a.k))
  return a._replace(q=q, k=k, positions=None)


def back(p: Problem, grads: Arrays, a: Arrays, made: Arrays) -> Arrays:
  """The gradients of q and k of `a`, from those of what `before` made of it."""
  if a.positions is None or made.positions is not None:
    return grads
  q, k = (_rotated(p, a, x, -1) for x in (grads.q, grads.k))
  return grads._replace(q=q, k=k)


def by_op(p: Problem, a: Arrays) -> Arrays:
  """q and k rotated by `apply_rope`, an op of its own with its own gradient."""
  # A traced base is the same for all elements of the batch.
  base = p.base_frequency if a.base is None else a.base[0]
  q, k = (
    _rope.apply_rope(
      x,
      a.positions,
      base_frequency=base,
      implementation=p.implementation,
    )
    for x in (a.q, a.k)
  )
  return a._replace(q=q, k=k, positions=None, base=None)


def _rotated(
  p: Problem, a: Arrays, x: jax.Array, sign: Literal[1, -1] = 1
) -> jax.Array:
  def by(base: Any, x: jax.Array, positions: jax.Array) -> jax.Array:
    of_rope = _rope.Problem(base, p.implementation, None)
    return _rope.rotated(of_rope, _rope.Arrays(x, positions), x, sign)

  if a.base is None:
    return by(p.base_frequency, x, a.positions)
  one = jax.vmap(lambda base, *xs: by(base, *(x[None] for x in xs))[0])
  return one(a.base, x, a.positions)
