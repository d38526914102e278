"""Seeds: whole numbers from 0 to 2^63 - 1, whatever draws from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

A_SEED = "a whole number from 0 to 2^63 - 1"


def is_seed(value: object) -> bool:
  """Whether it is such a number, Python's or NumPy's."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
    return False
  return 0 <= int(value) < 1 << 63


def key_of(seed: int) -> jax.Array:
  """A random key that depends on all 63 bits.

  `jax.random.key` takes 32 of them, unless JAX has 64-bit integers; of seeds
  below 2^32 this is its key.
  """
  low, high = words_of(seed)
  if not high:
    return jax.random.key(low)
  return key_of_words(np.array([low, high], np.uint32))


def words_of(seed: int) -> tuple[int, int]:
  """The lower and upper 32 bits."""
  return seed % (1 << 32), seed >> 32


def key_of_words(words: jax.Array | np.ndarray) -> jax.Array:
  """`key_of` of a seed's words, uint32 [2]."""
  key = jax.random.key(words[0])
  longer = jax.random.fold_in(key, words[1])
  # A key is opaque to `where` of older JAX; its words are not.
  chosen = jnp.where(
    words[1] > 0, jax.random.key_data(longer), jax.random.key_data(key)
  )
  return jax.random.wrap_key_data(chosen)
