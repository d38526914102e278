"""Ids, lengths and caches that a model cannot read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify
from pallas_gemma.gemma import REFERENCE, Gemma
from small_gemma import ONE_LAYER

pytestmark = pytest.mark.no_interpreter

CONFIG = dataclasses.replace(ONE_LAYER, vocab_size=300)


@pytest.fixture(scope="module")
def model():
  return Gemma(CONFIG, rngs=nnx.Rngs(0), ops=REFERENCE)


@pytest.mark.parametrize("wrong", [-1, 300, 2**31 - 1])
def test_ids_beyond_the_table_are_refused(wrong, model):
  tokens = np.array([[5, 6, wrong]], np.int32)
  lengths, cache = np.array([3]), model.init_cache(1, 8)
  for name, call in {
    "hidden_states": lambda: model(tokens),
    "prefill": lambda: model.prefill(tokens, lengths, cache),
    "extend": lambda: model.extend(tokens, cache),
    "decode": lambda: model.decode(tokens[:, 2], cache),
  }.items():
    message = f"{name}: tokens must be from 0 to 299, got {wrong}"
    with pytest.raises(ValueError, match=message):
      call()


def test_what_is_not_read_may_be_anything(model):
  tokens, cache = np.array([[5, 6, -1]]), model.init_cache(1, 8)
  h, _ = model.prefill(tokens, np.array([2]), cache)
  segments = np.array([[1, 1, 0]])
  whole = model.hidden_states(tokens, segment_ids=segments)
  np.testing.assert_allclose(h, whole[:, 1], rtol=1e-5, atol=1e-6)
  _, after = model.extend(tokens, cache, np.array([2]))
  assert after.lengths.tolist() == [2]


def test_a_full_cache_is_refused(model):
  """Its key would be dropped, and attention would miss it."""
  cache = model.init_cache(1, 8)
  full = cache.__class__(cache.k, cache.v, jnp.array([8]))
  with pytest.raises(ValueError, match="decode: .* room for 1 more .* got 8"):
    model.decode(np.array([5]), full)
  nearly = cache.__class__(cache.k, cache.v, jnp.array([7]))
  with pytest.raises(ValueError, match="extend: .* room for 2 more .* got 7"):
    model.extend(np.array([[5, 6]]), nearly)


def test_wrong_lengths_and_rows_are_refused(model):
  tokens, cache = np.array([[5, 6, 7]]), model.init_cache(1, 8)
  for wrong in (0, 4, -1):
    message = f"prompt_lengths must be from 1 to 3, got {wrong}"
    with pytest.raises(ValueError, match=message):
      model.prefill(tokens, np.array([wrong]), cache)
  for wrong in (-1, 4):
    with pytest.raises(ValueError, match=f"counts .* 0 to 3, got {wrong}"):
      model.extend(tokens, cache, np.array([wrong]))
  for call in (model.extend, lambda t, c: model.decode(t[:, 0], c)):
    with pytest.raises(ValueError, match="of the cache's 1 rows, got 2"):
      call(np.tile(tokens, (2, 1)), cache)


def test_a_compiled_program_tells_checkify(model):
  """And no one else: nothing waits for the numbers there."""

  def read(tokens):
    return model.hidden_states(tokens)

  plain = jax.jit(read)(np.array([[5, 300]]))
  assert plain.shape == (1, 2, 8)
  error, _ = jax.jit(checkify.checkify(read))(np.array([[5, 300]]))
  with pytest.raises(checkify.JaxRuntimeError, match="tokens must be .* 300"):
    error.throw()
  error, same = jax.jit(checkify.checkify(read))(np.array([[5, 299]]))
  error.throw()
  np.testing.assert_array_equal(same, jax.jit(read)(np.array([[5, 299]])))
