"""What is particular to RMSNorm."""

import functools
import re
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
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pallas_gemma import kernels
from pallas_gemma.kernels import RMSNormConfig, add_rms_norm, rms_norm

MODULE = sys.modules[rms_norm.__module__]
ROWS = sys.modules[kernels.Norm.__module__]  # what is done with a row
TPU = MODULE.tpu
KERNEL = functools.partial(rms_norm, implementation="pallas", scale_offset=1.0)
ADD_KERNEL = functools.partial(
  add_rms_norm, implementation="pallas", scale_offset=1.0
)


def draw(*shapes_and_dtypes, seed=0):
  rng = np.random.default_rng(seed)
  return [
    jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
    for shape, dtype in shapes_and_dtypes
  ]


dtypes = st.sampled_from([jnp.float32, jnp.bfloat16])
widths = st.one_of(
  st.integers(1, 300), st.sampled_from([1, 100, 128, 2047, 2048, 3072])
)


@hypothesis.settings(max_examples=8)
@hypothesis.given(
  rows=st.integers(1, 70),
  width=widths,
  dtype=dtypes,
  residual_dtype=dtypes,
  out_dtype=st.one_of(st.none(), dtypes),
  scale_dtype=st.one_of(st.none(), dtypes),
  offset=st.sampled_from([0.0, 1.0]),
  epsilon=st.sampled_from([1e-6, 1e-5, 0.1]),
  tile=st.sampled_from([16, 32, 64]),
  add=st.booleans(),
)
def test_any_shape_meets_the_bar(
  rows,
  width,
  dtype,
  residual_dtype,
  out_dtype,
  scale_dtype,
  offset,
  epsilon,
  tile,
  add,
):
  has_scale = scale_dtype is not None
  kwargs = {"epsilon": epsilon, "scale_offset": offset * has_scale}
  function = add_rms_norm if add else rms_norm
  reference = getattr(kernels, f"{function.__name__}_reference")

  def plain(x, *others):
    # The truth is not rounded.
    own = None if x.dtype == jnp.float64 else out_dtype
    return reference(x, *others, out_dtype=own, **kwargs)

  shapes = [((rows, width), dtype)]
  shapes += [((rows, width), residual_dtype)] * add
  shapes += [((width,), scale_dtype)] * has_scale
  seeds = range(-(-64 // width))  # enough sums in dscale for its statistics
  numerics.assert_agrees(
    functools.partial(
      function,
      implementation="pallas",
      config=RMSNormConfig(rows=tile),
      out_dtype=out_dtype,
      **kwargs,
    ),
    plain,
    *(draw(*shapes, seed=i) for i in seeds),
  )


@functools.cache
def problem(shape, dtype, magnitude):
  """Arrays, and what is expected of them: the same for all mutants."""
  x, scale = draw((shape, dtype), (shape[-1:], jnp.float32))
  arrays = [x * magnitude, scale]
  reference = functools.partial(kernels.rms_norm_reference, scale_offset=1.0)
  return arrays, *numerics.expected(reference, arrays)


def agrees(function, shape=(50, 100), dtype=jnp.float32, magnitude=1.0):
  """The bar on two tiles, the second one ragged."""
  arrays, plain, truth = problem(shape, dtype, magnitude)
  kernel = functools.partial(
    function,
    implementation="pallas",
    scale_offset=1.0,
    config=RMSNormConfig(rows=32),
  )
  got = numerics.value_and_gradients(kernel, arrays, jit=True)
  numerics.assert_within_bar(got, plain, truth)


def no_epsilon(self, x):
  return jnp.mean(x * x, axis=-1, keepdims=True)


def no_projection(self, x, scale, dy):
  _, dscale = ORIGINAL(self, x, scale, dy)
  r = jax.lax.rsqrt(self._mean_square(x))
  return r * dy * self._gain(scale), dscale


def r_once_too_often(self, x, scale, dy):
  _, dscale = ORIGINAL(self, x, scale, dy)
  r = jax.lax.rsqrt(self._mean_square(x))
  g = dy * self._gain(scale)
  return r * (g - x * jnp.mean(g * x, axis=-1, keepdims=True) * r**3), dscale


def dy_for_g(self, x, scale, dy):
  _, dscale = ORIGINAL(self, x, scale, dy)
  r = jax.lax.rsqrt(self._mean_square(x))
  g = dy * self._gain(scale)
  return r * (g - x * jnp.mean(dy * x, axis=-1, keepdims=True) * r**2), dscale


def scale_without_the_norm(self, x, scale, dy):
  return ORIGINAL(self, x, scale, dy)[0], dy * x


def not_cleared(tile, end, axis):
  del end, axis
  return tile


def last_alone(ref, part):
  ref[...] = part


def parallel(vmem_bytes):
  return pltpu.CompilerParams(
    dimension_semantics=("parallel",), vmem_limit_bytes=vmem_bytes
  )


ORIGINAL = ROWS.RowNorm.gradients
MUTANTS = {
  "ragged rows reach dscale": (TPU, "zero_past", not_cleared),
  "only the last tile": (MODULE, "_add", last_alone),
  "parallel sum": (TPU, "compiler_params", parallel),
  "epsilon": (ROWS.RowNorm, "_mean_square", no_epsilon),
  "no projection": (ROWS.RowNorm, "gradients", no_projection),
  "r once too often": (ROWS.RowNorm, "gradients", r_once_too_often),
  "offset dropped": (ROWS.RowNorm, "_gain", lambda self, scale: scale),
  "dy for g": (ROWS.RowNorm, "gradients", dy_for_g),
  "scale without the norm": (
    ROWS.RowNorm,
    "gradients",
    scale_without_the_norm,
  ),
}


@pytest.mark.parametrize("magnitude", [1e-2, 1.0])
def test_the_mutants_original_lives(magnitude):
  agrees(rms_norm, magnitude=magnitude)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name, monkeypatch):
  magnitude = 1e-2 if name == "epsilon" else 1.0  # where epsilon counts
  problem((50, 100), jnp.float32, magnitude)  # not by the mutant
  monkeypatch.setattr(*MUTANTS[name])
  mutation.assert_killed(agrees, rms_norm, (50, 100), jnp.float32, magnitude)


def test_bfloat16_arithmetic_dies(monkeypatch):
  check = functools.partial(agrees, dtype=jnp.bfloat16)
  check(rms_norm)
  monkeypatch.setattr(MODULE, "_float32", lambda ref: ref[...])
  mutation.assert_killed(check, rms_norm)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1e15])
def test_extreme_magnitudes(magnitude):
  """A mean square that underflows or nearly overflows."""
  agrees(rms_norm, magnitude=magnitude)


def test_zero_rows_stay_zero():
  x = jnp.zeros((4, 128))
  y, vjp = jax.vjp(KERNEL, x, jnp.zeros(128))
  dx, dscale = vjp(jnp.ones_like(x))
  assert not y.any() and not dscale.any() and jnp.isfinite(dx).all()


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0,)])
def test_empty_arrays(shape):
  y, vjp = jax.vjp(KERNEL, jnp.zeros(shape), jnp.zeros(shape[-1:]))
  assert y.shape == shape and vjp(y)[0].shape == shape


@pytest.mark.parametrize("scale_axis", [None, 0])
def test_vmap(scale_axis):
  """Mapped over x, with one scale for all or with one for each."""
  scale_shape = (128,) if scale_axis is None else (2, 128)
  arrays = draw(((2, 20, 128), jnp.float32), (scale_shape, jnp.float32))
  mapped = [
    jax.vmap(functools.partial(norm, scale_offset=1.0), (0, scale_axis))
    for norm in (
      functools.partial(rms_norm, implementation="pallas"),
      kernels.rms_norm_reference,
    )
  ]
  numerics.assert_agrees(*mapped, arrays)


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
def test_checkpoint_recomputes_the_kernel():
  def loss(x, scale):
    norm = functools.partial(rms_norm, scale_offset=1.0)
    return jnp.tanh(jax.checkpoint(norm)(x, scale)).astype(jnp.float32).sum()

  x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
  scale = jax.ShapeDtypeStruct((256,), jnp.float32)
  text = v5e.compile(jax.grad(loss, (0, 1)), x, scale).as_text() or ""
  assert "rms_norm_bwd" in text


@v5e.needs_compiler
@pytest.mark.no_interpreter
@pytest.mark.parametrize("width", [64, 100, 128, 256, 2048, 3072, 8192])
def test_any_width_compiles_for_v5e(width):
  """All four kernels, with a ragged last tile."""

  def run(x, residual, scale):
    def norms(x, residual, scale):
      y, h = add_rms_norm(x, residual, scale)
      return y, rms_norm(h, scale)

    y, vjp = jax.vjp(norms, x, residual, scale)
    return y, vjp(y)

  x = jax.ShapeDtypeStruct((1000, width), jnp.bfloat16)
  scale = jax.ShapeDtypeStruct((width,), jnp.float32)
  text = v5e.compile(run, x, x, scale).as_text() or ""
  kernels_in_it = set(re.findall("(?:add_)?rms_norm_(?:fwd|bwd)", text))
  assert len(kernels_in_it) == 4


# --- meshes -------------------------------------------------------------------


def mesh_of(kind):
  return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def split_loss(x, residual, scale):
  y, h = ADD_KERNEL(x, residual, scale)
  return ((y + KERNEL(h, scale)) ** 2).sum()


@pytest.mark.parametrize("how", ["explicit", "auto", "shard_map"])
def test_split_over_a_mesh(how):
  """Rows split over eight devices; dscale is summed over them."""
  kind = AxisType.Explicit if how == "explicit" else AxisType.Auto
  mesh = mesh_of(kind)
  x, r, scale = draw(*[((8, 6, 128), jnp.float32)] * 2, ((128,), jnp.float32))
  gradient = jax.grad(split_loss, (0, 1, 2))
  want = gradient(x, r, scale)
  spec = PartitionSpec("data", "model")
  if how == "shard_map":
    gradient = jax.grad(
      lambda *args: jax.shard_map(
        lambda *a: jax.lax.psum(split_loss(*a), ("data", "model")),
        mesh=mesh,
        in_specs=(spec, spec, PartitionSpec()),
        out_specs=PartitionSpec(),
      )(*args),
      (0, 1, 2),
    )
  put = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))
  rules = {"B": "data", "T": "model"} if how == "auto" else {}
  with jax.set_mesh(mesh), kernels.sharding(mesh, rules):
    got = jax.jit(gradient)(put(x), put(r), scale)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)
  assert got[0].sharding.spec[:2] == ("data", "model")


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
def test_compiles_for_eight_chips():
  mesh = jax.sharding.Mesh(
    np.reshape(v5e.devices("2x4", (2, 4, 1)), (4, 2)),
    ("data", "model"),
    axis_types=(AxisType.Explicit,) * 2,
  )
  split = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  x = jax.ShapeDtypeStruct((8, 512, 2048), jnp.bfloat16, sharding=split)
  scale = jax.ShapeDtypeStruct((2048,), jnp.float32, sharding=whole)
  norm = functools.partial(rms_norm, scale_offset=1.0)

  def gradient(x, scale):
    return jax.grad(lambda *a: norm(*a).astype(jnp.float32).sum(), (0, 1))(
      x, scale
    )

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    text = jax.jit(gradient).lower(x, scale).compile().as_text() or ""
  assert "rms_norm_bwd" in text and "all-gather" not in text


# --- refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
  "x, scale, kwargs, message",
  [
    ((8, 128), (64,), {}, r"scale must be \(128,\).*got \(64,\)"),
    ((), (1,), {}, "at least one dimension, got a scalar"),
    ((8, 128), None, {"scale_offset": 1.0}, "must be 0 without a scale"),
    ((8, 128), None, {"out_dtype": int}, "out_dtype must be float32"),
    ((8, 128), (128,), {"epsilon": -1.0}, "epsilon must not be negative"),
    (
      (8, 128),
      (128,),
      {"implementation": "cuda"},
      "'pallas', 'xla' or None, got 'cuda'",
    ),
  ],
)
def test_bad_input_is_refused(x, scale, kwargs, message):
  with pytest.raises(ValueError, match=f"rms_norm: .*{message}"):
    scale = None if scale is None else jnp.zeros(scale)
    rms_norm(jnp.zeros(x), scale, **kwargs)


def test_other_dtypes_are_refused():
  with pytest.raises(
    ValueError, match="x must be float32, bfloat16 or float16"
  ):
    rms_norm(jnp.zeros((8, 128), jnp.int8), jnp.zeros(128))
  with pytest.raises(ValueError, match="scale must be float32, bfloat16 or fl"):
    rms_norm(jnp.zeros((8, 128)), jnp.zeros(128, jnp.int32))


def test_residual_must_match():
  x = jnp.zeros((8, 128))
  with pytest.raises(ValueError, match=r"residual must be \(8, 128\)"):
    add_rms_norm(x, jnp.zeros((4, 128)), jnp.zeros(128))


@pytest.mark.parametrize("out", [None, "bfloat16", jnp.float16, jnp.float32])
@pytest.mark.parametrize(
  "x, residual",
  [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")],
)
def test_dtypes_are_those_of_plain_jnp(x, residual, out):
  """Of results and gradients; the sum has the wider of two."""
  arrays = draw(*[((8, 128), dtype) for dtype in (x, residual)])

  def run(implementation):
    norm = functools.partial(
      add_rms_norm, out_dtype=out, implementation=implementation
    )
    results, vjp = jax.vjp(norm, *arrays)
    return *results, *vjp(results)

  got, want = (run(way) for way in ("pallas", "xla"))
  assert [g.dtype for g in got] == [w.dtype for w in want]
  for g, w in zip(got, want, strict=True):
    g, w = (np.asarray(a, np.float32) for a in (g, w))
    np.testing.assert_allclose(g, w, rtol=2e-2, atol=2e-2)


def test_without_a_scale_and_split_widths():
  """A device with a part of each row; a stream in float32."""
  x, residual = draw(((8, 128), jnp.bfloat16), ((8, 128), jnp.float32))
  norm = functools.partial(ADD_KERNEL, scale_offset=0.0, out_dtype="bfloat16")
  want = norm(x, residual)
  mesh = mesh_of(AxisType.Explicit)
  put = functools.partial(
    jax.device_put, device=NamedSharding(mesh, PartitionSpec("data", "model"))
  )
  with jax.set_mesh(mesh):
    got = jax.jit(norm)(put(x), put(residual))
  for g, w in zip(got, want, strict=True):
    assert g.dtype == w.dtype
    g, w = (np.asarray(a, np.float32) for a in (g, w))
    np.testing.assert_allclose(g, w, rtol=1e-2)


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
def test_a_stream_in_float32_is_read_and_written_as_it_is():
  """Nothing but the kernels touches it."""

  def run(x, residual):
    norm = functools.partial(add_rms_norm, out_dtype=jnp.bfloat16)
    y, vjp = jax.vjp(norm, x, residual)
    return y, vjp(y)

  x = jax.ShapeDtypeStruct((1000, 2048), jnp.bfloat16)
  residual = jax.ShapeDtypeStruct((1000, 2048), jnp.float32)
  text = v5e.compile(run, x, residual).as_text() or ""
  assert "add_rms_norm_bwd" in text and " convert(" not in text


@pytest.mark.parametrize("rows", [0, -16, 12])
def test_config_is_validated_at_birth(rows):
  with pytest.raises(ValueError, match="positive multiple of 16"):
    RMSNormConfig(rows=rows)
