"""Logits cut to the likeliest tokens, without sorting them.

To sort 256,128 logits takes a v5e longer than to read the weights of three
layers.  What is kept are the likeliest tokens, so a threshold on the logits
says which: it is found by halving, each time with a sum over the vocabulary.
Logits are compared as integers in the order of their float32 bits, so that 32
halvings find any threshold exactly.  Of tokens as likely as the last one kept,
those of lower ids are, as many as there is room for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_BITS = 32
_ROWS = 8  # the sublanes of a TPU's registers


class Cut(NamedTuple):
  """Which tokens may be drawn: scalars, numbers or arrays.

  In this order, each of what the one before has left, renormalised.  What is
  None is not compiled either.

  Attributes:
    top_k: the so many likeliest.
    top_p: the fewest likeliest that have at least this probability together.
    min_p: those at least so many times as likely as the likeliest.
  """

  top_k: np.int32 | jax.Array | None = None
  top_p: np.float32 | jax.Array | None = None
  min_p: np.float32 | jax.Array | None = None


def keep_likeliest(logits: jax.Array, cut: Cut) -> jax.Array:
  """Logits [B, V] float32, minus infinity where a token may not be drawn."""
  if all(limit is None for limit in cut):
    return logits
  return jax.vmap(lambda row: _of_row(row, cut))(logits)


def _of_row(logits: jax.Array, cut: Cut) -> jax.Array:
  vocab_size = logits.size
  logits = in_rows(logits)
  order = _ordered(logits)
  if cut.top_k is not None:
    logits = jnp.where(_top_k(order, cut.top_k), logits, -jnp.inf)
  if cut.top_p is not None:
    p = jnp.exp(logits - jnp.max(logits))
    kept = _top_p(order, p / jnp.sum(p), cut.top_p)
    logits = jnp.where(kept, logits, -jnp.inf)
  if cut.min_p is not None:
    likely = logits >= jnp.max(logits) + jnp.log(cut.min_p)
    logits = jnp.where(likely, logits, -jnp.inf)
  return logits.reshape(-1)[:vocab_size]


def in_rows(logits: jax.Array) -> jax.Array:
  """Logits [V] as [8, V / 8], with minus infinity at the end.

  Of a vector along the lanes alone a TPU computes an eighth at a time.
  """
  padding = -logits.size % _ROWS
  logits = jnp.pad(logits, (0, padding), constant_values=-jnp.inf)
  return logits.reshape(_ROWS, -1)


def _ordered(x: jax.Array) -> jax.Array:
  """uint32 in the order of float32 numbers; both zeros are one."""
  x = jnp.where(x == 0, 0.0, x)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  sign = jnp.uint32(1) << (_BITS - 1)
  return jnp.where(bits < sign, bits | sign, ~bits)


def _top_k(order: jax.Array, k: jax.Array | np.int32) -> jax.Array:
  """Whether each token is among the k likeliest."""
  k = jnp.minimum(k, order.size)
  # The last of the k: fewer than k are above it.
  last = _least(lambda t: _count(order > t) < k, _BITS)
  room = k - _count(order > last)
  return (order > last) | _first(order == last, room)


def _top_p(
  order: jax.Array, p: jax.Array, mass: jax.Array | np.float32
) -> jax.Array:
  """Whether each token is needed for a probability of `mass`."""

  def above(t: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(order > t, p, 0.0))

  mass = jnp.maximum(mass, jnp.finfo(jnp.float32).tiny)
  last = _least(lambda t: above(t) < mass, _BITS)
  is_last = order == last
  one = jnp.max(jnp.where(is_last, p, 0.0))
  # As many of these as it takes; a quotient of zero by zero keeps them all.
  room = jnp.maximum(jnp.ceil((mass - above(last)) / one), 1)
  room = jnp.where(room < order.size, room, order.size)
  return (order > last) | _first(is_last, room)


def _first(chosen: jax.Array, count: jax.Array) -> jax.Array:
  """Of the chosen tokens, the first `count`."""
  index = jnp.arange(chosen.size, dtype=jnp.uint32).reshape(chosen.shape)

  def is_enough(i: jax.Array) -> jax.Array:
    return _count(chosen & (index <= i)) >= count

  return chosen & (index <= _least(is_enough, chosen.size.bit_length()))


def _count(chosen: jax.Array) -> jax.Array:
  """How many; a float32 counts to 2^24, and a TPU adds it faster."""
  return jnp.sum(jnp.where(chosen, 1.0, 0.0))


def _least(holds: Callable[[jax.Array], jax.Array], bits: int) -> jax.Array:
  """The least uint32 below 2^bits that `holds`, as all above it do.

  If none does, the last.
  """

  def step(i: jax.Array, high: jax.Array) -> jax.Array:
    lower = high - (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
    return jnp.where(holds(lower), lower, high)

  top = jnp.uint32((1 << bits) - 1)
  return jax.lax.fori_loop(0, bits, step, top)
