"""A norm, an attention, a feed-forward, of the arrays that a library has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._attention import flash_attention
from .._frame.check import Implementation, as_floats
from .._rms_norm import rms_norm


def norm(
  x: jax.Array,
  scale: jax.Array,
  *,
  epsilon: float,
  scale_offset: float,
  implementation: Implementation,
) -> jax.Array:
  """RMSNorm; by default plain jnp that XLA fuses into what follows.

  Then the backward pass computes it anew: JAX's derivative would keep arrays as
  large as x.

  Returns:
    x's shape, in the wider dtype of x and scale, as plain jnp gives it.
  """
  (x,) = as_floats("rms_norm", x=x)
  x = x.astype(jnp.promote_types(x.dtype, scale.dtype))
  run: Callable[..., jax.Array] = functools.partial(
    rms_norm,
    epsilon=epsilon,
    scale_offset=scale_offset,
    implementation=implementation or "xla",
  )
  if implementation != "pallas":
    run = jax.checkpoint(run, prevent_cse=False)
  return run(x, scale)


def norm_in_words(implementation: Implementation) -> str:
  """Which implementation of the norm, for the report."""
  if implementation is None:
    return "plain jnp, which XLA fuses into its neighbours and recomputes"
  return in_words(implementation)


def in_words(implementation: Implementation) -> str:
  """Which implementation, for the report."""
  if implementation is None:
    return "the kernel where lowered for TPU, else the reference"
  return "the kernel" if implementation == "pallas" else "the reference"


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any
) -> jax.Array:
  """Attention between two projections, which like arrays heads first.

  Args:
    q: [B, T, N, H].
    k: [B, S, K, H].
    v: [B, S, K, H].
    **kwargs: as `flash_attention` takes them, but for the layout.

  Returns:
    [B, T, N, H], of v's dtype.
  """
  dtype = v.dtype
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  out = flash_attention(q, k, v, layout="BNTH", **kwargs)
  return out.swapaxes(1, 2).astype(dtype)
