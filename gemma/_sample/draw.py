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

import jax
import jax.numpy as jnp

from .cut import least, weights_of
from .settings import Settings


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
    tokens = _in_proportion(keys, weights(penalised, settings))
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


def weights(logits: jax.Array, settings: Settings) -> jax.Array:
  """What tokens are drawn in proportion to: `weights_of` after temperature."""
  # With a maximum of 0 no logit overflows to infinity, however small the
  # temperature: negative infinities are harmless, they have weight 0.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  return weights_of(logits / settings.temperature, settings.cut)


def _in_proportion(keys: jax.Array, weights: jax.Array) -> jax.Array:
  """A token for each row, with the probability of its weight.

  First a column is drawn, then a token of it, each by inverting the
  distribution function.  (Noise on every logit, as of `jax.random.categorical`,
  takes a TPU five times as long.)

  Args:
    keys: [B].
    weights: [B, 8, n].
  """
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(
    keys
  )
  column = _invert(jnp.sum(weights, axis=1), uniform[:, 0])
  of_column = jnp.take_along_axis(weights, column[:, None, None], axis=2)
  row = _invert(of_column[..., 0], uniform[:, 1])
  return row * weights.shape[2] + column


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
  """The first index up to which the weights are more than a part of their sum.

  A weight of 0 is never the one: a sum with one term more, added up in the same
  order, is not less, and with a 0 more it is the same.

  Args:
    weights: [B, n], not negative.
    uniform: [B]: the part, from 0 to below 1.
  """
  batch, size = weights.shape
  index = jnp.arange(size, dtype=jnp.uint32)
  limit = uniform * jnp.sum(weights, axis=1)

  def is_enough(i: jax.Array) -> jax.Array:
    part = jnp.sum(jnp.where(index <= i[:, 0], weights, 0.0), axis=1)
    return (part > limit)[:, None, None]

  found = least(is_enough, batch, size.bit_length())[:, 0, 0]
  # `limit` was added up in another order: it may be as much as all, rounded.
  last = jnp.max(jnp.where(weights > 0, index, 0), axis=1)
  return jnp.minimum(found, last).astype(jnp.int32)
