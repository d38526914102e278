"""One token for each row, from its logits.

In this order:

    repetition penalty   l / r where l > 0, else l r   of tokens the row has
    frequency, presence  l - f count - p [count > 0]   of tokens it has drawn
    bias                 l + b
    temperature          l / t
    top-k, top-p, min-p  l = -inf outside the cut

and the token is drawn from the softmax of that, or at temperature 0 is the
likeliest.  The repetition penalty is that of CTRL (arXiv 1909.05858 §4.1) for
logits of both signs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .cut import (
  Cut,
  is_before,
  least,
  mass_of,
  sum_before,
  weights_of,
  within_min_p,
)
from .settings import Settings

# Tokens that are drawn at a time.  All lie outside of the likeliest 95 % in one
# of 8,000 rows: of 32 rows, in one step of 250.
_TRIALS = 3


def draw(
  logits: jax.Array,
  keys: jax.Array,
  settings: Settings,
  seen: jax.Array | None,
  counts: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Tokens and their log-probabilities.

  Args:
    logits: [B, V] float32.
    keys: [B] random keys.
    settings: how to draw.
    seen: [B, V] bool: tokens that a row has; None without repetition penalty.
    counts: [B, V] int32: how often a row has drawn each; None without presence
      and frequency penalty.

  Returns:
    [B] int32, and [B] float32 under the model's own distribution: before all of
    the above.
  """
  vocab = jnp.arange(logits.shape[-1])
  logits = jnp.where(vocab < settings.vocab_size, logits, -jnp.inf)
  penalised = penalise(logits, settings, seen, counts)
  if settings.greedy:
    tokens = jnp.argmax(penalised, axis=-1)
  else:
    scaled = _scale(penalised, settings.temperature)
    tokens = _draw_within(keys, scaled, settings.cut)
  logprobs = jnp.take_along_axis(
    jax.nn.log_softmax(logits), tokens[:, None], axis=-1
  )
  return tokens.astype(jnp.int32), logprobs[:, 0]


def penalise(
  logits: jax.Array,
  settings: Settings,
  seen: jax.Array | None,
  counts: jax.Array | None,
) -> jax.Array:
  """Logits after penalties and bias."""
  if seen is not None:
    factor = settings.repetition
    smaller = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(seen, smaller, logits)
  if counts is not None:
    logits -= settings.frequency * counts
    logits -= jnp.where(counts > 0, settings.presence, 0.0)
  if settings.bias is not None:
    logits += settings.bias
  return logits


def _scale(logits: jax.Array, temperature: Any) -> jax.Array:
  """Logits after temperature, of which the largest is 0."""
  # With a maximum of 0 no logit overflows to infinity, however small the
  # temperature: negative infinities are harmless, they have weight 0.
  return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature


def _draw_within(keys: jax.Array, logits: jax.Array, cut: Cut) -> jax.Array:
  """A token for each row, in proportion to the weights that a cut leaves.

  Args:
    keys: [B].
    logits: [B, V], of which the largest of each row is 0.
    cut: which tokens may be drawn.

  Returns:
    [B] int32.
  """
  weights = weights_of(logits, cut.top_k)
  likely = within_min_p(weights, cut.min_p)
  if cut.top_p is not None:
    return _try(keys, weights, likely, cut.top_p)
  return _in_proportion(_uniform(keys, 1), likely)[0][:, 0]


class _Tried(NamedTuple):
  """What has been drawn for each row.

  Attributes:
    rounds: [] int32, how often.
    token: [B] int32, the one that it is to be.
    is_found: [B] bool, whether that is known.
    outside: [B] int32, the likeliest token that turned out not to be within.
    weight: [B] of that token.
  """

  rounds: jax.Array
  token: jax.Array
  is_found: jax.Array
  outside: jax.Array
  weight: jax.Array


def _try(
  keys: jax.Array, weights: jax.Array, likely: jax.Array, top_p: Any
) -> jax.Array:
  """A token for each row, of those that a top-p leaves.

  To find where it cuts takes longer than all else.  But whether a token is
  within takes one sum.  So tokens are drawn from all, and the first that is
  within is as good as drawn from those that are.  Where none is, the likeliest
  of them says that all less likely ones are outside too; the next are drawn
  from what is left, which has the cut in it still.

  Args:
    keys: [B].
    weights: [B, 8, n], of which top-p is a part.
    likely: the same, 0 for what is not to be drawn.
    top_p: the part.

  Returns:
    [B] int32.
  """
  mass = mass_of(weights, top_p)

  def is_unfinished(state: _Tried) -> jax.Array:
    return ~jnp.all(state.is_found)

  def draw_more(state: _Tried) -> _Tried:
    left = is_before(weights, state.weight, state.outside)
    keys_now = jax.vmap(jax.random.fold_in, (0, None))(keys, state.rounds)
    tried, own = _in_proportion(
      _uniform(keys_now, _TRIALS), jnp.where(left, likely, 0.0)
    )
    fits = sum_before(weights, own, tried) < mass
    first, best = jnp.argmax(fits, axis=1), jnp.argmax(own, axis=1)

    def of(x: jax.Array, which: jax.Array) -> jax.Array:
      return jnp.take_along_axis(x, which[:, None], axis=1)[:, 0]

    return _Tried(
      state.rounds + 1,
      jnp.where(state.is_found, state.token, of(tried, first)),
      state.is_found | jnp.any(fits, axis=1),
      of(tried, best),
      of(own, best),
    )

  zeros = jnp.zeros(len(weights), jnp.int32)
  # Of a row that is not a number none would be within: it gets token 0.
  start = _Tried(jnp.int32(0), zeros, jnp.isnan(mass[:, 0]), zeros, zeros - 1.0)
  return jax.lax.while_loop(is_unfinished, draw_more, start).token


def _uniform(keys: jax.Array, tokens: int) -> jax.Array:
  """[B, tokens, 2], from 0 to below 1."""
  return jax.vmap(
    lambda key: jax.random.uniform(key, (tokens, 2), jnp.float32)
  )(keys)


def _in_proportion(
  uniform: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """C tokens for each row, each with the probability of its weight.

  First a column is drawn, then a token of it, each by inverting the
  distribution function.  (Noise on every logit, as of `jax.random.categorical`,
  takes a TPU five times as long.)

  Args:
    uniform: [B, C, 2], from 0 to below 1.
    weights: [B, 8, n].

  Returns:
    [B, C] int32, and their weights, [B, C].
  """
  column = _invert(jnp.sum(weights, axis=1)[:, None], uniform[..., 0])
  of_column = jnp.take_along_axis(weights, column[:, None], axis=2)
  of_column = of_column.swapaxes(1, 2)
  row = _invert(of_column, uniform[..., 1])
  own = jnp.take_along_axis(of_column, row[..., None], axis=2)
  return row * weights.shape[2] + column, own[..., 0]


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
  """The first index up to which the weights are more than a part of their sum.

  A weight of 0 is never the one: a sum with one term more, added up in the same
  order, is not less, and with a 0 more it is the same.

  Args:
    weights: [B, C or 1, n], not negative.
    uniform: [B, C]: the part, from 0 to below 1.

  Returns:
    [B, C] int32.
  """
  size = weights.shape[-1]
  index = jnp.arange(size, dtype=jnp.uint32)
  limit = uniform[..., None] * jnp.sum(weights, axis=-1, keepdims=True)

  def is_enough(i: jax.Array) -> jax.Array:
    part = jnp.where(index <= i, weights, 0.0)
    return jnp.sum(part, axis=-1, keepdims=True) > limit

  found = least(is_enough, limit.shape, size.bit_length())
  # `limit` was added up in another order: it may be as much as all, rounded.
  last = jnp.max(jnp.where(weights > 0, index, 0), axis=-1, keepdims=True)
  return jnp.minimum(found, last)[..., 0].astype(jnp.int32)
