"""Linear cross-entropy of other heads: stored [D, V], with a bias, smoothed
labels, predictions; and soft targets.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from pallas_gemma import kernels
from pallas_gemma.kernels import (
  LinearCrossEntropyConfig,
  Teacher,
  linear_cross_entropy,
  linear_cross_entropy_reference,
  linear_soft_cross_entropy,
)

SOFT: Any = importlib.import_module(f"{kernels.__name__}._cross_entropy.soft")
KERNEL = functools.partial(linear_cross_entropy, implementation="pallas")


def config(mode: Any = "recompute", rows=256):
  return LinearCrossEntropyConfig(
    mode=mode, forward_words=128, backward_words=128, rows=rows, chunk=128
  )


def draw(n=24, d=72, v=200, dtype=jnp.float32):
  """x, a table, a bias, weights, and labels below 150."""
  rng = np.random.default_rng(0)

  def normal(*shape, scale=1.0):
    return jnp.asarray(scale * rng.standard_normal(shape), dtype)

  arrays = normal(n, d, scale=d**-0.5), normal(v, d), normal(v)
  weights = jnp.asarray(np.linspace(0, 1, n), jnp.float32)
  return [*arrays, weights, jnp.asarray(rng.integers(0, 150, n), jnp.int32)]


def called(function, x, table, bias, weights, labels, **kwargs):
  if kwargs.get("transposed"):
    table = table.T
  out = function(x, table, labels, bias=bias, weights=weights, **kwargs)
  if not kwargs.get("return_predictions"):
    return out
  loss, predictions = out
  return loss, predictions.log_probability, predictions.best


PADDED = {"valid_vocab_size": 150, "logits_soft_cap": 4.0, "z_loss": 1e-2}
EVERYTHING = {"label_smoothing": 0.1, "return_predictions": True}
# (rows, config, keywords)
CASES: dict[str, tuple[int, Any, dict[str, Any]]] = {
  "bias": (24, config(), PADDED),
  "transposed": (24, config(), {**PADDED, **EVERYTHING, "transposed": True}),
  "rows in blocks": (300, config(rows=128), {"transposed": True, **EVERYTHING}),
  "kept": (24, config("chunked"), {"valid_vocab_size": 150, **EVERYTHING}),
}


@pytest.mark.parametrize("name", CASES)
def test_head_meets_the_bar(name):
  rows, how, kwargs = CASES[name]
  numerics.assert_agrees(
    functools.partial(called, functools.partial(KERNEL, config=how), **kwargs),
    functools.partial(called, linear_cross_entropy_reference, **kwargs),
    draw(rows),
    softmax=True,
  )


@pytest.mark.parametrize(
  "sizes, dtype",
  [((16, 600, 200), jnp.float32), ((64, 128, 512), jnp.bfloat16)],
)
def test_wide_rows_and_bfloat16(sizes, dtype):
  """More columns than the gradient is computed in at a time."""
  kwargs = {"transposed": True, "label_smoothing": 0.1}
  numerics.assert_agrees(
    functools.partial(called, KERNEL, **kwargs),
    functools.partial(called, linear_cross_entropy_reference, **kwargs),
    draw(sizes[0], sizes[1], sizes[2], dtype),
    softmax=True,
  )


def test_tiles_leave_room_for_a_bias():
  """Whole in VMEM, where XLA may put it and its gradient: Gemma 2B's."""
  x = jax.ShapeDtypeStruct((8192, 2048), jnp.bfloat16)
  table = jax.ShapeDtypeStruct((256128, 2048), jnp.bfloat16)
  of_more, of_less = (
    LinearCrossEntropyConfig.for_problem(x, table, more=more)
    for more in (True, False)
  )
  assert (of_more.backward_words, of_less.backward_words) == (384, 512)


def test_vocabulary_split_over_a_mesh():
  """Each device has columns of the head, and their bias."""
  mesh = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  args = draw()
  kwargs = {**PADDED, **EVERYTHING, "transposed": True}

  def run(*args):
    def loss(x, table, bias):
      out = called(KERNEL, x, table, bias, args[3], args[4], **kwargs)
      return out[0].sum() + out[1].sum(), out

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*args[:3])

  want = run(*args)
  with jax.set_mesh(mesh), kernels.sharding(mesh, {"B": "data", "V": "model"}):
    got = jax.jit(run)(*args)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)


def test_predictions_are_the_softmax_s():
  """Of equal logits the first; nothing of a token without weight."""
  x, table, _, weights, labels = draw()
  table = table.at[120].set(3 * x[5]).at[70].set(3 * x[5])
  _, got = KERNEL(
    x, table, labels, weights=weights, return_predictions=True, z_loss=0.1
  )
  logits = x @ table.T
  want = jax.nn.log_softmax(logits)[jnp.arange(24), labels]
  np.testing.assert_allclose(got.log_probability[1:], want[1:], rtol=1e-5)
  np.testing.assert_array_equal(got.best[1:], jnp.argmax(logits, -1)[1:])
  assert got.best.dtype == jnp.int32 and got.log_probability[0] == 0


def of_optax(x, table, labels, smoothing):
  """As optax smooths: the rest of the probability over all words."""
  hot = jax.nn.one_hot(labels, table.shape[0])
  aim = (1 - smoothing) * hot + smoothing / table.shape[0]
  return -jnp.sum(aim * jax.nn.log_softmax(x @ table.T), axis=-1)


def test_label_smoothing_is_that_of_optax():
  x, table, _, _, labels = draw()
  got = linear_cross_entropy(x, table, labels, label_smoothing=0.2)
  np.testing.assert_allclose(got, of_optax(x, table, labels, 0.2), rtol=1e-5)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"transposed": True}, r"embedding must be \[D, V\] with D = 72"),
    ({"bias": jnp.zeros(72)}, r"bias must be \(200,\) \(V\), got \(72,\)"),
    ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1"),
    (
      {
        "label_smoothing": 0.1,
        "logits_soft_cap": 5.0,
        "config": config("chunked"),
      },
      "config.mode must be 'recompute' for label_smoothing with a soft cap",
    ),
  ],
)
def test_bad_input_is_refused(kwargs, message):
  x, table, _, _, labels = draw()
  with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
    linear_cross_entropy(x, table, labels, **kwargs)


# --- soft targets -------------------------------------------------------------

TEMPERATURE, CAP, VALID, V = 2.0, 5.0, 2500, 2700


def soft_arrays():
  rng = np.random.default_rng(0)
  shapes = (3, 5, 16), (V, 16), (V,), (3, 5, 8), (V, 8), (V,)
  arrays = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]
  return arrays, jnp.linspace(0, 1, 15).reshape(3, 5)


def soft_reference(x, table, bias, teacher, weights):
  """With all logits at once, and the targets."""
  z = CAP * jnp.tanh((x @ table.T + bias) / CAP) / TEMPERATURE
  t = (teacher[0] @ teacher[1].T + teacher[2]) / TEMPERATURE
  q = jax.nn.softmax(t[..., :VALID])
  return -weights * (q * jax.nn.log_softmax(z[..., :VALID])).sum(-1), q


@pytest.mark.no_interpreter
@pytest.mark.parametrize("is_taught", [False, True])
def test_soft_targets(is_taught, monkeypatch):
  """Three blocks, of a vocabulary that they do not divide but for padding."""
  monkeypatch.setattr(SOFT, "_BLOCK_NUMBERS", 1)
  assert SOFT._blocks(V, 15) == (900, 3) and SOFT._blocks(2701, 15) == (901, 3)
  (*student, tx, table, bias), weights = soft_arrays()
  aimed = functools.partial(
    soft_reference, teacher=(tx, table, bias), weights=weights
  )
  _, q = aimed(student[0], student[1], student[2])
  aim: Any = jnp.pad(q, ((0, 0), (0, 0), (0, V - VALID)))
  if is_taught:
    aim = Teacher(tx, table, bias)

  def both(function):
    y, vjp = jax.vjp(function, *student)
    return y, *vjp(jnp.cos(jnp.arange(15.0)).reshape(3, 5))

  got = both(
    lambda x, table, bias: linear_soft_cross_entropy(
      x,
      table,
      aim,
      weights=weights,
      bias=bias,
      logits_soft_cap=CAP,
      temperature=TEMPERATURE,
      valid_vocab_size=VALID,
    )
  )
  want = both(lambda *s: aimed(*s)[0])
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, atol=3e-6 * np.abs(w).max())


@pytest.mark.no_interpreter
def test_soft_targets_hold_one_block_of_logits():
  """Forward and backward, whatever the vocabulary."""
  rows, words = 1024, 1 << 18

  def loss(x, table, tx, ttable):
    return linear_soft_cross_entropy(x, table, Teacher(tx, ttable)).sum()

  shapes = (rows, 8), (words, 8), (rows, 8), (words, 8)
  args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  text = jax.jit(jax.grad(loss, (0, 1))).lower(*args).as_text()
  assert f"{rows}x{words}x" not in text and f"{rows}x{words // 8}xf32" in text


def test_bad_soft_targets_are_refused():
  x, table, *_ = draw()
  for targets, message in (
    (jnp.zeros((24, 100)), r"targets must be \(24, 200\)"),
    (Teacher(x[:3], table), r"targets.x must be \(24, 72\)"),
    (Teacher(x, table[:9]), r"targets.embedding must be \(200, 72\)"),
  ):
    with pytest.raises(ValueError, match=f"linear_soft_.*: {message}"):
      linear_soft_cross_entropy(x, table, targets)
