"""What is particular to linear cross-entropy."""

import functools
import sys

import hypothesis
import jax
import jax.numpy as jnp
import mutation
import numerics
import numpy as np
import pytest
import v5e
from hypothesis import strategies as st
from jax.experimental import checkify
from pallas_gemma.kernels import (
  LinearCrossEntropyConfig,
  linear_cross_entropy,
  linear_cross_entropy_reference,
)

MODULE = sys.modules[LinearCrossEntropyConfig.__module__]
FORWARD = sys.modules[MODULE.forward.__module__]
BACKWARD = sys.modules[MODULE.backward.__module__]
MODES = ["recompute", "chunked"]


def config(mode="recompute", words=128, rows=256, chunk=128):
  """Small tiles, so that small problems have several."""
  return LinearCrossEntropyConfig(
    mode=mode,
    forward_words=words,
    backward_words=words,
    rows=rows,
    chunk=chunk,
  )


def draw(n, d, v, x_dtype=jnp.float32, table_dtype=None, scale=1.0, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((n, d), np.float32) * scale
  table = rng.standard_normal((v, d), np.float32)
  return [
    jnp.asarray(x, x_dtype),
    jnp.asarray(table, table_dtype or x_dtype),
    jnp.asarray(rng.integers(0, v, n), jnp.int32),
  ]


def agrees(arrays, config, function=linear_cross_entropy, **kwargs):
  """The bar, for the losses and both gradients."""
  weights = kwargs.pop("weights", None)
  if weights is not None:
    arrays = [*arrays, weights]

  def of_arrays(function, x, embedding, labels, *weights):
    more = {"weights": weights[0]} if weights else {}
    return function(x, embedding, labels, **more, **kwargs)

  numerics.assert_agrees(
    functools.partial(
      of_arrays,
      functools.partial(function, implementation="pallas", config=config),
    ),
    functools.partial(of_arrays, linear_cross_entropy_reference),
    arrays,
    softmax=True,
  )


# --- numerics -----------------------------------------------------------------

dtypes = st.sampled_from([jnp.float32, jnp.bfloat16])


@hypothesis.settings(max_examples=8)
@hypothesis.given(
  mode=st.sampled_from(MODES),
  n=st.integers(1, 280),
  d=st.one_of(st.integers(1, 140), st.sampled_from([128, 600])),
  v=st.integers(1, 280),
  padding=st.integers(0, 60),
  x_dtype=dtypes,
  table_dtype=dtypes,
  soft_cap=st.sampled_from([None, 3.0, 30.0]),
  z_loss=st.sampled_from([0.0, 1e-2]),
)
def test_any_problem_meets_the_bar(
  mode, n, d, v, padding, x_dtype, table_dtype, soft_cap, z_loss
):
  agrees(
    draw(n, d, v + padding, x_dtype, table_dtype, d**-0.5)[:2]
    + [jnp.arange(n, dtype=jnp.int32) * 7 % v],
    config(mode),
    logits_soft_cap=soft_cap,
    z_loss=z_loss,
    valid_vocab_size=v,
  )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_logits(mode, dtype):
  """Logits of 1e4 and -1e4: each row's softmax is all on one word."""
  x, table, labels = draw(40, 128, 200, dtype, scale=0.1)
  x = x.at[:20, 0].set(100.0).at[20:, 0].set(-100.0)
  table = table.at[::2, 0].set(100.0).at[1::2, 0].set(-100.0)
  agrees([x, table, labels], config(mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sharp_and_right(mode, dtype):
  """Probability of the label near 1: what is left of it must keep digits."""
  x, table, labels = draw(64, 128, 256, dtype)
  x = table[labels] * jnp.asarray(np.linspace(0.05, 0.3, 64)[:, None], dtype)
  agrees([x, table, labels], config(mode))


@pytest.mark.parametrize("mode", MODES)
def test_uniform(mode):
  x, table, labels = draw(64, 128, 256)
  loss = linear_cross_entropy(
    jnp.zeros_like(x),
    table,
    labels,
    implementation="pallas",
    config=config(mode),
  )
  np.testing.assert_allclose(loss, np.log(256), rtol=1e-6)
  agrees([jnp.zeros_like(x), table, labels], config(mode))


@pytest.mark.parametrize("mode", MODES)
def test_weights_ignore_what_a_token_holds(mode):
  """A token of weight 0 may hold NaN and any label; padding words too."""
  x, table, labels = draw(40, 128, 200)
  labels %= 180
  weights = jnp.asarray(np.arange(40) % 3, jnp.float32)
  bad = weights == 0
  poisoned = [
    jnp.where(bad[:, None], jnp.nan, x),
    table.at[180:].set(jnp.nan),
    jnp.where(bad, -7, labels),
  ]

  def run(arrays):
    def total(x, table):
      return linear_cross_entropy(
        x,
        table,
        arrays[2],
        weights=weights,
        valid_vocab_size=180,
        implementation="pallas",
        config=config(mode),
      ).sum()

    return jax.value_and_grad(total, (0, 1))(*arrays[:2])

  want, got = run([x, table, labels]), run(poisoned)
  for w, g in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_array_equal(w, g)
  assert not got[1][0][bad].any() and not got[1][1][180:].any()
  agrees(
    [x, table, labels], config(mode), weights=weights, valid_vocab_size=180
  )


@pytest.mark.parametrize("mode", MODES)
def test_all_weights_zero(mode):
  x, table, labels = draw(40, 128, 200)

  def total(x, table):
    return linear_cross_entropy(
      x,
      table,
      labels,
      weights=jnp.zeros(40),
      implementation="pallas",
      config=config(mode),
    ).sum()

  loss, gradients = jax.value_and_grad(total, (0, 1))(x * jnp.nan, table)
  assert loss == 0 and not any(g.any() for g in gradients)


def test_labels_outside_are_nan():
  x, table, _ = draw(4, 128, 200)
  labels = jnp.asarray([0, 179, 180, -1])
  loss = linear_cross_entropy(
    x, table, labels, valid_vocab_size=180, implementation="pallas"
  )
  np.testing.assert_array_equal(np.isnan(loss), [False, False, True, True])


def test_labels_outside_raise_under_checkify(implementation="pallas"):
  """`checkify` turns the documented NaN into an error with a message."""
  x, table, _ = draw(4, 128, 200)

  @jax.jit
  @functools.partial(checkify.checkify, errors=checkify.user_checks)
  def loss(labels, weights):
    return linear_cross_entropy(
      x, table, labels, weights=weights, implementation=implementation
    )

  loss(jnp.asarray([0, 1, 199, 777]), jnp.asarray([1.0, 1, 1, 0]))[0].throw()
  error, _ = loss(jnp.asarray([0, 1, 200, 3]), jnp.ones(4))
  with pytest.raises(checkify.JaxRuntimeError, match="from 0 to 199"):
    error.throw()


@pytest.mark.no_interpreter
@pytest.mark.parametrize("implementation", ["xla", None])
def test_labels_outside_raise_off_tpu(implementation):
  test_labels_outside_raise_under_checkify(implementation)


# --- transformations ----------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("table_axis", [None, 0])
def test_vmap(mode, table_axis):
  """Mapped over x and labels, with one table for all or with one for each."""
  examples = [draw(20, 64, 150, seed=i) for i in range(2)]
  x, table, labels = map(jnp.stack, zip(*examples, strict=True))
  if table_axis is None:
    table = table[0]
  kernel = functools.partial(
    linear_cross_entropy, implementation="pallas", config=config(mode)
  )
  mapped = [
    jax.vmap(f, (0, table_axis, 0))
    for f in (kernel, linear_cross_entropy_reference)
  ]
  numerics.assert_agrees(*mapped, [x, table, labels], softmax=True)


def compiled_text(function, *specs):
  return v5e.compile(function, *specs).as_text() or ""


SPECS = (
  jax.ShapeDtypeStruct((512, 256), jnp.bfloat16),
  jax.ShapeDtypeStruct((1024, 256), jnp.float32),
  jax.ShapeDtypeStruct((512,), jnp.int32),
)


@v5e.needs_compiler
@pytest.mark.no_interpreter
@pytest.mark.parametrize("mode", MODES)
def test_compiles_under_vmap_and_checkpoint(mode):
  def loss(x, table, labels):
    function = functools.partial(
      linear_cross_entropy, config=config(mode, rows=512)
    )
    mapped = jax.vmap(jax.checkpoint(function), (0, None, 0))
    return mapped(x.reshape(2, 256, 256), table, labels.reshape(2, 256)).sum()

  text = compiled_text(jax.grad(loss, (0, 1)), *SPECS)
  assert "linear_cross_entropy_bwd" in text


@v5e.needs_compiler
@pytest.mark.no_interpreter
@pytest.mark.parametrize("rows", [256, 512])
@pytest.mark.parametrize("mode", MODES)
def test_no_logits_in_hbm(mode, rows):
  """Temporaries stay far below [tokens, V], but for what `chunked` keeps."""
  n, d, v = 512, 256, 64 * 1024

  def loss(x, table, labels):
    return linear_cross_entropy(
      x, table, labels, config=config(mode, 256, rows)
    ).sum()

  compiled = v5e.compile(
    jax.value_and_grad(loss, (0, 1)),
    jax.ShapeDtypeStruct((n, d), jnp.bfloat16),
    jax.ShapeDtypeStruct((v, d), jnp.float32),
    jax.ShapeDtypeStruct((n,), jnp.int32),
  )
  memory = compiled.memory_analysis()
  kept = 1.1 * n * v * 2 if mode == "chunked" else 0
  assert memory.temp_size_in_bytes < kept + n * v / 8


# --- mutants ------------------------------------------------------------------


def mutated(module, old, new):
  """`linear_cross_entropy` upon a mutant of one pass."""
  copy = mutation.mutant(module, old, new)
  if module is MODULE:
    return copy.linear_cross_entropy
  main = mutation.mutant(MODULE, "dimension", "dimension")
  name = "forward" if module is FORWARD else "backward"
  setattr(main, name, getattr(copy, name))
  return main.linear_cross_entropy
