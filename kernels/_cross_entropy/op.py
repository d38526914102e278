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
  as_floats,
  as_integers,
  as_number,
  as_whole_number,
  check_config,
  check_implementation,
  check_positive,
  check_seen_products,
  check_shape,
)
from .._frame.kernel import kernel_op
from .._frame.manual import vary_alike
from .._frame.op import Case, Cost, Integers, Op, nbytes
from .._frame.sharding import Axes, Split, is_split, leading_dims
from .backward import backward
from .forward import exponentials_types, forward
from .labels import labels_checked
from .spec import (
  Arrays,
  Exponentials,
  Kept,
  Outs,
  Problem,
  RowArrays,
  Statistics,
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
  n, v = a.labels.size, a.embedding.shape[0]
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
  config = p.config or LinearCrossEntropyConfig.for_problem(x, a.embedding)
  p = dataclasses.replace(p, config=config, vocab_is_split=bool(vocab_axes))
  more = padded_rows(config, n) - n
  if more:
    x = jnp.pad(x, ((0, more), (0, 0)))
    labels = jnp.pad(labels, (0, more), constant_values=-1)
  statistics = row_op(
    p, RowArrays(x, a.embedding, labels, valid_vocab, a.source)
  )
  statistics = Statistics(*(row[:n] for row in statistics))
  statistics = _combined(statistics, vocab_axes)
  loss = _loss(statistics, label_exists, p.z_loss).reshape(a.labels.shape)
  return Outs(loss if a.weights is None else _weighted(loss, a.weights))


def _combined(s: Statistics, vocab_axes: Axes) -> Statistics:
  """Statistics over the vocabulary from those over each device's part."""
  top = jax.lax.stop_gradient(s.top)
  if not vocab_axes:
    return s._replace(top=top)
  highest = jax.lax.pmax(top, vocab_axes)
  total = jax.lax.psum(s.total * jnp.exp(top - highest), vocab_axes)
  return Statistics(highest, total, jax.lax.psum(s.target, vocab_axes))


def _loss(s: Statistics, label_exists: jax.Array, z_loss: float) -> jax.Array:
  lse = s.top + jnp.log(s.total)
  target = jnp.where(label_exists, s.target, jnp.nan)
  return lse - target + _z_loss(lse, z_loss)


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
  del p
  tokens = leading_dims(a.labels.ndim)
  weights = None if a.weights is None else tokens
  return Split(
    Arrays(
      tokens + "D",
      "Vd",
      tokens,
      weights,
      a.source if a.source is None else "Vd",
    ),
    Outs(tokens),
    over="BTV",
    gathers="Dd",
    alone="V",
  )


_linear_cross_entropy = kernel_op(
  "linear_cross_entropy",
  reference=reference,
  forward=forward,
  backward=backward,
  saves=("x", "embedding", "labels", "valid_vocab", "source", "top", "target"),
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


def _checked(
  x: Any,
  embedding: Any,
  labels: Any,
  weights: Any,
  valid_vocab_size: Any,
) -> tuple[Arrays, int]:
  """The arrays, and how many rows of the table are vocabulary."""
  op = "linear_cross_entropy"
  x, embedding = as_floats(op, x=x, embedding=embedding)
  if x.ndim == 0:
    raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
  if embedding.ndim != 2 or embedding.shape[1] != x.shape[-1]:
    raise ValueError(
      f"{op}: embedding must be [V, D] with D = {x.shape[-1]}, the last "
      f"dimension of x, got {embedding.shape}"
    )
  labels = as_integers(op, "labels", labels)
  shape = x.shape[:-1]
  check_shape(op, "labels", labels, shape, "x without its last dimension")
  if weights is not None:
    (weights,) = as_floats(op, weights=weights)
    check_shape(op, "weights", weights, shape, "the shape of labels")
  vocab = embedding.shape[0]
  if valid_vocab_size is None:
    return Arrays(x, embedding, labels, weights), vocab
  valid = as_whole_number(op, "valid_vocab_size", valid_vocab_size)
  if not 0 < valid <= vocab:
    raise ValueError(
      f"{op}: valid_vocab_size must be from 1 to V = {vocab}, got {valid}"
    )
  return Arrays(x, embedding, labels, weights), valid


@switches.plain
def linear_cross_entropy(
  x: jax.Array,
  embedding: jax.Array,
  labels: jax.Array,
  *,
  weights: jax.Array | None = None,
  logits_soft_cap: float | None = None,
  z_loss: float = 0.0,
  valid_vocab_size: int | None = None,
  implementation: Implementation = None,
  config: LinearCrossEntropyConfig | None = None,
) -> jax.Array:
  """Cross-entropy of the softmax of x E^T, per token.

  Its negation, without z-loss and weights, is the log-probability of each
  label.  z-loss: PaLM, arXiv 2204.02311 §5.

  A gradient that is not asked for is not computed.  On a mesh, tokens and the
  vocabulary (rows of the table, V) may be split, over different axes.  Under
  `vmap` examples take turns, and a table that they share gets a gradient from
  each before these are added up: give x more leading dimensions instead.

  Args:
    x: [..., D] float32, bfloat16 or float16.  Products of bfloat16 take one
      pass of the matrix units, those of the others the six that make them exact
      to float32.
    embedding: [V, D] float32 or bfloat16, a tied table as it is stored;
      computed with in x's dtype.
    labels: [...] integers from 0 to valid_vocab_size - 1.  Another label on a
      token with a weight gives NaN, and an error under
      `checkify.checkify(f, errors=checkify.user_checks)`.
    weights: [...] floats that multiply each token's loss; None is all ones.  A
      token of weight 0 is ignored: its x and label may be anything.
    logits_soft_cap: cap in cap * tanh(logits / cap).
    z_loss: coefficient of the squared log-normaliser, which keeps it near 0.
    valid_vocab_size: rows of the table from here on are padding: no
      probability, no gradient.  None is V.
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: tile sizes, and what is kept between the passes; None picks the
      tiles from the shape and keeps next to nothing.  To keep more:
      `LinearCrossEntropyConfig.for_problem(x, embedding, mode="chunked")`.

  Returns:
    [...] float32 losses, in nats.  The table's gradient has its dtype; the sum
    is float32 in any case.

  Raises:
    ValueError: on wrong shapes, dtypes or values, or a mesh axis that splits
      both tokens and vocabulary.
  """
  op, cap = "linear_cross_entropy", logits_soft_cap
  check_implementation(op, implementation)
  check_config(op, config, LinearCrossEntropyConfig)
  check_seen_products(op, implementation, "embedding")
  arrays, vocab = _checked(x, embedding, labels, weights, valid_vocab_size)
  cap = None if cap is None else as_number(op, "logits_soft_cap", cap)
  check_positive(op, logits_soft_cap=cap)
  z_loss = as_number(op, "z_loss", z_loss)
  problem = Problem(cap, z_loss, vocab, implementation, config)
  loss = _linear_cross_entropy(problem, _rounded(problem, arrays)).loss
  return labels_checked(loss, arrays.labels, arrays.weights, vocab)


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
