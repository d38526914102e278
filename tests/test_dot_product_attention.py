"""`jax.nn.dot_product_attention`'s arguments give its results."""

import functools
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from flax import nnx
from pallas_gemma.kernels import (
  FlashAttentionConfig,
  dot_product_attention,
  flash_attention,
)

SMALL = FlashAttentionConfig(
  block_q=128, block_kv=128, rows=128, block_q_bwd=128, block_kv_bwd=128
)
PALLAS = functools.partial(
  dot_product_attention, implementation="pallas", config=SMALL
)
B, T, S, N, K, H = 2, 24, 40, 4, 2, 16
RNG = np.random.default_rng(0)


def draw(t=T, s=S, dtype=jnp.float32, n=N, k=K, b=B):
  rng = np.random.default_rng(1)
  return [
    jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
    for shape in ((b, t, n, H), (b, s, k, H), (b, s, k, H))
  ]


def bits(*shape):
  """One row and one column of [T, S] see nothing."""
  mask = RNG.random(shape) < 0.5
  mask[..., :1, :] &= shape[-2] == 1
  mask[..., :1] = False
  return jnp.asarray(mask)


def agrees(arrays, function, bar=1e-5, **kwargs):
  """Results and gradients are those of jax.nn, to a few roundings."""
  jitted = jax.nn.dot_product_attention
  got = numerics.value_and_gradients(
    functools.partial(function, **kwargs), arrays, jit=True
  )
  want = numerics.value_and_gradients(
    functools.partial(jitted, **kwargs), arrays, jit=True
  )
  for name, x in want.items():
    top = max(1.0, numerics.max_abs(np.where(abs(x) < 1e30, x, 0)))
    np.testing.assert_allclose(got[name] / top, x / top, atol=bar, err_msg=name)


LENGTHS = {
  "query_seq_lengths": jnp.asarray([5, 24]),
  "key_value_seq_lengths": jnp.asarray([0, 33]),
}
BY_FLASH = {
  "causal": {"is_causal": True, "scale": 0.5},
  "lengths": {**LENGTHS, "local_window_size": (30, 1)},
  "padding": {
    "mask": bits(B, 1, 1, S),
    "key_value_seq_lengths": LENGTHS["key_value_seq_lengths"],
    "local_window_size": (2, 2),
    "return_residual": True,
  },
}
BY_MASK = {
  "whole": {"mask": bits(B, N, T, S), "return_residual": True},
  "of heads": {"mask": bits(1, N, T, S), "is_causal": True},
  "of all": {"mask": bits(1, 1, T, S), **LENGTHS},
}
BY_BIAS = {
  "bias": {"bias": jnp.asarray(RNG.standard_normal((1, N, T, S)), jnp.float32)},
  "column": {
    "bias": jnp.asarray(RNG.standard_normal((B, 1, T, 1)), jnp.float32),
    "mask": bits(B, 1, T, S),
  },
}


@pytest.mark.parametrize("name", [*BY_FLASH, *BY_MASK, *BY_BIAS])
def test_is_jax_nn(name):
  kwargs: Any = (BY_FLASH | BY_MASK | BY_BIAS)[name]
  agrees(draw(), PALLAS, **kwargs)


def test_more_queries_than_keys():
  """Of which some see no key."""
  agrees(draw(t=S, s=T), PALLAS, local_window_size=3, return_residual=True)


def test_queries_that_see_no_key_of_several_calls(monkeypatch):
  """And of heads whose rows are packed."""
  monkeypatch.setattr(
    "pallas_gemma.kernels._attention.memory.keys_that_fit", lambda *_: 128
  )
  agrees(draw(t=160, s=140, k=1, b=1), PALLAS, local_window_size=9)


@pytest.mark.no_interpreter
def test_forms_of_its_arguments():
  q, k, v = draw(b=1)
  mask = bits(N, T, S)
  want = jax.nn.dot_product_attention(q[0], k[0], v[0], None, mask)
  got = dot_product_attention(q[0], k[0], v[0], None, mask)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert got.shape == q.shape[1:]
  got = dot_product_attention(q, k, v, mask=mask[:1], return_residual=True)
  want = jax.nn.dot_product_attention(
    q, k, v, mask=mask[:1], return_residual=True
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5), got, want
  )
  with jax.enable_x64(True):
    for shape in ((1, N, 1, S), (1, 1, T, 1)):
      bias = jnp.asarray(RNG.standard_normal(shape), jnp.float32)
      grads = [
        jax.grad(lambda b, f=f: (f(q, k, v, b) ** 2).sum())(bias)
        for f in (dot_product_attention, jax.nn.dot_product_attention)
      ]
      np.testing.assert_allclose(*grads, atol=1e-4)


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"mask": jnp.ones((1, 1, T, S))}, "mask must be booleans"),
    ({"mask": bits(1, 3, T, S)}, r"mask must be \[B, N, T, S\]"),
    ({"bias": jnp.ones((1, 1, T, 3))}, r"bias must be \[B, N, T, S\]"),
    ({"query_seq_lengths": jnp.ones(3, int)}, r"query_seq_lengths must be"),
    (
      {"key_value_seq_lengths": jnp.ones(B)},
      "key_value_seq_lengths must be integers",
    ),
    ({"implementation": "cudnn"}, "implementation must be"),
    ({"dropout_rate": 0.1, "deterministic": False}, "dropout_rng must be a"),
    ({"is_causal": "no"}, "is_causal must be True or False, got 'no'"),
    ({"return_residual": 2}, "return_residual must be True or False"),
    ({"deterministic": "no"}, "deterministic must be True or False"),
    ({"bias": "none"}, "bias must be an array, got str"),
    ({"dtype": jnp.int8}, "dtype must be float32, bfloat16, float16 or None"),
    ({"module": object()}, "module must be None"),
  ],
)
def test_the_rest_is_refused_in_words(kwargs, message):
  with pytest.raises(ValueError, match=f"dot_product_attention: {message}"):
    dot_product_attention(*draw(), **kwargs)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_is_flax_attention_fn(library):
  """A mask of numbers is not lost, nor is dropout."""
  x = jnp.asarray(RNG.standard_normal((2, 7, 8)), jnp.float32)
  padding = jnp.asarray([[1] * 7, [1] * 3 + [0] * 4])
  mask = flax.linen.combine_masks(
    flax.linen.make_attention_mask(padding, padding),
    flax.linen.make_causal_mask(padding),
  )
  sizes: Any = {"num_heads": 2, "dropout_rate": 0.5}

  def run(fn: Any, mask: Any = mask, **kwargs: Any) -> Any:
    if library == "nnx":
      module = nnx.MultiHeadAttention(
        in_features=8,
        attention_fn=fn,
        decode=False,
        rngs=nnx.Rngs(0),
        **sizes,
      )
      return module(x, mask=mask, **kwargs)
    linen: Any = flax.linen.MultiHeadDotProductAttention(
      attention_fn=fn, **sizes
    )
    params = linen.init(jax.random.key(0), x, deterministic=True)
    keys = {"dropout": jax.random.key(1)}
    return linen.apply(params, x, mask=mask, rngs=keys, **kwargs)

  module = nnx if library == "nnx" else flax.linen
  want = run(module.dot_product_attention, deterministic=True)
  got = run(dot_product_attention, deterministic=True)
  np.testing.assert_allclose(got, want, atol=1e-5)
  dropped = run(dot_product_attention, deterministic=False)
  assert np.isfinite(dropped).all() and np.abs(dropped - got).max() > 1e-3
  if library == "linen":  # which hands on what a signature has
    again = run(flash_attention, mask != 0, deterministic=True)
    real = np.asarray(padding > 0)  # others, which see nothing, give 0
    np.testing.assert_allclose(again[real], want[real], atol=1e-5)
    with pytest.raises(ValueError, match="dropout_seed must be .* of flax"):
      run(flash_attention, mask != 0, deterministic=False)
