"""What is particular to RoPE."""

import functools
import importlib

import hypothesis
import jax
import jax.numpy as jnp
import mutation
import numerics
import numpy as np
import pytest
import v5e
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pallas_gemma import kernels
from pallas_gemma.kernels import RopeConfig, apply_rope, apply_rope_reference

MODULE = importlib.import_module("pallas_gemma.kernels._rope.kernel")
KERNEL = functools.partial(apply_rope, implementation="pallas")
SMALL = RopeConfig(rows=128)


def draw(shape, dtype=jnp.float32, top=1000, seed=0):
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
  return [x, jnp.asarray(rng.integers(0, top, shape[:2], np.int32))]


@hypothesis.settings(max_examples=8)
@hypothesis.given(
  batch=st.integers(1, 3),
  length=st.integers(1, 70),
  heads=st.integers(1, 20),
  half=st.one_of(st.integers(1, 80), st.sampled_from([32, 64, 128])),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  top=st.sampled_from([1, 8192, 1_000_000]),
  base=st.sampled_from([10_000.0, 500_000.0]),
  split_heads=st.booleans(),
)
def test_any_shape_meets_the_bar(
  batch, length, heads, half, dtype, top, base, split_heads
):
  config = RopeConfig(rows=128, heads=16 if split_heads else None)
  numerics.assert_agrees(
    functools.partial(KERNEL, base_frequency=base, config=config),
    functools.partial(apply_rope_reference, base_frequency=base),
    draw((batch, length, heads, 2 * half), dtype, top),
  )


@functools.cache
def problem(*shape):
  """Arrays, and what is expected of them: the same for all mutants."""
  arrays = draw(shape, top=1_000_000)
  return arrays, *numerics.expected(apply_rope_reference, arrays)


TWO_TILES = (1, 150, 2, 256)  # the second one ragged


def agrees(*shape):
  arrays, plain, truth = problem(*shape)
  kernel = functools.partial(KERNEL, config=SMALL)
  got = numerics.value_and_gradients(kernel, arrays, jit=True)
  numerics.assert_within_bar(got, plain, truth)


def forward_for_backward(p, a, x, sign):
  del sign
  return ROTATED(p, a, x, 1)


def negative_sine(angle):
  sin, cos = SIN_COS(angle)
  return -sin, cos


def rotate_lanes_back(x, sin, cos):
  return ROTATE_LANES(x, -sin, cos)


def bfloat16_positions(positions):
  return BY_TOKEN(positions).astype(jnp.bfloat16).astype(jnp.float32)


ROTATED, SIN_COS = MODULE.rotated, MODULE.sin_cos
ROTATE_LANES, BY_TOKEN = MODULE._rotate_lanes, MODULE._by_token
MUTANTS = {
  "backward turns forward": ("rotated", forward_for_backward),
  "halves' signs": ("sin_cos", negative_sine),
  "bfloat16 phases": ("_by_token", bfloat16_positions),
  "first tile's positions": ("_tile_of_tokens", lambda i, j: (0, 0)),
  "always 10,000": (
    "_timescale",
    lambda p, a, h: MODULE.rope_timescale(h // 2, 1e4 + 1, jnp.float32)[None],
  ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name, monkeypatch):
  problem(*TWO_TILES)  # not by the mutant
  monkeypatch.setattr(MODULE, *MUTANTS[name])
  mutation.assert_killed(agrees, *TWO_TILES)


def test_rotated_lanes_mutant_dies(monkeypatch):
  shape = (1, 20, 2, 64)
  agrees(*shape)
  monkeypatch.setattr(MODULE, "_rotate_lanes", rotate_lanes_back)
  mutation.assert_killed(agrees, *shape)


def test_the_mutants_original_lives():
  agrees(*TWO_TILES)


def test_halves_rotate_against_each_other():
  """Not neighbouring pairs: a quarter turn of the first frequency."""
  x = jnp.arange(1.0, 9.0).reshape(1, 1, 1, 8)
  y = apply_rope_reference(x, jnp.array([[1]]))
  cos, sin = np.cos(1.0), np.sin(1.0)
  np.testing.assert_allclose(y[0, 0, 0, 0], 1 * cos - 5 * sin, rtol=1e-6)
  np.testing.assert_allclose(y[0, 0, 0, 4], 5 * cos + 1 * sin, rtol=1e-6)


def test_preserves_norms_and_relative_position():
  with jax.enable_x64(True):
    x, p = numerics.widened(draw((2, 6, 3, 64), top=50))
    rotate = apply_rope_reference
    np.testing.assert_allclose(
      jnp.linalg.norm(rotate(x, p), axis=-1), jnp.linalg.norm(x, axis=-1)
    )
    scores = [
      jnp.einsum("bqnh,bknh->bnqk", rotate(x, p + shift), rotate(x, p + shift))
      for shift in (0, 1234)
    ]
    np.testing.assert_allclose(*scores, rtol=1e-9, atol=1e-9)


def test_position_zero_is_the_identity():
  x, _ = draw((1, 5, 2, 64))
  np.testing.assert_array_equal(KERNEL(x, jnp.zeros((1, 5), jnp.int32)), x)


def test_vmap():
  numerics.assert_agrees(
    jax.vmap(KERNEL), jax.vmap(apply_rope_reference), draw3((2, 1, 20, 2, 128))
  )


def draw3(shape):
  x, _ = draw(shape)
  return [x, jnp.asarray(np.arange(np.prod(shape[:3])).reshape(shape[:3]))]


@v5e.needs_compiler
@pytest.mark.no_interpreter
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_any_head_size_compiles_for_v5e(heads, head_size):
  def run(x, positions):
    y, vjp = jax.vjp(lambda x: apply_rope(x, positions), x)
    return y, vjp(y)

  x = jax.ShapeDtypeStruct((2, 500, heads, head_size), jnp.bfloat16)
  positions = jax.ShapeDtypeStruct((2, 500), jnp.int32)
  text = v5e.compile(run, x, positions).as_text() or ""
  assert "apply_rope_fwd" in text and "apply_rope_bwd" in text


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_split_over_a_mesh(kind):
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
  x, positions = draw((4, 10, 2, 128))
  gradient = jax.grad(lambda x, p: (KERNEL(x, p) ** 3).sum())
  want = gradient(x, positions)
  x = jax.device_put(
    x, NamedSharding(mesh, PartitionSpec("data", None, "model"))
  )
  rules = {"B": "data", "N": "model"} if kind == AxisType.Auto else {}
  with jax.set_mesh(mesh), kernels.sharding(mesh, rules):
    got = jax.jit(gradient)(x, positions)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "x, positions, kwargs, message",
  [
    ((2, 8, 4, 63), (2, 8), {}, "even head size H, got 63"),
    ((2, 8, 64), (2, 8), {}, r"x must be \[B, T, N, H\]"),
    ((2, 8, 4, 64), (9,), {}, r"positions must be \(2, 8\)"),
    ((2, 8, 4, 64), (2, 8), {"base_frequency": 0}, "must be positive, got 0"),
  ],
)
def test_bad_input_is_refused(x, positions, kwargs, message):
  with pytest.raises(ValueError, match=f"apply_rope: .*{message}"):
    apply_rope(jnp.zeros(x), jnp.zeros(positions, jnp.int32), **kwargs)


def test_float_positions_are_refused():
  with pytest.raises(ValueError, match="positions must be integers, got float"):
    apply_rope(jnp.zeros((2, 8, 4, 64)), jnp.zeros((2, 8)))


@pytest.mark.parametrize("kwargs", [{"rows": 100}, {"rows": 0}, {"heads": 8}])
def test_config_is_validated_at_birth(kwargs):
  with pytest.raises(ValueError, match="RopeConfig: .* multiple of"):
    RopeConfig(**kwargs)
