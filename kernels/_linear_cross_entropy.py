"""Linear projection onto a vocabulary and cross-entropy, without the logits.

Maths, for a row x in R^D with label y and weight w, over the table E [V, D]:

    z_v  = x . E_v,   then  cap * tanh(z_v / cap)  with a soft cap
    lse  = log(sum_v exp(z_v))                     v < valid_vocab_size
    loss = w * (lse - z_y + z_loss * lse^2)

    dz_v = w * dloss * ((1 + 2 z_loss lse) exp(z_v - lse) - [v = y])
    dx   = sum_v dz_v E_v,   dE_v = sum over rows of dz_v x

Traffic: x, E and both gradients once; 3 matmuls of 2 R V D flops where the
logits are kept, 4 where the backward recomputes them.  At 2048 rows or more
both are bound by the MXU.

Tiling: none yet; there is no Pallas kernel for this op.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ._op import (
  Case,
  Cost,
  Implementation,
  Integers,
  Op,
  check_float,
  check_implementation,
  check_shape,
  nbytes,
)
from ._rope import check_integers

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


# --- public -------------------------------------------------------------------


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
  config: None = None,
) -> jax.Array:
  """Cross-entropy of the softmax of x E^T, per token.

  Its negation, without z-loss and weights, is the log-probability of each
  label.  z-loss: PaLM, arXiv 2204.02311 §5.

  Args:
    x: [..., D] float32 or bfloat16.
    embedding: [V, D] float32 or bfloat16, a tied table as it is stored;
      computed with in x's dtype.
    labels: [...] integers from 0 to valid_vocab_size - 1.  Another label on a
      token with a weight gives NaN.
    weights: [...] floats that multiply each token's loss; None is all ones.  A
      token of weight 0 is ignored: its x and label may be anything.
    logits_soft_cap: cap in cap * tanh(logits / cap).
    z_loss: coefficient of the squared log-normaliser, which keeps it near 0.
    valid_vocab_size: rows of the table from here on are padding: no
      probability, no gradient.  None is V.
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: reserved for the kernel's tile sizes.

  Returns:
    [...] float32 losses, in nats.

  Raises:
    ValueError: on wrong shapes, dtypes or values.
    NotImplementedError: for implementation="pallas".
  """
  op = "linear_cross_entropy"
  check_implementation(op, implementation, pallas=OP.pallas)
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
  return linear_cross_entropy_reference(
    x,
    embedding,
    labels,
    weights=weights,
    logits_soft_cap=logits_soft_cap,
    z_loss=z_loss,
    valid_vocab_size=valid_vocab_size,
  )


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
  ),
  pallas=False,
)
