"""`jax.nn.dot_product_attention`, by these kernels.

Read it when a model that calls JAX's, or flax's, is to call ours: nothing is
computed here but what the arguments mean.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._frame import switches
from .._frame.check import (
  Implementation,
  as_array,
  as_float_dtype,
  as_integers,
  as_number,
  as_scalar,
  as_switch,
  check_config,
  check_implementation,
  check_shape,
)
from .arguments import Drop, Seen, Weights, problem_of
from .door import as_bias, as_drop, as_mask, as_qkv, as_window
from .op import attend
from .spec import Segments, Window
from .tiles import FlashAttentionConfig

_OP = "dot_product_attention"

# What jax.nn has in place of a logit that is hidden, hence as the residual of a
# query that sees no key.
_HIDDEN = np.float32(-0.7 * float(np.finfo(np.float32).max))


@switches.plain
def dot_product_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  *,
  scale: float | None = None,
  is_causal: bool = False,
  query_seq_lengths: jax.Array | None = None,
  key_value_seq_lengths: jax.Array | None = None,
  local_window_size: Window = None,
  implementation: Implementation = None,
  return_residual: bool = False,
  config: FlashAttentionConfig | None = None,
  broadcast_dropout: bool = True,
  dropout_rng: Any = None,
  dropout_rate: float = 0.0,
  deterministic: bool | None = None,
  dtype: Any = None,
  precision: Any = None,
  module: Any = None,
  promote_dtype: Any = None,
  force_fp32_for_softmax: bool = False,
  einsum_dot_general: Any = None,
  qk_attn_weights_einsum: Any = None,
  attn_weights_value_einsum: Any = None,
) -> Any:
  """`jax.nn.dot_product_attention`, by the flash attention kernels.

  Its arguments and its results, so that it takes its place; and the
  `attention_fn` of `flax.nnx.MultiHeadAttention` and of flax.linen's.  A query
  that sees no key gives the mean of all values, as there.

  Args:
    query: [B, T, N, H], or [T, N, H] as are then key and value; float32,
      bfloat16 or float16.
    key: [B, S, K, H]; N is a multiple of K.
    value: [B, S, K, H].
    bias: added to the logits after the scale; broadcasts to [B, N, T, S].
      The kernels read it in full T and S; its gradient takes as much, or more
      if it is shared, see `flash_attention`.
    mask: booleans that broadcast to [B, N, T, S], True where a query sees a
      key.  Blocks that see nothing are skipped.  One of keys alone, [B, 1, 1,
      S], costs next to nothing.  Of flax, which has masks of numbers, what is
      not 0 is seen.
    scale: multiplies the logits; None is 1 / sqrt(H).
    is_causal: query i sees keys 0 to i.
    query_seq_lengths: [B] integers; later queries give 0.
    key_value_seq_lengths: [B] integers; later keys are not seen.
    local_window_size: (left, right), or one number for both, inclusive.
    implementation: "pallas", "xla" (plain jnp), or None for the kernel where
      the computation is lowered for TPU and plain jnp elsewhere.
    return_residual: also return the log of the sum of exponentials.
    config: tile sizes; None picks them from the shape.
    broadcast_dropout: of flax: whether batch and heads drop the same weights.
    dropout_rng: of flax: a key of `jax.random`, from which the seed is drawn.
    dropout_rate: of flax: the part of the weights that is dropped, in the
      kernels; what is kept is divided by 1 - dropout_rate.
    deterministic: of flax: True is without dropout.
    dtype: of flax: what query, key and value are cast to; None leaves them.
    precision: of flax.  Products of float32 are float32 and those of bfloat16
      exact, whatever it says.
    module: of flax, which would sow the weights: refused, as there are none.
    promote_dtype: of flax: casts (query, key, value) in the place of `dtype`.
    force_fp32_for_softmax: of flax; it always is float32.
    einsum_dot_general: of flax; another product is refused.
    qk_attn_weights_einsum: likewise.
    attn_weights_value_einsum: likewise.

  Returns:
    An array of query's shape; with `return_residual` also [B, T, N] (or [T, N])
    of key's dtype, which has no gradient.

  Raises:
    ValueError: on wrong shapes, dtypes or values, and on what it cannot do.
  """
  del precision, force_fp32_for_softmax
  check_implementation(_OP, implementation)
  check_config(_OP, config, FlashAttentionConfig)
  products = einsum_dot_general, qk_attn_weights_einsum
  _refuse(module, *products, attn_weights_value_einsum)
  drop = _drop(dropout_rate, dropout_rng, deterministic, broadcast_dropout)
  if promote_dtype is not None:
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
  q, k, v = as_qkv(_OP, *_with_batch(dtype, query, key, value))
  is_causal = as_switch(_OP, "is_causal", is_causal)
  lengths = _lengths(q, query_seq_lengths, key_value_seq_lengths)
  window = as_window(_OP, local_window_size)
  mask = _with_heads("mask", mask, deterministic is not None)
  mask = as_mask(_OP, mask, q, k)
  scale = None if scale is None else as_scalar(_OP, "scale", scale)
  bias = as_bias(_OP, _with_heads("bias", bias), q, k)
  problem, arrays = problem_of(
    *(q, k, v),
    Seen(is_causal, _segments(lengths, q, k), window, mask),
    Weights(scale, bias=bias, drop=drop),
    return_lse=as_switch(_OP, "return_residual", return_residual),
    gives_mean=True,
    implementation=implementation,
    config=config,
  )
  outs = attend(_OP, problem, arrays)
  out = _without_padding(outs.out, lengths[0]).reshape(jnp.shape(query))
  if not return_residual:
    return out
  residual = jnp.maximum(outs.lse, _HIDDEN).swapaxes(1, 2).astype(k.dtype)
  residual = residual.reshape(jnp.shape(query)[:-1])
  return out, jax.lax.stop_gradient(residual)


# --- the arguments ------------------------------------------------------------


def _refuse(*values: Any) -> None:
  names = (
    "module",
    "einsum_dot_general",
    "qk_attn_weights_einsum",
    "attn_weights_value_einsum",
  )
  for name, value in zip(names, values, strict=True):
    if value is not None:
      raise ValueError(
        f"{_OP}: {name} must be None, as the weights are never in memory, got "
        f"{value!r}"
      )


def _drop(rate: Any, rng: Any, deterministic: Any, is_shared: Any) -> Drop:
  """Dropout, if there is any."""
  if deterministic is not None:
    deterministic = as_switch(_OP, "deterministic", deterministic)
  if deterministic or not as_number(_OP, "dropout_rate", rate):
    return Drop()
  if rng is None:
    raise ValueError(
      f"{_OP}: dropout_rng must be a key with dropout_rate {rate}, got None"
    )
  seed = jax.random.bits(rng, (), jnp.uint32)
  is_shared = as_switch(_OP, "broadcast_dropout", is_shared)
  return as_drop(_OP, rate, seed, is_shared)


def _with_batch(dtype: Any, *arrays: Any) -> tuple[Any, Any, Any]:
  """q, k and v with all of their four dimensions."""
  dtype = as_float_dtype(_OP, "dtype", dtype)
  found = []
  for name, x in zip(("query", "key", "value"), arrays, strict=True):
    x = as_array(_OP, name, x)
    if x.ndim not in (3, 4):
      raise ValueError(
        f"{_OP}: {name} must be [B, length, heads, H] or [length, heads, H], "
        f"got shape {x.shape}"
      )
    x = x if dtype is None else x.astype(dtype)
    found.append(x if x.ndim == 4 else x[None])
  q, k, v = found
  return q, k, v


def _with_heads(name: str, scores: Any, are_numbers: bool = False) -> Any:
  """[..., T, S] with all of its four dimensions; booleans of numbers."""
  if scores is None:
    return None
  scores = as_array(_OP, name, scores)
  scores = scores != 0 if are_numbers else scores
  return scores.reshape(*[1] * (4 - scores.ndim), *scores.shape)


def _lengths(q: jax.Array, *given: Any) -> Any:
  """Of the queries' sequences and of the keys', or None."""
  found: list[jax.Array | None] = []
  names = "query_seq_lengths", "key_value_seq_lengths"
  for name, lengths in zip(names, given, strict=True):
    if lengths is not None:
      lengths = as_integers(_OP, name, lengths)
      check_shape(_OP, name, lengths, q.shape[:1], "[B]")
    found.append(lengths)
  return tuple(found)


def _segments(lengths: Any, q: jax.Array, k: jax.Array) -> Segments | None:
  """Of each sequence one segment, 1, as far as it goes."""
  of_q, of_k = lengths
  if of_q is None and of_k is None:
    return None

  def ids(lengths: Any, x: jax.Array) -> jax.Array:
    if lengths is None:
      return jnp.ones(x.shape[:2], jnp.int32)
    return (jnp.arange(x.shape[1]) < lengths[:, None]).astype(jnp.int32)

  return Segments(ids(of_q, q), ids(of_k, k))


def _without_padding(out: jax.Array, lengths: Any) -> jax.Array:
  """0 for the queries past the end."""
  if lengths is None:
    return out
  is_real = jnp.arange(out.shape[1]) < lengths[:, None]
  return jnp.where(is_real[..., None, None], out, 0)
