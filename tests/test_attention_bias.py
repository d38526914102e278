"""A bias that is an array, and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
import small_attention
from jax.sharding import AxisType
from pallas_gemma.kernels import (
  flash_attention,
  flash_attention_reference,
  sharding,
)
from small_attention import MEMORY, NARROW, assert_same, mesh_of


def draw(*sizes):
  """q, k, v and a bias, of the last size."""
  *sizes, shape = sizes
  bias = np.random.default_rng(2).standard_normal(shape, np.float32)
  return [*small_attention.draw(*sizes), jnp.asarray(bias)]


def with_bias(function, **kwargs):
  return lambda q, k, v, bias: function(q, k, v, bias=bias, **kwargs)


MASK = jnp.asarray(np.random.default_rng(1).random((1, 1, 40, 70)) < 0.7)
CASES = {
  "of heads, of a batch, soft cap, dropout": (
    (2, 40, 40, 2, 1, 64, (1, 2, 40, 40)),
    {
      "is_causal": True,
      "logits_soft_cap": 5.0,
      "dropout_rate": 0.2,
      "dropout_seed": 1,
    },
  ),
  "shared by heads, of keys, with a mask": (
    (1, 40, 70, 4, 2, 64, (1, 1, 1, 70)),
    {"mask": MASK, "return_lse": True},
  ),
  "flat, in calls of 128 keys": (
    (1, 16, 150, 2, 1, 128, (1, 2, 16, 150)),
    {"is_causal": True, "query_offset": 134},
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_meet_the_bar(name, monkeypatch):
  shape, kwargs = CASES[name]
  arrays = draw(*shape)
  if "calls" in name:
    monkeypatch.setattr(MEMORY, "keys_that_fit", lambda *_: 128)
  if "flat" in name:
    kwargs = kwargs | {"layout": "BT(NH)", "head_size": shape[5]}
    arrays[:3] = [x.reshape(*x.shape[:2], -1) for x in arrays[:3]]
  numerics.assert_agrees(
    with_bias(NARROW, **kwargs),
    with_bias(flash_attention_reference, **kwargs),
    arrays,
    softmax=True,
  )


def test_it_may_hide_keys_and_be_mapped():
  q, k, v, bias = draw(4, 8, 8, 2, 1, 64, (2, 1, 2, 8, 8))
  bias = bias.at[..., 3].set(-jnp.inf).at[..., 5].set(jnp.finfo(bias.dtype).min)
  q, k, v = (x.reshape(2, 2, *x.shape[1:]) for x in (q, k, v))

  def run(function):
    def loss(bias):
      return jnp.sin(jax.vmap(with_bias(function))(q, k, v, bias)).sum()

    return jax.value_and_grad(loss)(bias)

  for got, want in zip(
    run(NARROW), run(flash_attention_reference), strict=True
  ):
    assert_same(got, want)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_bias_is_split_over_a_mesh(kind):
  mesh = mesh_of(kind)

  def run(function, arrays):
    def loss(arrays):
      return jnp.sin(with_bias(function, is_causal=True)(*arrays)).sum()

    return jax.grad(loss)(arrays)

  for parts, heads in ((1, 4), (2, 1)):
    arrays = draw(2, 8, 8, 4, 2, 16, (parts, heads, 8, 8))
    want = run(flash_attention_reference, arrays)
    with jax.set_mesh(mesh), sharding(mesh, {"B": "data", "N": "model"}):
      got = jax.jit(functools.partial(run, flash_attention))(arrays)
    for x, y in zip(got, want, strict=True):
      assert_same(x, y)


@pytest.mark.no_interpreter
def test_tokens_in_the_order_of_a_context():
  arrays = draw(1, 16, 16, 2, 1, 16, (1, 2, 16, 16))
  kwargs = {"is_causal": True, "context_parts": 2}
  got = with_bias(flash_attention, **kwargs)(*arrays)
  want = with_bias(flash_attention_reference, **kwargs)(*arrays)
  assert_same(got, want)


def test_what_is_no_number_is_kept():
  """In the values' gradient and, with sinks, in lse: of a ragged length."""
  q, k, v, bias = draw(1, 8, 8, 2, 1, 64, (1, 2, 8, 8))
  q = q.at[0, 3, 1, 5].set(jnp.nan)
  function = functools.partial(
    flash_attention, bias=bias, sinks=jnp.ones(2), return_lse=True
  )

  def loss(v, implementation):
    out, lse = function(q, k, v, implementation=implementation)
    return out.sum(), lse

  for implementation in ("pallas", "xla"):
    gradient = jax.grad(loss, has_aux=True)
    d_v, lse = gradient(v, implementation)
    assert jnp.isnan(d_v).all()
    assert (jnp.isnan(lse) == jnp.isnan(q).any(axis=3).swapaxes(1, 2)).all()
