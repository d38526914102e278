"""Queries that see no key, where they are to give the mean of all values.

`jax.nn.dot_product_attention` has it so: of equal logits, all hidden, the
weights are equal.  The kernels take no part in it block by block.  Forward, the
mean is made before, and the end of a grid step puts it where a row has seen
nothing; backward, what such rows have of cotangents is added to dv afterwards,
and that is not computed if there is none.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .layout import Layout
from .reference import (
  may_see_nothing,
  mean_of_nothing,
  mean_of_values,
  rows_of_nothing,
)
from .softmax import MASKED
from .spec import Arrays, Outs, Problem
from .tiles import Call

# --- around the kernels -------------------------------------------------------


def _some_give_it(p: Problem, a: Arrays) -> bool:
  return p.gives_mean and may_see_nothing(p, a)


def mean_for_rows(p: Problem, a: Arrays) -> jax.Array | None:
  """[B K, 1, H] float32; None if no query of the problem is to give it."""
  if not _some_give_it(p, a):
    return None
  mean = mean_of_values(a.v).astype(jnp.float32)  # [B, 1, K, H]
  return mean.reshape(-1, 1, mean.shape[-1])


def spec_of(call: Call, mean: jax.Array | None) -> pl.BlockSpec | None:
  """A kv head's, [1, H]; None without one."""
  if mean is None:
    return None
  # The grid has a kv head after the other: `dot_product_attention` has no
  # layout of which two come together.
  assert call.layout.together == 1
  return pl.BlockSpec((None, *mean.shape[1:]), lambda b, *_: (b, 0, 0))


def given(p: Problem, a: Arrays, outs: Outs) -> Outs:
  """Results of several calls, lse [B, N, T], with the mean."""
  return mean_of_nothing(p, a, outs) if may_see_nothing(p, a) else outs


def added(p: Problem, a: Arrays, outs: Outs, d: Outs, dv: jax.Array) -> Any:
  """dv [B, S, K, H], with what queries that see no key give it.

  Args:
    p: the problem.
    a: its arrays.
    outs: its results, lse by row.
    d: their cotangents.
    dv: from the kernel, which gives such queries the weight 0.
  """
  if not _some_give_it(p, a):
    return dv
  layout = Layout.of_shapes(p, a.q.shape, a.k.shape)

  def with_means(dv: jax.Array) -> jax.Array:
    b, s, kv_heads, h = dv.shape
    nothing = rows_of_nothing(layout.to_lse(outs.lse, a.q.shape))
    d_out = jnp.where(nothing, d.out.astype(jnp.float32), 0.0).sum(axis=1)
    d_mean = d_out.reshape(b, 1, kv_heads, -1, h).sum(axis=3)
    return (dv.astype(jnp.float32) + d_mean * (1 / s)).astype(dv.dtype)

  some = jnp.isneginf(outs.lse).any()
  return jax.lax.cond(some, with_means, lambda dv: dv, dv)


# --- in a kernel --------------------------------------------------------------


def is_nothing(m: jax.Array, total: jax.Array) -> jax.Array:
  """Whether rows have seen no key, of their maxima and sums at the end."""
  # A maximum may pass over NaN; the sum does not.
  return (m <= MASKED / 2) & (total == total)
