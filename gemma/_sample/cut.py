"""The likeliest tokens, without sorting them.

To sort 256,128 logits takes a v5e longer than to read the weights of three
layers.  The k likeliest are those above a threshold, which is found by halving,
each time with a sum over the vocabulary.  float32 numbers from 0 to 1 are in
the order of their bits, so that 30 halvings find any threshold exactly.  Of
tokens as likely as the last one kept, those of lower ids are, as many as there
is room for.

For top-p no threshold is needed: whether a given token is within takes one sum,
of the tokens before it.  `draw.py` asks for the tokens that it has drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_BITS = 30  # of a float32 from 0 to 1
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


def weights_of(
  logits: jax.Array, top_k: jax.Array | np.int32 | None
) -> jax.Array:
  """What the probabilities of the tokens are in proportion to.

  Args:
    logits: [B, V] float32, of which the largest of each row is 0.
    top_k: of a `Cut`.

  Returns:
    [B, 8, n]: the tokens of a row one after the other, and padding; 0 for
    padding and for what is not among the top k.  (Of a vector along the lanes
    alone a TPU computes an eighth at a time.)
  """
  batch, vocab_size = logits.shape
  padding = (0, 0), (0, -vocab_size % _ROWS)
  logits = jnp.pad(logits, padding, constant_values=-jnp.inf)
  logits = logits.reshape(batch, _ROWS, -1)
  weights = jnp.exp(logits)
  return weights if top_k is None else _top_k(weights, top_k)


def within_min_p(
  weights: jax.Array, min_p: jax.Array | np.float32 | None
) -> jax.Array:
  """Weights after the `min_p` of a `Cut`; the likeliest token's is 1."""
  if min_p is None:
    return weights
  return jnp.where(weights >= min_p, weights, 0.0)


def mass_of(weights: jax.Array, p: jax.Array | np.float32) -> jax.Array:
  """[B, 1]: a part p of all, less than which is before every token of top-p.

  Args:
    weights: [B, 8, n].
    p: the part; the likeliest token is within any.
  """
  mass = jnp.maximum(p * _sum(weights), jnp.finfo(jnp.float32).tiny)
  return mass[..., 0]


def is_before(
  weights: jax.Array, weight: jax.Array, token: jax.Array
) -> jax.Array:
  """[B, 8, n] bool: which tokens are likelier than one, or like it before it.

  Args:
    weights: [B, 8, n].
    weight: [B], of the token.
    token: [B], its id.
  """
  weight, token = weight[:, None, None], token[:, None, None]
  is_earlier = _index_of(weights) < token.astype(jnp.uint32)
  return (weights > weight) | (weights == weight) & is_earlier


def sum_before(
  weights: jax.Array, own: jax.Array, tokens: jax.Array
) -> jax.Array:
  """[B, C]: what the tokens before each of some have together.

  Args:
    weights: [B, 8, n].
    own: [B, C], of the tokens.
    tokens: [B, C], their ids.
  """
  before = [
    _sum(jnp.where(is_before(weights, w, t), weights, 0.0))
    for w, t in zip(own.T, tokens.T, strict=True)
  ]
  return jnp.concatenate(before, axis=1)[..., 0]


def least(
  holds: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], bits: int
) -> jax.Array:
  """The least uint32 below 2^bits that `holds`, as all above it do.

  Args:
    holds: maps numbers of a shape to whether they hold.
    shape: theirs.
    bits: of the numbers.

  Returns:
    Of this shape; the last number where none holds.
  """

  def step(i: jax.Array, high: jax.Array) -> jax.Array:
    lower = high - (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
    return jnp.where(holds(lower), lower, high)

  top = jnp.full(shape, (1 << bits) - 1, jnp.uint32)
  return jax.lax.fori_loop(0, bits, step, top)


# In what follows, weights are [B, 8, n], and numbers of each row [B, 1, 1].


def _top_k(weights: jax.Array, k: jax.Array | np.int32) -> jax.Array:
  """Weights of the k likeliest tokens."""
  k = jnp.minimum(k, weights[0].size)
  # The last of the k: fewer than k are above it.
  last = _threshold(weights, lambda t: _count(weights > t) < k)
  return _keep(weights, last, k - _count(weights > last))


def _threshold(
  weights: jax.Array, holds: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """The least float32 that `holds`, as all above it do."""

  def as_float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

  return as_float(
    least(lambda t: holds(as_float(t)), (len(weights), 1, 1), _BITS)
  )


def _keep(weights: jax.Array, last: jax.Array, room: jax.Array) -> jax.Array:
  """Weights above the last, and the first `room` of those like it."""
  size, index = weights[0].size, _index_of(weights)

  def search() -> jax.Array:
    def is_enough(i: jax.Array) -> jax.Array:
      return _count((weights == last) & (index <= i)) >= room

    return least(is_enough, last.shape, size.bit_length())

  def all_of_them() -> jax.Array:
    return jnp.full(last.shape, size, jnp.uint32)

  # Nearly always one token is like it, and there is room for one.
  fit = jnp.all(_count(weights == last) <= room)
  end = jax.lax.cond(fit, all_of_them, search)
  kept = (weights > last) | (weights == last) & (index <= end)
  return jnp.where(kept, weights, 0.0)


def _index_of(weights: jax.Array) -> jax.Array:
  """[8, n] uint32, the tokens' ids."""
  size = weights[0].size
  return jnp.arange(size, dtype=jnp.uint32).reshape(weights.shape[1:])


def _count(chosen: jax.Array) -> jax.Array:
  """How many; a float32 counts to 2^24, and a TPU adds it faster."""
  return _sum(jnp.where(chosen, 1.0, 0.0))


def _sum(x: jax.Array) -> jax.Array:
  return jnp.sum(x, axis=(1, 2), keepdims=True)
