"""Page 6: NaN and infinity among what the segments hide.

Padding may hold anything, and so may another segment of a packed row.  A mask
gives hidden keys the weight 0, but 0 times NaN is NaN.  So with segment ids
no product has a factor that is not finite: such elements are set to 0, and
whoever sees one of them gets NaN on another way,

    of q, k   through the logits, which the mask hides from the others
    of v      likewise, as if k were NaN
    of do     through lse, hence the weights, which the mask hides too

Who sees NaN must not get a number; it need not be told which number is missing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import layout, spec
from .spec import Outs, Problem

# --- in a kernel: tiles -------------------------------------------------------
# A v5e has no arithmetic of 16 bits.  Two bfloat16 lie in a word, and exponents
# of ones, which only NaN and infinity have, are found in both at once: adding
# one to them carries into the place of the sign.


def cleared(tile: jax.Array) -> jax.Array:
  """The tile with 0 for what is not finite."""
  words = pltpu.bitcast(tile, jnp.int32)
  return pltpu.bitcast(words & ~_not_finite(words, tile.dtype), tile.dtype)


def nan_where_not_finite(tile: jax.Array, other: jax.Array) -> jax.Array:
  """The tile with NaN where another of its shape is not finite."""
  words = pltpu.bitcast(tile, jnp.int32)
  bad = _not_finite(pltpu.bitcast(other, jnp.int32), other.dtype)
  return pltpu.bitcast(words | bad, tile.dtype)


def nan_in_lse(lse: jax.Array, di: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Both, with NaN in lse where di = do . o - dlse tells that one is in do."""
  is_finite = jnp.abs(di) < jnp.inf
  return jnp.where(is_finite, lse, jnp.nan), jnp.where(is_finite, di, 0.0)


def clear_in_place(lse: jax.Array, q: Any, dout: Any) -> None:
  """Clears refs of rows, if one of the rows may need it.

  Where lse is finite q was, and by `nan_in_lse` do.  What is overwritten is the
  kernel's own copy of the block in VMEM.
  """

  def clear() -> None:
    q[...], dout[...] = cleared(q[...]), cleared(dout[...])

  pl.when(jnp.any(~(jnp.abs(lse) < jnp.inf)))(clear)


def _not_finite(words: jax.Array, dtype: Any) -> jax.Array:
  """Ones in all bits of the elements that are not finite, zeros in others."""
  if dtype == jnp.float32:
    return ((words & 0x7F800000) + 0x00800000) >> 31
  signs = ((words & 0x7F807F80) + 0x00800080) & -0x7FFF8000
  low = jax.lax.shift_right_logical(signs, 15)  # 1 in the lowest bit of each
  return (low << 16) - low


# --- in plain jnp -------------------------------------------------------------


def plain_backward(reference_vjp: Any, p: Problem, saved: Any, d: Outs) -> Any:
  """The reference's gradient, of cotangents that may be anything.

  Differentiation of plain jnp alone would let one row's cotangent into all.
  """
  a = saved.arrays
  if a.segments is None:
    return reference_vjp(p, saved, d)
  d_lse = layout.lse_from_rows(d.lse, a.q.shape).swapaxes(1, 2)  # [B, T, N]
  bad = ~(jnp.isfinite(d.out).all(axis=-1) & jnp.isfinite(d_lse))
  d = Outs(*(jnp.where(jnp.isfinite(x), x, 0) for x in d))
  grads = reference_vjp(p, saved, d)
  mask = spec.visible(p, a)
  of_kv = bad.reshape(*bad.shape[:2], a.k.shape[2], -1).any(axis=-1)
  seen_by_bad = (mask[..., None] & of_kv[:, :, None, :]).any(axis=1)
  bad &= mask.any(axis=-1)[..., None]
  return grads._replace(
    q=_with_nan(grads.q, bad),
    k=_with_nan(grads.k, seen_by_bad),
    v=_with_nan(grads.v, seen_by_bad),
    scale=_with_nan(grads.scale, bad.any(axis=(1, 2))),
  )


def _with_nan(x: Any, bad: jax.Array) -> Any:
  if x is None:
    return None
  return jnp.where(
    bad.reshape(*bad.shape, *[1] * (x.ndim - bad.ndim)), jnp.nan, x
  )
