"""Weights in int8: what the numbers are, and what is computed with them."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import v5e
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from pallas_gemma.bench.suites import gemma_decode
from pallas_gemma.gemma import (
  Gemma,
  GemmaConfig,
  Sampler,
  Tokenizer,
  UserError,
  save_checkpoint,
)
from pallas_gemma.kernels import (
  Norm,
  QuantizedWeight,
  feed_forward,
  geglu,
  layer_einsum,
  scan_layers,
)

pytestmark = pytest.mark.no_interpreter
PRODUCTS = {  # of the model, and the dimensions that they sum over
  "BTD,NDH->BTNH": ((3, 16, 5), (-2,)),
  "BTD,CKDH->CBTKH": ((2, 3, 16, 5), (-2,)),
  "BTNH,NHD->BTD": ((3, 5, 16), (-3, -2)),
  "...D,VD->...V": ((7, 16), (-1,)),
  "BTD,DF->FTB": ((16, 6), (0,)),
  "BTD,BDF->FBT": ((2, 16, 6), (1,)),
}


def normal(seed, *shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


@given(
  shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
  data=st.data(),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
@settings(deadline=None, max_examples=25)
def test_is_within_half_a_step_of_the_weight(shape, data, dtype):
  ndim = len(shape)
  axis = st.integers(-ndim, ndim - 1)
  axes = data.draw(st.lists(axis, min_size=1, unique_by=lambda a: a % ndim))
  weight = normal(sum(shape), *shape, dtype=dtype)
  quantized = QuantizedWeight.quantize(weight, tuple(axes))
  assert quantized.values.dtype == jnp.int8
  exact = np.asarray(weight, np.float64)
  top = np.abs(exact).max(tuple(axes), keepdims=True)
  assert quantized.scale.shape == top.shape
  scale = np.asarray(quantized.scale, np.float64)
  np.testing.assert_allclose(scale, top / 127, rtol=3e-7)
  error = np.abs(np.asarray(quantized.values, np.float64) * scale - exact)
  assert (error <= 0.5001 * scale).all()


def test_a_channel_of_zeros_stays_zeros():
  weight = jnp.zeros((4, 3)).at[:, 1].set(2.0)
  again = QuantizedWeight.quantize(weight).astype(jnp.float32)
  np.testing.assert_array_equal(again, weight)


@pytest.mark.parametrize("subscripts", PRODUCTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_is_that_with_the_dequantized_weight(subscripts, dtype):
  shape, contracted = PRODUCTS[subscripts]
  weight = QuantizedWeight.quantize(normal(0, *shape), contracted)
  x = normal(1, 2, 4, *((3, 5) if "NH,N" in subscripts else (16,)), dtype=dtype)
  got = layer_einsum(subscripts, x, weight)
  wide = np.asarray(weight.values, np.float64) * np.asarray(weight.scale)
  want = np.einsum(subscripts, np.asarray(x, np.float64), wide)
  assert got.dtype == dtype
  # Each result is rounded once, to x's dtype, after sums in float32.
  rtol = 2**-8 if dtype == jnp.bfloat16 else 1e-5
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol, 2e-5)


def feed_forward_weights(layers=()):
  shapes = (*layers, 16, 24), (*layers, 16, 24), (*layers, 24, 16)
  return [0.3 * normal(i, *shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("op", [geglu, feed_forward])
def test_an_op_and_its_gradient_are_those_of_the_dequantized_weights(op):
  count = 2 if op is geglu else 3
  weights = [QuantizedWeight.quantize(w) for w in feed_forward_weights()]
  plain = [w.astype(jnp.float32) for w in weights]
  x, norm = normal(5, 2, 7, 16), Norm(normal(6, 16), scale_offset=1.0)

  def run(weights, x, norm):
    y, vjp = jax.vjp(lambda x, n: op(x, *weights[:count], norm=n), x, norm)
    return y, vjp(jnp.cos(y))

  got, want = run(weights, x, norm), run(plain, x, norm)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_layers_of_a_stack_in_each_way_that_there_is():
  stacks = [QuantizedWeight.quantize(w) for w in feed_forward_weights((3,))]
  x = normal(5, 7, 16)
  want = x
  for layer in range(3):
    own = [w[layer] for w in stacks]
    want = feed_forward(want, *own, residual=True)

  def by_index(x, layer):
    return feed_forward(x, *stacks, layer=layer, residual=True), None

  def one(x, own):
    return feed_forward(x, *own, residual=True), None

  ways = [
    jax.lax.scan(by_index, x, jnp.arange(3)),
    jax.lax.scan(one, x, stacks),
    scan_layers(one, x, stacks, in_place=("values",)),
  ]
  near = functools.partial(np.testing.assert_allclose, rtol=1e-5)
  for got, _ in ways:
    near(got, want, atol=1e-6 * float(jnp.max(jnp.abs(want))))
  mapped = jax.vmap(functools.partial(feed_forward, x))(*stacks)
  near(mapped[1], feed_forward(x, *[w[1] for w in stacks]), atol=1e-5)


@pytest.mark.parametrize("rows", [37, 64])
def test_rows_are_the_weights_rows(rows):
  weight = QuantizedWeight.quantize(normal(0, rows, 8), -1)
  whole = np.asarray(weight.astype(jnp.float32))
  for index in (jnp.array([[rows - 1]]), jnp.array(33), jnp.array([5, 36])):
    got = weight[index].astype(jnp.float32)
    np.testing.assert_array_equal(got, whole[np.asarray(index)])
  assert weight[...].shape == weight[:rows].shape == (rows, 8)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(w_up=jnp.ones((16, 24))), "all weights must be QuantizedWeight"),
    (dict(implementation="pallas"), "implementation must be None or 'xla'"),
    (
      dict(w_up=QuantizedWeight.quantize(jnp.ones((16, 24)), -1)),
      "w_up must have int8 values, and scales",
    ),
    (
      dict(w_up=QuantizedWeight(jnp.ones((16, 24)), jnp.ones((1, 24)))),
      "w_up must have int8 values",
    ),
    (
      dict(w_up=QuantizedWeight.quantize(jnp.ones((16, 25)))),
      "the shape of w_gate",
    ),
  ],
)
def test_refuses_what_it_cannot_compute(changes, message):
  names = "w_gate", "w_up", "w_down"
  weights = map(QuantizedWeight.quantize, feed_forward_weights())
  arguments = dict(zip(names, weights, strict=True)) | changes
  with pytest.raises(ValueError, match=message):
    feed_forward(jnp.ones((4, 16)), **arguments)


@pytest.mark.no_interpreter
def test_a_weight_is_not_cast_to_integers():
  weight = jnp.full((3, 4), 0.5)
  for form in (weight, QuantizedWeight.quantize(weight)):
    with pytest.raises(ValueError, match="layer_einsum: x must be floats, got"):
      layer_einsum("BD,DF->BF", jnp.ones((2, 3), jnp.int32), form)


def test_refuses_what_it_cannot_quantize():
  with pytest.raises(ValueError, match="must be floats, got int32"):
    QuantizedWeight.quantize(jnp.ones((3, 4), jnp.int32))
  wrong: Any = (2, (), (0, -3), (0, -2), 1.0, "D")
  for contracted in wrong:
    with pytest.raises(ValueError, match="QuantizedWeight: contracted must be"):
      QuantizedWeight.quantize(jnp.ones((3, 4)), contracted)
  weight = QuantizedWeight.quantize(jnp.ones((3, 4)), -1)
  with pytest.raises(ValueError, match="1 where the product sums"):
    layer_einsum("BD,DF->BF", jnp.ones((2, 3)), weight)


def test_a_model_predicts_much_the_same():
  model = Gemma(GemmaConfig.tiny(96), rngs=nnx.Rngs(0))
  quantized = jax.jit(Gemma.quantize)(model)
  # Neither does anything to it.
  again = quantized.quantize().cast()
  assert jax.tree.all(jax.tree.map(jnp.array_equal, again, quantized))
  sizes = [sum(x.nbytes for x in jax.tree.leaves(m)) for m in (model, again)]
  assert sizes[1] < 0.28 * sizes[0]
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 96)
  want, got = model(tokens), quantized(tokens)
  error = jnp.std(got - want) / jnp.std(want)
  assert 0 < error < 0.05
  # Read with a cache, it is the same model.
  cache = quantized.init_cache(2, 16)
  hidden, cache = quantized.prefill(tokens[:, :8], jnp.array([8, 8]), cache)
  hidden, cache = quantized.decode(tokens[:, 8], cache)
  last = quantized.logits(hidden)
  np.testing.assert_allclose(last, got[:, -1], rtol=2e-5, atol=2e-5)


def test_a_sampler_may_compute_with_it(tmp_path):
  tokenizer = Tokenizer.train(["The for statement. " * 20], vocab_size=280)
  model = Gemma(GemmaConfig.tiny(280), rngs=nnx.Rngs(0))

  def logprobs(model, **options):
    sample = Sampler(model, tokenizer, **options)
    (completion,) = sample(["The"], max_new_tokens=4, stop_tokens=())
    return completion.logprobs

  got = logprobs(model, weights="int8")
  assert got == logprobs(model.quantize()) != logprobs(model)
  with pytest.raises(UserError, match="a model in int8 cannot be saved"):
    save_checkpoint(tmp_path, model.quantize(), tokenizer)
  with pytest.raises(UserError, match="weights must be 'int8' or None"):
    Sampler(model, tokenizer, weights=cast(Any, "int4"))


@v5e.needs_compiler
@v5e.around_kernels
def test_a_step_reads_int8_and_copies_nothing():
  config = dataclasses.replace(GemmaConfig.gemma_2b(), num_layers=2)
  built = gemma_decode.step(config, (256,), 256, quantized=True)
  donated = built.placement.donated
  compiled = v5e.compile(built.function, *built.specs, donate_argnums=donated)
  analysis: Any = compiled.memory_analysis()
  assert analysis.temp_size_in_bytes < 1 << 20
