"""What is particular to gated units; their backward kernel is that of the
feed-forward block, and has its mutants there.
"""

import functools
import sys
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import mutation
import numerics
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pallas_gemma import kernels
from pallas_gemma.kernels import (
  FeedForwardConfig,
  FeedForwardTiles,
  Norm,
  geglu,
  geglu_reference,
)

ROOM = f"{kernels.__name__}._gated"
ACTIVATION, SPEC, FORWARD, BACKWARD = (
  sys.modules[f"{ROOM}.{page}"]
  for page in ("activation", "spec", "forward", "backward")
)
KERNEL = functools.partial(geglu, implementation="pallas")
ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu")
OTHERS = ("relu2", "quick_gelu", "sigmoid")


def small(residuals: Any = "gate_up"):
  tiles = FeedForwardTiles(16, 128)
  return FeedForwardConfig(residuals=residuals, forward=tiles, backward=tiles)


def draw(n, d, f, dtype=jnp.float32, weight_dtype=None, scale=1.0, seed=0):
  rng = np.random.default_rng(seed)
  shapes = ((n, d), 1.0, dtype), *[((d, f), d**-0.5, weight_dtype or dtype)] * 2
  return [
    jnp.asarray(scale * s * rng.standard_normal(shape, np.float32), t)
    for shape, s, t in shapes
  ]


@hypothesis.settings(max_examples=6)
@hypothesis.given(
  n=st.integers(1, 70),
  d=st.integers(1, 150),
  f=st.one_of(st.integers(1, 300), st.just(256)),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  weight_dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  activation=st.sampled_from(ACTIVATIONS),
  residuals=st.sampled_from(["gate_up", "none"]),
)
def test_any_shape_meets_the_bar(
  n, d, f, dtype, weight_dtype, activation, residuals
):
  config = small(residuals)
  # Enough numbers in every result for the statistics of its error.
  seeds = range(-(-64 // (min(n, f) * d)))
  numerics.assert_agrees(
    functools.partial(KERNEL, activation=activation, config=config),
    functools.partial(geglu_reference, activation=activation),
    *(draw(n, d, f, dtype, weight_dtype, seed=seed) for seed in seeds),
  )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_residuals_agree(activation):
  """Gate and up, saved in float32, are what they are computed to again."""
  args = draw(40, 64, 200)

  def gradients(residuals):
    function = functools.partial(
      KERNEL, activation=activation, config=small(residuals)
    )
    h, vjp = jax.vjp(function, *args)
    return h, *vjp(h)

  for a, b in zip(gradients("gate_up"), gradients("none"), strict=True):
    np.testing.assert_array_equal(a, b)


# --- activations --------------------------------------------------------------


def activation_agrees(activation):
  """Value and derivative over six decades of both signs, and at zero."""
  half = jnp.geomspace(1e-4, 1e2, 500)
  gate = jnp.concatenate([-half[::-1], jnp.zeros(1), half])

  def both(function, gate):
    value, derivative = jax.vjp(function, gate)
    return value, derivative(jnp.ones_like(gate))[0]

  with jax.enable_x64(True):
    reference = ACTIVATION.ACTIVATIONS[activation]
    truth = both(reference, gate.astype(jnp.float64))
  got = ACTIVATION.activate_and_derive(activation, gate)
  for g, t in zip(got, truth, strict=True):
    # An error of g * rounding is that of the argument, which no one can undo.
    bar = 8 * np.finfo(np.float32).eps * np.maximum(np.abs(gate), 1)
    assert (np.abs(g - np.asarray(t)) <= bar).all()


def half_of_gelu_tanh(g):
  cubic = g * (1 + ACTIVATION._K * g * g)
  return 0.5 * (1 + jnp.tanh(ACTIVATION._C * cubic))


# Derivatives that lack a term, or that are wrong at zero.
WRONG_DERIVATIVES = {
  "gelu_tanh": half_of_gelu_tanh,
  "gelu": lambda g: 0.5 * (1 + jax.lax.erf(g * 0.5**0.5)),
  "silu": jax.nn.sigmoid,
  "relu": lambda g: jnp.where(g >= 0, 1.0, 0.0),
  "relu2": lambda g: jnp.maximum(g, 0),
  "quick_gelu": lambda g: jax.nn.sigmoid(ACTIVATION._QUICK * g),
  "sigmoid": lambda g: jax.nn.sigmoid(g) ** 2,
}


@pytest.mark.parametrize("activation", (*ACTIVATIONS, *OTHERS))
def test_activation_and_its_mutant(activation, monkeypatch):
  activation_agrees(activation)
  right = ACTIVATION._VALUE_AND_DERIVATIVE[activation]
  wrong = WRONG_DERIVATIVES[activation]
  table = {activation: lambda gate: (right(gate)[0], wrong(gate))}
  monkeypatch.setattr(ACTIVATION, "_VALUE_AND_DERIVATIVE", table)
  mutation.assert_killed(activation_agrees, activation)


# --- the kernel ---------------------------------------------------------------


def normed(function, *args, **kwargs):
  """The op with a norm, whose scale comes last."""
  *args, scale = args
  return function(*args, norm=Norm(scale, scale_offset=1.0), **kwargs)


@pytest.mark.parametrize("residuals", ["gate_up", "none"])
def test_norm(residuals):
  kernel = functools.partial(KERNEL, config=small(residuals))
  scale = 0.3 * jax.random.normal(jax.random.key(1), (72,))
  numerics.assert_agrees(
    functools.partial(normed, kernel),
    functools.partial(normed, geglu_reference),
    [*draw(40, 72, 200), scale],
  )


@pytest.mark.no_interpreter
def test_a_norm_may_have_no_scale():
  arrays = draw(8, 72, 40)
  for function in (geglu, geglu_reference):
    want = function(*arrays, norm=Norm(jnp.ones(72)))
    np.testing.assert_allclose(function(*arrays, norm=Norm()), want, rtol=1e-6)


# --- mutants ------------------------------------------------------------------

PROBLEM = SPEC.Problem(
  activation="gelu_tanh",
  norm=None,
  residual=False,
  implementation="pallas",
  config=small(),
)


FORWARD_ARRAYS, ARRAYS = draw(20, 24, 200), draw(16, 24, 128)


def forward_by(forward):
  """The forward pass alone, and what it keeps."""

  def run(*arrays):
    arrays = SPEC.Arrays(*arrays, w_down=None, scale=None)
    return forward(PROBLEM, arrays, keep=True)

  return run


@functools.cache
def expected_forward():
  reference = forward_by(SPEC.plain_forward)
  return numerics.expected(reference, FORWARD_ARRAYS, grad=False)


@functools.cache
def expected_gradients():
  return numerics.expected(geglu_reference, ARRAYS)


def forward_agrees():
  kernel = forward_by(FORWARD.forward)
  got = numerics.values(kernel, FORWARD_ARRAYS, jit=True)
  numerics.assert_within_bar(got, *expected_forward())


def gradients_agree():
  kernel = functools.partial(KERNEL, config=small())
  got = numerics.value_and_gradients(kernel, ARRAYS, jit=True)
  numerics.assert_within_bar(got, *expected_gradients())


def without_dh(*args, inputs=BACKWARD._inputs):
  i = inputs(*args)
  return i._replace(dh=0 * i.dh)


MUTANTS = {
  "gate and up swapped": (
    FORWARD,
    "_multiply",
    lambda *args, multiply=FORWARD._multiply: multiply(*args)[::-1],
    forward_agrees,
  ),
  "up is not a factor": (
    FORWARD,
    "_gate",
    lambda gate, up, plan: ACTIVATION.activate("gelu_tanh", gate) + 0 * up,
    forward_agrees,
  ),
  "gate is saved as up": (
    FORWARD,
    "_keep",
    lambda o, gate, up, rows, keep=FORWARD._keep: keep(o, up, up, rows),
    forward_agrees,
  ),
  "dh is not given": (BACKWARD, "_inputs", without_dh, gradients_agree),
}


@pytest.mark.parametrize("check", [forward_agrees, gradients_agree])
def test_no_mutant_lives(check):
  """What the mutants are measured against."""
  check()


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name, monkeypatch):
  *step, check = MUTANTS[name]
  for expected in (expected_forward, expected_gradients):
    expected()  # not by the mutant
  monkeypatch.setattr(*step)
  mutation.assert_killed(check)


# --- transformations ----------------------------------------------------------


@pytest.mark.parametrize("weight_axis", [None, 0])
def test_vmap(weight_axis):
  x, w_gate, w_up = draw(70, 72, 200)
  x = jnp.stack([x, 2 * x])
  weights = [w_gate, w_up]
  if weight_axis == 0:
    weights = [jnp.stack([w, -w]) for w in weights]
  mapped = [
    jax.vmap(f, (0, weight_axis, weight_axis))
    for f in (functools.partial(KERNEL, config=small()), geglu_reference)
  ]
  numerics.assert_agrees(*mapped, [x, *weights])


def test_split_over_a_mesh():
  """Rows and F split; h comes out split over both, each gradient whole."""
  mesh = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2
  )
  x, w_gate, w_up = draw(16, 128, 256)
  gradient = jax.grad(lambda *args: (KERNEL(*args) ** 2).sum(), (0, 1, 2))
  want = gradient(x, w_gate, w_up)
  with jax.set_mesh(mesh):
    put = [
      jax.device_put(a, NamedSharding(mesh, s))
      for a, s in zip(
        (x, w_gate, w_up),
        (P("data"), P(None, "model"), P(None, "model")),
        strict=True,
      )
    ]
    h = jax.jit(KERNEL)(*put)
    got = jax.jit(gradient)(*put)
  assert jax.typeof(h).sharding.spec == P("data", "model")
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5 * np.abs(w).max())


@pytest.mark.parametrize(
  "change, kwargs, message",
  [
    ({1: (64, 256)}, {}, r"w_gate must be \[D, F\] with D = 128.*\(64, 256\)"),
    ({2: (128, 64)}, {}, r"w_up must be \(128, 256\).*got \(128, 64\)"),
    ({}, {"activation": "tanh"}, "activation must be one of .* got 'tanh'"),
    ({}, {"norm": Norm(jnp.zeros(64))}, r"norm.scale must be \(128,\)"),
  ],
)
def test_bad_input_is_refused(change, kwargs, message):
  shapes = [(8, 128), (128, 256), (128, 256)]
  args = [jnp.zeros(change.get(i, s)) for i, s in enumerate(shapes)]
  with pytest.raises(ValueError, match=f"geglu: .*{message}"):
    geglu(*args, **kwargs)
