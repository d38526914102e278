"""What the model refuses to read: shapes, ids that are none, a full cache.

Shapes are always known.  Numbers are outside `jax.jit`, and there a wrong one
is an error; in a compiled program there is nobody to tell, and nothing waits
to find out: an id beyond the table reads its last row, as of `jax.numpy`, and
a key beyond the cache is dropped.  `jax.experimental.checkify` finds both
there.
"""

from __future__ import annotations

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ._cache import Cache
from ._config import GemmaConfig
from .ops import checked


def check_shape(
  name: str, tokens: jax.Array, config: GemmaConfig, cache: Cache | None = None
) -> None:
  """Of `decode` [B], of all others [B, T], which must fit a cache.

  Raises:
    ValueError: if they are not.
  """
  ndim = 1 if name == "decode" else 2
  if tokens.ndim != ndim or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f"{name}: tokens must be {'[B, T]' if ndim == 2 else '[B]'} integers, "
      f"got {tokens.dtype}{list(tokens.shape)}"
    )
  if cache is not None and tokens.shape[0] != len(cache.lengths):
    raise ValueError(
      f"{name}: tokens must be of the cache's {len(cache.lengths)} rows, got "
      f"{tokens.shape[0]}"
    )
  if ndim == 1:
    return
  if cache is not None and tokens.shape[1] > cache.size:
    raise ValueError(
      f"{name}: tokens must fit the cache's {cache.size} places, "
      f"got {tokens.shape[1]}"
    )
  if cache is None and tokens.shape[1] > config.context_length:
    raise ValueError(
      f"{name}: tokens must be at most the context length "
      f"{config.context_length}, got {tokens.shape[1]}"
    )


def check_room(name: str, cache: Cache, new: int) -> None:
  """That each row of a cache has room for so many tokens.

  Raises:
    ValueError: if the lengths are known, and one has not.
  """
  lengths = _on_host(cache.lengths)
  if lengths is not None and lengths.size and lengths.max() + new > cache.size:
    raise ValueError(
      f"{name}: the cache must have room for {new} more in every row, got "
      f"{lengths.max()} tokens in its {cache.size} places"
    )


def checked_range(
  name: str,
  value: jax.Array,
  least: int,
  most: int,
  where: jax.Array | None = None,
) -> jax.Array:
  """The integers; an error if some are out of range.

  Args:
    name: who wants what, such as "decode: tokens".
    value: of any shape.
    least: the least that is allowed.
    most: the most that is allowed.
    where: which count, of the same shape; None for all.

  Raises:
    ValueError: naming one that is not allowed, if they are known.
  """
  wanted = f"{name} must be from {least} to {most}, got"
  allowed = (value >= least) & (value <= most)
  if where is not None:
    allowed |= ~where
  fine, found = _on_host(allowed), _on_host(value)
  if fine is None or found is None:
    return checked(value, allowed, value, f"{wanted} {{found}}")
  if not fine.all():
    raise ValueError(f"{wanted} {found[~fine][0]}")
  return value


def _on_host(x: jax.Array) -> np.ndarray | None:
  """The numbers; None if they are traced, or partly on other hosts."""
  if isinstance(x, jax.core.Tracer):
    return None
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return None
  return np.asarray(x)
