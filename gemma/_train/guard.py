"""Steps that are not taken: of a gradient that is no number, or a spike.

One batch that overflows, or one device that computes nonsense, would otherwise
be in every weight for good.  Such a step changes nothing: not the parameters,
nor the moments, nor the count by which the learning rate falls.  It is decided
inside the compiled step, from numbers that all devices have, so that the state
may be donated and all devices decide alike.

A spike is a norm above `skip_spikes` times the running mean of the norms of the
steps that were taken.  (The idea is old; PaLM, arXiv 2204.02311 §5.1, went back
to a checkpoint and left out the batches around a spike, by hand.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

_SHARE = 0.02  # of a step's norm in the running mean: it is of some 50 steps
_FIRST = 10  # steps whose norms are taken before one is called a spike


class Guard(NamedTuple):
  """What is remembered of earlier steps; scalars.

  Attributes:
    taken: int32, steps whose norm is in the mean.
    mean_norm: float32, the running mean of the gradient's norm.
    skipped: int32, steps that were not taken, in all.
    in_a_row: int32, those of them that are the newest steps.
  """

  taken: Any
  mean_norm: Any
  skipped: Any
  in_a_row: Any


class OptimizerState(NamedTuple):
  """What a step of training changes besides the parameters."""

  adamw: optax.OptState
  guard: Guard


def fresh_guard() -> Guard:
  """Before the first step."""

  def zero(dtype: Any) -> jax.Array:
    return jnp.zeros((), dtype)  # each its own, for all may be donated

  return Guard(
    zero(jnp.int32), zero(jnp.float32), zero(jnp.int32), zero(jnp.int32)
  )


def judge(
  guard: Guard, loss: jax.Array, norm: jax.Array, skip_spikes: float | None
) -> tuple[jax.Array, Guard]:
  """Whether a step is taken, and what is remembered after it.

  Args:
    guard: before the step.
    loss: of its batch.
    norm: of its gradient, before clipping.
    skip_spikes: how many times the mean norm is a spike; None for none.
  """
  taken = jnp.isfinite(loss) & jnp.isfinite(norm)
  if skip_spikes is not None:
    is_known = guard.taken >= _FIRST
    taken &= ~is_known | (norm <= skip_spikes * guard.mean_norm)
  # The mean of all while they are few, then one that forgets.
  share = jnp.maximum(1 / (guard.taken + 1.0), _SHARE)
  mean = guard.mean_norm + share * (norm - guard.mean_norm)
  counted = Guard(
    taken=guard.taken + taken,
    mean_norm=jnp.where(taken, mean, guard.mean_norm),
    skipped=guard.skipped + ~taken,
    in_a_row=jnp.where(taken, 0, guard.in_a_row + 1),
  )
  return taken, counted


def chosen(taken: jax.Array, new: Any, old: Any) -> Any:
  """The new state of a step that is taken, else the old one."""
  return jax.tree.map(lambda n, o: jnp.where(taken, n, o), new, old)


def to_record(guard: Guard) -> dict[str, float]:
  """As JSON holds it, bit by bit."""
  return {name: x.item() for name, x in jax.device_get(guard._asdict()).items()}


def from_record(record: Mapping[str, Any] | None) -> Guard:
  """What `to_record` gave; of an earlier version's None, a fresh one."""
  if record is None:
    return jax.device_get(fresh_guard())
  dtypes = jax.tree.map(lambda x: x.dtype, jax.eval_shape(fresh_guard))
  return Guard(
    *(
      np.asarray(record[name], dtype)
      for name, dtype in dtypes._asdict().items()
    )
  )
