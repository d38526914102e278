"""Linear cross-entropy with soft targets, as in distillation: XLA's, in blocks.

Maths, for a row x with targets q over the vocabulary, temperature T:

    z_v  = (x . E_v + b_v, through the soft cap) / T
    loss = w * sum_v q_v (lse - z_v),      lse = log(sum_v exp(z_v))

where q is given, or is the softmax of a teacher's logits t, at the same T:

    sum_v q_v z_v = sum_v exp(t_v - max t) z_v / sum_v exp(t_v - max t)

There is no kernel of it.  A scan goes over blocks of the vocabulary and carries
five numbers per row, the online softmax of both; its backward pass computes the
logits of a block again.  So of [rows, V] there is one block at a time, and each
block of the table has its gradient whole; that of x is summed in float32.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._frame import switches, tpu
from .._frame.check import (
  as_floats,
  as_number,
  as_whole_number,
  check_positive,
  check_shape,
)
from .._frame.manual import partitioned
from .spec import LOWEST_LOGIT, capped

_OP = "linear_soft_cross_entropy"
# Logits of a block in float32, 128 MiB: enough to fill the matrix units.
_BLOCK_NUMBERS = 1 << 25
_MANY_ROWS = 8192


class Teacher(NamedTuple):
  """Whose softmax is the target of `linear_soft_cross_entropy`.

  Attributes:
    x: [..., D'] float32, bfloat16 or float16, its last layer's output for the
      same tokens; of any width.
    embedding: [V, D'], its table, over the same vocabulary.
    bias: [V], or None.
    logits_soft_cap: its own, or None.
  """

  x: Any
  embedding: Any
  bias: Any = None
  logits_soft_cap: Any = None


class _Head(NamedTuple):
  """A model's last layer, and what comes into it."""

  x: Any  # [R, D]; as given [..., D]
  table: Any  # [V, D]; of a scan's step [words, D]
  bias: Any  # [V] float32, or [words]; None for none


class _Online(NamedTuple):
  """Sums over the words so far, [R] float32 each."""

  top: Any  # the student's largest logit
  total: Any  # its exponentials, relative to that
  teacher_top: Any  # the teacher's; 0 where the targets are given
  weight: Any  # its exponentials, or the targets
  aim: Any  # these times the student's logits


@switches.plain
def linear_soft_cross_entropy(
  x: jax.Array,
  embedding: jax.Array,
  targets: jax.Array | Teacher,
  *,
  weights: jax.Array | None = None,
  bias: jax.Array | None = None,
  logits_soft_cap: float | None = None,
  temperature: float = 1.0,
  valid_vocab_size: int | None = None,
) -> jax.Array:
  """Cross-entropy of the softmax of x E^T with soft targets, per token.

  Less the targets' entropy, which has no gradient, it is their KL divergence
  from the model.  Hinton et al., arXiv 1503.02531 §2, which multiplies it by
  temperature squared; here that is left to the caller.

  It runs by XLA, in blocks of the vocabulary: [tokens, V] never exists, but for
  targets that are given so.  A V that no number of blocks divides is padded, a
  copy of the table and of given targets.

  Args:
    x: [..., D] float32, bfloat16 or float16, the dtype of the products.
    embedding: [V, D] float32 or bfloat16; computed with in x's dtype.
    targets: [..., V] probabilities, or a `Teacher`, whose logits are computed
      block by block too.  Neither has a gradient.
    weights: [...] floats that multiply each token's loss; None is all ones.  A
      token of weight 0 is ignored: its x and targets may be anything finite.
    bias: [V] floats added to the logits, before the cap; None for none.
    logits_soft_cap: cap in cap * tanh(logits / cap).
    temperature: divides the logits, the teacher's too.
    valid_vocab_size: rows of the table from here on are padding; None is V.

  Returns:
    [...] float32 losses, in nats.

  Raises:
    ValueError: on wrong shapes, dtypes or values.
  """
  temperature = as_number(_OP, "temperature", temperature)
  check_positive(_OP, temperature=temperature)
  cap = _cap("logits_soft_cap", logits_soft_cap)
  student = _head("", x, embedding, bias)
  lead, vocab = student.x.shape[:-1], student.table.shape[0]
  if weights is not None:
    (weights,) = as_floats(_OP, weights=weights)
    check_shape(_OP, "weights", weights, lead, "x without its last dimension")
  valid = vocab
  if valid_vocab_size is not None:
    valid = as_whole_number(_OP, "valid_vocab_size", valid_vocab_size)
    if not 0 < valid <= vocab:
      raise ValueError(
        f"{_OP}: valid_vocab_size must be from 1 to V = {vocab}, got {valid}"
      )
  numbers = _Numbers(cap, None, temperature, valid)
  if isinstance(targets, Teacher):
    name = "targets."
    teacher = _head(name, targets.x, targets.embedding, targets.bias)
    width = teacher.x.shape[-1]
    check_shape(
      _OP, f"{name}x", teacher.x, (*lead, width), "x's, but for its width"
    )
    check_shape(_OP, f"{name}embedding", teacher.table, (vocab, width), "V")
    own_cap = _cap(f"{name}logits_soft_cap", targets.logits_soft_cap)
    numbers = numbers._replace(teacher_cap=own_cap)
    aim: Any = teacher
  else:
    (aim,) = as_floats(_OP, targets=targets)
    check_shape(_OP, "targets", aim, (*lead, vocab), "[..., V]")
  losses = functools.partial(_losses_of_tokens, p=numbers)
  spec = jax.typeof(student.x).sharding.spec[:-1]
  return partitioned(losses, spec)(student, aim, weights)


class _Numbers(NamedTuple):
  """What is static."""

  cap: float | None
  teacher_cap: float | None
  temperature: float
  valid: int


def _cap(name: str, cap: Any) -> float | None:
  cap = None if cap is None else as_number(_OP, name, cap)
  check_positive(_OP, **{name: cap})
  return cap


def _head(prefix: str, x: Any, embedding: Any, bias: Any) -> _Head:
  """A model's arrays, checked; x [..., D]."""
  x, table = as_floats(
    _OP, **{f"{prefix}x": x, f"{prefix}embedding": embedding}
  )
  if x.ndim == 0 or table.ndim != 2 or table.shape[1] != x.shape[-1]:
    raise ValueError(
      f"{_OP}: {prefix}embedding must be [V, D] with D the last dimension of "
      f"{prefix}x, got {table.shape} and {x.shape}"
    )
  if bias is not None:
    (bias,) = as_floats(_OP, **{f"{prefix}bias": bias})
    check_shape(_OP, f"{prefix}bias", bias, table.shape[:1], "V")
    bias = bias.astype(jnp.float32)
  return _Head(x, table, bias)


# --- the scan -----------------------------------------------------------------


def _losses_of_tokens(
  student: _Head, aim: Any, weights: Any, p: _Numbers
) -> jax.Array:
  """[...], with a teacher or targets [..., V] to aim at."""
  lead = student.x.shape[:-1]

  def rows(array: jax.Array) -> jax.Array:
    return array.reshape(-1, array.shape[-1])

  aim = jax.lax.stop_gradient(aim)
  aim = aim._replace(x=rows(aim.x)) if isinstance(aim, _Head) else rows(aim)
  x = rows(student.x)
  if weights is None:
    return _losses(student._replace(x=x), aim, p).reshape(lead)
  counted = weights != 0
  x = jnp.where(counted.reshape(-1, 1), x, 0)
  loss = _losses(student._replace(x=x), aim, p).reshape(lead)
  return jnp.where(counted, loss * weights.astype(jnp.float32), 0.0)


def _losses(student: _Head, aim: Any, p: _Numbers) -> jax.Array:
  """[R] of rows, with a teacher or targets [R, V] to aim at."""
  (n, _), vocab, dtype = (
    student.x.shape,
    student.table.shape[0],
    student.x.dtype,
  )
  words, count = _blocks(vocab, n)
  more = words * count - vocab
  # In float32, the gradient is summed in it over the blocks.
  x = student.x.astype(jnp.float32)
  is_taught = isinstance(aim, _Head)
  teacher = aim if is_taught else None
  if not is_taught and more:
    aim = jnp.pad(aim, ((0, 0), (0, more)))

  def blocks(array: Any) -> Any:
    """[V, ...] in blocks of the vocabulary."""
    if array is None:
      return None
    padding = ((0, more), *((0, 0),) * (array.ndim - 1))
    array = jnp.pad(array, padding) if more else array
    return array.reshape(count, words, *array.shape[1:])

  def step(sums: _Online, block: Any) -> tuple[_Online, None]:
    index, own, taught = block
    own = own._replace(x=x.astype(dtype))
    first = index * words
    inside = first + jnp.arange(words) < p.valid
    z = _logits(own, p.cap, p.temperature)
    if teacher is None:
      q = jax.lax.dynamic_slice_in_dim(aim, first, words, axis=1)
      return _with_targets(sums, z, q.astype(jnp.float32), inside), None
    taught = taught._replace(x=teacher.x)
    t = _logits(taught, p.teacher_cap, p.temperature)
    return _with_teacher(sums, z, t, inside), None

  def in_blocks(head: Any) -> Any:
    if head is None:
      return None
    return _Head(None, blocks(head.table), blocks(head.bias))

  lowest, zero = jnp.full(n, LOWEST_LOGIT), jnp.zeros(n, jnp.float32)
  start = _Online(lowest, zero, lowest if is_taught else zero, zero, zero)
  tables = jnp.arange(count), in_blocks(student), in_blocks(teacher)
  sums, _ = jax.lax.scan(jax.checkpoint(step), start, tables)
  lse = sums.top + jnp.log(sums.total)
  if teacher is None:
    return sums.weight * lse - sums.aim
  return lse - sums.aim / sums.weight


def _blocks(vocab: int, rows: int) -> tuple[int, int]:
  """Words of a block, and how many there are: such as divide V, if any do."""
  # `jax.export` may leave open how many rows there are.
  rows = rows if isinstance(rows, int) else _MANY_ROWS
  words = max(1024, _BLOCK_NUMBERS // max(rows, 1) // tpu.LANES * tpu.LANES)
  least = -(-vocab // words)
  # Whole tiles of lanes before others, and fewer blocks before more.
  for unit in (tpu.LANES, 1):
    for count in range(least, 2 * least):
      if vocab % (unit * count) == 0:
        return vocab // count, count
  return -(-vocab // least), least


def _logits(head: _Head, cap: float | None, temperature: float) -> jax.Array:
  """[R, words] float32, at the temperature."""
  table = head.table.astype(head.x.dtype)
  z = jnp.einsum("rd,vd->rv", head.x, table, preferred_element_type=jnp.float32)
  z = z if head.bias is None else z + head.bias
  return capped(z, cap) / temperature


def _with_student(sums: _Online, z: jax.Array, inside: jax.Array) -> _Online:
  """The student's own sums with those of a block."""
  z = jnp.where(inside, z, -jnp.inf)
  top = jnp.maximum(sums.top, jax.lax.stop_gradient(jnp.max(z, axis=1)))
  part = jnp.sum(jnp.exp(z - top[:, None]), axis=1)
  return sums._replace(
    top=top, total=sums.total * jnp.exp(sums.top - top) + part
  )


def _with_targets(
  sums: _Online, z: jax.Array, q: jax.Array, inside: jax.Array
) -> _Online:
  q = jnp.where(inside, q, 0.0)
  return _with_student(sums, z, inside)._replace(
    weight=sums.weight + jnp.sum(q, axis=1),
    aim=sums.aim + jnp.sum(q * z, axis=1),
  )


def _with_teacher(
  sums: _Online, z: jax.Array, t: jax.Array, inside: jax.Array
) -> _Online:
  t = jnp.where(inside, t, -jnp.inf)
  top = jnp.maximum(sums.teacher_top, jnp.max(t, axis=1))
  exps, again = jnp.exp(t - top[:, None]), jnp.exp(sums.teacher_top - top)
  return _with_student(sums, z, inside)._replace(
    teacher_top=top,
    weight=sums.weight * again + jnp.sum(exps, axis=1),
    aim=sums.aim * again + jnp.sum(exps * z, axis=1),
  )
