"""Keys and values of the tokens read so far, for decoding."""

from __future__ import annotations

import dataclasses
from typing import Any

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

  @property
  def letters(self) -> Cache:
    """Those of its arrays' dimensions, in place of the arrays."""
    kept: Any = "LBSKH"
    lengths: Any = "B"
    return Cache(k=kept, v=kept, lengths=lengths)

  @property
  def size(self) -> int:
    """S, the tokens that a row has room for."""
    return self.k.shape[2]

  def row(self, index: jax.Array) -> Cache:
    """A cache of one of its rows."""

    def read(x: jax.Array, axis: int) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(x, index, 1, axis)

    return Cache(read(self.k, 1), read(self.v, 1), read(self.lengths, 0))

  def with_row(self, index: jax.Array, row: Cache) -> Cache:
    """This cache with one of its rows replaced."""

    def write(x: jax.Array, new: jax.Array, axis: int) -> jax.Array:
      return jax.lax.dynamic_update_slice_in_dim(x, new, index, axis)

    return Cache(
      write(self.k, row.k, 1),
      write(self.v, row.v, 1),
      write(self.lengths, row.lengths, 0),
    )


jax.tree_util.register_dataclass(
  Cache, data_fields=["k", "v", "lengths"], meta_fields=[]
)
