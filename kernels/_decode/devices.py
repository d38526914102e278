"""Page 9: one device's part of a cache that is split over a mesh.

Rows of the batch and heads need nothing of each other.  Of a cache that is
split along its length each device has some keys of every row: it attends to
these, as if they were all, and what the devices found is merged by their lse.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from .._attention.heads import own_kv_heads
from .._frame.sharding import Axes
from .cache import by_token, in_groups
from .spec import Arrays, Outs


def shifted(a: Arrays, axes: Axes) -> Arrays:
  """The arrays with positions counted from this device's first key."""
  first_key = jax.lax.axis_index(axes) * a.k.shape[-3]
  return a._replace(shift=jnp.full_like(a.lengths, first_key))


def merged_over(outs: Outs, axes: Axes) -> Outs:
  """The results over the keys of all devices."""
  assert outs.lse is not None
  top = jax.lax.pmax(jax.lax.stop_gradient(outs.lse), axes)
  top = jnp.where(jnp.isneginf(top), 0.0, top)
  weight = jnp.exp(outs.lse - top)
  total = jax.lax.psum(weight, axes)
  share = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1.0), 0.0)
  share = share.swapaxes(1, 2)[..., None]
  out = jax.lax.psum(share * outs.out.astype(share.dtype), axes)
  lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
  return outs._replace(out=out.astype(outs.out.dtype), lse=lse)


def with_own_kv_heads(a: Arrays, axes: Mapping[str, Axes]) -> Arrays:
  """Of the kv heads that a device has, those of its query heads."""
  heads = own_kv_heads(a.q.shape[2], a.k.shape[-2], axes)
  if heads is None:
    return a

  def own(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else jnp.take(x, heads, axis=-2, mode="clip")

  def own_scale(x: jax.Array | None) -> jax.Array | None:
    if x is None:
      return None
    x = by_token(x, *a.k.shape[-3:-1])
    return in_groups(jnp.take(x, heads, axis=-1, mode="clip"), heads.size)

  return a._replace(
    k=own(a.k),
    v=own(a.v),
    k_scale=own_scale(a.k_scale),
    v_scale=own_scale(a.v_scale),
    new_k=own(a.new_k),
    new_v=own(a.new_v),
  )


def check_groups(a: Arrays, axes: Mapping[str, Axes]) -> None:
  """Refuses scales that cannot be split as the heads are.

  Raises:
    ValueError: if they would keep an int8 cache whole on every device.
  """
  if a.k_scale is None or axes.get("N", ()) == axes.get("K", ()):
    return
  groups, kv_heads = a.k_scale.shape[-3], a.k.shape[-2]
  if groups < kv_heads:
    raise ValueError(
      f"decode_attention: N is split over {axes.get('N', ())}: an int8 cache "
      f"must be in groups of heads that these devices can share, got "
      f"{kv_heads} heads in {groups} group(s) on each device; use "
      f"QuantizedCache.quantize(..., head_groups=)"
    )
