"""What is particular to linear cross-entropy."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

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
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pallas_gemma import kernels
from pallas_gemma.kernels import (
  LinearCrossEntropyConfig,
  linear_cross_entropy,
  linear_cross_entropy_reference,
)

ROOM = "pallas_gemma.kernels._cross_entropy"
FORWARD: Any = importlib.import_module(f"{ROOM}.forward")
BACKWARD: Any = importlib.import_module(f"{ROOM}.backward")
OP: Any = importlib.import_module(f"{ROOM}.op")
MODES = ["recompute", "chunked"]


def config(mode: Any = "recompute", words=128, rows=256, chunk=128):
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


def kernel_of(config):
  return functools.partial(
    linear_cross_entropy, implementation="pallas", config=config
  )


def bound(function, kwargs):
  """`function` of its arrays alone: the fourth, if any, are the weights."""

  def of_arrays(x, embedding, labels, *weights):
    more = {"weights": weights[0]} if weights else {}
    return function(x, embedding, labels, **more, **kwargs)

  return of_arrays


def expected(arrays, kwargs, grad=True):
  """The reference's numbers: as they are, and in float64."""
  reference = bound(linear_cross_entropy_reference, kwargs)
  return numerics.expected(reference, arrays, grad=grad)


def agrees(arrays, config, **kwargs):
  """The bar, for the losses and both gradients."""
  kernel = bound(kernel_of(config), kwargs)
  got = numerics.value_and_gradients(kernel, arrays, jit=True)
  numerics.assert_within_bar(got, *expected(arrays, kwargs), softmax=True)


# --- numerics -----------------------------------------------------------------

dtypes = st.sampled_from([jnp.float32, jnp.bfloat16])


@hypothesis.settings(max_examples=6)
@hypothesis.given(
  mode=st.sampled_from(MODES),
  n=st.integers(1, 280),
  d=st.one_of(st.integers(2, 140), st.sampled_from([128, 600])),
  v=st.integers(2, 280),
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


BOTH = [("recompute", jnp.float32), ("chunked", jnp.bfloat16)]


@pytest.mark.parametrize("mode, dtype", BOTH)
def test_extreme_logits(mode, dtype):
  """Logits of 1e4 and -1e4: each row's softmax is all on one word."""
  x, table, labels = draw(40, 128, 200, dtype, scale=0.1)
  x = x.at[:20, 0].set(100.0).at[20:, 0].set(-100.0)
  table = table.at[::2, 0].set(100.0).at[1::2, 0].set(-100.0)
  agrees([x, table, labels], config(mode))


@pytest.mark.parametrize("mode, dtype", BOTH)
def test_sharp_and_right(mode, dtype):
  """Probability of the label near 1: what is left of it must keep digits."""
  x, table, labels = draw(64, 128, 256, dtype)
  x = table[labels] * jnp.asarray(np.linspace(0.05, 0.3, 64)[:, None], dtype)
  agrees([x, table, labels], config(mode))


def test_uniform(mode="recompute"):
  x, table, labels = draw(64, 128, 256)
  arrays = [jnp.zeros_like(x), table, labels]
  kernel = bound(kernel_of(config(mode)), {})
  got = numerics.value_and_gradients(kernel, arrays, jit=True)
  np.testing.assert_allclose(got["output 0"], np.log(256), rtol=1e-6)
  numerics.assert_within_bar(got, *expected(arrays, {}), softmax=True)


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

  def total(x, table, labels):
    kernel = kernel_of(config(mode))
    return kernel(x, table, labels, weights=weights, valid_vocab_size=180).sum()

  run = jax.jit(jax.value_and_grad(total, (0, 1)))
  want, got = run(x, table, labels), run(*poisoned)
  for w, g in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_array_equal(w, g)
  assert not got[1][0][bad].any() and not got[1][1][180:].any()


def test_all_weights_zero(mode="chunked"):
  x, table, labels = draw(40, 128, 200)

  def total(x, table):
    kernel = kernel_of(config(mode))
    return kernel(x, table, labels, weights=jnp.zeros(40)).sum()

  run = jax.jit(jax.value_and_grad(total, (0, 1)))
  loss, gradients = run(x * jnp.nan, table)
  assert loss == 0 and not any(g.any() for g in gradients)


def test_labels_outside_are_nan():
  x, table, _ = draw(4, 128, 200)
  labels = jnp.asarray([0, 179, 180, -1])
  loss = linear_cross_entropy(
    x, table, labels, valid_vocab_size=180, implementation="pallas"
  )
  np.testing.assert_array_equal(np.isnan(loss), [False, False, True, True])


def test_labels_outside_raise_under_checkify(implementation: Any = "pallas"):
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


@pytest.mark.parametrize(
  "mode, table_axis", [("recompute", None), ("chunked", 0)]
)
def test_vmap(mode, table_axis):
  """Mapped over x and labels, with one table for all or with one for each."""
  examples = [draw(20, 64, 150, seed=i) for i in range(2)]
  x, table, labels = map(jnp.stack, zip(*examples, strict=True))
  if table_axis is None:
    table = table[0]
  mapped = [
    jax.vmap(f, (0, table_axis, 0))
    for f in (kernel_of(config(mode)), linear_cross_entropy_reference)
  ]
  numerics.assert_agrees(*mapped, [x, table, labels], softmax=True)


@pytest.mark.parametrize("mode, wanted", [("recompute", 0), ("chunked", 1)])
def test_one_gradient_alone(mode, wanted):
  """The same numbers as with both, from fewer matrix products."""
  x, table, labels = draw(140, 64, 200)

  def total(x, table):
    return kernel_of(config(mode, rows=128))(x, table, labels).sum()

  traced = [
    jax.jit(jax.grad(total, arguments)).trace(x, table)
    for arguments in ((0, 1), wanted)
  ]
  both, alone = (t.lower().compile()(x, table) for t in traced)
  np.testing.assert_array_equal(alone, both[wanted])
  products = [str(t.jaxpr).count("dot_general") for t in traced]
  assert products[1] < products[0]


def compiled_text(function, *specs):
  return v5e.compile(function, *specs).as_text() or ""


SPECS = (
  jax.ShapeDtypeStruct((512, 256), jnp.bfloat16),
  jax.ShapeDtypeStruct((1024, 256), jnp.float32),
  jax.ShapeDtypeStruct((512,), jnp.int32),
)


@v5e.needs_compiler
@v5e.around_kernels
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
@v5e.around_kernels
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
  assert memory is not None
  kept = 1.1 * n * v * 2 if mode == "chunked" else 0
  assert memory.temp_size_in_bytes < kept + n * v / 8


# --- mutants ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Check:
  """A small problem with all in use that a mutant may get wrong."""

  arrays: Callable[[], list[jax.Array]]
  config: LinearCrossEntropyConfig
  kwargs: dict[str, Any]
  grad: bool = True

  @functools.cached_property
  def _run(self):
    return numerics.value_and_gradients if self.grad else numerics.values

  @functools.cached_property
  def _expected(self):
    return expected(self.arrays(), self.kwargs, self.grad)

  def __call__(self):
    kernel = bound(kernel_of(self.config), self.kwargs)
    got = self._run(kernel, self.arrays(), jit=True)
    numerics.assert_within_bar(got, *self._expected, softmax=True)


def everything(n):
  """Two vocabulary blocks, the second with padding and the table's end."""
  x, table, labels = draw(n, 32, 200, scale=0.3)
  weights = jnp.asarray(np.linspace(0, 1, n), jnp.float32)
  return [x, table.at[150:].set(9.0), labels % 150, weights]


def growing():
  """Logits of 1000 in the first vocabulary block."""
  x, table, labels = draw(8, 64, 200, scale=0.1)
  return [x.at[:, 0].set(10.0), table.at[:100, 0].set(100.0), labels]


def sharp():
  """The labels' probabilities are near 1."""
  x, table, labels = draw(64, 128, 256, jnp.bfloat16)
  return [table[labels] * jnp.asarray(0.15, jnp.bfloat16), table, labels]


IN_USE = {"logits_soft_cap": 4.0, "z_loss": 1e-2, "valid_vocab_size": 150}
FEW, MANY = (
  functools.partial(everything, 24),
  functools.partial(everything, 140),
)
CHECKS = {
  "forward": Check(FEW, config(), IN_USE, grad=False),
  "growing": Check(growing, config(), {}, grad=False),
  "backward": Check(FEW, config(), IN_USE),
  "blocks of rows": Check(MANY, config(rows=128), IN_USE),
  "kept": Check(FEW, config("chunked"), IN_USE),
  "sharp": Check(sharp, config("chunked"), {"logits_soft_cap": 30.0}),
}


# What is wrong is told by a step and what takes its place: a function of the
# step and of its arguments.


def unmasked(step, *args, static):
  return step(*args, static=dataclasses.replace(static, masked=False))


def unmasked_last(step, *args):
  *args, static = args
  return step(*args, dataclasses.replace(static, masked=False))


def only_the_last_block(step, i, s, j, static):
  s.dxt[...] = jnp.zeros_like(s.dxt)
  step(i, s, j, static)


def without_those_before(step, i, *args):
  step(i._replace(de_before=None), *args)


def to_the_first_half(step, i, s, body, tiles):
  copy = step(i, s, body, tiles)
  semaphore = s.semaphores.at[body % 2]
  return pltpu.make_async_copy(copy.src_ref, s.piece.at[0], semaphore)


@dataclasses.dataclass
class NotAwaited:
  copy: Any

  def start(self):
    self.copy.start()

  def wait(self):
    pass


def rounded_label(step, kept, shift, is_label, row, static):
  dz = step(kept, shift, jnp.zeros_like(is_label), row, static)
  return jnp.where(is_label, dz + row.dtarget, dz)


MUTANTS: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
  "no running maximum": (
    "growing",
    FORWARD,
    "_running_maximum",
    lambda step, old, logits: step(0 * old, logits),
  ),
  "old sums not rescaled": (
    "forward",
    FORWARD,
    "_rescaling",
    lambda step, old, new: jnp.ones_like(old),
  ),
  "past the vocabulary": ("forward", FORWARD, "_kernel", unmasked),
  "label missed": (
    "forward",
    FORWARD,
    "_label_logits",
    lambda step, word, labels, first, logits: step(word, labels, 0, logits),
  ),
  "kept without the cap's slope": (
    "kept",
    FORWARD,
    "_with_slope",
    lambda step, exps, slope: exps,
  ),
  "padding gets a gradient": (
    "backward",
    BACKWARD,
    "_rows_pass",
    unmasked_last,
  ),
  "what is past the table's end": (
    "backward",
    BACKWARD,
    "_make_ready",
    unmasked_last,
  ),
  "slope of the soft cap": (
    "backward",
    BACKWARD,
    "through_cap",
    lambda step, dz, capped, soft_cap: dz,
  ),
  "first block of rows alone": (
    "blocks of rows",
    BACKWARD,
    "_columns_pass",
    without_those_before,
  ),
  "only the last tile": (
    "backward",
    BACKWARD,
    "_rows_pass",
    only_the_last_block,
  ),
  "z-loss not differentiated": (
    "backward",
    OP,
    "_z_loss",
    lambda step, *args: jax.lax.stop_gradient(step(*args)),
  ),
  "weights not applied": (
    "forward",
    OP,
    "_weighted",
    lambda step, loss, weights: loss,
  ),
  "dE without its rows before": (
    "blocks of rows",
    BACKWARD,
    "_rows_of_block",
    lambda step, inputs, block, rows: step(inputs, 0, rows),
  ),
  "maximum forgotten": (
    "kept",
    BACKWARD,
    "_from_kept",
    lambda step, kept, shift, *args: step(kept, 0 * shift, *args),
  ),
  "the wrong half": ("kept", BACKWARD, "_fetch", to_the_first_half),
  "a tile late": (
    "backward",
    BACKWARD,
    "_next_block",
    lambda step, s, steps: jnp.maximum(s - 1, 0),
  ),
  "copy not awaited": (
    "kept",
    BACKWARD,
    "_fetch",
    lambda step, *args: NotAwaited(step(*args)),
  ),
  "label from what is kept": ("sharp", BACKWARD, "_from_kept", rounded_label),
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_op_passes_the_mutants_checks(name):
  CHECKS[name]()


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name, monkeypatch):
  check, module, step, wrong = MUTANTS[name]
  mutation.replaced(monkeypatch, module, step, wrong)
  mutation.assert_killed(CHECKS[check])


def test_a_mutant_that_is_right_lives(monkeypatch):
  """Steps put in place of others do run, and alone do not fail a check."""
  ran = set()
  for _, module, name, _ in MUTANTS.values():

    def same(step, *args, name=name, **kwargs):
      ran.add(name)
      return step(*args, **kwargs)

    mutation.replaced(monkeypatch, module, name, same)
  Check(MANY, config("chunked", rows=128), IN_USE)()
  assert ran == {name for _, _, name, _ in MUTANTS.values()}


# --- meshes -------------------------------------------------------------------


def mesh_of(kind):
  return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


SPLITS = {
  "tokens": {"B": ("data", "model")},
  "words": {"V": ("data", "model")},
  "both": {"B": ("data",), "V": ("model",)},
}


@pytest.mark.parametrize(
  "mode, split, kind",
  [
    ("recompute", "tokens", AxisType.Explicit),
    ("recompute", "words", AxisType.Explicit),
    ("recompute", "both", AxisType.Auto),
    ("chunked", "both", AxisType.Explicit),
  ],
)
def test_split_over_a_mesh(mode, split, kind):
  """Tokens, words or both over eight devices; the last words are padding."""
  axes = SPLITS[split]
  mesh = mesh_of(kind)
  x, table, labels = draw(8, 64, 256, scale=0.1)
  x, labels = x.reshape(8, 1, 64), labels.reshape(8, 1) % 200

  def total(x, table, labels):
    loss = linear_cross_entropy(
      x,
      table,
      labels,
      implementation="pallas",
      config=config(mode),
      z_loss=1e-2,
      valid_vocab_size=200,
    )
    return (loss * loss).sum()

  value_and_grad = jax.jit(jax.value_and_grad(total, (0, 1)))
  want = value_and_grad(x, table, labels)

  def put(array, letter):
    spec = PartitionSpec(axes.get(letter))
    return jax.device_put(array, NamedSharding(mesh, spec))

  rules = axes if kind == AxisType.Auto else {}
  with jax.set_mesh(mesh), kernels.sharding(mesh, rules):
    got = value_and_grad(put(x, "B"), put(table, "V"), put(labels, "B"))
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)


@pytest.mark.no_interpreter
def test_what_is_kept_varies_over_a_mesh_on_either_platform():
  """Where the platform is open, also what stands for the kernel there."""
  mesh = mesh_of(AxisType.Auto)
  x, table, labels = draw(8, 64, 256)

  def total(x):
    return linear_cross_entropy(
      x, table, labels, config=config("chunked")
    ).sum()

  with jax.set_mesh(mesh), kernels.sharding(mesh, SPLITS["tokens"]):
    assert jax.eval_shape(jax.jit(jax.grad(total)), x).shape == x.shape


@pytest.mark.no_interpreter
def test_a_split_table_is_gathered_in_the_dtype_of_x():
  """Its gradient stays float32, and what it was."""
  mesh = mesh_of(AxisType.Auto)
  x, table, labels = draw(8, 64, 256)
  x = x.astype(jnp.bfloat16)

  def of(x, table):
    losses = linear_cross_entropy(x, table, labels)
    return losses.sum(), losses

  gradients = jax.value_and_grad(of, (0, 1), has_aux=True)
  want = gradients(x, table)
  with jax.set_mesh(mesh), kernels.sharding(mesh, SPLITS["tokens"]):
    jaxpr = jax.make_jaxpr(of)(x, table)
    got = jax.jit(gradients)(x, table)
  (split,) = [e for e in jaxpr.eqns if e.primitive.name == "shard_map"]
  assert "bfloat16[256,64]" in [v.aval.str_short() for v in split.invars]
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    wide = [np.asarray(y, np.float64) for y in (a, b)]
    # The devices' parts of the sum over tokens are rounded apart.
    bound = 4 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(wide[1]).max()
    assert np.abs(wide[0] - wide[1]).max() <= bound


@pytest.mark.no_interpreter
def test_one_axis_for_tokens_and_words_is_refused():
  mesh = mesh_of(AxisType.Explicit)
  split = NamedSharding(mesh, PartitionSpec("data"))
  x, table, labels = draw(8, 64, 256)
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="both split over"):
    linear_cross_entropy(
      *(jax.device_put(a, split) for a in (x, table, labels))
    )


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
@pytest.mark.parametrize("split", SPLITS)
def test_compiles_for_eight_chips(split):
  axes = SPLITS[split]
  mesh = jax.sharding.Mesh(
    np.reshape(v5e.devices("2x4", (2, 4, 1)), (4, 2)),
    ("data", "model"),
    axis_types=(AxisType.Explicit,) * 2,
  )

  def spec(shape, dtype, letter):
    sharding = NamedSharding(mesh, PartitionSpec(axes.get(letter)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def total(*args):
    return linear_cross_entropy(*args).sum()

  args = (
    spec((8, 512, 256), jnp.bfloat16, "B"),
    spec((16384, 256), jnp.float32, "V"),
    spec((8, 512), jnp.int32, "B"),
  )
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(jax.grad(total, (0, 1))).lower(*args)
  text = lowered.compile().as_text() or ""
  assert "linear_cross_entropy_bwd" in text and "all-gather" not in text


# --- refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("mode", "both", "mode must be 'recompute' or 'chunked', got 'both'"),
    ("forward_words", 100, "forward_words must be a positive multiple of 128"),
    ("backward_words", 0, "backward_words must be a positive multiple of 128"),
    ("chunk", -128, "chunk must be a positive multiple of 128, got -128"),
    ("rows", 300, "rows must be a positive multiple of 256, got 300"),
  ],
)
def test_config_is_validated_at_birth(field, value, message):
  with pytest.raises(ValueError, match=message):
    LinearCrossEntropyConfig(**{field: value})


def test_bad_input_is_refused():
  x, table, labels = draw(4, 64, 100)
  for bad, message in (
    ((x[0, 0], table, labels), "at least one dimension, got a scalar"),
    ((x, table.T, labels), r"embedding must be \[V, D\] with D = 64"),
    ((x, table, labels[:2]), r"labels must be \(4,\)"),
    ((x, table, x[:, 0]), "labels must be"),
    ((labels[:, None], table, labels), "x must be float32, bfloat16 or fl"),
  ):
    with pytest.raises(ValueError, match=f"linear_cross_entropy: .*{message}"):
      linear_cross_entropy(*bad)
  refused: list[tuple[dict[str, Any], str]] = [
    ({"valid_vocab_size": 0}, "valid_vocab_size must be from 1 to V = 100"),
    ({"valid_vocab_size": 101}, "from 1 to V = 100, got 101"),
    ({"logits_soft_cap": 0.0}, "logits_soft_cap must be positive or None"),
    ({"weights": jnp.ones(3)}, r"weights must be \(4,\)"),
  ]
  for kwargs, message in refused:
    with pytest.raises(ValueError, match=message):
      linear_cross_entropy(x, table, labels, **kwargs)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("table", [jnp.bfloat16, jnp.float32])
def test_tiles_fit_the_problem(mode, table):
  """One block of rows where it can be, else tiles that divide the table."""
  types = jnp.dtype(jnp.bfloat16), jnp.dtype(table)
  one = LinearCrossEntropyConfig.fitting(8192, 2048, 256128, *types, mode)
  assert one.rows == 8192
  many = LinearCrossEntropyConfig.fitting(32768, 3072, 256128, *types, mode)
  assert many.rows < 32768 and 256128 % many.backward_words == 0
  few = LinearCrossEntropyConfig.fitting(1, 2048, 256128, *types, mode)
  assert few.rows == few.chunk == 128


def test_too_wide_for_vmem_is_refused():
  dtype = jnp.dtype(jnp.float32)
  with pytest.raises(ValueError, match="got D = 1048576"):
    LinearCrossEntropyConfig.fitting(8, 1 << 20, 256, dtype, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_nan_in_x_stays_out_of_the_padding_of_the_table(mode):
  x, table, labels = draw(8, 128, 300)
  x = x.at[3].set(jnp.nan)

  def loss(table):
    config = LinearCrossEntropyConfig.for_problem(x, table, mode=mode)
    return linear_cross_entropy(
      x,
      table,
      labels % 200,
      valid_vocab_size=200,
      implementation="pallas",
      config=config,
    ).sum()

  gradient = jax.grad(loss)(table)
  np.testing.assert_array_equal(gradient[200:], 0)
  assert np.isnan(gradient[:200]).all()
