"""Scale, window and RoPE's base of flash attention as traced values."""

import functools

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
import v5e
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pallas_gemma.kernels import (
  FlashAttentionConfig,
  Rope,
  flash_attention,
  flash_attention_reference,
)

CONFIG = FlashAttentionConfig(
  block_q=128, block_kv=128, rows=128, block_q_bwd=128, block_kv_bwd=128
)
KERNEL = functools.partial(
  flash_attention, implementation="pallas", config=CONFIG
)
SCALE = jnp.float32(0.11)


def draw(t, h, seed=0, dtype=jnp.float32, n=2):
  rng = np.random.default_rng(seed)
  return [
    jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
    for shape in ((2, t, n, h), (2, t, 1, h), (2, t, 1, h))
  ]


def positions_of(t):
  rng = np.random.default_rng(7)
  return jnp.asarray(rng.integers(0, 300, (2, t)), jnp.int32)


def ids_of(t):
  return jnp.asarray(np.sort(np.random.default_rng(3).integers(0, 3, (2, t))))


def called(function, **kwargs):
  """With some of scale, window and base as further arguments, by name."""

  def of(q, k, v, values):
    given = dict(values)
    base = given.pop("base", None)
    if base is not None:
      # The gradient of the base is the reference's alone.
      base = jax.lax.stop_gradient(base)
      given["rope"] = Rope(positions_of(q.shape[1]), base)
    return function(q, k, v, **kwargs, **given)

  return of


def agrees(values, *draws, **kwargs):
  names, leaves = list(values), list(values.values())

  def of(function):
    call = called(function, **kwargs)
    return lambda q, k, v, *leaves: call(
      q, k, v, zip(names, leaves, strict=True)
    )

  numerics.assert_agrees(
    of(KERNEL),
    of(flash_attention_reference),
    *([*qkv, *leaves] for qkv in draws),
    softmax=True,
  )


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scale_and_its_gradient(scale):
  """Learned, of any sign; several draws, as its gradient is one number."""
  draws = [draw(40, 64, seed) for seed in range(4)]
  agrees({"scale": jnp.float32(scale)}, *draws, return_lse=True)


def test_scale_under_a_soft_cap_in_bfloat16():
  draws = [draw(70, 64, seed, jnp.bfloat16) for seed in range(4)]
  agrees({"scale": SCALE}, *draws, logits_soft_cap=2.0, is_causal=True)


@pytest.mark.parametrize(
  "window, kwargs",
  [
    ((20, 5), {}),
    ((140, 0), {"is_causal": True, "segment_ids": ids_of(300)}),
    ((2**31 - 1, 2**31 - 1), {}),
  ],
  ids=["both sides", "segments", "no limit"],
)
def test_window(window, kwargs):
  left, right = map(jnp.int32, window)

  def of(function):
    return lambda q, k, v, left, right: function(
      q, k, v, local_window_size=(left, right), **kwargs
    )

  arrays = [*draw(300, 64), left, right]
  numerics.assert_agrees(
    of(KERNEL), of(flash_attention_reference), arrays, softmax=True
  )


@pytest.mark.parametrize("h", [64, 256], ids=["before", "inside"])
def test_base(h):
  """Where the kernel cannot rotate inside, its passes do it before."""

  def of(function):
    rope = positions_of(140)
    return lambda q, k, v, base: function(
      q,
      k,
      v,
      is_causal=True,
      rope=Rope(rope, jax.lax.stop_gradient(base)),
    )

  numerics.assert_agrees(
    of(KERNEL),
    of(flash_attention_reference),
    [*draw(140, h), jnp.float32(100.0)],
    softmax=True,
  )


def test_vmap_over_all_three():
  q, k, v = draw(130, 256)
  scales = jnp.float32([0.1, 0.02])
  windows, bases = jnp.int32([5, 100]), jnp.float32([100.0, 1e4])

  def loss(function, q, scale, window, base):
    out = function(
      q,
      k.astype(q.dtype),
      v.astype(q.dtype),
      scale=scale,
      is_causal=True,
      local_window_size=(window, 0),
      rope=Rope(positions_of(130), base),
    )
    return (out**2).sum()

  def gradients(function):
    return jax.grad(functools.partial(loss, function), (0, 1))

  def by_reference(arrays):
    q, scales = arrays
    each = [
      gradients(flash_attention_reference)(q, s, int(w), float(b))
      for s, w, b in zip(scales, windows, bases, strict=True)
    ]
    return [np.stack(gradient) for gradient in zip(*each, strict=True)]

  mapped = jax.vmap(gradients(KERNEL), (None, 0, 0, 0))
  got = jax.jit(mapped)(q, scales, windows, bases)
  plain = by_reference([q, scales])
  with jax.enable_x64(True):
    truth = by_reference(numerics.widened([q, scales]))
  named = [
    {"gradient of q": np.asarray(d, np.float64)} for d, _ in (got, plain, truth)
  ]
  numerics.assert_within_bar(*named, softmax=True)
  np.testing.assert_allclose(got[1], truth[1], rtol=2e-4)


# --- elsewhere than in the interpreter ----------------------------------------


def layers(q, k, v, positions, scales, windows, bases):
  """Local and global layers, one after the other in a scan."""

  def layer(x, of_layer):
    scale, window, base = of_layer
    out = flash_attention(
      x,
      k,
      v,
      scale=scale,
      is_causal=True,
      local_window_size=(window, 0),
      rope=Rope(positions, base),
    )
    return x + out, None

  return jax.lax.scan(layer, q, (scales, windows, bases))[0]


@v5e.needs_compiler
@pytest.mark.no_interpreter
def test_a_scan_over_layers_compiles_at_real_sizes():
  def gradients(q, k, v, positions, scales, windows, bases):
    def loss(q, scales):
      out = layers(q, k, v, positions, scales, windows, bases)
      return out.astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1))(q, scales)

  q = jax.ShapeDtypeStruct((1, 8192, 8, 256), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, 8192, 1, 256), jnp.bfloat16)
  integers = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
  numbers = jax.ShapeDtypeStruct((4,), jnp.float32)
  windows = jax.ShapeDtypeStruct((4,), jnp.int32)
  text = v5e.compile(gradients, q, k, k, integers, numbers, windows, numbers)
  assert "flash_attention_bwd" in (text.as_text() or "")


@pytest.mark.no_interpreter
def test_a_mesh():
  """Replicated scalars beside a batch that is split; off TPU the reference."""
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
  q, k, v = draw(20, 64)

  def loss(q, scale, window):
    out = flash_attention(q, k, v, scale=scale, local_window_size=window)
    return (out**2).sum()

  gradient = jax.jit(jax.grad(loss, (0, 1)))
  want = gradient(q, SCALE, jnp.int32(5))
  with jax.set_mesh(mesh):
    q, k, v = (
      jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
      for x in (q, k, v)
    )
    got = gradient(q, SCALE, jnp.int32(5))
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)


def test_a_base_keeps_its_kind_as_an_argument_of_jit():
  """A number is known when the function is traced, an array is not."""
  kinds = []

  @jax.jit
  def trace(rope):
    kinds.append(isinstance(rope.base_frequency, float))
    return rope

  positions = positions_of(8)
  assert trace(Rope(positions, 500.0)).base_frequency == 500.0
  assert trace(Rope(positions, jnp.float32(500.0))).base_frequency == 500.0
  assert kinds == [True, False]


# --- refusals -----------------------------------------------------------------


def gradient_of_base(implementation):
  q, k, v = draw(8, 64)

  def loss(base):
    rope = Rope(positions_of(8), base)
    out = flash_attention(q, k, v, rope=rope, implementation=implementation)
    return (out**2).sum()

  return jax.grad(loss)(100.0)


def test_the_gradient_of_the_base_is_the_references_alone():
  assert gradient_of_base("xla") != 0
  assert gradient_of_base(None) == gradient_of_base("xla")
  with pytest.raises(NotImplementedError, match="has no gradient of base"):
    gradient_of_base("pallas")


@pytest.mark.parametrize(
  "name, value, message",
  [
    ("logits_soft_cap", 2.0, "known when the program is traced"),
    ("scale", [1.0], "scale must be a single number"),
    ("scale", True, "scale must be a single number, got bool"),
    ("local_window_size", 2.0, "local_window_size must be integers"),
    (
      "local_window_size",
      [2, 0],
      r"must be \(\) \(a single number\), got \(2,\)",
    ),
  ],
)
def test_what_is_refused(name, value, message):
  q, k, v = draw(8, 64)

  @jax.jit
  def traced(value):
    return flash_attention(q, k, v, **{name: value})

  with pytest.raises(ValueError, match=f"flash_attention: .*{message}"):
    traced(jnp.asarray(value))
