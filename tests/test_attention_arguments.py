"""Sinks, offsets, prefixes, chunks, and values of another head size."""

import functools

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from pallas_gemma.kernels import (
  FlashAttentionConfig,
  flash_attention,
  flash_attention_reference,
)

SMALL = FlashAttentionConfig(
  block_q=128, block_kv=128, rows=128, block_q_bwd=128, block_kv_bwd=128
)
KERNEL = functools.partial(
  flash_attention, implementation="pallas", config=SMALL
)
B, T, S, N, K, H = 2, 150, 280, 2, 1, 64
SINKS = jnp.asarray([0.7, -1.0], jnp.float32)


def draw(value_size=H, t=T, s=S):
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in ((B, t, N, H), (B, s, K, H), (B, s, K, value_size))
  ]


CASES = {
  "offset": {"query_offset": S - T, "is_causal": True},
  "offset, window": {"query_offset": 70, "local_window_size": (60, 20)},
  "before the keys": {"query_offset": -40, "is_causal": True},
  "of rows": {"query_offset": jnp.asarray([0, S - T]), "is_causal": True},
  "chunks": {"chunk_size": 100, "is_causal": True, "query_offset": 30},
  "prefix": {"prefix_lengths": jnp.asarray([0, 200]), "is_causal": True},
}


def dense(q, k, v, sinks=None, **kwargs):
  """By NumPy, a query at a time."""
  q, k, v = map(np.asarray, (q, k, v))
  kwargs = {
    name: np.asarray(x) if isinstance(x, jax.Array) else x
    for name, x in kwargs.items()
  }
  out = np.zeros((*q.shape[:3], v.shape[3]))
  offsets = np.broadcast_to(kwargs.get("query_offset", 0), q.shape[0])
  left, right = kwargs.get("local_window_size", (10**6, 10**6))
  prefix = kwargs.get("prefix_lengths", np.zeros(q.shape[0], int))
  chunk = kwargs.get("chunk_size", 10**6)
  j = np.arange(k.shape[1])
  for b, t, n in np.ndindex(q.shape[:3]):
    i = t + offsets[b]
    seen = (j >= i - left) & (j <= i + right) & (j // chunk == i // chunk)
    if kwargs.get("is_causal"):
      seen &= (j <= i) | (j < prefix[b])
    if seen.any():
      logits = k[b, seen, 0] @ q[b, t, n] / H**0.5
      weights = np.exp(logits)
      total = weights.sum() + (0 if sinks is None else np.exp(sinks[n]))
      out[b, t, n] = weights @ v[b, seen, 0] / total
  return out


@pytest.mark.no_interpreter
@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_what_it_says(name):
  (q, k, v), kwargs = draw(32), CASES[name]
  got = flash_attention_reference(q, k, v, sinks=SINKS, **kwargs)
  np.testing.assert_allclose(
    got, dense(q, k, v, np.asarray(SINKS), **kwargs), atol=1e-5
  )


@pytest.mark.parametrize("name", ["offset", "offset, window", "chunks"])
def test_kernels_meet_the_bar(name):
  """With spans of keys for those whose queries are shifted."""
  value_size = 128 if name == "chunks" else 32

  kwargs = {"sinks": SINKS, **CASES[name]}
  numerics.assert_agrees(
    functools.partial(KERNEL, **kwargs),
    functools.partial(flash_attention_reference, **kwargs),
    draw(value_size),
    softmax=True,
  )


@pytest.mark.parametrize("name", ["before the keys", "of rows", "prefix"])
def test_kernels_give_the_same(name):
  q, k, v = draw()

  def run(function):
    def weighted(sinks):
      outs = function(q, k, v, return_lse=True, sinks=sinks, **CASES[name])
      return sum(jnp.sin(x).sum() for x in outs), outs

    of_sinks = jax.jit(jax.grad(weighted, has_aux=True))(SINKS)
    return jax.tree.leaves(of_sinks)

  for got, want in zip(
    run(KERNEL), run(flash_attention_reference), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"sinks": jnp.ones(3)}, r"sinks must be \(2,\)"),
    ({"query_offset": jnp.ones(3, int)}, "query_offset must be an integer"),
    ({"query_offset": 0.5}, "query_offset must be integers"),
    ({"prefix_lengths": jnp.ones(B, int)}, "prefix_lengths need is_causal"),
    ({"chunk_size": 0}, "chunk_size must be at least 1"),
  ],
)
def test_the_rest_is_refused_in_words(kwargs, message):
  with pytest.raises(ValueError, match=f"flash_attention: {message}"):
    flash_attention(*draw(), **kwargs)
