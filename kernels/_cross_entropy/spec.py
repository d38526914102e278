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
  embedding: Any  # [V, D]
  labels: Any  # [...] integers
  weights: Any  # [...], or None
  source: Any = None  # [V, D] float32, what the embedding was rounded from


def table_of(a: Any) -> Any:
  """Of a record: what of embedding and source has the gradient.

  The values are the embedding's.
  """
  return a.embedding if a.source is None else a.source


class Outs(NamedTuple):
  """What it gives."""

  loss: Any  # [...] float32


@dataclasses.dataclass(frozen=True)
class Problem:
  """Everything that is not an array.

  Attributes:
    logits_soft_cap: as in the public function, and so are the others.
    z_loss: likewise.
    valid_vocab_size: likewise, but never None.
    implementation: likewise.
    config: likewise; never None for the kernels.
    vocab_is_split: whether a device has a part of the table only.  How many of
      its rows are vocabulary then depends on the device.
  """

  logits_soft_cap: float | None
  z_loss: float
  valid_vocab_size: int
  implementation: Implementation
  config: LinearCrossEntropyConfig | None
  vocab_is_split: bool = False

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
  logits_soft_cap: float | None = None,
  z_loss: float = 0.0,
  valid_vocab_size: int | None = None,
) -> jax.Array:
  """The maths of the package's docstring in plain jnp.  The specification."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  table = embedding[:valid_vocab_size].astype(x.dtype)
  if weights is not None:
    # An ignored row may hold anything: it must not reach a gradient as 0 * NaN.
    counted = weights != 0
    x = jnp.where(counted[..., None], x, 0)
    labels = jnp.where(counted, labels, 0)
  logits = jnp.einsum("...d,vd->...v", x, table, preferred_element_type=wide)
  if logits_soft_cap is not None:
    logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
  lse = jax.nn.logsumexp(logits, axis=-1)
  # Negative labels would count from the end; "fill" makes them NaN instead.
  outside = jnp.where(labels < 0, table.shape[0], labels)
  target = jnp.take_along_axis(
    logits, outside[..., None], axis=-1, mode="fill", fill_value=jnp.nan
  )
  loss = lse - target[..., 0] + z_loss * lse * lse
  return loss if weights is None else loss * weights.astype(wide)


def reference(p: Problem, a: Arrays) -> Outs:
  """The reference, of records."""
  return Outs(
    linear_cross_entropy_reference(
      a.x,
      table_of(a),
      a.labels,
      weights=a.weights,
      logits_soft_cap=p.logits_soft_cap,
      z_loss=p.z_loss,
      valid_vocab_size=p.valid_vocab_size,
    )
  )


# --- what the kernels compute -------------------------------------------------


class RowArrays(NamedTuple):
  """What the kernels are given: one device's rows and its part of the table.

  A label that is not a row of that part is -1.
  """

  x: Any  # [R, D], R padded to whole tiles
  embedding: Any  # [V, D]
  labels: Any  # [R] int32
  valid_vocab: Any  # [1] int32: rows of the table from here on are padding
  source: Any = None  # as in `Arrays`

  def gradients(self, dx: Any, de: Any) -> RowArrays:
    """The record of them, `de` that of the table."""
    grads = RowArrays(dx, de, None, None)
    if self.source is None:
      return grads
    return grads._replace(embedding=None, source=de)


class Statistics(NamedTuple):
  """What the kernels give: three numbers for each row.

  The maximum is kept apart from the sum, whose logarithm would lose digits
  beside a large one.  It cancels in the loss and has no gradient.
  """

  top: Any  # [R] float32, the largest logit
  total: Any  # [R] float32, sum_v exp(z_v - top)
  target: Any  # [R] float32, the label's logit; 0 if the label is -1


class RowNumbers(NamedTuple):
  """What the backward pass knows of a row: statistics and their cotangents."""

  top: Any
  dtotal: Any
  dtarget: Any
  target: Any


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
  table = table_of(a)[:end].astype(a.x.dtype)
  valid = jnp.arange(table.shape[0]) < a.valid_vocab
  if p.vocab_is_split:
    table = jnp.where(valid[:, None], table, 0)
  logits = capped(
    jnp.einsum("rd,vd->rv", a.x, table, preferred_element_type=jnp.float32),
    p.logits_soft_cap,
  )
  if p.vocab_is_split:
    logits = jnp.where(valid, logits, -jnp.inf)
  target = jnp.take_along_axis(logits, a.labels[:, None], axis=-1, mode="clip")
  top = jnp.max(logits, axis=-1, initial=LOWEST_LOGIT)
  top = jax.lax.stop_gradient(top)
  total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
  return Statistics(top, total, jnp.where(a.labels < 0, 0.0, target[:, 0]))
