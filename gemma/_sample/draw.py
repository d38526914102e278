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

from .cut import in_rows, keep_likeliest
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
    scaled = cut_logits(penalised, settings)
    tokens = jax.vmap(_categorical)(keys, scaled)
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


def cut_logits(logits: jax.Array, settings: Settings) -> jax.Array:
  """Logits after temperature and cut: those of the distribution drawn from."""
  # With a maximum of 0 no logit overflows to infinity, however small the
  # temperature: negative infinities are harmless, they have probability 0.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  logits /= settings.temperature
  return keep_likeliest(logits, settings.cut)


def _categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
  """As `jax.random.categorical` of logits [V], by Gumbel's noise."""
  rows = in_rows(logits)
  rows += jax.random.gumbel(key, rows.shape)
  row = jnp.argmax(jnp.max(rows, axis=1))
  return row * rows.shape[1] + jnp.argmax(rows, axis=1)[row]
