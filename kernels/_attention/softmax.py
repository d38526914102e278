"""The online softmax of a block of queries, in a forward kernel.

Read it where a kernel uses it: these are the steps that kernels share.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .spec import Logits

# Hides a key.  Finite, so that a row that has seen no key yet stays a number:
# what it gathers is multiplied by exp2(MASKED - m) = 0 at its first key.  And
# not so low that the difference with a logit overflows.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def row_maximum(logits: jax.Array) -> jax.Array:
  """[R, keys] to [R, LANES], equal in all lanes."""
  top = jnp.max(logits, axis=1, keepdims=True)
  return jnp.broadcast_to(top, (logits.shape[0], tpu.LANES))


def sum_by_lane(weights: jax.Array) -> jax.Array:
  """[R, keys] to [R, LANES]: the sum over lanes is left for the end."""
  parts = jnp.split(weights, weights.shape[1] // tpu.LANES, axis=1)
  return functools.reduce(jnp.add, parts)


def lse_of(m: jax.Array, total: jax.Array, p: Logits) -> jax.Array:
  """In the units of the logits."""
  return m + jnp.log2(total) * (1 / p.to_base_2)


# In `pl` up to JAX 0.10, deprecated there since.
_approximate_reciprocal = getattr(pltpu, "reciprocal", None) or pl.reciprocal


def reciprocal(x: jax.Array, dtype: Any) -> jax.Array:
  """1 / x, well within dtype's precision."""
  if dtype == jnp.float32:
    return 1.0 / x
  guess = _approximate_reciprocal(x, approx=True)
  return guess * (2.0 - x * guess)
