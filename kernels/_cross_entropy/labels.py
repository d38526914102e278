"""Labels that are not vocabulary: an error under `checkify`, else NaN."""

from __future__ import annotations

import jax

from .._frame.debug import checked


def labels_checked(
  loss: jax.Array, labels: jax.Array, weights: jax.Array | None, vocab: int
) -> jax.Array:
  """The loss; an error for `checkify` to find if a label is not below `vocab`.

  The label of a token of weight 0 may be anything.
  """
  allowed = (labels >= 0) & (labels < vocab)
  if weights is not None:
    allowed |= weights == 0
  wanted = f"linear_cross_entropy: labels must be from 0 to {vocab - 1}"
  return checked(loss, allowed, labels, f"{wanted}, got {{found}}")
