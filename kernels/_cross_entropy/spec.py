"""What linear cross-entropy is: its arrays, what is static, the reference.

The op is told in two records of arrays.  A caller gives `Arrays` and gets
losses.  The kernels compute less: the `Statistics` of every row, the largest
logit, the sum of the exponentials relative to it, and the logit of the label.
From those to the loss it is plain jnp on a few numbers per row (`op.py`):
weights, z-loss and the sum over the parts of a vocabulary that is split over
devices need no kernel, and JAX differentiates them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._frame import switches
from .._frame.check import Implementation
from .tiles import LinearCrossEntropyConfig

# --- the public function ------------------------------------------------------


class Arrays(NamedTuple):
  """What the public function is given."""

  x: Any  # [..., D]
  embedding: Any  # [V, D]; [D, V] if it is transposed
  labels: Any  # [...] integers
  weights: Any  # [...], or None
  source: Any = None  # float32, what the embedding was rounded from
  bias: Any = None  # [V], or None


def table_of(a: Any) -> Any:
  """Of a record: what of embedding and source has the gradient.

  The values are the embedding's.
  """
  return a.embedding if a.source is None else a.source


class Outs(NamedTuple):
  """What it gives."""

  loss: Any  # [...] float32
  log_probability: Any = None  # [...] float32, None if not asked for
  best: Any = None  # [...] int32, likewise


class TokenPredictions(NamedTuple):
  """What `linear_cross_entropy(..., return_predictions=True)` says of tokens.

  Both are 0 where a token has weight 0.

  Attributes:
    log_probability: [...] float32, of the label: without smoothing, z-loss and
      weights.  It can be differentiated.
    best: [...] int32, the word of the largest logit, the first of equal ones.
  """

  log_probability: jax.Array
  best: jax.Array


@dataclasses.dataclass(frozen=True)
class Problem:
  """Everything that is not an array.

  Attributes:
    logits_soft_cap: as in the public function, and so are the others.
    z_loss: likewise.
    valid_vocab_size: likewise, but never None.
    implementation: likewise.
    config: likewise; never None for the kernels.
    label_smoothing: likewise.
    transposed: likewise, and so is the next.
    predicts: whether predictions are returned.
    vocab_is_split: whether a device has a part of the table only.  How many of
      its rows are vocabulary then depends on the device.
  """

  logits_soft_cap: float | None
  z_loss: float
  valid_vocab_size: Any
  implementation: Implementation
  config: LinearCrossEntropyConfig | None
  vocab_is_split: bool = False
  label_smoothing: float = 0.0
  transposed: bool = False
  predicts: bool = False

  def vocab(self, table: Any) -> int:
    """How many rows a table has, or columns."""
    return table.shape[1 if self.transposed else 0]

  @property
  def keeps_exponentials(self) -> bool:
    """Whether the forward pass stores them for the backward pass."""
    return self.config is not None and self.config.mode == "chunked"


@switches.plain
def linear_cross_entropy_reference(
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
) -> Any:
  """The maths of the package's docstring in plain jnp.  The specification."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  table = embedding.T if transposed else embedding
  table = table[:valid_vocab_size].astype(x.dtype)
  counted: Any = True if weights is None else weights != 0
  if weights is not None:
    # An ignored row may hold anything: it must not reach a gradient as 0 * NaN.
    x = jnp.where(counted[..., None], x, 0)
    labels = jnp.where(counted, labels, 0)
  logits = jnp.einsum("...d,vd->...v", x, table, preferred_element_type=wide)
  if bias is not None:
    logits += bias[:valid_vocab_size].astype(wide)
  if logits_soft_cap is not None:
    logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
  lse = jax.nn.logsumexp(logits, axis=-1)
  # Negative labels would count from the end; "fill" makes them NaN instead.
  outside = jnp.where(labels < 0, table.shape[0], labels)
  target = jnp.take_along_axis(
    logits, outside[..., None], axis=-1, mode="fill", fill_value=jnp.nan
  )[..., 0]
  aim = target = jnp.where(counted, target, 0)
  if label_smoothing:
    mean = jnp.mean(logits, axis=-1)
    aim = (1 - label_smoothing) * target + label_smoothing * mean
  loss = lse - aim + z_loss * lse * lse
  loss = loss if weights is None else loss * weights.astype(wide)
  if not return_predictions:
    return loss
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return loss, TokenPredictions(
    jnp.where(counted, target - lse, 0), jnp.where(counted, best, 0)
  )


def reference(p: Problem, a: Arrays) -> Outs:
  """The reference, of records."""
  outs = linear_cross_entropy_reference(
    a.x,
    table_of(a),
    a.labels,
    weights=a.weights,
    bias=a.bias,
    transposed=p.transposed,
    logits_soft_cap=p.logits_soft_cap,
    z_loss=p.z_loss,
    label_smoothing=p.label_smoothing,
    valid_vocab_size=p.valid_vocab_size,
    return_predictions=p.predicts,
  )
  return Outs(outs[0], *outs[1]) if p.predicts else Outs(outs)


# --- what the kernels compute -------------------------------------------------


class RowArrays(NamedTuple):
  """What the kernels are given: one device's rows and its part of the table.

  A label that is not a row of that part is -1.
  """

  x: Any  # [R, D], R padded to whole tiles
  embedding: Any  # [V, D]; [D, V] if it is transposed
  labels: Any  # [R] int32
  valid_vocab: Any  # [1] int32: rows of the table from here on are padding
  source: Any = None  # as in `Arrays`
  bias: Any = None  # [V], or None

  def gradients(self, dx: Any, de: Any, db: Any) -> RowArrays:
    """The record of them, `de` that of the table, `db` of the bias."""
    if db is not None:
      db = db[0].astype(self.bias.dtype)
    grads = RowArrays(dx, de, None, None, bias=db)
    if self.source is None:
      return grads
    return grads._replace(embedding=None, source=de)


class Statistics(NamedTuple):
  """What the kernels give: three numbers for each row, or more.

  The maximum is kept apart from the sum, whose logarithm would lose digits
  beside a large one.  It cancels in the loss and has no gradient.
  """

  top: Any  # [R] float32, the largest logit
  total: Any  # [R] float32, sum_v exp(z_v - top)
  target: Any  # [R] float32, the label's logit; 0 if the label is -1
  logit_sum: Any = None  # [R] float32, of all words; None without smoothing
  best: Any = None  # [R] float32, the word of `top`; None if not asked for


# Above every word; words are float32, which holds them up to 2**24.
NO_WORD = float(1 << 24)


class RowNumbers(NamedTuple):
  """What the backward pass knows of a row: statistics and their cotangents."""

  top: Any
  dtotal: Any
  dtarget: Any
  target: Any
  dlogit_sum: Any = None  # None without smoothing


class Exponentials(NamedTuple):
  """What the forward pass stores in mode "chunked", vocabulary block by block.

  Block j has its exponentials relative to the maxima that were known when it
  passed, one for every eighth word of the vocabulary.
  """

  exps: Any  # [V, R] of x's dtype, V rounded up to whole blocks
  shift: Any  # [blocks, SUBLANES, R] float32, those maxima


class Kept(NamedTuple):
  """The record of it that the frame names for remat policies."""

  kept: Exponentials


# Below every logit, and finite: its difference with itself is 0, not NaN.
LOWEST_LOGIT = float(jnp.finfo(jnp.float32).min)


def capped(logits: jax.Array, soft_cap: float | None) -> jax.Array:
  """The logits of the softmax."""
  if soft_cap is None:
    return logits
  return soft_cap * jnp.tanh(logits / soft_cap)


def cap_slope(capped: jax.Array, soft_cap: float | None) -> jax.Array | None:
  """Derivative of `capped` where it gives `capped`; None stands for 1."""
  return None if soft_cap is None else 1.0 - (capped / soft_cap) ** 2


def through_cap(
  dz: jax.Array, capped: jax.Array, soft_cap: float | None
) -> jax.Array:
  """The gradient before the soft cap, from that of the capped logits."""
  slope = cap_slope(capped, soft_cap)
  return dz if slope is None else dz * slope


def statistics_reference(p: Problem, a: RowArrays) -> Statistics:
  """The kernels' results in plain jnp."""
  # Where the vocabulary is split, its end in this part is known at run time.
  end = None if p.vocab_is_split else p.valid_vocab_size
  table = table_of(a).T if p.transposed else table_of(a)
  table = table[:end].astype(a.x.dtype)
  valid = jnp.arange(table.shape[0]) < a.valid_vocab
  if p.vocab_is_split:
    table = jnp.where(valid[:, None], table, 0)
  product = jnp.einsum(
    "rd,vd->rv", a.x, table, preferred_element_type=jnp.float32
  )
  if a.bias is not None:
    product += a.bias[:end].astype(product.dtype)
  known = logits = capped(product, p.logits_soft_cap)
  if p.vocab_is_split:
    logits = jnp.where(valid, logits, -jnp.inf)
    known = jnp.where(valid, known, 0)
  # By comparison: the gradient of an indexed logit is a scatter, another pass.
  is_label = jnp.arange(logits.shape[1]) == a.labels[:, None]
  target = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
  top = jnp.max(logits, axis=-1, initial=LOWEST_LOGIT)
  top = jax.lax.stop_gradient(top)
  total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
  best = None
  if p.predicts:
    best = jnp.argmax(jax.lax.stop_gradient(logits), -1).astype(total.dtype)
  logit_sum = jnp.sum(known, axis=-1) if p.label_smoothing else None
  return Statistics(top, total, target, logit_sum, best)
