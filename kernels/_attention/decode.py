"""Decode attention: the newest queries of each row against a dense KV cache.

Maths: as `flash_attention`, where row b holds lengths[b] valid keys, the last T
of which belong to the T queries.  Query t stands at position

    i = lengths[b] - T + t

and sees the keys j <= i, from i - left on with a window (left, right).

Traffic: the valid part of the cache is read once, for all query heads of a kv
head together; at T = 1 that is 2 N / K flops per byte: bound by HBM.

Tiling: none yet; there is no Pallas kernel for this op.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .._frame import switches
from .._frame.check import (
  Implementation,
  as_array,
  as_integers,
  as_number,
  as_scalar,
  check_config,
  check_implementation,
  check_positive,
  check_shape,
)
from .._frame.op import Case, Cost, Integers, Op, nbytes
from .door import as_qkv, as_window
from .spec import Window, masked_attention, visible_pairs

# --- specification ------------------------------------------------------------


@switches.plain
def decode_attention_reference(
  q: jax.Array,
  k_cache: jax.Array,
  v_cache: jax.Array,
  lengths: jax.Array,
  *,
  scale: float | None = None,
  local_window_size: Window = None,
  logits_soft_cap: float | None = None,
) -> jax.Array:
  """Attention over the valid part of the cache.  The specification."""
  t, s, lengths = q.shape[1], k_cache.shape[1], lengths.astype(jnp.int32)
  q_index = lengths[:, None] - t + jnp.arange(t)  # [B, T]
  mask = visible_pairs(q_index, jnp.arange(s), True, local_window_size)
  # What lies beyond a row's length may be anything, even NaN times weight 0.
  valid = (jnp.arange(s) < lengths[:, None])[:, :, None, None]
  outs = masked_attention(
    q,
    jnp.where(valid, k_cache, 0),
    jnp.where(valid, v_cache, 0),
    mask,
    scale,
    logits_soft_cap,
  )
  return outs.out


# --- public -------------------------------------------------------------------


@switches.plain
def decode_attention(
  q: jax.Array,
  k_cache: jax.Array,
  v_cache: jax.Array,
  lengths: jax.Array,
  *,
  scale: float | None = None,
  local_window_size: Window = None,
  logits_soft_cap: float | None = None,
  implementation: Implementation = None,
  config: None = None,
) -> jax.Array:
  """Attention of each row's T newest tokens over its part of a KV cache.

  Args:
    q: [B, T, N, H] float32 or bfloat16.
    k_cache: [B, S, K, H] of q's dtype, the T newest keys already in place;
      entries at or beyond a row's length are not read and may hold anything.
    v_cache: [B, S, K, H].
    lengths: [B] integers: valid keys of each row, the T newest included; at
      most S.
    scale: multiplies the logits; None is 1 / sqrt(H).
    local_window_size: (left, right): a query also sees no key more than left
      before it; right does not matter here.
    logits_soft_cap: cap in cap * tanh(logits / cap), after the scale.
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: reserved for the kernel's tile sizes.

  Returns:
    [B, T, N, H] of q's dtype; 0 for a query before its row's first key.

  Raises:
    ValueError: on wrong shapes, dtypes or values.
    NotImplementedError: for implementation="pallas".
  """
  op = "decode_attention"
  check_implementation(op, implementation, pallas=DECODE_ATTENTION.pallas)
  check_config(op, config, type(None))
  dtype = as_array(op, "q", q).dtype
  q, k_cache, v_cache = as_qkv(op, q, k_cache, v_cache)
  lengths = as_integers(op, "lengths", lengths)
  check_shape(op, "lengths", lengths, q.shape[:1], "[B]")
  cap = logits_soft_cap
  cap = None if cap is None else as_number(op, "logits_soft_cap", cap)
  check_positive(op, logits_soft_cap=cap)
  return decode_attention_reference(
    q,
    k_cache,
    v_cache,
    lengths,
    scale=None if scale is None else as_scalar(op, "scale", scale),
    local_window_size=as_window(op, local_window_size),
    logits_soft_cap=cap,
  ).astype(dtype)


# --- registration -------------------------------------------------------------


def _cost(q, k_cache, v_cache, lengths, **_) -> tuple[Cost, None]:
  b, t, n, h = q.shape
  flops = 4 * b * t * n * h * k_cache.shape[1]
  return Cost(flops, nbytes(q, q, k_cache, v_cache, lengths)), None


def _case(name, b, t, s, n, k, h, dtype=jnp.bfloat16, **kwargs) -> Case:
  cache = jax.ShapeDtypeStruct((b, s, k, h), dtype)
  lengths = Integers((b,), lambda rng: rng.integers(t, s + 1, (b,), np.int32))
  q = jax.ShapeDtypeStruct((b, t, n, h), dtype)
  return Case(name, (q, cache, cache, lengths), kwargs)


DECODE_ATTENTION = Op(
  name="decode_attention",
  function=decode_attention,
  reference=decode_attention_reference,
  cost=_cost,
  tests=(
    _case("mqa", 2, 1, 64, 8, 1, 128, jnp.float32),
    _case("several", 3, 4, 50, 4, 2, 64, jnp.float32, local_window_size=(8, 0)),
    _case("bf16", 2, 1, 64, 4, 4, 128, logits_soft_cap=30.0),
  ),
  benches=(_case("gemma_2b_8x8k", 8, 1, 8192, 8, 1, 256),),
  pallas=False,
  through_softmax=True,
)
