"""The optimizer, from optax's parts."""

from __future__ import annotations

from typing import Any

import jax
import optax

from .._arguments import instance, whole
from .._weights import is_norm_scale
from .config import OptimizerConfig


def learning_rate_schedule(
  config: OptimizerConfig, steps: int
) -> optax.Schedule:
  """Linear warm-up to the highest rate, then a cosine to the final one.

  The first of the `steps` already has a rate above 0; the last has the final
  rate.
  """
  instance("config", config, OptimizerConfig)
  steps = whole("steps", steps, 1, (1 << 31) - 1)
  # At least one step has the highest rate, also in a run that is shorter than
  # its warm-up.
  warmup = min(config.warmup_steps, steps - 1)

  rises = optax.linear_schedule(
    config.learning_rate / (warmup + 1), config.learning_rate, warmup
  )
  falls = optax.cosine_decay_schedule(
    config.learning_rate,
    max(steps - 1 - warmup, 1),
    alpha=config.final_learning_rate / config.learning_rate,
  )
  return optax.join_schedules([rises, falls], [warmup])


def make_optimizer(
  config: OptimizerConfig, steps: int
) -> optax.GradientTransformation:
  """AdamW with float32 moments, after clipping by the global norm."""
  instance("config", config, OptimizerConfig)
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      learning_rate_schedule(config, steps),
      b1=config.beta1,
      b2=config.beta2,
      eps=config.epsilon,
      weight_decay=config.weight_decay,
      mask=decays,
    ),
  )


def decays(params: Any) -> Any:
  """True for the weights that decay: all but the scales of norms."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not is_norm_scale(path), params
  )
