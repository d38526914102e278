"""What is particular to the feed-forward block."""

import functools
import re
import sys
from typing import Any, cast

import hypothesis
import jax
import jax.numpy as jnp
import mutation
import numerics
import numpy as np
import pytest
import v5e
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pallas_gemma import kernels
from pallas_gemma.kernels import (
  FeedForwardConfig,
  FeedForwardTiles,
  Norm,
  feed_forward,
  feed_forward_reference,
)

ROWS = sys.modules[kernels.Norm.__module__]
ROOM = f"{kernels.__name__}._gated"
SPEC, FORWARD, BACKWARD, TRAVEL = (
  sys.modules[f"{ROOM}.{page}"]
  for page in ("spec", "forward", "backward", "travel")
)
FRAME = sys.modules[f"{kernels.__name__}._frame.kernel"]
TPU = sys.modules[f"{kernels.__name__}._frame.tpu"]
KERNEL = functools.partial(feed_forward, implementation="pallas")
# Five row tiles and three F tiles, the last of each ragged: more row tiles than
# the backward pass keeps sums of dx for, so that they travel to HBM and back.
SIZES = (70, 72, 300)


def small(residuals: Any = "gate_up", rows=16):
  return FeedForwardConfig(
    residuals=residuals,
    forward=FeedForwardTiles(32, 128),
    backward=FeedForwardTiles(rows, 128),
  )


def draw(n, d, f, dtype=jnp.float32, weight_dtype=None, leading=(), seed=0):
  """x, the three weights, and a norm's scale."""
  rng = np.random.default_rng(seed)
  weight_dtype = weight_dtype or dtype

  def normal(shape, dtype, scale=1.0):
    return jnp.asarray(scale * rng.standard_normal(shape, np.float32), dtype)

  # Gates of unit variance, as in a model: where the activation bends.
  up = functools.partial(normal, (d, f), weight_dtype, d**-0.5)
  x = normal((*leading, n, d), dtype)
  return [x, up(), up(), up().T, normal(d, weight_dtype, 0.3)]


def block(function, *args, epsilon=1e-6, residual=True, **kwargs):
  """The op with a norm, whose scale comes last, and the residual."""
  *args, scale = args
  norm = Norm(scale, epsilon, scale_offset=1.0)
  return function(*args, norm=norm, residual=residual, **kwargs)


def agrees(function, residuals="gate_up", dtype=jnp.float32, sizes=SIZES):
  kernel = functools.partial(
    function, implementation="pallas", config=small(residuals)
  )
  numerics.assert_agrees(
    functools.partial(block, kernel),
    functools.partial(block, feed_forward_reference),
    draw(*sizes, dtype=dtype),
  )


@hypothesis.settings(max_examples=8)
@hypothesis.given(
  n=st.integers(1, 70),
  d=st.one_of(st.integers(1, 150), st.just(128)),
  f=st.one_of(st.integers(1, 300), st.just(256)),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  weight_dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  activation=st.sampled_from(["gelu_tanh", "gelu", "silu", "relu"]),
  residuals=st.sampled_from(["gate_up", "none"]),
  rows=st.sampled_from([16, 32]),
  residual=st.booleans(),
)
def test_any_shape_meets_the_bar(
  n, d, f, dtype, weight_dtype, activation, residuals, rows, residual
):
  config = small(residuals, rows)
  kwargs = {"activation": activation, "residual": residual}
  # Enough numbers in every result for the statistics of its error.
  seeds = range(-(-64 // (min(n, f) * d)))
  numerics.assert_agrees(
    functools.partial(KERNEL, config=config, **kwargs),
    functools.partial(feed_forward_reference, **kwargs),
    *(draw(n, d, f, dtype, weight_dtype, seed=seed)[:4] for seed in seeds),
  )


@hypothesis.settings(max_examples=6)
@hypothesis.given(
  n=st.integers(1, 70),
  d=st.one_of(st.integers(32, 150), st.just(128)),
  f=st.one_of(st.integers(1, 300), st.just(256)),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  weight_dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  residuals=st.sampled_from(["gate_up", "none"]),
  epsilon=st.sampled_from([1e-6, 0.1]),
  residual=st.booleans(),
)
def test_any_norm_meets_the_bar(
  n, d, f, dtype, weight_dtype, residuals, epsilon, residual
):
  seeds = range(-(-64 // d))  # enough sums in dscale for its statistics
  function = functools.partial(block, epsilon=epsilon, residual=residual)
  numerics.assert_agrees(
    functools.partial(
      function, functools.partial(KERNEL, config=small(residuals))
    ),
    functools.partial(function, feed_forward_reference),
    *(draw(n, d, f, dtype, weight_dtype, seed=seed) for seed in seeds),
  )


def test_norm_of_one_column():
  """Where nothing of x but its sign is left, and of dx only epsilon's part."""
  agrees(feed_forward, sizes=(300, 1, 130))


@pytest.mark.parametrize("residuals", ["gate_up", "none"])
def test_dx_travels_in_bfloat16(residuals):
  agrees(feed_forward, residuals, jnp.bfloat16)


# --- mutants ------------------------------------------------------------------
# A mutant is a wrong step in place of a right one.  It is tried on its kernel
# alone, with plain jnp in place of the other.

# Two row tiles and two F tiles, the last of either ragged.
FORWARD_SIZES = (40, 24, 200)
# As many, so that dx stays in VMEM; and four row tiles, so that it travels.
BACKWARD_SIZES = (24, 24, 200)
TRAVEL_SIZES = (58, 24, 200)
PROBLEM = SPEC.Problem(
  activation="gelu_tanh",
  norm=ROWS.RowNorm(epsilon=1e-6, scale_offset=1.0),
  residual=True,
  implementation="pallas",
  config=small(),
)


def forward_by(forward):
  def run(*arrays):
    return forward(PROBLEM, SPEC.Arrays(*arrays), keep=True)

  return run


def backward_by(backward):
  def run(dy, *arrays):
    arrays = SPEC.Arrays(*arrays)
    _, kept = SPEC.plain_forward(PROBLEM, arrays, keep=True)
    saved = FRAME.Saved(arrays, outs=None, kept=kept, wanted=None)
    return backward(PROBLEM, saved, SPEC.Outs(dy))

  return run


@functools.cache
def case(is_forward, sizes):
  """Arrays, and plain jnp's results and the truth: the same for all mutants."""
  arrays = draw(*sizes)
  if is_forward:
    reference = forward_by(SPEC.plain_forward)
  else:
    reference = backward_by(SPEC.plain_backward)
    arrays = [draw(*sizes, seed=1)[0], *arrays]
  return arrays, *numerics.expected(reference, arrays, grad=False)


def forward_agrees():
  arrays, plain, truth = case(True, FORWARD_SIZES)
  got = numerics.values(forward_by(FORWARD.forward), arrays, jit=True)
  numerics.assert_within_bar(got, plain, truth)


def backward_agrees(sizes=BACKWARD_SIZES):
  arrays, plain, truth = case(False, sizes)
  got = numerics.values(backward_by(BACKWARD.backward), arrays, jit=True)
  numerics.assert_within_bar(got, plain, truth)


def wrong_projection(store):
  def project(i, o, s, h, plan):
    h, w_down = FORWARD._inside_f(h, i.w_down[...], plan)
    store(FORWARD._y_sum(o, s), TPU.dot(h, w_down))

  return project


def add(ref, part):
  ref[...] += part


def assign(ref, part):
  ref[...] = part


def norm_of_the_first_rows(i, o, s, plan):
  @pl.when(pl.program_id(0) + pl.program_id(1) == 0)
  def _():
    o.normed[...] = plan.problem.norm.of(i.x[...], i.scale[...])

  return o.normed[...]


FORWARD_MUTANTS = {
  "sum not cleared": ("_project", wrong_projection(add)),
  "only the last F tile": ("_project", wrong_projection(assign)),
  "ragged F reaches y": ("_inside_f", lambda h, w_down, plan: (h, w_down)),
  "up is activated": ("_gate", lambda gate, up, plan: gate * up),
  "gate is saved as up": (
    "_keep",
    lambda o, gate, up, rows, keep=FORWARD._keep: keep(o, up, up, rows),
  ),
  "residual after the norm": (
    "_finish",
    lambda i, o, s, plan, finish=FORWARD._finish: finish(
      i._replace(x=o.normed), o, s, plan
    ),
  ),
  "norm of the first rows for all": ("_normalise", norm_of_the_first_rows),
}


def sums_not_cleared(total, part, is_first):
  total[...] = jnp.where(is_first, total[...], 0.0) + part


def only_the_last_part_of_dx(i, s, dx_sum, plan):
  dx_sum[...] = BACKWARD._dx(i, s, plan)


def wrong_gate(change):
  """`change` is of dh, up, the activation a and its derivative."""

  def through_the_gate(dh, gate, up, plan):
    a, da = BACKWARD.activate_and_derive(plan.problem.activation, gate)
    return *change(dh, up, a, da), a * up

  return through_the_gate


def dx_of_one_product(i, s, plan):
  w_gate = BACKWARD._inside_f(i.w_gate[...], plan, axis=1)
  return TPU.dot(s.dgate[...], w_gate, TPU.NT)


def dx_of_the_norm(i, o, dx, rows, plan, through=BACKWARD._through_the_norm):
  through(i, o, dx, rows, plan)
  return dx


def dscale_of_the_last_rows(o, dscale, rows):
  o.dscale[...] = jnp.sum(rows.inside(dscale), axis=0, keepdims=True)


Rows: Any = BACKWARD.Rows


class RaggedRows(Rows):
  def inside(self, tile):
    return tile


def ragged_rows_reach_dscale(o, dscale, rows):
  part = jnp.sum(dscale, axis=0, keepdims=True)
  BACKWARD.accumulate(o.dscale, part, pl.program_id(1) == 0)


BACKWARD_MUTANTS = {
  "ragged rows reach the weights": ("Rows", RaggedRows),
  "ragged F reaches dx": ("_inside_f", lambda tile, plan, axis: tile),
  "sums not cleared": ("accumulate", sums_not_cleared),
  "only the last part of dx": ("_add_dx", only_the_last_part_of_dx),
  "gate without the derivative": (
    "_through_the_gate",
    wrong_gate(lambda dh, up, a, da: (dh * up * a, dh * a)),
  ),
  "up with the derivative": (
    "_through_the_gate",
    wrong_gate(lambda dh, up, a, da: (dh * up * da, dh * da)),
  ),
  "dx of one product": ("_dx", dx_of_one_product),
  "products of x without its norm": ("_factor", lambda i: i.x),
  "dx of the norm": ("_through_the_norm", dx_of_the_norm),
  "dscale of the last rows": ("_add_dscale", dscale_of_the_last_rows),
  "ragged rows reach dscale": ("_add_dscale", ragged_rows_reach_dscale),
  "residual without a gradient": ("_add_residual", lambda i, dx, plan: dx),
}


def fetch_from_the_wrong_place(self, fetch=TRAVEL.Travel._fetch_next):
  self.after = self.i
  fetch(self)


TRAVEL_MUTANTS = {
  "dx is not awaited": ("_receive", lambda self: None),
  "slots are not awaited": ("_free_next", lambda self: None),
  "dx is fetched from the wrong place": (
    "_fetch_next",
    fetch_from_the_wrong_place,
  ),
}


@pytest.mark.parametrize(
  "module, step, check",
  [
    (FORWARD, "_gate", forward_agrees),
    (BACKWARD, "_through_the_gate", backward_agrees),
    (BACKWARD, "_dx", functools.partial(backward_agrees, TRAVEL_SIZES)),
  ],
)
def test_no_mutant_lives(module, step, check, monkeypatch):
  """What mutants are measured against: the right step in place of itself."""
  right, calls = getattr(module, step), []

  def same(*args):
    calls.append(step)
    return right(*args)

  monkeypatch.setattr(module, step, same)
  check()
  assert calls


@pytest.mark.parametrize("name", FORWARD_MUTANTS)
def test_forward_mutants_die(name, monkeypatch):
  case(True, FORWARD_SIZES)
  monkeypatch.setattr(FORWARD, *FORWARD_MUTANTS[name])
  mutation.assert_killed(forward_agrees)


@pytest.mark.parametrize("name", BACKWARD_MUTANTS)
def test_backward_mutants_die(name, monkeypatch):
  case(False, BACKWARD_SIZES)
  monkeypatch.setattr(BACKWARD, *BACKWARD_MUTANTS[name])
  mutation.assert_killed(backward_agrees)


@pytest.mark.parametrize("name", TRAVEL_MUTANTS)
def test_travel_mutants_die(name, monkeypatch):
  case(False, TRAVEL_SIZES)
  monkeypatch.setattr(TRAVEL.Travel, *TRAVEL_MUTANTS[name])
  mutation.assert_killed(backward_agrees, TRAVEL_SIZES)


def test_f_tiles_do_not_run_in_parallel(monkeypatch):
  """Where dx stays in VMEM; else the cores would wait for each other."""
  case(False, BACKWARD_SIZES)
  parallel = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))
  monkeypatch.setattr(TPU, "compiler_params", lambda _: parallel)
  mutation.assert_killed(backward_agrees)


# --- transformations ----------------------------------------------------------


@pytest.mark.parametrize("weight_axis", [None, 0])
def test_vmap(weight_axis):
  """Mapped over x, with the same weights for all or with some for each."""
  axes = (0, *[weight_axis] * 3)
  x, *weights, scale = draw(*SIZES, leading=(2,))
  if weight_axis == 0:
    weights = [jnp.stack([w, -w]) for w in weights]
  numerics.assert_agrees(
    *(
      jax.vmap(functools.partial(block, function), (*axes, None))
      for function in (
        functools.partial(KERNEL, config=small()),
        feed_forward_reference,
      )
    ),
    [x, *weights, scale],
  )


def test_empty_arrays():
  for n, d, f in [(0, 8, 16), (3, 0, 16), (3, 8, 0)]:
    args = [jnp.zeros(s) for s in [(n, d), (d, f), (d, f), (f, d), (d,)]]
    y, vjp = jax.vjp(functools.partial(block, KERNEL), *args)
    assert y.shape == (n, d) and not y.any()
    assert [g.shape for g in vjp(y)] == [a.shape for a in args]


def described(n, d, f, dtype=jnp.bfloat16, weight_dtype=jnp.bfloat16):
  """As `draw` gives them."""
  up = jax.ShapeDtypeStruct((d, f), weight_dtype)
  down = jax.ShapeDtypeStruct((f, d), weight_dtype)
  scale = jax.ShapeDtypeStruct((d,), weight_dtype)
  return [jax.ShapeDtypeStruct((n, d), dtype), up, up, down, scale]


BLOCK = functools.partial(block, feed_forward)


def value_and_gradients(function):
  def both(*args):
    y, vjp = jax.vjp(function, *args)
    return y, vjp(y)

  return both


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
@pytest.mark.parametrize("saved", [False, True])
def test_checkpoint_finds_what_is_saved_by_name(saved):
  """A policy that saves it spares the second run of the forward kernel."""
  names = ("gate", "up", "normed") if saved else ()
  policy = jax.checkpoint_policies.save_only_these_names(
    *(f"feed_forward_{name}" for name in names)
  )
  function = jax.checkpoint(BLOCK, policy=policy)
  compiled = v5e.compile(
    value_and_gradients(function), *described(64, 128, 256)
  )
  runs = re.findall(r"%feed_forward_fwd[\w.]* = ", compiled.as_text() or "")
  assert len(runs) == (1 if saved else 2)


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
def test_memory():
  """Beside what is kept, only the float32 dx is in HBM, and a norm's x."""
  n, d, f = 2048, 256, 4096
  args = described(n, d, f)
  keeping_all = FeedForwardConfig(residuals="gate_up")
  keeping_none = FeedForwardConfig(residuals="none")
  for config, kept in ((keeping_all, 2 * 2 * n * f), (keeping_none, 0)):
    for op, own_args, row_bytes in (
      (feed_forward, args[:4], 4 * d),
      (BLOCK, args, (4 + 2) * d),
    ):
      function = value_and_gradients(functools.partial(op, config=config))
      memory = v5e.compile(function, *own_args).memory_analysis()
      assert memory is not None
      assert memory.temp_size_in_bytes <= kept + row_bytes * n + (1 << 20)


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
def test_float32_weights_are_cast_in_the_kernel():
  args = described(256, 256, 1024, weight_dtype=jnp.float32)
  compiled = v5e.compile(value_and_gradients(feed_forward), *args[:4])
  text = compiled.as_text() or ""
  assert "feed_forward_bwd" in text and " convert(" not in text


@v5e.needs_compiler
@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  "dtype, rows, width, hidden",
  [
    (jnp.float32, 512, 8192, 256),
    (jnp.bfloat16, 512, 8192, 256),
    (jnp.bfloat16, 4096, 4096, 14336),  # Llama 3 8B
  ],
)
def test_wide_models_fit(dtype, rows, width, hidden):
  """Tiles shrink as D grows, by a model of VMEM; beyond it the op refuses.

  With the norm and the residual more is in VMEM than without.
  """
  args = described(rows, width, hidden, dtype, dtype)
  v5e.compile(value_and_gradients(BLOCK), *args)
  with pytest.raises(ValueError, match="feed_forward: .* got D = 100000"):
    jax.eval_shape(KERNEL, *described(512, 100_000, 256, dtype, dtype)[:4])


# --- meshes -------------------------------------------------------------------


UP, DOWN = P(None, "model"), P("model")
FSDP_UP, FSDP_DOWN = P("data", "model"), P("model", "data")
LAYOUTS = {
  "tensor parallel": (AxisType.Explicit, UP, DOWN),
  "D stored over data": (AxisType.Explicit, FSDP_UP, FSDP_DOWN),
  "F stored over data": (
    AxisType.Explicit,
    P(None, ("model", "data")),
    P(("model", "data")),
  ),
  "auto": (AxisType.Auto, FSDP_UP, FSDP_DOWN),
  "by hand": (AxisType.Auto, UP, DOWN),
}


def loss(*args):
  return (block(KERNEL, *args) ** 2).sum()


def loss_by_hand(mesh):
  """Megatron's split, written by the user around the op."""

  def local(x, *args):
    y = block(KERNEL, x, *args, residual=False)
    return ((x + jax.lax.psum(y, "model")) ** 2).sum()

  return jax.shard_map(
    lambda *args: jax.lax.psum(local(*args), "data"),
    mesh=mesh,
    in_specs=(P("data"), UP, UP, DOWN, P()),
    out_specs=P(),
  )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_over_a_mesh(layout):
  """Rows over four devices and F over two; every gradient is whole."""
  kind, up, down = LAYOUTS[layout]
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
  args = draw(6, 128, 256, leading=(8,))
  gradient = jax.grad(loss, range(5))
  want = gradient(*args)
  if layout == "by hand":
    gradient = jax.grad(loss_by_hand(mesh), range(5))
  put = [
    jax.device_put(a, NamedSharding(mesh, s))
    for a, s in zip(args, (P("data"), up, up, down, P()), strict=True)
  ]
  rules = {"B": "data", "F": "model"} if layout == "auto" else {}
  with jax.set_mesh(mesh), kernels.sharding(mesh, rules):
    got = jax.jit(gradient)(*put)
  for g, w, a in zip(got, want, put, strict=True):
    np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5 * np.abs(w).max())
    if kind == AxisType.Explicit:
      assert jax.typeof(g).sharding == jax.typeof(a).sharding


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
def test_collectives_on_eight_chips():
  """One sum after down, one of dx, and those of the weights over the rows."""
  mesh = jax.sharding.Mesh(
    np.reshape(v5e.devices("2x4", (2, 4, 1)), (4, 2)),
    ("data", "model"),
    axis_types=(AxisType.Explicit,) * 2,
  )
  args = [
    jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, s))
    for a, s in zip(
      described(2048, 512, 2048)[:4], (P("data"), UP, UP, DOWN), strict=True
    )
  ]

  def text(function):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return jax.jit(function).lower(*args).compile().as_text() or ""

  forward, both = text(feed_forward), text(value_and_gradients(feed_forward))
  assert forward.count(" all-reduce(") == 1 and "all-gather" not in forward
  assert "feed_forward_bwd" in both and "all-gather" not in both


# --- refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
  "change, kwargs, message",
  [
    (
      {1: (64, 256)},
      {},
      r"w_gate must be \[D, F\] with D = 128.*got \(64, 256\)",
    ),
    ({2: (128, 64)}, {}, r"w_up must be \(128, 256\).*got \(128, 64\)"),
    ({3: (128, 256)}, {}, r"w_down must be \(256, 128\).*got \(128, 256\)"),
    ({0: ()}, {}, "x must have at least one dimension, got a scalar"),
    ({}, {"activation": "tanh"}, "activation must be one of .* got 'tanh'"),
    ({}, {"implementation": "cuda"}, "'pallas', 'xla' or None, got 'cuda'"),
    (
      {},
      {"norm": Norm(jnp.zeros(64))},
      r"norm.scale must be \(128,\) .*got \(64,\)",
    ),
    (
      {},
      {"norm": Norm(jnp.zeros(128), -1.0)},
      "norm.epsilon must not be negative, got -1.0",
    ),
  ],
)
def test_bad_input_is_refused(change, kwargs, message):
  shapes = [(8, 128), (128, 256), (128, 256), (256, 128)]
  args = [jnp.zeros(change.get(i, s)) for i, s in enumerate(shapes)]
  with pytest.raises(ValueError, match=f"feed_forward: .*{message}"):
    feed_forward(*args, **kwargs)


def test_other_dtypes_are_refused():
  x, w_gate, w_up, w_down, scale = draw(8, 16, 32)
  wanted = "must be float32, bfloat16 or float16"
  with pytest.raises(ValueError, match=f"x {wanted}, got int8"):
    feed_forward(x.astype(jnp.int8), w_gate, w_up, w_down)
  with pytest.raises(ValueError, match=f"w_down {wanted}"):
    feed_forward(x, w_gate, w_up, w_down.astype(jnp.int32))
  with pytest.raises(ValueError, match=f"norm.scale {wanted}"):
    norm = Norm(scale.astype(jnp.int32))
    feed_forward(x, w_gate, w_up, w_down, norm=norm)


@pytest.mark.parametrize(
  "make, message",
  [
    (
      lambda: FeedForwardTiles(rows=12, cols=128),
      "rows must be a positive multiple of 16",
    ),
    (
      lambda: FeedForwardTiles(rows=16, cols=64),
      "cols must be a positive multiple of 128",
    ),
    (
      lambda: small(residuals="all"),
      "'gate_up' or 'none', got 'all'",
    ),
    (
      lambda: FeedForwardConfig(backward=cast(Any, (16, 128))),
      "backward must be FeedForwardTiles or None",
    ),
  ],
)
def test_config_is_validated_at_birth(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_the_old_name_of_the_tiles_warns():
  with pytest.warns(DeprecationWarning, match="FeedForwardTiles now"):
    assert kernels.Tiles is FeedForwardTiles
  other = "Tile"
  with pytest.raises(AttributeError, match=f"has no attribute '{other}'"):
    getattr(kernels, other)
