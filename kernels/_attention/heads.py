"""Which kv heads a device needs, where query heads are split over a mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from .._frame.sharding import Axes


def own_kv_heads(
  n: int, kv_heads: int, axes: Mapping[str, Axes]
) -> jax.Array | None:
  """Of the kv heads that a device has, those of its query heads.

  They are more where kv heads are fewer than the devices that share the query
  heads.  One for every g query heads, the most that never have two.

  Args:
    n: the device's query heads.
    kv_heads: its kv heads.
    axes: over which the letters N and K are split.

  Returns:
    Indices of its kv heads; None if it needs all of them.
  """
  q_axes, kv_axes = axes.get("N", ()), axes.get("K", ())
  if q_axes == kv_axes or kv_heads == 1:
    return None
  group = n * _size(q_axes) // (kv_heads * _size(kv_axes))
  g = math.gcd(n, group)
  first = jax.lax.axis_index(q_axes) * n if q_axes else 0
  first_kv = jax.lax.axis_index(kv_axes) * kv_heads if kv_axes else 0
  return (first + g * jnp.arange(n // g)) // group - first_kv


def _size(axes: Axes) -> int:
  return jax.lax.axis_size(axes) if axes else 1
