"""Dropout of weights, by a seed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from jax.sharding import AxisType
from pallas_gemma.kernels import (
  FlashAttentionConfig,
  dot_product_attention,
  flash_attention,
  flash_attention_reference,
  sharding,
)
from small_attention import KERNEL, MEMORY, SMALL, draw, mesh_of

RATE = 0.3


def even(b=2, n=4, size=64):
  """Of all keys alike, whose values tell them apart: out is the weights."""
  q = jnp.zeros((b, size, n, size), jnp.float32)
  v = jnp.broadcast_to(jnp.eye(size)[:, None], (b, size, 1, size))
  return q, jnp.zeros_like(v), v


def kept(function: Any, seed: Any = 1, b: int = 2, **kwargs: Any) -> np.ndarray:
  """[B, T, N, S]"""
  q, k, v = even(b)
  out = function(q, k, v, dropout_rate=RATE, dropout_seed=seed, **kwargs)
  weights = np.asarray(out) * q.shape[1] * (1 - RATE)
  np.testing.assert_allclose(weights, weights.round(), atol=1e-5)
  return weights.round()


@pytest.mark.no_interpreter
def test_so_many_are_dropped_and_none_like_another():
  found = kept(flash_attention_reference)
  assert abs(found.mean() - (1 - RATE)) < 0.01
  other = kept(flash_attention_reference, seed=jnp.uint32(2**32 - 1))
  np.testing.assert_array_equal(other, kept(flash_attention_reference, -1))
  deviation = (RATE * (1 - RATE)) ** 0.5
  values = [(x - 1 + RATE) / deviation for x in (found, other)]
  one = values[0]
  for pair in (
    values,
    (one[:1], one[1:]),
    (one[:, 1:], one[:, :-1]),
    (one[:, :, 1:], one[:, :, :-1]),
    (one[..., 1:], one[..., :-1]),
  ):
    assert abs(np.mean(pair[0] * pair[1])) < 0.03  # 4 deviations


def test_kernels_drop_the_same_whatever_the_tiles():
  want = kept(flash_attention_reference, b=1)
  other = FlashAttentionConfig(block_q=16, block_kv=128, rows=128)
  for config in (SMALL, other):
    got = kept(functools.partial(KERNEL, config=config), b=1)
    np.testing.assert_array_equal(got, want)


def test_kernels_meet_the_bar_in_calls_of_some_keys(monkeypatch):
  monkeypatch.setattr(MEMORY, "keys_that_fit", lambda *_: 256)
  ids = jnp.asarray([[1] * 90 + [2] * 60]), jnp.asarray([[1] * 90 + [2] * 210])
  kwargs = {"dropout_rate": RATE, "dropout_seed": 5, "return_lse": True}
  numerics.assert_agrees(
    functools.partial(KERNEL, segment_ids=ids, **kwargs),
    functools.partial(flash_attention_reference, segment_ids=ids, **kwargs),
    draw(1, 150, 300, 2, 1, 64),
    softmax=True,
  )


@pytest.mark.no_interpreter
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_drops_the_same(kind):
  mesh = mesh_of(kind)
  want = kept(flash_attention_reference)
  for rules in ({"B": "data", "N": "model"}, {"T": "data"}):
    with jax.set_mesh(mesh), sharding(mesh, rules):
      got = kept(jax.jit(flash_attention, static_argnames="dropout_rate"))
    np.testing.assert_array_equal(got, want)


@pytest.mark.no_interpreter
def test_by_the_names_of_flax():
  q, k, v = even()
  run = functools.partial(
    dot_product_attention,
    *(q, k, v),
    dropout_rng=jax.random.key(0),
    dropout_rate=RATE,
    deterministic=False,
  )
  alike, apart = (np.asarray(run(broadcast_dropout=x)) for x in (True, False))
  assert (alike == alike[:1, :, :1]).all() and alike.std() > 0
  assert (apart != apart[:1]).any() and (apart != apart[:, :, :1]).any()
  none = run(deterministic=True)
  np.testing.assert_array_equal(none, dot_product_attention(q, k, v))


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"dropout_rate": 1.0}, "dropout_rate must be at least 0 and below 1"),
    ({"dropout_rate": 0.1}, "dropout_seed must be an integer scalar .* None"),
    ({"dropout_rate": 0.1, "dropout_seed": 0.5}, "dropout_seed must be int"),
  ],
)
def test_the_rest_is_refused_in_words(kwargs, message):
  with pytest.raises(ValueError, match=f"flash_attention: {message}"):
    flash_attention(*even(), **kwargs)
