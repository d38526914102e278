"""Keys and values of the tokens read so far, for decoding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ._config import GemmaConfig


@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of the tokens so far, right-padded.

  Attributes:
    k: [L, B, S, K, H] keys as attention reads them: rotated by RoPE.
    v: [L, B, S, K, H] values.
    lengths: [B] int32 tokens of each row.  Entries from there on are undefined:
      they are never read, and later overwritten.
  """

  k: jax.Array
  v: jax.Array
  lengths: jax.Array

  @classmethod
  def empty(cls, config: GemmaConfig, batch: int, length: int) -> Cache:
    """Room for `batch` rows of `length` tokens, S = length, in config.dtype."""
    shape = (
      *(config.num_layers, batch, length),
      *(config.num_kv_heads, config.head_size),
    )
    dtype = jnp.dtype(config.dtype)
    return cls(
      k=jnp.zeros(shape, dtype),
      v=jnp.zeros(shape, dtype),
      lengths=jnp.zeros(batch, jnp.int32),
    )

  def write_prompts(
    self, layer: jax.Array, k: jax.Array, v: jax.Array
  ) -> Cache:
    """This cache with k and v [B, T, K, H] at the first T places of a layer.

    `lengths` are left as they are: they hold for all layers, so the caller sets
    them when every layer has been written.
    """

    def write(stacked: jax.Array, new: jax.Array) -> jax.Array:
      start = (layer, 0, 0, 0, 0)
      return jax.lax.dynamic_update_slice(stacked, new[None], start)

    return dataclasses.replace(self, k=write(self.k, k), v=write(self.v, v))

  def append(self, layer: jax.Array, k: jax.Array, v: jax.Array) -> Cache:
    """This cache with k and v [B, 1, K, H] after each row's last token.

    A row that is full is left as it is.  So are `lengths`, as in
    `write_prompts`.
    """
    rows = jnp.arange(k.shape[0])

    def write(stacked: jax.Array, new: jax.Array) -> jax.Array:
      # JAX drops an update whose index is out of bounds.
      return stacked.at[layer, rows, self.lengths].set(new[:, 0])

    return dataclasses.replace(self, k=write(self.k, k), v=write(self.v, v))


jax.tree_util.register_dataclass(
  Cache, data_fields=["k", "v", "lengths"], meta_fields=[]
)
