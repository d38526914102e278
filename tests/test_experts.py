"""The feed-forward of a mixture of experts."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from pallas_gemma.kernels import (
  ClampedSwiGLU,
  ExpertBiases,
  FeedForwardConfig,
  FeedForwardTiles,
  expert_feed_forward,
  feed_forward_reference,
  sharding,
)

T, D, F, E = 24, 16, 40, 4
SIZES = jnp.asarray([5, 0, 9, 7])  # one has no row, and three rows no expert


def draw(dtype=jnp.float32):
  """x, three weights and three biases."""
  rng = np.random.default_rng(0)
  shapes = (T, D), (E, D, F), (E, D, F), (E, F, D), (E, F), (E, F), (E, D)
  scales = 1, D**-0.5, D**-0.5, F**-0.5, 1, 1, 1
  return [
    jnp.asarray(s * rng.standard_normal(shape), dtype)
    for shape, s in zip(shapes, scales, strict=True)
  ]


def one_by_one(x, gate, up, down, b_gate, b_up, b_down, **kwargs):
  """Every expert's rows through a feed-forward of its own."""
  parts, start = [], 0
  for e, size in enumerate(SIZES.tolist()):
    part = feed_forward_reference(
      x[start : start + size],
      None if gate is None else gate[e],
      up[e],
      down[e],
      b_gate=None if gate is None else b_gate[e],
      b_up=b_up[e],
      b_down=b_down[e],
      **kwargs,
    )
    parts.append(part)
    start += size
  return jnp.concatenate([*parts, jnp.zeros_like(x[start:])])


def at_once(x, gate, up, down, b_gate, b_up, b_down, **kwargs):
  biases = ExpertBiases(None if gate is None else b_gate, b_up, b_down)
  return expert_feed_forward(x, gate, up, down, SIZES, biases=biases, **kwargs)


def fused(x, gate, up, down, b_gate, b_up, b_down, **kwargs):
  both = jnp.concatenate([gate, up], axis=2)
  biases = ExpertBiases(jnp.concatenate([b_gate, b_up], axis=1), None, b_down)
  return expert_feed_forward(
    x, both, None, down, SIZES, biases=biases, **kwargs
  )


def ungated(function):
  return lambda x, gate, *args, **kw: function(x, None, *args, **kw)


CASES: dict[str, tuple[Any, Any, Any]] = {
  "silu": (at_once, one_by_one, "silu"),
  "gpt-oss": (fused, one_by_one, ClampedSwiGLU(limit=1.0)),
  "ungated": (ungated(at_once), ungated(one_by_one), "relu2"),
}


# Two row tiles, the last of them not whole; experts end inside of both.
CONFIG = FeedForwardConfig(
  forward=FeedForwardTiles(16, 128), backward=FeedForwardTiles(16, 128)
)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_every_row_meets_its_expert(name, implementation):
  """Forward and backward; rows of none, which may hold anything, give 0."""
  function, reference, activation = CASES[name]
  args = draw()
  by_expert = functools.partial(
    function, implementation=implementation, config=CONFIG
  )

  def both(function):
    run = functools.partial(function, activation=activation)
    y, vjp = jax.vjp(run, *args)
    return y, *vjp(jnp.cos(jnp.arange(T * D)).reshape(T, D))

  for got, want in zip(both(by_expert), both(reference), strict=True):
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
  args[0] = args[0].at[21:].set(jnp.nan)
  for got in both(by_expert):
    assert np.isfinite(got).all()


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_bfloat16(implementation):
  args = draw(jnp.bfloat16)
  want = one_by_one(*(a.astype(jnp.float32) for a in args), activation="silu")
  got = at_once(*args, implementation=implementation)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


X, GATE, UP, DOWN, *_ = (jnp.zeros_like(a) for a in draw())


@pytest.mark.parametrize(
  "args, kwargs, message",
  [
    ([X[None], GATE, UP, DOWN], {}, r"x must be \[T, D\]"),
    ([X, UP, None, DOWN], {}, r"w_gate must be \(4, 16, 80\) \(\[E, D, 2F\]\)"),
    ([X, GATE, UP[:2], DOWN], {}, r"w_up must be \(4, 16, 40\)"),
    ([X, GATE, UP, UP], {}, r"w_down must be \[E, F, D\] with D = 16"),
    ([X, None, None, DOWN], {}, "w_down, and w_gate or w_up, must be given"),
    ([X, None, UP, DOWN], {"activation": ClampedSwiGLU()}, "w_gate must be"),
    (
      [X, None, UP, DOWN],
      {"biases": ExpertBiases(gate=jnp.zeros((E, F)))},
      "biases.gate must be None where w_gate is",
    ),
    (
      [X, GATE, UP, DOWN],
      {"biases": ExpertBiases(down=jnp.zeros((E, F)))},
      r"biases.down must be \(4, 16\)",
    ),
  ],
)
def test_bad_input_is_refused(args, kwargs, message):
  x, gate, up, down = args
  with pytest.raises(ValueError, match=f"expert_feed_forward: {message}"):
    expert_feed_forward(x, gate, up, down, SIZES, **kwargs)


def test_group_sizes_are_integers():
  with pytest.raises(ValueError, match="group_sizes must be integers"):
    expert_feed_forward(X, GATE, UP, DOWN, cast(Any, jnp.ones(E)))


@pytest.mark.no_interpreter
def test_both_branches_in_one_weight_over_a_mesh():
  """Columns that lie side by side cannot be split as they lie."""
  rng = np.random.default_rng(0)
  x, both, down = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in ((T, D), (E, D, 512), (E, 256, D))
  )

  @jax.jit
  def run(x, both, down):
    function = functools.partial(expert_feed_forward, group_sizes=SIZES)
    y, vjp = jax.vjp(lambda x, w, d: function(x, w, None, d), x, both, down)
    return y, *vjp(jnp.cos(jnp.arange(T * D)).reshape(T, D))

  want = run(x, both, down)
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
  for rules in ({"B": "data", "F": "model"}, {"B": "data"}):
    with sharding(mesh, rules):
      for got, exact in zip(run(x, both, down), want, strict=True):
        bar = 2e-5 * np.abs(exact).max()
        np.testing.assert_allclose(got, exact, rtol=0, atol=bar)
