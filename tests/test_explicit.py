"""Gemma on a mesh whose axes are Explicit, as `jax.make_mesh` makes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pallas_gemma.gemma import Gemma
from small_gemma import TWO_LAYERS

pytestmark = pytest.mark.no_interpreter

SPLITS = {
  # Parameter's name: how it is split; others are copied.
  "rows": {},
  "fsdp": {
    "gate": P(None, "d"),
    "embedding": P(None, "d"),
    "q": P(None, None, "d"),
  },
  "tensor": {
    "gate": P(None, None, "m"),
    "up": P(None, None, "m"),
    "down": P(None, "m"),
    "q": P(None, "m"),
    "out": P(None, "m"),
    "embedding": P("m"),
  },
}
TOKENS = jnp.arange(1, 49, dtype=jnp.int32).reshape(4, 12)


@pytest.fixture(scope="module")
def mesh():
  devices = np.array(jax.devices()[:4]).reshape(2, 2)
  return Mesh(devices, ("d", "m"), axis_types=(AxisType.Explicit,) * 2)


@pytest.fixture(scope="module")
def model():
  return Gemma(TWO_LAYERS, rngs=nnx.Rngs(0))


def placed(model, mesh, splits):
  def of(path, x):
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    spec = next((splits[n] for n in names if n in splits), P())
    return jax.device_put(x, NamedSharding(mesh, spec))

  return jax.tree_util.tree_map_with_path(of, model)


def loss(model, tokens):
  return model(tokens).astype(jnp.float32).var()


@pytest.mark.parametrize("name", SPLITS)
def test_logits_and_gradients_are_those_of_one_device(name, mesh, model):
  there = placed(model, mesh, SPLITS[name])
  tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("d")))
  logits = jax.jit(Gemma.__call__)(there, tokens)
  want_axis = "m" if name == "tensor" else None
  assert jax.typeof(logits).sharding.spec == P("d", None, want_axis)
  want = model(TOKENS)
  np.testing.assert_allclose(logits, want, atol=2e-5)
  got = jax.jit(jax.grad(loss))(there, tokens)
  for a, b, x in zip(
    jax.tree.leaves(got),
    jax.tree.leaves(jax.jit(jax.grad(loss))(model, TOKENS)),
    jax.tree.leaves(there),
    strict=True,
  ):
    assert a.sharding.is_equivalent_to(x.sharding, x.ndim)
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_generation_is_that_of_one_device(mesh, model):
  def generate(model, tokens, lengths):
    cache = model.init_cache(4, 16)
    hidden, cache = model.prefill(tokens, lengths, cache)
    more, cache = model.extend(tokens[:, :1], cache)
    return hidden, model.logits(more), cache.lengths

  lengths = jnp.array([12, 3, 1, 7], jnp.int32)
  rows = NamedSharding(mesh, P("d"))
  got = jax.jit(generate)(
    placed(model, mesh, SPLITS["tensor"]),
    jax.device_put(TOKENS, rows),
    jax.device_put(lengths, rows),
  )
  for a, b in zip(got, generate(model, TOKENS, lengths), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_without_jit_in_the_context_of_a_mesh(mesh, model):
  with jax.set_mesh(mesh):
    tokens = jax.device_put(TOKENS, P("d"))
    got = placed(model, mesh, SPLITS["fsdp"])(tokens)
  np.testing.assert_allclose(got, model(TOKENS), atol=2e-5)
