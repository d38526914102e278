"""Page 17: one step of a ring, by the kernels and in plain jnp.

A part is some rows of a device and some of the keys that it has.  Forward, it
is attention to these keys alone; backward, its share of the gradients, by the
lse of all keys.  Here lse is [B, N, T], in units of `Problem.unit`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from .._frame.kernel import Saved
from . import tiles
from .backward import backward
from .dropout import kept_of
from .forward import forward
from .layout import Layout
from .reference import (
  attention,
  by_kv_head,
  nan_by_finiteness,
  penalties,
  visible,
)
from .spec import Arrays, Outs, Problem

# --- sums ---------------------------------------------------------------------


def wide_zeros(x: jax.Array) -> jax.Array:
  """As x, in float32 at least, and varying as it does."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.zeros_like(x, wide)


def wide(tree: Any) -> Any:
  """Arrays in float32 at least."""
  return jax.tree.map(
    lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree
  )


def nothing(a: Arrays) -> Outs:
  """The results of rows that have met no key."""
  out = wide_zeros(a.q)
  lse = jnp.full_like(out[..., 0].swapaxes(1, 2), -jnp.inf)
  return Outs(out, lse)


# --- by the kernels -----------------------------------------------------------


def forward_kernel(p: Problem, a: Arrays) -> Outs:
  """The forward kernel of a part."""
  p = dataclasses.replace(p, config=tiles.choose(p, a))
  outs = forward(p, a)
  layout = Layout.of_shapes(p, a.q.shape, a.k.shape)
  return outs._replace(lse=layout.to_lse(outs.lse, a.q.shape))


def backward_kernel(p: Problem, a: Arrays, outs: Outs, d: Outs) -> Arrays:
  """The backward kernel of a part: gradients in float32."""
  p = dataclasses.replace(p, config=tiles.choose(p, a))
  layout = Layout.of_shapes(p, a.q.shape, a.k.shape)
  outs, d = (x._replace(lse=layout.of_lse(x.lse)) for x in (outs, d))
  return backward(p, Saved(a, outs, None, wanted=None), d)


# --- in plain jnp -------------------------------------------------------------


def forward_plain(p: Problem, a: Arrays) -> Outs:
  """The reference of a part."""
  outs = attention(dataclasses.replace(p, return_lse=True), a)
  return outs._replace(lse=outs.lse / p.unit)


def backward_plain(p: Problem, a: Arrays, outs: Outs, d: Outs) -> Arrays:
  """The room's formulas, from lse."""
  (batch, t, n, h), kv_heads = a.q.shape, a.k.shape[2]

  def grouped(x: jax.Array) -> jax.Array:
    return x.reshape(batch, t, kv_heads, n // kv_heads, h)

  def by_head(x: jax.Array) -> jax.Array:
    return x.reshape(batch, kv_heads, n // kv_heads, t, 1)

  wide_type = jnp.promote_types(a.q.dtype, jnp.float32)
  q, k, v, dout = a.q, a.k, a.v, d.out
  lse, mask = by_head(outs.lse * p.unit), visible(p, a)[:, None, None]
  di = (dout.astype(wide_type) * outs.out.astype(wide_type)).sum(axis=-1)
  di = by_head(di.swapaxes(1, 2) - d.lse / p.unit)
  bias: Any = 0.0
  if a.alibi is not None:
    bias += by_kv_head(penalties(p, a), kv_heads)
  if a.segments is not None:  # see `finite`
    bias += nan_by_finiteness(q, k, v)
    lse = jnp.where(jnp.isfinite(di), lse, jnp.nan)
    q, k, v, dout, di = (
      jnp.where(jnp.isfinite(x), x, 0) for x in (q, k, v, dout, di)
    )
  product = functools.partial(jnp.einsum, preferred_element_type=wide_type)
  scale = jnp.full((batch, 1, 1, 1, 1), p.scale, wide_type)
  if a.scale is not None:
    scale *= a.scale[:, None, None, None, None]
  logits = product("btkgh,bskh->bkgts", grouped(q), k) * scale
  slope: Any = 1.0
  if p.soft_cap is not None:
    tanh = jnp.tanh(logits / p.soft_cap)
    logits, slope = p.soft_cap * tanh, 1 - tanh * tanh
  weights = jnp.where(mask, jnp.exp(logits + bias - lse), 0.0)
  dweights = product("btkgh,bskh->bkgts", grouped(dout), v)
  kept: Any = 1.0
  if a.dropout is not None:
    kept = kept_of(p.dropout_rate, a.dropout)
    kept = jnp.where(by_kv_head(kept, kv_heads), p.kept_scale, 0.0)
  dweights *= kept
  dlogits = (weights * (dweights - di) * slope * p.scale).astype(q.dtype)
  weights = (weights * kept).astype(v.dtype)
  dv = product("bkgts,btkgh->bskh", weights, grouped(dout))
  dk = product("bkgts,btkgh->bskh", dlogits, grouped(q))
  dq = product("bkgts,bskh->btkgh", dlogits, k)
  dq, d_scale = dq.reshape(a.q.shape), None
  if a.scale is not None:
    d_scale = (q.astype(wide_type) * dq).sum(axis=(1, 2, 3))
    dq, dk = (x * a.scale[:, None, None, None] for x in (dq, dk))
  return Arrays(dq, dk, dv, scale=d_scale)
