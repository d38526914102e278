"""Masks that are still known for what they are.

Libraries make a mask [B, T, S] of booleans out of a few facts, and attention
gets the booleans alone.  To guess the facts from them is neither possible where
they are traced nor safe where they are not; so the function that makes the mask
is asked for the facts instead.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class CausalMask:
  """Causal attention to real tokens; an array of booleans for all others.

  It goes through `jit` and whatever else takes a pytree.  `jax.numpy` functions
  and operators take it for the array [B, T, T] that the library would have
  made, which is computed only where somebody asks for it.

  Attributes:
    tokens: [B, T] booleans, True where there is a token, False for padding.
      Keys are hidden where there is padding, not queries.
    positions_count_tokens: whether positions, where a library has them, are
      those of the tokens in their sequence; else they are anybody's.
  """

  tokens: Any
  positions_count_tokens: bool = True

  def dense(self) -> jax.Array:
    """[B, T, T] booleans: whether a query sees a key."""
    length = self.tokens.shape[-1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return jnp.asarray(self.tokens, bool)[..., None, :] & causal

  def segment_ids(self) -> tuple[jax.Array, jax.Array]:
    """For `flash_attention`: all queries see the keys that are tokens."""
    keys = jnp.asarray(self.tokens, jnp.int32)
    return jnp.ones_like(keys), keys

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the array it stands for."""
    return (*self.tokens.shape, self.tokens.shape[-1])

  @property
  def ndim(self) -> int:
    """Of the array it stands for."""
    return len(self.shape)

  @property
  def dtype(self) -> Any:
    """Of the array it stands for."""
    return jnp.dtype(bool)

  def __jax_array__(self) -> jax.Array:
    """What `jax.numpy` makes of it."""
    return self.dense()

  def __array__(self, *args: Any, **kwargs: Any) -> Any:
    """What NumPy makes of it."""
    return np.asarray(self.dense(), *args, **kwargs)

  def __getattr__(self, name: str) -> Any:
    """The methods of an array."""
    if name.startswith("_") or name == "tokens":
      raise AttributeError(name)
    return getattr(self.dense(), name)

  def __getitem__(self, index: Any) -> jax.Array:
    """A part of the array."""
    return self.dense()[index]

  def __and__(self, other: Any) -> jax.Array:
    """Narrowed by another mask."""
    return self.dense() & other

  def __mul__(self, other: Any) -> jax.Array:
    """Narrowed by another mask."""
    return self.dense() * other

  def __or__(self, other: Any) -> jax.Array:
    """Widened by another mask."""
    return self.dense() | other

  __rand__, __rmul__, __ror__ = __and__, __mul__, __or__

  def __invert__(self) -> jax.Array:
    """Whether a query does not see a key."""
    return ~self.dense()

  def tree_flatten(self) -> tuple[tuple[Any], bool]:
    """For JAX."""
    return (self.tokens,), self.positions_count_tokens

  @classmethod
  def tree_unflatten(cls, counts: bool, children: tuple[Any]) -> CausalMask:
    """For JAX."""
    return cls(*children, positions_count_tokens=counts)


def dense(mask: Any) -> Any:
  """The array of a mask, whatever it is."""
  return mask.dense() if isinstance(mask, CausalMask) else mask
