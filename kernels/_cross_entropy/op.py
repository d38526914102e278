"""Linear cross-entropy: from the statistics of rows to the loss, in public.

On each device, with its tokens and its part of the vocabulary:

  1. rows        tokens of weight 0 made harmless; labels counted from the first
                 row of the device's part of the table, -1 if they are not in it
  2. statistics  the kernels' op, differentiable: `forward.py`, `backward.py`
  3. combine     over the devices that share the vocabulary
  4. loss        lse - target + z_loss lse^2, times the weight
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._frame import switches
from .._frame.check import (
  Implementation,
  as_switch,
  check_config,
  check_implementation,
  check_seen_products,
)
from .._frame.kernel import kernel_op
from .._frame.manual import vary_alike
from .._frame.op import Case, Cost, Integers, Op, nbytes
from .._frame.sharding import Axes, Split, is_split, leading_dims
from .backward import backward
from .door import as_problem
from .forward import exponentials_types, forward
from .labels import labels_checked
from .spec import (
  NO_WORD,
  Arrays,
  Exponentials,
  Kept,
  Outs,
  Problem,
  RowArrays,
  Statistics,
  TokenPredictions,
  linear_cross_entropy_reference,
  reference,
  statistics_reference,
)
from .tiles import LinearCrossEntropyConfig, padded_rows

# --- one device's losses ------------------------------------------------------

_RowOp = Callable[[Problem, RowArrays], Statistics]


def _losses(
  row_op: _RowOp, p: Problem, a: Arrays, axes: Mapping[str, Axes]
) -> Outs:
  """The losses of one device's tokens, from its part of the table."""
  n, v = a.labels.size, p.vocab(a.embedding)
  x, labels = a.x.reshape(n, -1), a.labels.reshape(n)
  # Its gradient is summed over the parts of the vocabulary: here, before rows
  # are added to it that would be summed too.
  x, _ = vary_alike((x, a.embedding))
  label_exists = (labels >= 0) & (labels < p.valid_vocab_size)
  if a.weights is not None:
    # An ignored row may hold anything: it must not reach a gradient as 0 * NaN.
    counted = a.weights.reshape(n) != 0
    x = jnp.where(counted[:, None], x, 0)
    labels = jnp.where(counted, labels, -1)
    label_exists |= ~counted
  vocab_axes = axes.get("V", ())
  first = jax.lax.axis_index(vocab_axes) * v if vocab_axes else 0
  valid_vocab = jnp.clip(p.valid_vocab_size - first, 0, v)
  valid_vocab = valid_vocab.astype(jnp.int32).reshape(1)
  in_this_part = (labels >= first) & (labels < first + valid_vocab)
  labels = jnp.where(in_this_part, labels - first, -1)
  config = p.config or LinearCrossEntropyConfig.for_problem(
    x,
    a.embedding,
    transposed=p.transposed,
    more=a.bias is not None or p.predicts or p.label_smoothing > 0,
  )
  p = dataclasses.replace(p, config=config, vocab_is_split=bool(vocab_axes))
  more = padded_rows(config, n) - n
  if more:
    x = jnp.pad(x, ((0, more), (0, 0)))
    labels = jnp.pad(labels, (0, more), constant_values=-1)
  rows = RowArrays(x, a.embedding, labels, valid_vocab, a.source, a.bias)
  statistics = jax.tree.map(lambda row: row[:n], row_op(p, rows))
  statistics = _combined(statistics, first, vocab_axes)
  return _outs(statistics, label_exists, p, a)


def _combined(s: Statistics, first: Any, vocab_axes: Axes) -> Statistics:
  """Statistics over the vocabulary from those over each device's part."""
  top = jax.lax.stop_gradient(s.top)
  if not vocab_axes:
    return s._replace(top=top)
  highest = jax.lax.pmax(top, vocab_axes)
  total = jax.lax.psum(s.total * jnp.exp(top - highest), vocab_axes)
  target = jax.lax.psum(s.target, vocab_axes)
  logit_sum, best = s.logit_sum, s.best
  if logit_sum is not None:
    logit_sum = jax.lax.psum(logit_sum, vocab_axes)
  if best is not None:
    best = jax.lax.stop_gradient(best) + first
    best = jnp.where(top == highest, best, NO_WORD)
    best = jax.lax.pmin(best, vocab_axes)
  return Statistics(highest, total, target, logit_sum, best)


def _outs(
  s: Statistics, label_exists: jax.Array, p: Problem, a: Arrays
) -> Outs:
  """Losses of the labels' shape, and what else is asked for."""
  lse = s.top + jnp.log(s.total)
  target = jnp.where(label_exists, s.target, jnp.nan)
  loss = lse - _smoothed(s, target, p) + _z_loss(lse, p.z_loss)
  loss = loss.reshape(a.labels.shape)
  outs = Outs(loss if a.weights is None else _weighted(loss, a.weights))
  if s.best is None:
    return outs
  log_probability = (target - lse).reshape(loss.shape)
  best = jax.lax.stop_gradient(s.best).astype(jnp.int32).reshape(loss.shape)
  if a.weights is not None:  # of an ignored row nothing is known
    log_probability = jnp.where(a.weights != 0, log_probability, 0.0)
    best = jnp.where(a.weights != 0, best, 0)
  return outs._replace(log_probability=log_probability, best=best)


def _smoothed(s: Statistics, target: jax.Array, p: Problem) -> jax.Array:
  """What the loss raises: the label's logit, and a part of the mean's."""
  if s.logit_sum is None:
    return target
  part = p.label_smoothing
  return (1 - part) * target + part / p.valid_vocab_size * s.logit_sum


def _z_loss(lse: jax.Array, z_loss: float) -> jax.Array:
  return z_loss * lse * lse


def _weighted(loss: jax.Array, weights: jax.Array) -> jax.Array:
  return loss * weights.astype(jnp.float32)


# --- the op -------------------------------------------------------------------


def _plain_forward(
  p: Problem, a: RowArrays, *, keep: bool
) -> tuple[Statistics, Kept | None]:
  """What stands for the kernel off TPU.

  Nothing there reads what is kept, and XLA drops it: zeros will do.
  """
  statistics = statistics_reference(p, a)
  if not (keep and p.keeps_exponentials):
    return statistics, None
  types = exponentials_types(p, a)
  zeros = Exponentials(*(jnp.zeros(t.shape, t.dtype) for t in types))
  _, zeros = vary_alike((a.x, zeros))
  return statistics, Kept(zeros)


def _split(p: Problem, a: Arrays) -> Split:
  # A table may be stored split over D too, but a logit needs a whole row.
  tokens = leading_dims(a.labels.ndim)
  table = "dV" if p.transposed else "Vd"
  letters = Arrays(tokens + "D", table, tokens, tokens, table, "V")
  pairs = zip(a, letters, strict=True)
  predicted = tokens if p.predicts else None
  return Split(
    Arrays(*(None if x is None else own for x, own in pairs)),
    Outs(tokens, predicted, predicted),
    over="BTV",
    gathers="Dd",
    alone="V",
  )


_linear_cross_entropy = kernel_op(
  "linear_cross_entropy",
  reference=reference,
  forward=forward,
  backward=backward,
  saves=(
    *("x", "embedding", "bias", "labels", "valid_vocab", "source"),
    *("top", "target"),
  ),
  names=("top", "total", "target", "kept"),
  keeps=True,
  split=_split,
  vmap=("loop", "loop"),
  around=_losses,
  plain_forward=_plain_forward,
  constants=lambda a: () if a.source is None else ("embedding",),
)

# --- public -------------------------------------------------------------------


def _rounded(p: Problem, a: Arrays) -> Arrays:
  """On a mesh, the table in x's dtype, so that half as much is gathered.

  The kernels round it so in any case; its gradient stays float32.
  """
  halves = (a.embedding.dtype, a.x.dtype) == (jnp.float32, jnp.bfloat16)
  if not halves or not is_split("linear_cross_entropy", a, _split(p, a)):
    return a
  table = jax.lax.stop_gradient(a.embedding.astype(a.x.dtype))
  return a._replace(embedding=table, source=a.embedding)


@switches.plain
def linear_cross_entropy(
  x: jax.Array,
  embedding: jax.Array,
  labels: jax.Array,
  *,
  weights: jax.Array | None = None,
  bias: jax.Array | None = None,
  transposed: bool = False,
  logits_soft_cap: float | None = None,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  valid_vocab_size: int | None = None,
  return_predictions: bool = False,
  implementation: Implementation = None,
  config: LinearCrossEntropyConfig | None = None,
) -> Any:
  """Cross-entropy of the softmax of x E^T, per token.

  Its negation, without z-loss, smoothing and weights, is the log-probability of
  each label.  z-loss: PaLM, arXiv 2204.02311 §5.  Label smoothing: Szegedy et
  al., arXiv 1512.00567 §7.

  A gradient that is not asked for is not computed.  On a mesh, tokens and the
  vocabulary (rows of the table, V) may be split, over different axes.  Under
  `vmap` examples take turns, and a table that they share gets a gradient from
  each before these are added up: give x more leading dimensions instead.

  Args:
    x: [..., D] float32, bfloat16 or float16.  Products of bfloat16 take one
      pass of the matrix units, those of the others the six that make them exact
      to float32.
    embedding: [V, D] float32 or bfloat16, a tied table as it is stored;
      computed with in x's dtype.  A head [D, V] with `transposed`.
    labels: [...] integers from 0 to valid_vocab_size - 1.  Another label on a
      token with a weight gives NaN, and an error under
      `checkify.checkify(f, errors=checkify.user_checks)`.
    weights: [...] floats that multiply each token's loss; None is all ones.  A
      token of weight 0 is ignored: its x and label may be anything.
    bias: [V] floats added to the logits in float32, before the cap; None for
      none.
    transposed: whether the embedding is [D, V], an untied head as `x @ head`
      has it.  It is read where it lies, and its gradient comes in that form.
    logits_soft_cap: cap in cap * tanh(logits / cap).
    z_loss: coefficient of the squared log-normaliser, which keeps it near 0.
    label_smoothing: the part of the probability that the target gives to all
      words alike, from 0 to below 1: the target's logit becomes
      (1 - s) * the label's + s * the mean of all.  With a soft cap it needs a
      config of mode "recompute".
    valid_vocab_size: rows of the table from here on are padding: no
      probability, no gradient.  None is V.
    return_predictions: whether `TokenPredictions` are returned too, from the
      same pass: each label's log-probability and the most probable word.
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: tile sizes, and what is kept between the passes; None picks the
      tiles from the shape and keeps next to nothing.  To keep more:
      `LinearCrossEntropyConfig.for_problem(x, embedding, mode="chunked")`.

  Returns:
    [...] float32 losses, in nats; with `return_predictions` a pair of these and
    `TokenPredictions`.  The table's gradient has its dtype; the sum
    is float32 in any case.

  Raises:
    ValueError: on wrong shapes, dtypes or values, or a mesh axis that splits
      both tokens and vocabulary.
  """
  op = "linear_cross_entropy"
  check_implementation(op, implementation)
  check_config(op, config, LinearCrossEntropyConfig)
  check_seen_products(op, implementation, "embedding")
  problem = Problem(
    logits_soft_cap,
    z_loss,
    valid_vocab_size,
    implementation,
    config,
    label_smoothing=label_smoothing,
    transposed=as_switch(op, "transposed", transposed),
    predicts=as_switch(op, "return_predictions", return_predictions),
  )
  given = Arrays(x, embedding, labels, weights, bias=bias)
  problem, arrays = as_problem(op, problem, given)
  outs = _linear_cross_entropy(problem, _rounded(problem, arrays))
  vocab = problem.valid_vocab_size
  loss = labels_checked(outs.loss, arrays.labels, arrays.weights, vocab)
  if not return_predictions:
    return loss
  return loss, TokenPredictions(outs.log_probability, outs.best)


# --- registration -------------------------------------------------------------


def _cost(x, embedding, labels, **_) -> tuple[Cost, Cost]:
  rows = x.size // x.shape[-1]
  one = 2 * rows * embedding.shape[0] * embedding.shape[1]
  moved = nbytes(x, embedding, labels)
  return Cost(one, moved), Cost(2 * one, 2 * moved)


def _case(name, rows, d, v, dtype=jnp.bfloat16, *, weighted=False, **kwargs):
  labels = Integers(
    rows,
    lambda rng: rng.integers(
      0, kwargs.get("valid_vocab_size", v), rows, np.int32
    ),
  )
  if weighted:
    kwargs["weights"] = jax.ShapeDtypeStruct(rows, jnp.float32)
  x = jax.ShapeDtypeStruct((*rows, d), dtype)
  return Case(name, (x, jax.ShapeDtypeStruct((v, d), dtype), labels), kwargs)


LINEAR_CROSS_ENTROPY = Op(
  name="linear_cross_entropy",
  function=linear_cross_entropy,
  reference=linear_cross_entropy_reference,
  cost=_cost,
  through_softmax=True,
  tests=(
    _case("one_tile", (64,), 128, 256, jnp.float32),
    _case("ragged", (3, 11), 100, 333, jnp.float32, valid_vocab_size=300),
    _case("weighted", (40,), 128, 256, jnp.float32, weighted=True, z_loss=1e-2),
    _case("soft_cap", (40,), 128, 256, jnp.float32, logits_soft_cap=5.0),
    _case("bf16", (64,), 128, 512, jnp.bfloat16),
  ),
  benches=(
    _case("gemma_2b_2k", (2048,), 2048, 256128),
    _case("gemma_2b_8k", (8192,), 2048, 256128),
    _case("gemma_7b_4k", (4096,), 3072, 256128),
  ),
  modes={
    "chunked": lambda x, embedding, *_, **__: (
      LinearCrossEntropyConfig.for_problem(x, embedding, mode="chunked")
    )
  },
)
