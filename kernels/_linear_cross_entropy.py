"""Linear projection onto a vocabulary and cross-entropy, without the logits.

Maths, for a row x in R^D with label y and weight w, over the table E [V, D]:

    z_v  = x . E_v,   then  cap * tanh(z_v / cap)  with a soft cap
    lse  = log(sum_v exp(z_v))                     v < valid_vocab_size
    loss = w * (lse - z_y + z_loss * lse^2)

    dz_v = w * dloss * ((1 + 2 z_loss lse) exp(z_v - lse) - [v = y])
    dx   = sum_v dz_v E_v,   dE_v = sum over rows of dz_v x

Traffic: a pass reads x and E once, the backward pass writes both gradients
once; nothing of size R V exists.  Four matrix products of 2 R V D flops, one of
them the logits again in the backward pass ("recompute"), or three, if the
exponentials stay in HBM between the passes ("chunked", R V numbers of x's
dtype).  On v5e, R 2048, D 2048 and V 256128 in bfloat16 take 65,568,768 cycles
for four and 49,176,576 for three, and their traffic 6 million, which hides
behind them from a few hundred rows on: bound by the MXU.

Tiling: x stays in VMEM, and so does dx, in float32; the table streams by in
tiles of `words`.  A tile meets all rows, `chunk` by `chunk`; its gradient is
complete then, and leaves.  Logits are [words, rows], so that sums over words
need no cross-lane traffic.

                  rows (all in VMEM, in chunks)
                +------+------+------+------+
      table  E  |  z = E x^T  ->  softmax   |   forward: max, sum and label's
      tile  --> |      |      |      |      |   logit of each row, online
                +------+------+------+------+   backward: dz, dx^T += E^T dz,
      next tile |                           |   then dE = dz x

More rows than fit take turns in blocks, each of which adds to dE in HBM.  The
passes are in `_linear_cross_entropy_fwd.py` and `_linear_cross_entropy_bwd.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import sequential_vmap
from jax.custom_derivatives import SymbolicZero
from jax.experimental import checkify
from jax.experimental import pallas as pl

from ._frame.check import check_integers
from ._linear_cross_entropy_bwd import backward, backward_bytes
from ._linear_cross_entropy_fwd import (
  LANES,
  LOWEST,
  Tiles,
  capped,
  forward,
  forward_bytes,
  kept_types,
  round_up,
)
from ._op import (
  Case,
  Cost,
  Implementation,
  Integers,
  Op,
  check_float,
  check_implementation,
  check_shape,
  dispatch,
  nbytes,
)
from ._sharding import leading_dims, per_device, split_axes
from ._tuned import power_of_two, tuned_config

# --- specification ------------------------------------------------------------


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
  """The maths of the module docstring in plain jnp.  The specification."""
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


# --- configuration ------------------------------------------------------------

Mode = Literal["recompute", "chunked"]
# A v5e has 128 MiB; the compiler keeps a little of it.
_VMEM_BYTES = 126 << 20
# What a v5e does in a cycle of 1.5 GHz.
_PRODUCTS_PER_CYCLE = 4 * 128 * 128
_BYTES_PER_CYCLE = 819 / 1.5
# Widths of table tiles to choose from; wider ones only compile more slowly.
_WORDS = (768, 512, 384, 256, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCrossEntropyConfig:
  """Tile sizes and what is kept between the passes: speed, never results.

  Attributes:
    mode: "recompute" keeps three numbers per row between the passes, and
      computes the logits twice.  "chunked" keeps the exponentials, [V, R] of
      x's dtype in HBM, and saves a matrix product of four.
    forward_words: rows of the table per grid step of the forward pass; a
      multiple of 128.
    backward_words: the same for the backward pass, and for both passes where
      the forward pass keeps the softmax.
    rows: rows of x that stay in VMEM, at most; a multiple of `chunk`.  With
      more rows than this, blocks of them take turns.
    chunk: rows of x per matrix product; a multiple of 128.
  """

  mode: Mode = "recompute"
  forward_words: int = 768
  backward_words: int = 512
  rows: int = 8192
  chunk: int = 256

  def __post_init__(self):
    if self.mode not in ("recompute", "chunked"):
      raise ValueError(
        "LinearCrossEntropyConfig: mode must be 'recompute' or 'chunked', "
        f"got {self.mode!r}"
      )
    for name in ("forward_words", "backward_words", "rows", "chunk"):
      value = getattr(self, name)
      unit = self.chunk if name == "rows" else LANES
      if value <= 0 or value % unit:
        raise ValueError(
          f"LinearCrossEntropyConfig: {name} must be a positive multiple of "
          f"{unit}, got {value}"
        )

  @classmethod
  def for_problem(
    cls, x: Any, embedding: Any, mode: Mode = "recompute"
  ) -> LinearCrossEntropyConfig:
    """The tuned config for x [R, D] and embedding [V, D], or one that fits."""
    (n, d), v = x.shape, embedding.shape[0]
    tuned = tuned_config(
      "linear_cross_entropy",
      rows=power_of_two(n),
      width=d,
      vocab=v,
      mode=mode,
      x=x.dtype.name,
      table=embedding.dtype.name,
    )
    if tuned is not None:
      return cls(**tuned)
    return cls.fitting(n, d, v, x.dtype, embedding.dtype, mode)

  @classmethod
  def fitting(
    cls,
    n: int,
    d: int,
    v: int,
    x_dtype: jnp.dtype,
    table_dtype: jnp.dtype,
    mode: Mode = "recompute",
  ) -> LinearCrossEntropyConfig:
    """The config for x [n, d] and a table [v, d] by a model of VMEM.

    With more blocks of rows, tiles of the table may be wider, and traffic is
    more: each reads the table, and reads and writes its gradient.

    Raises:
      ValueError: if not even the smallest tiles fit.
    """
    # A product in float32 is six on the matrix units, and as long a program.
    exact = x_dtype == jnp.float32
    widths = [words for words in _WORDS if words <= 256 or not exact]
    # Half chunks where whole ones would mostly be padding.
    chunk = min(
      (128,) if exact else (256, 128),
      key=lambda c: (1 + 8 / c) * round_up(n, _body_rows(c, n)),
    )
    body = _body_rows(chunk, n)

    def rows(blocks: int) -> int:
      return round_up(pl.cdiv(n, blocks), body)

    def fits(words: int, blocks: int, need: Callable[..., int], *more) -> bool:
      keep = mode == "chunked"
      tiles = Tiles(
        words=words,
        rows=rows(blocks),
        chunk=chunk,
        overlap=_overlap(need is forward_bytes, keep),
        keep=keep,
        masked=True,
        soft_cap=None,
        vmem_bytes=_VMEM_BYTES,
      )

      return need(tiles, d, x_dtype, table_dtype, *more) <= _VMEM_BYTES

    def cycles(words: int, blocks: int) -> float:
      # Of the backward pass, but for D.  A tile costs its words, and about ten
      # words' time to start and stop; each block moves the table and, to add
      # to it, its float32 gradient.
      products = 3 * rows(blocks) * pl.cdiv(v, words) * (words + 10)
      moved = v * (table_dtype.itemsize + (8 if blocks > 1 else 4))
      return blocks * max(
        products / _PRODUCTS_PER_CYCLE, moved / _BYTES_PER_CYCLE
      )

    def memory(words: int, blocks: int) -> int:
      # One block adds nothing up in HBM, for which a table in fewer bits would
      # need a float32 gradient as well: worth the few percent that a tile of
      # middling width costs.  Tiles that hang over the table's end would too.
      if blocks == 1:
        return int(words < min(v, 384, widths[0]))
      return 1 + (v % words != 0)

    backward = [
      (memory(words, blocks), cycles(words, blocks), -words, blocks)
      for blocks in range(1, pl.cdiv(n, body) + 1)
      for words in widths
      if fits(words, blocks, backward_bytes, blocks)
      and fits(widths[-1], blocks, forward_bytes)
    ]
    if not backward:
      raise ValueError(
        f"linear_cross_entropy: wanted rows of which {body} fit VMEM beside a "
        f"tile of the table, got D = {d}"
      )
    *_, words, blocks = min(backward)
    return cls(
      mode=mode,
      forward_words=next(w for w in widths if fits(w, blocks, forward_bytes)),
      backward_words=-words,
      rows=rows(blocks),
      chunk=chunk,
    )


def _overlap(is_forward: bool, keep: bool) -> int:
  """Chunks per loop body: two where it is long, having two products each."""
  return 4 if is_forward or keep else 2


def _body_rows(chunk: int, n: int) -> int:
  """Rows of a loop body: two chunks, unless there is but one."""
  return chunk if n <= chunk else 2 * chunk


@dataclasses.dataclass(frozen=True)
class _Static:
  """Everything that is not an array, in one hashable piece."""

  soft_cap: float | None
  limit: int | None
  implementation: Implementation
  config: LinearCrossEntropyConfig

  @property
  def keep(self) -> bool:
    return self.config.mode == "chunked"

  def tiles(
    self, is_forward: bool, keep: bool, x: jax.Array, embedding: jax.Array
  ) -> Tiles:
    """For x [R, D], padded as `_padded` does, and embedding [V, D]."""
    n, v = x.shape[0], embedding.shape[0]
    # What is kept comes in the backward pass's tiles.
    words = self.config.backward_words
    if is_forward and not keep:
      words = self.config.forward_words
    words = min(words, round_up(v, LANES))
    return Tiles(
      words=words,
      rows=n // pl.cdiv(n, self.config.rows),
      chunk=min(self.config.chunk, n),
      overlap=_overlap(is_forward, keep),
      keep=keep,
      masked=self.limit != v or v % words != 0,
      soft_cap=self.soft_cap,
      vmem_bytes=_VMEM_BYTES,
    )


# --- differentiation ----------------------------------------------------------
# The kernels' op is, of every row, the largest logit, the sum of exponentials
# relative to it, and the logit of the label.  The loss is plain jnp on top:
# z-loss, weights and the sum over vocabulary shards are a few numbers per row,
# and their gradients are nobody's work.  The largest logit cancels, hence has
# no gradient; apart from the sum it costs no digits where logits are large.


def _statistics_reference(
  static: _Static,
  x: jax.Array,
  embedding: jax.Array,
  labels: jax.Array,
  limit: jax.Array,
) -> tuple[jax.Array, ...]:
  table = embedding[: static.limit].astype(x.dtype)
  inside = (jnp.arange(table.shape[0]) < limit)[:, None]
  if static.limit is None:
    table = jnp.where(inside, table, 0)
  logits = capped(
    jnp.einsum("rd,vd->rv", x, table, preferred_element_type=jnp.float32),
    static.soft_cap,
  )
  if static.limit is None:
    logits = jnp.where(inside[:, 0], logits, -jnp.inf)
  target = jnp.take_along_axis(logits, labels[:, None], axis=-1, mode="clip")
  top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, initial=LOWEST))
  total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
  return top, total, jnp.where(labels < 0, 0.0, target[:, 0])


def _forward(static, keep, x, embedding, labels, limit):
  tiles = static.tiles(True, keep, x, embedding)

  def reference(*args):
    # Nothing off TPU reads what is kept, and XLA drops it.
    types = kept_types(tiles.words, x, embedding) if keep else ()
    kept = tuple(jnp.zeros(t.shape, t.dtype) for t in types)
    return *_statistics_reference(static, *args), *kept

  kernel = sequential_vmap(functools.partial(forward, tiles))
  args = x, embedding, labels, limit
  return dispatch(static.implementation, kernel, reference, *args)


def _statistics_primal(static, *args):
  return _forward(static, False, *args)


def _statistics_fwd(static, x, embedding, labels, limit):
  args = x.value, embedding.value, labels.value, limit.value
  statistics = tuple(
    checkpoint_name(result, f"linear_cross_entropy_{name}")
    for name, result in zip(
      ("top", "total", "target", "kept", "kept"),
      _forward(static, static.keep, *args),
      strict=False,
    )
  )
  # What the pytree holds in place of arrays is known when it is traced.
  wanted = tuple(() if a.perturbed else None for a in (x, embedding))
  return statistics[:3], (*args, statistics, wanted)


def _statistics_bwd(static, saved, cotangents):
  *saved, wanted = saved
  wanted = wanted[0] is not None, wanted[1] is not None
  x, embedding, labels, limit, _ = saved
  cotangents = tuple(
    jnp.zeros(x.shape[:1], jnp.float32) if isinstance(c, SymbolicZero) else c
    for c in cotangents
  )

  def reference(*args):
    _, vjp = jax.vjp(
      lambda x, e: _statistics_reference(static, x, e, labels, limit),
      x,
      embedding,
    )
    gradients = zip(vjp(args[-1]), wanted, strict=True)
    return tuple(gradient if w else None for gradient, w in gradients)

  tiles = static.tiles(False, static.keep, x, embedding)
  kernel = sequential_vmap(functools.partial(backward, tiles, wanted))
  args = *saved, cotangents
  gradients = dispatch(static.implementation, kernel, reference, *args)
  return *gradients, None, None


_statistics = jax.custom_vjp(_statistics_primal, nondiff_argnums=(0,))
_statistics.defvjp(_statistics_fwd, _statistics_bwd, symbolic_zeros=True)


def _padded(config, x, labels):
  """x and labels with rows appended until the tiles divide them."""
  n = x.shape[0]
  blocks = pl.cdiv(n, config.rows)
  chunk = min(config.chunk, round_up(n, LANES))
  body = min(_body_rows(chunk, n), config.rows)
  more = blocks * round_up(pl.cdiv(n, blocks), body) - n
  if more:
    x = jnp.pad(x, ((0, more), (0, 0)))
    labels = jnp.pad(labels, (0, more), constant_values=-1)
  return x, labels


def _all_words(top, total, target, axes):
  """Statistics over the vocabulary from those over each device's part."""
  highest = jax.lax.pmax(jax.lax.stop_gradient(top), axes)
  total = jax.lax.psum(total * jnp.exp(top - highest), axes)
  return highest, total, jax.lax.psum(target, axes)


def _losses(
  x: jax.Array,
  embedding: jax.Array,
  labels: jax.Array,
  *weights: jax.Array,
  soft_cap: float | None,
  z_loss: float,
  vocab: int,
  vocab_axes: tuple[str, ...],
  implementation: Implementation,
  config: LinearCrossEntropyConfig | None,
) -> jax.Array:
  """The losses of one device's tokens, from its part of the table."""
  shape, n, v = labels.shape, labels.size, embedding.shape[0]
  x, labels = x.reshape(n, -1), labels.reshape(n).astype(jnp.int32)
  known = (labels >= 0) & (labels < vocab)
  if weights:
    # An ignored row may hold anything: it must not reach a gradient as 0 * NaN.
    counted = weights[0].reshape(n) != 0
    x = jnp.where(counted[:, None], x, 0)
    labels = jnp.where(counted, labels, -1)
    known |= ~counted
  first = jax.lax.axis_index(vocab_axes) * v if vocab_axes else 0
  limit = jnp.clip(vocab - first, 0, v).astype(jnp.int32).reshape(1)
  here = (labels >= first) & (labels < first + limit)
  labels = jnp.where(here, labels - first, -1)
  config = config or LinearCrossEntropyConfig.for_problem(x, embedding)
  static = _Static(
    soft_cap, None if vocab_axes else vocab, implementation, config
  )
  x, labels = _padded(config, x, labels)
  statistics = _statistics(static, x, embedding, labels, limit)
  top, total, target = (row[:n] for row in statistics)
  top = jax.lax.stop_gradient(top)
  if vocab_axes:
    top, total, target = _all_words(top, total, target, vocab_axes)
  lse = top + jnp.log(total)
  loss = lse - jnp.where(known, target, jnp.nan) + z_loss * lse * lse
  loss = loss.reshape(shape)
  return loss * weights[0].astype(jnp.float32) if weights else loss


# --- public -------------------------------------------------------------------


def _check_labels(labels, weights, vocab: int) -> None:
  """An error for `checkify` to find; nothing without it."""
  known = (labels >= 0) & (labels < vocab)
  if weights is not None:
    known |= weights == 0
  checkify.debug_check(
    jnp.all(known),
    "linear_cross_entropy: labels must be from 0 to {last}, got {found}",
    last=jnp.int32(vocab - 1),
    found=jnp.max(jnp.where(known, jnp.iinfo(labels.dtype).min, labels)),
  )


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

  A gradient that is not asked for is not computed.  On a mesh, tokens and words
  (rows of the table, V) may be split, over different axes.  Under `vmap`
  examples take turns, and a table that they share gets a gradient from each
  before these are added up: give x more leading dimensions instead.

  Args:
    x: [..., D] float32 or bfloat16.
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
      both tokens and words.
  """
  op = "linear_cross_entropy"
  check_implementation(op, implementation)
  if x.ndim == 0:
    raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
  check_float(op, x=x, embedding=embedding)
  if embedding.ndim != 2 or embedding.shape[1] != x.shape[-1]:
    raise ValueError(
      f"{op}: embedding must be [V, D] with D = {x.shape[-1]}, the last "
      f"dimension of x, got {embedding.shape}"
    )
  check_shape(
    op, "labels", labels, x.shape[:-1], "x without its last dimension"
  )
  check_integers(op, "labels", labels)
  if weights is not None:
    check_shape(op, "weights", weights, labels.shape, "the shape of labels")
    check_float(op, weights=weights)
  vocab = embedding.shape[0]
  if valid_vocab_size is not None and not 0 < valid_vocab_size <= vocab:
    raise ValueError(
      f"{op}: valid_vocab_size must be from 1 to V = {vocab}, "
      f"got {valid_vocab_size}"
    )
  if logits_soft_cap is not None and not logits_soft_cap > 0:
    raise ValueError(
      f"{op}: logits_soft_cap must be positive or None, got {logits_soft_cap}"
    )
  _check_labels(labels, weights, valid_vocab_size or vocab)
  if implementation == "xla" or x.size == 0:
    return linear_cross_entropy_reference(
      x,
      embedding,
      labels,
      weights=weights,
      logits_soft_cap=logits_soft_cap,
      z_loss=z_loss,
      valid_vocab_size=valid_vocab_size,
    )
  tokens = leading_dims(labels.ndim)
  args, dims = [x, embedding, labels], [(*tokens, "D"), ("V", "D"), tokens]
  if weights is not None:
    args.append(weights)
    dims.append(tokens)
  _, axes = split_axes(op, args, dims)
  vocab_axes = axes.get("V", ())
  for letter in tokens:
    if shared := set(vocab_axes) & set(axes.get(letter, ())):
      raise ValueError(
        f"{op}: wanted different mesh axes for tokens and vocabulary, got "
        f"{letter} and V both split over {sorted(shared)}; use "
        f"jax.sharding.reshard"
      )
  losses = functools.partial(
    _losses,
    soft_cap=logits_soft_cap,
    z_loss=z_loss,
    vocab=valid_vocab_size or vocab,
    vocab_axes=vocab_axes,
    implementation=implementation,
    config=config,
  )
  return per_device(op, losses, args, dims, tokens, splits="BTV")


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


OP = Op(
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
