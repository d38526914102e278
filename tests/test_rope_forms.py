"""Forms of RoPE that models of today have, and their frequencies."""

import functools
import importlib
import math

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
from pallas_gemma.kernels import (
  Rope,
  RopeConfig,
  RopeFrequencies,
  apply_rope,
  apply_rope_reference,
  decode_attention,
  decode_attention_reference,
  flash_attention,
  flash_attention_reference,
)

KERNEL = functools.partial(
  apply_rope, implementation="pallas", config=RopeConfig(rows=128)
)
HF = RopeFrequencies.from_hugging_face


def draw(shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape, np.float32))


def positions_of(shape, top=1000):
  return jnp.asarray(np.random.default_rng(1).integers(0, top, shape, np.int32))


# --- rotations ----------------------------------------------------------------


def by_complex_numbers(x, angle, interleaved=False, scale=1.0):
  """Float64, one product of complex numbers for each pair; angle [B, T, F]."""
  x = np.array(x, np.float64)
  pairs = angle.shape[-1]
  if interleaved:
    first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
  else:
    first, second = slice(0, pairs), slice(pairs, 2 * pairs)
  turned = x[..., first] + 1j * x[..., second]
  turned = turned * scale * np.exp(1j * np.asarray(angle)[:, :, None])
  x[..., first], x[..., second] = turned.real, turned.imag
  return x


@hypothesis.settings(max_examples=4)
@hypothesis.given(
  heads=st.sampled_from([1, 3]),
  size=st.sampled_from([40, 64, 128, 256]),
  part=st.sampled_from([0.25, 0.5, 1.0]),
  interleaved=st.booleans(),
  scale=st.sampled_from([1.0, 1.25]),
  way=st.sampled_from(["frequencies", "streams", "phases", "base"]),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_any_form_meets_the_bar_and_is_a_rotation(
  heads, size, part, interleaved, scale, way, dtype
):
  shape = (2, 70, heads, size)
  pairs = size // 2 if way == "base" else int(size * part) // 2
  values = 1e4 ** (-np.arange(pairs) / pairs)
  kwargs = {"interleaved": interleaved}
  frequencies = RopeFrequencies(values, scale)
  positions = positions_of(shape[:2])
  angle = np.asarray(positions)[..., None] * np.float64(np.float32(values))
  if way == "streams":
    frequencies = frequencies.by_sections((pairs - 4, 3, 1))
    positions = positions_of((3, *shape[:2]))
    angle = np.concatenate(
      [
        np.asarray(positions)[stream, ..., None] * values[part]
        for stream, part in enumerate(
          (slice(0, pairs - 4), slice(pairs - 4, -1), slice(-1, None))
        )
      ],
      axis=-1,
    )
  if way in ("frequencies", "streams"):
    kwargs["frequencies"] = frequencies
  else:
    scale = 1.0
  if way == "phases":
    positions = None
    kwargs["phases"] = jnp.sin(angle), jnp.cos(angle)
  x = draw(shape).astype(dtype)
  numerics.assert_agrees(
    functools.partial(KERNEL, positions=positions, **kwargs),
    functools.partial(apply_rope_reference, positions=positions, **kwargs),
    [x],
  )
  want = by_complex_numbers(x, angle, interleaved, scale)
  tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-3
  got = KERNEL(x, positions, **kwargs)
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * 4)
  rest = 2 * pairs
  np.testing.assert_array_equal(got[..., rest:], x[..., rest:])


MODULE = importlib.import_module("pallas_gemma.kernels._rope.kernel")
ROLLED = MODULE._rolled
MUTANTS = {
  "all by the first stream": (
    "_by_stream",
    lambda p, f, n: jnp.zeros((n, f.size)).at[0].set(f),
  ),
  "no attention scale": ("_scaled", lambda sin, cos, pairs: (sin, cos)),
  "the neighbour beyond": ("_rolled", lambda x, n: ROLLED(x, -n)),
}


def neighbours_agree():
  """All at once: parts of heads, neighbours, streams and a scale."""
  values = 1e4 ** (-np.arange(16) / 16)
  frequencies = RopeFrequencies(values, 1.25).by_sections((8, 4, 4))
  options = {"frequencies": frequencies, "interleaved": True}
  options["positions"] = positions_of((3, 1, 20))
  numerics.assert_agrees(
    functools.partial(KERNEL, **options),
    functools.partial(apply_rope_reference, **options),
    [draw((1, 20, 1, 64))],
  )


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name, monkeypatch):
  monkeypatch.setattr(MODULE, *MUTANTS[name])
  mutation.assert_killed(neighbours_agree)


def test_the_mutants_original_lives():
  neighbours_agree()


def test_what_is_not_rotated_does_not_meet_what_is():
  x = draw((1, 3, 1, 128)).at[0, 0, 0, 3].set(jnp.inf)
  frequencies = RopeFrequencies.plain(1e4, 128, rotated=0.5)
  y = KERNEL(x, jnp.zeros((1, 3), jnp.int32), frequencies=frequencies)
  assert jnp.isfinite(y[..., 64:]).all()


def test_positions_of_the_batch_may_be_said_once():
  x, positions = draw((2, 5, 2, 64)), jnp.arange(5)
  want = apply_rope(x, jnp.broadcast_to(positions, (2, 5)))
  for given in (positions, positions[None]):
    np.testing.assert_array_equal(apply_rope(x, given), want)
  sections = RopeFrequencies.plain(1e4, 64).by_sections((16, 8, 8))
  streams = jnp.broadcast_to(positions, (3, 2, 5))
  np.testing.assert_array_equal(
    apply_rope(x, positions, frequencies=sections),
    apply_rope(x, streams, frequencies=sections),
  )


@pytest.mark.no_interpreter
def test_frequencies_of_each_layer_in_a_scan():
  """Local and global layers, as in Gemma 3; and no gradient but of x."""
  local = RopeFrequencies.plain(1e4, 64)
  far = RopeFrequencies.linear(1e6, 64, factor=8.0)
  x, positions = draw((1, 4, 2, 64)), jnp.arange(4)

  @jax.jit
  def layers(x):
    def layer(x, frequencies):
      return apply_rope(x, positions, frequencies=frequencies), None

    stack = jax.tree.map(lambda *v: jnp.stack(v), local, far)
    return jax.lax.scan(layer, x, stack)[0].sum()

  def one_by_one(x):
    for frequencies in (local, far):
      x = apply_rope(x, positions, frequencies=frequencies)
    return x.sum()

  np.testing.assert_allclose(
    jax.grad(layers)(x), jax.grad(one_by_one)(x), atol=1e-5
  )
  with pytest.raises(NotImplementedError, match="no gradient of frequencies"):
    jax.jit(
      jax.grad(
        lambda v: apply_rope(
          x, positions, frequencies=RopeFrequencies(v), implementation="pallas"
        ).sum()
      )
    ).lower(local.values)


@pytest.mark.parametrize("way", ["streams", "phases"])
def test_split_over_a_mesh(way):
  mesh = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2
  )
  x, positions = draw((4, 10, 2, 128)), positions_of((3, 4, 10))
  kwargs = {}
  if way == "streams":
    frequencies = RopeFrequencies.plain(1e4, 128, rotated=0.5)
    kwargs["frequencies"] = frequencies.by_sections((16, 8, 8))
  else:
    angle = draw((4, 10, 64))
    positions, kwargs["phases"] = None, (jnp.sin(angle), jnp.cos(angle))
  gradient = jax.grad(lambda x: (KERNEL(x, positions, **kwargs) ** 3).sum())
  want = gradient(x)
  where = NamedSharding(mesh, PartitionSpec("data", None, "model"))
  with jax.set_mesh(mesh):
    got = jax.jit(gradient)(jax.device_put(x, where))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# --- in attention -------------------------------------------------------------

FORMS = {
  "linear": Rope(
    jnp.arange(130), frequencies=RopeFrequencies.linear(1e4, 64, factor=8.0)
  ),
  "interleaved": Rope(positions_of((1, 130)), 500.0, interleaved=True),
}


@pytest.mark.parametrize("rope", FORMS.values(), ids=FORMS)
def test_attention_takes_any_form(rope):
  q, k, v = (
    draw((1, 130, 2, 64)),
    draw((1, 130, 1, 64), 1),
    draw((1, 130, 1, 64), 2),
  )
  kwargs = {"is_causal": True, "rope": rope}
  numerics.assert_agrees(
    functools.partial(flash_attention, implementation="pallas", **kwargs),
    functools.partial(flash_attention_reference, **kwargs),
    [q, k, v],
    softmax=True,
  )


def test_decoding_takes_any_form():
  q, new = draw((2, 3, 4, 64)), (draw((2, 3, 2, 64), 1), draw((2, 3, 2, 64), 2))
  caches = draw((2, 32, 2, 64), 3), draw((2, 32, 2, 64), 4)
  lengths = jnp.asarray([7, 32])
  positions = lengths[:, None] - 3 + jnp.arange(3)
  frequencies = RopeFrequencies.yarn(
    1e4, 64, factor=4.0, original_length=256, rotated=0.5
  )
  rope = Rope(positions, frequencies=frequencies)
  want = decode_attention(
    apply_rope(q, positions, frequencies=frequencies),
    *caches,
    lengths,
    new=(apply_rope(new[0], positions, frequencies=frequencies), new[1]),
  )
  for function in (decode_attention, decode_attention_reference):
    got = function(q, *caches, lengths, new=new, rope=rope)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5), got, want
    )


@v5e.needs_compiler
@pytest.mark.no_interpreter
def test_forms_compile_for_v5e():
  """Of 8 heads, and inside a program of attention."""
  part = RopeFrequencies.plain(1e4, 128, rotated=0.5)
  forms = {
    "part": {"frequencies": part},
    "neighbours": {"interleaved": True},
    "streams": {"frequencies": part.by_sections((16, 8, 8))},
  }

  def run(x, positions, streams, k):
    ys = [
      apply_rope(x, streams if name == "streams" else positions, **form)
      for name, form in forms.items()
    ]
    phases = jnp.sin(k[:, :, 0, :32]), jnp.cos(k[:, :, 0, :32])
    phases = jax.lax.stop_gradient(phases)
    ys.append(apply_rope(x, phases=phases))
    rope = Rope(positions, frequencies=part)
    return sum(ys) + flash_attention(x, k, k, is_causal=True, rope=rope)

  x = jax.ShapeDtypeStruct((2, 500, 8, 128), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((2, 500, 1, 128), jnp.bfloat16)
  positions = jax.ShapeDtypeStruct((2, 500), jnp.int32)
  streams = jax.ShapeDtypeStruct((3, 2, 500), jnp.int32)

  def gradient(*arrays):
    return jax.grad(lambda x, *a: run(x, *a).astype(jnp.float32).sum())(*arrays)

  text = v5e.compile(gradient, x, positions, streams, k).as_text() or ""
  assert text.count("apply_rope_bwd") >= 5


# --- frequencies --------------------------------------------------------------


def plain(base, size):
  return [base ** (-2 * i / size) for i in range(size // 2)]


def llama3(base, size, factor, original, low, high):
  """By wavelengths, pair by pair."""
  values = []
  for f in plain(base, size):
    wavelength = 2 * math.pi / f
    if wavelength < original / high:
      values.append(f)
    elif wavelength > original / low:
      values.append(f / factor)
    else:
      smooth = (original / wavelength - low) / (high - low)
      values.append((1 - smooth) * f / factor + smooth * f)
  return values


def yarn(base, size, factor, original, fast=32, slow=1, truncate=True):
  def index(turns):
    return (
      size * math.log(original / (turns * 2 * math.pi)) / 2 / math.log(base)
    )

  low, high = index(fast), index(slow)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, size - 1)
  values = []
  for i, f in enumerate(plain(base, size)):
    ramp = min(max((i - low) / (high - low), 0), 1)
    values.append(f / factor * ramp + f * (1 - ramp))
  return values


LLAMA = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 4096}
PHI = {
  "short_factor": [1.0 + i / 10 for i in range(16)],
  "long_factor": [2.0 + i for i in range(16)],
}
MODELS = {
  "Gemma 1": ({"head_dim": 256, "rope_theta": 1e4}, {}, plain(1e4, 256), 1),
  "base": (
    {"hidden_size": 64, "num_attention_heads": 2},
    {"base": 500.0},
    plain(500.0, 32),
    1,
  ),
  "Gemma 3": (
    {
      "text_config": {
        "head_dim": 32,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
      }
    },
    {"layer_type": "full_attention"},
    [f / 8 for f in plain(1e6, 32)],
    1,
  ),
  "Gemma 3, local": (
    {
      "head_dim": 32,
      "rope_theta": 1e6,
      "rope_local_base_freq": 1e4,
      "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    {"layer_type": "sliding_attention"},
    plain(1e4, 32),
    1,
  ),
  "Gemma 4": (
    {
      "head_dim": 32,
      "global_head_dim": 64,
      "rope_parameters": {
        "full_attention": {
          "rope_type": "proportional",
          "rope_theta": 1e6,
          "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      },
    },
    {"layer_type": "full_attention"},
    plain(1e6, 64)[:8] + [0.0] * 24,
    1,
  ),
  "Llama 3.1": (
    {
      "head_dim": 128,
      "rope_theta": 5e5,
      "rope_scaling": {"rope_type": "llama3", **LLAMA},
    },
    {},
    llama3(5e5, 128, 8, 8192, 1, 4),
    1,
  ),
  "YaRN": (
    {"type": "yarn", **YARN},
    {"head_size": 128, "base": 1e6},
    yarn(1e6, 128, 4, 4096),
    0.1 * math.log(4) + 1,
  ),
  "gpt-oss": (
    {
      "rope_type": "yarn",
      **YARN,
      "truncate": False,
      "beta_fast": 16,
      "rope_theta": 1.5e5,
    },
    {"head_size": 64},
    yarn(1.5e5, 64, 4, 4096, fast=16, truncate=False),
    0.1 * math.log(4) + 1,
  ),
  "DeepSeek": (
    {
      "qk_rope_head_dim": 64,
      "rope_theta": 1e4,
      "hidden_size": 7168,
      "num_attention_heads": 128,
      "rope_scaling": {
        "type": "yarn",
        **YARN,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
      },
    },
    {},
    yarn(1e4, 64, 4, 4096),
    (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
  ),
  "Phi 3, short": (
    {
      "head_dim": 32,
      "rope_theta": 1e4,
      "max_position_embeddings": 131072,
      "original_max_position_embeddings": 4096,
      "rope_scaling": {"type": "su", **PHI},
    },
    {},
    [f / d for f, d in zip(plain(1e4, 32), PHI["short_factor"], strict=True)],
    math.sqrt(1 + math.log(32) / math.log(4096)),
  ),
  "Phi 3, long": (
    {
      "rope_type": "longrope",
      "factor": 32.0,
      "original_max_position_embeddings": 4096,
      **PHI,
    },
    {"head_size": 32, "base": 1e4, "length": 5000},
    [f / d for f, d in zip(plain(1e4, 32), PHI["long_factor"], strict=True)],
    math.sqrt(1 + math.log(32) / math.log(4096)),
  ),
  "dynamic": (
    {
      "head_dim": 64,
      "rope_theta": 1e4,
      "max_position_embeddings": 2048,
      "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    {"length": 8192},
    plain(1e4 * (2 * 8192 / 2048 - 1) ** (64 / 62), 64),
    1,
  ),
  "ntk": (
    {"type": "ntk", "factor": 3.0},
    {"head_size": 64, "base": 1e4},
    plain(1e4 * 3 ** (64 / 62), 64),
    1,
  ),
  "GPT-NeoX": (
    {
      "hidden_size": 64,
      "num_attention_heads": 1,
      "rotary_pct": 0.25,
      "rotary_emb_base": 1e4,
    },
    {},
    plain(1e4, 16),
    1,
  ),
  "GPT-J": (
    {"n_embd": 4096, "n_head": 16, "rotary_dim": 64},
    {"base": 1e4},
    plain(1e4, 64),
    1,
  ),
}


@pytest.mark.parametrize(
  "config, kwargs, values, scale", MODELS.values(), ids=MODELS
)
def test_frequencies_of_models(config, kwargs, values, scale):
  got = HF(config, **kwargs)
  np.testing.assert_allclose(got.values, values, rtol=2e-7)
  np.testing.assert_allclose(got.attention_scale, scale, rtol=1e-12)


def test_sections_of_qwen():
  config = {"head_dim": 128, "rope_theta": 1e6}
  old = HF(
    config | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
  )
  assert old.streams == (0,) * 16 + (1,) * 24 + (2,) * 24
  parameters = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
  new = HF(config | {"rope_parameters": {"rope_type": "default", **parameters}})
  assert new.streams == (0, 1, 2) * 20 + (0,) * 4


@pytest.mark.no_interpreter
def test_numbers_may_be_traced():
  """A base of each layer; the length of what has been decoded so far."""
  of_base = functools.partial(RopeFrequencies.linear, head_size=32, factor=2.0)
  np.testing.assert_allclose(
    jax.jit(of_base)(1e4).values, of_base(1e4).values, rtol=1e-6
  )
  for config in (
    MODELS["dynamic"][0] | {"head_dim": 32},
    MODELS["Phi 3, short"][0],
  ):
    of_length = jax.jit(lambda n, config=config: HF(config, length=n))
    for length in (100, 9000):
      np.testing.assert_allclose(
        of_length(length).values, HF(config, length=length).values, rtol=2e-6
      )


@pytest.mark.parametrize(
  "make, message",
  [
    (
      lambda: HF({"type": "cubic"}, head_size=64, base=1.0),
      "must be one of default, linear",
    ),
    (lambda: HF({"rope_theta": 1e4}), "head_size must be given"),
    (
      lambda: HF({"type": "linear"}, head_size=64, base=1e4),
      "factor must be given for type 'linear'",
    ),
    (lambda: HF({"head_dim": 64}), "rope_theta must be given"),
    (
      lambda: HF(MODELS["Gemma 4"][0]),
      "layer_type must be one of full_attention, sliding",
    ),
    (lambda: HF("gemma"), "config must be a dictionary, got str"),
    (
      lambda: RopeFrequencies.plain(1e4, 64, rotated=0.3),
      "must be even, got 19",
    ),
    (lambda: RopeFrequencies.plain(0.0, 64), "base must be positive"),
    (
      lambda: RopeFrequencies.plain(1e4, 64).by_sections((1, 2)),
      "must sum to the 32",
    ),
    (
      lambda: RopeFrequencies.plain(1e4, 4).by_sections(
        (1, 1),
        interleaved="no",  # type: ignore[arg-type]
      ),
      "interleaved must be True or False",
    ),
    (
      lambda: RopeFrequencies.yarn(
        *(1e4, 64),
        factor=4.0,
        original_length=4096,
        truncate="no",  # type: ignore[arg-type]
      ),
      "truncate must be True or False",
    ),
    (lambda: RopeFrequencies([[1.0]]), r"values must be floats \[F\]"),
    (lambda: RopeFrequencies([1.0], 0.0), "attention_scale must be positive"),
    (
      lambda: RopeFrequencies([1.0], streams=(0, 1)),
      "one index for each of the 1",
    ),
  ],
)
def test_what_is_no_rotation_is_refused(make, message):
  with pytest.raises(ValueError, match=f"RopeFrequencies.*: .*{message}"):
    make()


F64 = RopeFrequencies.plain(1e4, 64)
PHASES = (jnp.zeros((8, 32)), jnp.ones((8, 32)))
HALF_SCALED = RopeFrequencies.yarn(
  1e4, 64, factor=4, original_length=32, rotated=0.5
)


@pytest.mark.parametrize(
  "rope",
  [
    Rope(positions_of((2, 8)), 50.0),
    Rope(positions_of((8,)), interleaved=True),
    Rope(positions_of((2, 8)), frequencies=HALF_SCALED),
    Rope(phases=(jnp.zeros((8, 16)), jnp.ones((8, 16)))),
  ],
)
def test_precomputed_is_the_same_rotation(rope):
  x = draw((2, 8, 4, 64))
  want = apply_rope(
    x,
    rope.positions,
    base_frequency=rope.base_frequency,
    frequencies=rope.frequencies,
    interleaved=rope.interleaved,
    phases=rope.phases,
    implementation="xla",
  )
  made = rope.precomputed(64)
  assert made.positions is None and made.frequencies is None
  got = apply_rope_reference(
    x, phases=made.phases, interleaved=made.interleaved
  )
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  "rope, head_size, message",
  [
    (Rope(jnp.arange(8)), 7, "head_size must be even, got 7"),
    (Rope(jnp.arange(8)), "64", "head_size must be an integer, got '64'"),
    (Rope(jnp.ones(8)), 64, "positions must be integers"),
    (Rope(), 64, "positions must be an array, got NoneType"),
  ],
)
def test_what_cannot_be_precomputed_is_refused(rope, head_size, message):
  with pytest.raises(ValueError, match=f"Rope.precomputed: .*{message}"):
    rope.precomputed(head_size)


@pytest.mark.parametrize(
  "positions, kwargs, message",
  [
    (None, {}, "positions must be an array, got NoneType"),
    (
      jnp.arange(8),
      {"frequencies": F64, "base_frequency": 5.0},
      "wanted one of",
    ),
    (jnp.arange(8), {"phases": PHASES}, "positions must be None with phases"),
    (None, {"phases": PHASES[0]}, r"phases must be a pair \(sin, cos\)"),
    (None, {"phases": (jnp.zeros((2, 8, 40)),) * 2}, "of 1 to 32 pairs"),
    (
      None,
      {"phases": (jnp.zeros((7, 4)),) * 2},
      r"must be \[B, T, F\] or \[T, F\]",
    ),
    (jnp.arange(8), {"frequencies": F64.values}, "must be a RopeFrequencies"),
    (
      jnp.zeros((3, 2, 8), int),
      {"frequencies": F64},
      r"positions must be \(2, 8\)",
    ),
    (
      jnp.zeros((2, 2, 8), int),
      {"frequencies": F64.by_sections((8, 8, 16))},
      "at least 3 streams",
    ),
    (jnp.arange(8), {"interleaved": "yes"}, "must be True or False"),
  ],
)
def test_what_does_not_fit_is_refused(positions, kwargs, message):
  with pytest.raises(ValueError, match=f"apply_rope: .*{message}"):
    apply_rope(jnp.zeros((2, 8, 4, 64)), positions, **kwargs)
