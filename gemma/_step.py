"""One step of training: the loss, its gradient, the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ._checkpoint import Params, model_params
from ._model import Gemma
from ._optimizer import make_optimizer
from ._train_config import TrainConfig
from .ops import KERNELS, LinearCrossEntropyConfig

Batch = dict[str, jax.Array]
Head = Literal["recompute", "chunked"]
State = tuple[Params, optax.OptState]


def token_losses(
  model: Gemma,
  batch: Batch,
  valid_vocab_size: int,
  z_loss: float = 0.0,
  head: Head = "recompute",
) -> jax.Array:
  """[B, T] float32 next-token losses, 0 where the weight is 0."""
  hidden = model.hidden_states(
    batch["tokens"], segment_ids=batch["segment_ids"]
  )
  table = model.embedder.embedding[...]
  rows = hidden.reshape(-1, hidden.shape[-1])
  return KERNELS.linear_cross_entropy(
    hidden,
    table,
    batch["labels"],
    weights=batch["weights"],
    z_loss=z_loss,
    valid_vocab_size=valid_vocab_size,
    config=LinearCrossEntropyConfig.for_problem(rows, table, head),
  )


def choose_head(config: TrainConfig, memory: int | None) -> Head:
  """What `TrainConfig.head` comes to on a device.

  Args:
    config: of the run.
    memory: bytes of the device, or None where it does not say.
  """
  if config.head != "auto":
    return config.head
  if memory is None:
    return "recompute"
  # float32 weights, two moments and a gradient.
  weights = jax.tree.leaves(abstract_model(config)[1])
  state = 16 * sum(math.prod(w.shape) for w in weights)
  rows = config.batch_size // config.accumulation * config.sequence_length
  kept = rows * config.model.vocab_size * jnp.dtype(config.model.dtype).itemsize
  return "chunked" if 4 * kept <= memory - state else "recompute"


def loss_and_gradient(
  loss_sum: Callable[[Params, Batch], jax.Array],
  params: Params,
  batch: Batch,
  accumulation: int,
) -> tuple[jax.Array, Params]:
  """Mean loss per weighted token of a batch, and its gradient.

  The batch is taken in `accumulation` equal parts, one after the other.  Each
  part's sum is divided by the weight of the *whole* batch, so parts with more
  padding do not count for more.

  Args:
    loss_sum: of (params, part), the sum of the weighted losses.
    params: to differentiate by.
    batch: arrays [B, ...], with "weights".
    accumulation: a divisor of B.
  """
  # A batch of padding alone has no loss, rather than 0 / 0.
  weight = jnp.maximum(batch["weights"].sum(), 1)
  value_and_grad = jax.value_and_grad(lambda p, b: loss_sum(p, b) / weight)
  if accumulation == 1:
    return value_and_grad(params, batch)
  parts = jax.tree.map(
    lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch
  )

  def add(total, part):
    return jax.tree.map(jnp.add, total, value_and_grad(params, part)), None

  zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
  return jax.lax.scan(add, zero, parts)[0]


def make_steps(
  config: TrainConfig, valid_vocab_size: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Compiled training and evaluation.

  Returns:
    A function of (params, optimizer state, batch), whose first two arguments
    are used up, to their successors and (loss, norm of the gradient); and a
    function of (params, batch) to the sums of losses and of weights.
  """
  graph, _ = abstract_model(config)
  head = choose_head(config, device_memory())
  optimizer = make_optimizer(config.optimizer, config.steps)

  def loss_sum(params: Params, batch: Batch, z_loss: float) -> jax.Array:
    model = nnx.merge(graph, nnx.State(params))
    return token_losses(model, batch, valid_vocab_size, z_loss, head).sum()

  def train_step(params, state, batch):
    loss, gradient = loss_and_gradient(
      lambda p, b: loss_sum(p, b, config.z_loss),
      params,
      batch,
      config.accumulation,
    )
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    return params, state, (loss, optax.tree.norm(gradient))

  def evaluate(params, batch):
    return loss_sum(params, batch, 0.0), batch["weights"].sum()

  return jax.jit(train_step, donate_argnums=(0, 1)), jax.jit(evaluate)


def device_memory() -> int | None:
  """Bytes that the first device has for arrays, None where it does not say."""
  return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def fresh_state(config: TrainConfig) -> State:
  """Parameters and optimizer state before the first step."""
  params = model_params(_new_model(config))
  return params, make_optimizer(config.optimizer, config.steps).init(params)


def abstract_model(config: TrainConfig) -> tuple[Any, Params]:
  """The model's graph, and its parameters as shapes."""
  abstract = nnx.eval_shape(lambda: _new_model(config))
  graph, state = nnx.split(abstract)
  return graph, nnx.to_pure_dict(state)


def _new_model(config: TrainConfig) -> Gemma:
  return Gemma(config.model, rngs=nnx.Rngs(config.seed), ops=KERNELS)
