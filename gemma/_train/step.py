"""One step of training: the loss, its gradient, the update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from .._model import Gemma, positions_of
from .._params import (
  Params,
  abstract_gemma,
  model_params,
  num_parameters,
  with_params,
)
from .._parts import compiler_options
from .._seeds import key_of
from .._table import on_vocabulary, with_copies
from ..ops import (
  KERNELS,
  LinearCrossEntropyConfig,
  context_order,
  in_context,
)
from .config import TrainConfig
from .fit import Head, fitting
from .guard import OptimizerState, chosen, fresh_guard, judge
from .layout import Layout
from .mesh import parse
from .optimizer import make_optimizer

DeviceBatch = dict[str, jax.Array]  # a `data.Batch` inside a compiled function
State = tuple[Params, OptimizerState]


def token_losses(
  model: Gemma,
  batch: DeviceBatch,
  valid_vocab_size: int,
  z_loss: float = 0.0,
  head: Head = "recompute",
) -> jax.Array:
  """The next-token losses of a batch, by the model's `linear_cross_entropy`.

  Args:
    model: to train or to evaluate.
    batch: arrays [B, T], named as the fields of `Rows`.
    valid_vocab_size: the tokenizer's; later rows of the embedding get no
      probability.
    z_loss: weight of the squared log-normaliser.
    head: what the loss keeps for its backward pass; see `TrainConfig.head`.

  Returns:
    [B, T] float32, in nats, times the batch's weights.
  """
  return _losses(model, batch, valid_vocab_size, head)(z_loss)


def _losses(
  model: Gemma, batch: DeviceBatch, valid_vocab_size: int, head: Head
) -> Callable[[float], jax.Array]:
  """What `token_losses` returns, by the weight of the z-loss.

  The model runs once.  Of two weights in one program, XLA computes the
  logits once, too: the same products of the same arrays.
  """
  with jax.named_scope("embed"):
    both = model.embedder.embed_with_copies(batch["tokens"])
  embedded, copies = both or (None, None)
  hidden = model.hidden_states(
    batch["tokens"],
    positions=batch.get("positions"),
    segment_ids=batch["segment_ids"],
    embedded=embedded,
  )

  arrays = hidden, batch["labels"], batch["weights"]
  table = model.embedder.embedding[...]
  run = (
    on_vocabulary(table, hidden.dtype, *arrays)
    if copies is None
    else functools.partial(with_copies, copies=copies, arrays=arrays)
  )

  def of(z_loss: float) -> jax.Array:
    def losses(
      table: jax.Array, *arrays: jax.Array, split: tuple[int, int] = (1, 1)
    ) -> jax.Array:
      hidden, labels, weights = arrays
      (words, width), (of_tokens, of_words) = table.shape, split
      rows = labels.size // of_tokens, width
      part = words // of_words, width
      config = LinearCrossEntropyConfig.for_problem(
        jax.ShapeDtypeStruct(rows, hidden.dtype),
        jax.ShapeDtypeStruct(part, table.dtype),
        head,
      )
      return model.ops.linear_cross_entropy(
        hidden,
        table,
        labels,
        weights=weights,
        z_loss=z_loss,
        valid_vocab_size=valid_vocab_size,
        config=config,
      )

    return run(losses)

  return of


def context_of(config: TrainConfig) -> int:
  """Over how many devices the run splits the tokens of a row."""
  mesh = parse(config.mesh)
  return 1 if mesh is None else mesh.context


def _in_context(batch: DeviceBatch, parts: int) -> DeviceBatch:
  """The batch with its tokens in the order of a context, and their positions.

  Labels are of the token at the same place, so they move along.
  """
  if parts == 1:
    return batch
  positions = positions_of(batch["tokens"], batch["segment_ids"])
  batch = {**batch, "positions": positions}
  order = context_order(positions.shape[1], parts)
  return {name: x[:, order] for name, x in batch.items()}


def choose_head(
  config: TrainConfig, memory: int | None, layout: Layout | None = None
) -> Head:
  """What `TrainConfig.head` means on a device: resolves "auto".

  Args:
    config: of the run.
    memory: bytes of the device, or None if it does not report them.
    layout: over several devices; None for one.
  """
  if config.head != "auto":
    return config.head
  if memory is None:
    return "recompute"
  # float32, 4 bytes each: weights, two moments and a gradient.
  state = 4 * 4 * num_parameters(abstract_model(config))
  rows = config.batch_size // config.accumulation * config.sequence_length
  kept = rows * config.model.vocab_size * jnp.dtype(config.model.dtype).itemsize
  if layout is not None:
    mesh = layout.config
    state //= mesh.fsdp * mesh.context * mesh.model
    kept //= mesh.rows * mesh.context * mesh.model
  return "chunked" if 4 * kept <= memory - state else "recompute"


def loss_and_gradient(
  loss_sum: Callable[[Params, DeviceBatch], Any],
  params: Params,
  batch: DeviceBatch,
  accumulation: int,
  *,
  has_aux: bool = False,
) -> tuple[Any, Params]:
  """Mean loss per weighted token of a batch, and its gradient.

  The batch is taken in `accumulation` equal parts, one after the other.  Each
  part's sum is divided by the weight of the *whole* batch: divided by its own,
  the few tokens of a part with much padding would count for more.

  Args:
    loss_sum: of (params, part), the sum of the weighted losses.
    params: to differentiate by.
    batch: arrays [B, ...], with "weights".
    accumulation: a divisor of B.
    has_aux: whether `loss_sum` returns a pair, as for `jax.value_and_grad`: the
      second is a pytree of other sums, of which there is no gradient, and whose
      means are returned in a pair with the loss.
  """
  # At least 1, so that a batch of nothing but padding has loss 0 and not 0 / 0.
  weight = jnp.maximum(batch["weights"].sum(), 1)

  def mean(params: Params, part: DeviceBatch) -> Any:
    return jax.tree.map(lambda x: x / weight, loss_sum(params, part))

  value_and_grad = jax.value_and_grad(mean, has_aux=has_aux)
  if accumulation == 1:
    return value_and_grad(params, batch)
  parts = jax.tree.map(
    lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch
  )

  def add(total, part):
    return jax.tree.map(jnp.add, total, value_and_grad(params, part)), None

  first = jax.tree.map(lambda x: x[0], parts)
  zero = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(value_and_grad, params, first),
  )
  return jax.lax.scan(add, zero, parts)[0]


def make_steps(
  config: TrainConfig, valid_vocab_size: int, layout: Layout | None = None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Compiled training and evaluation.

  Args:
    config: of the run, without "auto"; see `resolved`.
    valid_vocab_size: the tokenizer's.
    layout: over several devices; None for one.

  Returns:
    Two functions.  The first takes (params, optimizer state, batch) and returns
    (params, optimizer state, measured); its first two arguments are donated, so
    that they must not be used again.  `measured` has, by their names in the
    metrics, "loss", the cross-entropy alone, "gradient_norm", before clipping,
    "parameter_norm", after the step, "skipped" and "skipped_in_a_row", as
    `guard` counts them; with a z-loss also that, "z_loss", and the sum of both,
    "total_loss", whose gradient is taken.  The second takes (params, batch) and
    returns the sum of the losses, without z-loss, and the sum of the weights.
  """
  abstract = abstract_model(config)
  head: Any = config.head
  optimizer = make_optimizer(config.optimizer, config.steps)

  def losses(params: Params, batch: DeviceBatch) -> Any:
    model = with_params(abstract, params)
    batch = _in_context(batch, context_of(config))
    return _losses(model, batch, valid_vocab_size, head)

  def loss_sum(params: Params, batch: DeviceBatch) -> Any:
    of = losses(params, batch)
    if not config.z_loss:
      plain = of(0.0).sum()
      return plain, {"loss": plain}
    total, plain = of(config.z_loss), of(0.0)
    # The difference is taken token by token: that of the sums, two large
    # numbers, would have few digits.
    parts = {"loss": plain.sum(), "z_loss": (total - plain).sum()}
    return total.sum(), parts

  def train_step(params, state, batch):
    (total, measured), gradient = loss_and_gradient(
      loss_sum, params, batch, config.accumulation, has_aux=True
    )
    if config.z_loss:
      measured["total_loss"] = total
    norm = measured["gradient_norm"] = optax.tree.norm(gradient)
    taken, guard = judge(state.guard, total, norm, config.skip_spikes)
    updates, adamw = optimizer.update(gradient, state.adamw, params)
    new = optax.apply_updates(params, updates), adamw
    params, adamw = chosen(taken, new, (params, state.adamw))
    measured |= {
      "parameter_norm": optax.tree.norm(params),
      "skipped": guard.skipped,
      "skipped_in_a_row": guard.in_a_row,
    }
    return params, OptimizerState(adamw, guard), measured

  def evaluate(params, batch):
    return losses(params, batch)(0.0).sum(), batch["weights"].sum()

  device = jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
  options = None
  if device.platform == "tpu":
    options = layout.compiler_options if layout else compiler_options()
  if layout is None:
    jit = functools.partial(jax.jit, compiler_options=options)
    return jit(train_step, donate_argnums=(0, 1)), jit(evaluate)
  params, moments = layout.state(abstract_state(config))
  return (
    jax.jit(
      layout.splits(train_step),
      compiler_options=options,
      in_shardings=(params, moments, layout.batch),
      out_shardings=(params, moments, layout.everywhere),
      donate_argnums=(0, 1),
    ),
    jax.jit(
      layout.splits(evaluate),
      compiler_options=options,
      in_shardings=(params, layout.batch),
      out_shardings=layout.everywhere,
    ),
  )


def resolved(
  config: TrainConfig, memory: int | None, layout: Layout | None = None
) -> TrainConfig:
  """The config, with "auto" resolved for a device.

  Args:
    config: of the run.
    memory: bytes of the device, or None if it does not report them.
    layout: over several devices; None for one.

  Raises:
    UserError: if a step cannot fit.
  """
  shape = config.batch_size, config.sequence_length

  def compile_step(config: TrainConfig) -> Any:
    params, state = abstract_state(config)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32)
    names = "tokens", "labels", "segment_ids"
    batch = {**dict.fromkeys(names, ids), "weights": weights}
    steps = make_steps(config, config.model.vocab_size, layout)
    train_step: Any = steps[0]
    return train_step.lower(params, state, batch).compile()

  head = choose_head(config, memory, layout)
  over_devices = layout is not None
  return fitting(config, memory, head, compile_step, over_devices)


def device_memory() -> int | None:
  """Bytes a device has for arrays; None if it does not report them."""
  return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def fresh_state(config: TrainConfig) -> State:
  """Parameters and optimizer state before the first step."""
  model = Gemma(config.model, rngs=nnx.Rngs(key_of(config.seed)), ops=KERNELS)
  params = model_params(model)
  adamw = make_optimizer(config.optimizer, config.steps).init(params)
  return params, OptimizerState(adamw, fresh_guard())


def initial_state(config: TrainConfig, layout: Layout | None) -> State:
  """`fresh_state`, made where it is to lie."""
  make = functools.partial(fresh_state, config)
  if layout is None:
    return jax.jit(make)()
  return jax.jit(make, out_shardings=layout.state(abstract_state(config)))()


def abstract_state(config: TrainConfig, layout: Layout | None = None) -> Any:
  """The shapes of the state, and where it is to lie."""
  state = jax.eval_shape(functools.partial(fresh_state, config))
  if layout is None:
    return state
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    state,
    layout.state(state),
  )


def abstract_model(config: TrainConfig) -> Gemma:
  """The model that is trained, with shapes in place of its parameters."""
  return abstract_gemma(config.model, in_context(KERNELS, context_of(config)))
