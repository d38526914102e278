"""Guesses of the next tokens, from the row itself.

Text repeats itself: names, quotations, code.  Where the last few tokens have
stood before, what followed then is likely to follow again ("prompt lookup
decoding", Saxena 2023).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_LONGEST = 3  # tokens that are compared


def guess(tokens: jax.Array, known: jax.Array, count: int) -> jax.Array:
  """What followed where the last tokens stood before.

  Of all places it is the one where most of the last three tokens are the same;
  of several such the last.  A text that ends there goes on as it did from
  there: after "a b c a b" comes "c a b c a b ...".

  Args:
    tokens: [B, S].
    known: [B]: how many of a row's tokens there are, at least 1.
    count: how many to guess.

  Returns:
    [B, count] ids; any of the row's if its last token is new.
  """
  return jax.vmap(lambda row, n: _of_row(row, n, count))(tokens, known)


def _of_row(tokens: jax.Array, known: jax.Array, count: int) -> jax.Array:
  index = jnp.arange(tokens.size, dtype=jnp.int32)
  last = known - 1
  same, length = index < last, jnp.zeros_like(index)
  for back in range(_LONGEST):
    # jnp.roll brings the end of the row to its start: it is masked.
    same &= (jnp.roll(tokens, back) == tokens[last - back]) & (index >= back)
    length += same
  found = jnp.argmax(jnp.where(length > 0, length * tokens.size + index, 0))
  period = jnp.maximum(last - found, 1)
  places = found + 1 + jnp.arange(count, dtype=jnp.int32) % period
  return tokens[jnp.minimum(places, tokens.size - 1)]
