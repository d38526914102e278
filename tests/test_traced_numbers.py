"""Numbers that are known only when the program runs: per layer, or learned.

Of attention's own there is a module of its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_gemma.kernels import (
  Norm,
  add_rms_norm,
  apply_rope,
  feed_forward,
  geglu,
  rms_norm,
)

# The reference where there is no TPU, not even an interpreted one.
DEFAULT = pytest.param(None, marks=pytest.mark.no_interpreter)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["pallas", DEFAULT])


def draw(*shape, seed=0):
  return jnp.asarray(
    np.random.default_rng(seed).standard_normal(shape), jnp.float32
  )


X, SCALE = draw(24, 128), draw(128, seed=1)
W, W_DOWN = draw(128, 128, seed=2) / 12, draw(128, 128, seed=3) / 12
HEADS = draw(1, 24, 2, 64)
POSITIONS = jnp.arange(24)[None]


def normed(function, *weights):
  def call(x, epsilon, offset, **kwargs):
    norm = Norm(SCALE, epsilon, offset)
    return function(x, *weights, norm=norm, **kwargs)

  return call


CALLS = {
  "rms_norm": lambda x, e, o, **k: rms_norm(
    x, SCALE, epsilon=e, scale_offset=o, **k
  ),
  "add_rms_norm": lambda x, e, o, **k: add_rms_norm(
    x, x, SCALE, epsilon=e, scale_offset=o, **k
  )[0],
  "geglu": normed(geglu, W, W),
  "feed_forward": normed(feed_forward, W, W, W_DOWN),
}


def value_and_gradient(call, x):
  out, back = jax.vjp(call, x)
  return out, back(jnp.cos(out))[0]


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", CALLS)
def test_epsilon_and_offset(name, implementation):
  call = functools.partial(CALLS[name], implementation=implementation)
  run = value_and_gradient
  want = jax.jit(lambda x: run(lambda x: call(x, 0.3, 0.7), x))(X)
  traced = jax.jit(lambda x, e, o: run(lambda x: call(x, e, o), x))
  for got, exact in zip(traced(X, 0.3, 0.7), want, strict=True):
    np.testing.assert_allclose(got, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_epsilon_are_the_references_alone(name):
  def gradient(implementation):
    call = functools.partial(CALLS[name], implementation=implementation)
    return jax.grad(lambda e: call(X, e, 1.0).sum())(0.3)

  np.testing.assert_allclose(gradient(None), gradient("xla"), rtol=1e-4)
  assert gradient("xla") != 0
  with pytest.raises(NotImplementedError, match="no gradient of epsilon"):
    jax.make_jaxpr(lambda: gradient("pallas"))()


@IMPLEMENTATIONS
def test_the_base_of_each_layer(implementation):
  """As in a scan over local and global layers."""
  rope = functools.partial(apply_rope, implementation=implementation)
  bases = jnp.asarray([10_000.0, 500.0])

  @jax.jit
  def layers(x):
    def layer(x, base):
      return rope(x, POSITIONS, base_frequency=base), None

    return jax.lax.scan(layer, x, bases)[0]

  def one_by_one(x):
    for base in (10_000.0, 500.0):
      x = rope(x, POSITIONS, base_frequency=base)
    return x

  got, want = (value_and_gradient(f, HEADS) for f in (layers, one_by_one))
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.no_interpreter
def test_a_base_has_no_gradient_but_the_references():
  def gradient(implementation):
    def loss(base):
      rotated = apply_rope(
        HEADS, POSITIONS, base_frequency=base, implementation=implementation
      )
      return (rotated**3).sum()

    return jax.grad(loss)(500.0)

  assert gradient("xla") != 0
  for implementation in (None, "pallas"):
    with pytest.raises(NotImplementedError, match="no gradient of base"):
      jax.jit(lambda i=implementation: gradient(i)).lower()


@pytest.mark.no_interpreter
def test_a_norm_keeps_its_kind_as_an_argument_of_jit():
  """A number is part of the program, an array is not."""
  kinds = []

  @jax.jit
  def trace(norm):
    kinds.append(isinstance(norm.epsilon, float))
    return rms_norm(X, norm.scale, epsilon=norm.epsilon)

  trace(Norm(SCALE, 1e-3))
  trace(Norm(SCALE, jnp.float32(1e-3)))
  assert kinds == [True, False]


@pytest.mark.no_interpreter
@pytest.mark.parametrize("norm", [(SCALE, 1e-6), SCALE, 1.0])
def test_what_is_no_norm_is_refused_in_words(norm):
  with pytest.raises(ValueError, match="geglu: norm must be a pallas_gemma"):
    geglu(X, W, W, norm=norm)
