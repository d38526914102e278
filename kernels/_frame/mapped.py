"""A kernel under `jax.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap, sequential_vmap

from . import switches

# One more axis of its grid, as Pallas does it; a larger first dimension of all
# its arrays; or one example after the other.
Vmap = Literal["grid", "batch", "loop"]


def mapped_kernel(vmap: Vmap, kernel: Callable[..., Any]) -> Callable[..., Any]:
  """`kernel`, as the op says that it is mapped."""
  kernel = switches.kernel(kernel)
  match vmap:
    case "grid":
      return kernel
    case "loop":
      return sequential_vmap(kernel)
    case "batch":
      return _as_batch(kernel)


def _as_batch(kernel: Callable[..., Any]) -> Callable[..., Any]:
  """`kernel` of arrays [B, ...] that vmap maps by a larger B."""
  mapped = custom_vmap(kernel)

  @mapped.def_vmap
  def rule(axis_size: int, in_batched: Any, *args: Any) -> Any:
    def merged(x: jax.Array, batched: bool) -> jax.Array:
      if not batched:
        x = jnp.broadcast_to(x, (axis_size, *x.shape))
      return x.reshape(-1, *x.shape[2:])

    outs = mapped(*jax.tree.map(merged, args, tuple(in_batched)))
    outs = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), outs)
    return outs, jax.tree.map(lambda _: True, outs)

  return mapped
