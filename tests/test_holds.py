"""An op holds wherever a jnp function holds: every op, in every way of use.

Each row of the table is a kind of use, tried on every op of the registry; with
`-s` the table is printed at the end.  What is special to one op, such as
attention's masks, is in that op's own tests.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_lowering
import v5e
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pallas_gemma import kernels
from pallas_gemma.kernels import OPS, sharding

pytestmark = [pytest.mark.no_interpreter, pytest.mark.unoptimised]

SIZES = dict(B=4, T=8, S=8, N=8, K=2, H=8, D=16, F=32, V=64, E=2)
LETTERS = {
  "scale": "D",
  "positions": "BT",
  "w_gate": "DF",
  "w_up": "DF",
  "w_down": "FD",
  "q": "BTNH",
  "k": "BSKH",
  "v": "BSKH",
  "k_cache": "BSKH",
  "v_cache": "BSKH",
  "lengths": "B",
  "embedding": "VD",
  "labels": "BT",
}
LETTERS_OF = {
  "apply_rope": {"x": "BTNH"},
  "expert_feed_forward": {
    "x": "BD",
    "w_gate": "EDF",
    "w_up": "EDF",
    "w_down": "EFD",
    "group_sizes": "E",
  },
}
TOPS = {"positions": 1000, "lengths": SIZES["S"], "labels": SIZES["V"]}
TOPS |= {"group_sizes": SIZES["B"] // SIZES["E"] + 1}
SWITCHES = {"is_causal", "deterministic", "transposed", "residual"}
SWITCHES |= {"interleaved", "return_predictions"}
WHOLE = {"local_window_size", "chunk_size", "valid_vocab_size"}
NAMES = {"implementation", "layout", "out_dtype", "activation"}
RULES = {"B": "data", "N": "model", "F": "model", "V": "model"}


def letters_of(op, name):
  """Of one argument's dimensions."""
  return {**LETTERS, **LETTERS_OF.get(op.name, {})}.get(name, "BTD")


def arguments(op, sizes=None, dtype=jnp.float32):
  """Small arrays for every positional argument of the op, by name."""
  sizes, rng, arrays = {**SIZES, **(sizes or {})}, np.random.default_rng(0), {}
  for name, parameter in inspect.signature(op.function).parameters.items():
    if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
      continue
    shape = [sizes[letter] for letter in letters_of(op, name)]
    if name in TOPS:
      array = rng.integers(1, TOPS[name], shape, np.int32)
    else:
      array = np.asarray(jnp.asarray(rng.standard_normal(shape), dtype))
    arrays[name] = jnp.asarray(array)
  return arrays


def floats_of(arrays):
  return [n for n, x in arrays.items() if jnp.issubdtype(x.dtype, np.inexact)]


def differentiable(op):
  return True


def results(op, arrays, **kwargs):
  """Outputs and the gradients of all floats, jitted, as a flat list."""
  floats = floats_of(arrays)

  def run(arrays):
    def of_floats(values):
      outs = jax.tree.leaves(op.function(**{**arrays, **values}, **kwargs))
      weights = [jnp.cos(jnp.arange(x.size).reshape(x.shape)) for x in outs]
      pairs = zip(outs, weights, strict=True)
      total = sum((x.astype(jnp.float32) * w).sum() for x, w in pairs)
      return total, outs

    if not differentiable(op):
      return of_floats({})[1]
    values = {n: arrays[n] for n in floats}
    (_, outs), grads = jax.value_and_grad(of_floats, has_aux=True)(values)
    return [*outs, *grads.values()]

  return [np.asarray(x, np.float32) for x in jax.jit(run)(arrays)]


def assert_same(got, want, tolerance=1e-5):
  for g, w in zip(got, want, strict=True):
    bar = tolerance * (1 + np.abs(w).max(initial=0))
    np.testing.assert_allclose(g, w, rtol=0, atol=bar)


def mesh_of(kind=AxisType.Auto, devices=None):
  devices = np.array(jax.devices() if devices is None else devices)
  return jax.sharding.Mesh(
    devices.reshape(2, 4), ("data", "model"), axis_types=(kind,) * 2
  )


def spec_of(op, name, rules):
  axes = []
  for letter in letters_of(op, name):
    size = {"data": 2, "model": 4}.get(rules.get(letter), 1)
    axes.append(rules.get(letter) if SIZES[letter] % size == 0 else None)
  return P(*axes)


def placed(op, arrays, mesh, rules):
  return {
    n: jax.device_put(x, NamedSharding(mesh, spec_of(op, n, rules)))
    for n, x in arrays.items()
  }


# --- the rows -----------------------------------------------------------------


def the_context_is_part_of_jits_key(op):
  arrays, mesh = arguments(op), mesh_of()
  function = jax.jit(op.function)

  def is_split():
    return "shard_map" in str(function.trace(**arrays).jaxpr)

  assert not is_split()
  with sharding(mesh, {"B": "data"}):
    assert is_split() == op.pallas
  assert not is_split()


def on_a_mesh_with_rules(op):
  arrays, mesh = arguments(op), mesh_of()
  with sharding(mesh, RULES):
    got = results(op, placed(op, arrays, mesh, RULES))
  assert_same(got, results(op, arrays))


def on_a_mesh_of_explicit_axes(op):
  """Given by types, and as the mesh of rules, as `jax.make_mesh` gives it."""
  arrays, mesh = arguments(op), mesh_of(AxisType.Explicit)
  want = [np.asarray(x) for x in jax.tree.leaves(op.function(**arrays))]
  if op.pallas:
    with sharding(mesh, RULES):
      got = jax.tree.leaves(jax.jit(op.function)(**arrays))
    assert_same(map(np.asarray, got), want)
    with jax.set_mesh(mesh), sharding(mesh, RULES):  # of what types leave open
      whole = placed(op, arrays, mesh, {})
      out, *_ = jax.tree.leaves(jax.jit(op.function)(**whole))
      assert jax.typeof(out).sharding.spec[0] == "data"
    with jax.set_mesh(mesh):
      split = placed(op, arrays, mesh, RULES)
      got = jax.tree.leaves(jax.jit(op.function)(**split))
    assert_same(map(np.asarray, got), want)


def on_a_mesh_of_either_kind_of_axes(op):
  """Rules say it of Auto axes, and of Explicit ones what types leave open."""
  arrays = arguments(op)
  want = [np.asarray(x) for x in jax.tree.leaves(op.function(**arrays))]
  kinds = (AxisType.Auto, AxisType.Explicit)
  mesh = jax.sharding.Mesh(mesh_of().devices, ("data", "model"), kinds)
  with jax.set_mesh(mesh), sharding(mesh, RULES):
    split = placed(op, arrays, mesh, RULES)
    got = jax.tree.leaves(jax.jit(op.function)(**split))
  assert_same(map(np.asarray, got), want)


def with_a_width_that_is_split(op):
  rules = {"B": "data", "D": "model"}
  rules |= {"H": "model"} if op.name == "apply_rope" else {}
  arrays, mesh = arguments(op), mesh_of()
  with sharding(mesh, rules):
    got = results(op, placed(op, arrays, mesh, rules))
  assert_same(got, results(op, arrays))


def in_a_partly_manual_mesh(op):
  arrays, mesh = arguments(op), mesh_of()
  by_device = {}
  if "group_sizes" in arrays:  # who splits rows by hand says whose they are
    arrays["group_sizes"] = jnp.asarray([3, 1])
    by_device = {"group_sizes": jnp.asarray([2, 0, 1, 1])}
  want = results(op, arrays)
  if not op.pallas:
    return
  specs = {n: P(*spec_of(op, n, {"B": "data"})) for n in arrays}
  specs |= dict.fromkeys(by_device, P("data"))

  def by_hand(**arrays):
    return jax.shard_map(
      lambda arrays: op.function(**arrays),
      mesh=mesh,
      in_specs=(specs,),
      out_specs=P("data"),
      axis_names={"data"},
    )(arrays)

  class Handmade:
    name, function = op.name, staticmethod(by_hand)

  with jax.set_mesh(mesh), sharding(mesh, RULES):
    got = results(Handmade, {**arrays, **by_device})
  assert_same(got, want)


def sizes_that_do_not_divide_are_refused(op):
  arrays = arguments(op, {"B": 3})
  if op.pallas:
    with sharding(mesh_of(), RULES):
      with pytest.raises(ValueError, match=f"{op.name}: .*of the 2 devices"):
        jax.jit(op.function)(**arrays)


def no_more_collectives_than_the_reference(op):
  """Both passes; what is replicated over an axis is not summed over it."""
  if not op.pallas:
    return
  mesh, arrays = mesh_of(), arguments(op)
  split = placed(op, arrays, mesh, RULES)

  def reduced(implementation):
    floats = floats_of(arrays)

    def run(arrays, weights):
      def total(values):
        arguments = {**arrays, **values}
        outs = op.function(**arguments, implementation=implementation)
        outs = jax.tree.leaves(outs)
        return sum((x * w).sum() for x, w in zip(outs, weights, strict=True))

      return jax.grad(total)({n: arrays[n] for n in floats})

    outs = jax.tree.leaves(jax.eval_shape(op.function, **arrays))
    letters = letters_of(op, "x" if "x" in arrays else "q")
    weights = [
      jax.ShapeDtypeStruct(
        x.shape,
        x.dtype,
        sharding=NamedSharding(
          mesh, P(*(RULES.get(a) for a in letters[: x.ndim]))
        ),
      )
      for x in outs
    ]
    grads = {n: split[n].sharding for n in floats}
    function = jax.jit(run, out_shardings=grads)
    with sharding(mesh, RULES), v5e.kernels_without_bodies():
      text = function.lower(split, weights).compile().as_text() or ""
    return v5e.collective_bytes(text)

  ours, reference = reduced(None), reduced("xla")
  assert ours <= reference, f"{ours} bytes, the reference {reference}"


@v5e.needs_compiler
def what_xla_cannot_split_is_refused_in_our_words(op):
  if not op.pallas:
    return
  mesh = mesh_of(devices=v5e.devices("2x4", (2, 4, 1)))
  specs = {
    n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))
    for n, x in arguments(op).items()
  }
  with pytest.raises(ValueError, match=f"{op.name}: .*kernels.sharding"):
    jax.jit(op.function).lower(**specs)


def exported(op, platforms=("tpu",), function=None, arrays=None):
  """For TPU, both passes if there are two."""
  case = op.tests[0]
  implementation = "pallas" if op.pallas else None
  call = functools.partial(op.function, implementation=implementation)
  if function is None:
    function = case.bind(call)
    if differentiable(op):
      function = test_lowering.loss_gradient(function)
  specs = case.specs if arrays is None else arrays
  return jax.export.export(jax.jit(function), platforms=platforms)(*specs)


def with_x64(op):
  with jax.enable_x64(True):
    exported(op)
    case = op.tests[0]
    jax.block_until_ready(case.bind(op.function)(*case.sample()))


def whatever_the_matmul_precision(op):
  for case in op.tests:
    function = case.bind(functools.partial(op.function, implementation=None))
    with jax.default_matmul_precision("highest"):
      exported(op, function=function, arrays=case.specs)


def with_strict_promotion(op):
  for case in op.tests:
    with (
      jax.numpy_rank_promotion("raise"),
      jax.numpy_dtype_promotion("strict"),
    ):
      for function in (op.function, op.reference):
        bound = case.bind(function)
        if differentiable(op):
          bound = test_lowering.loss_gradient(bound)
        jax.jit(bound).lower(*case.specs)


def with_debug_nans(op):
  case = op.tests[1]
  function = case.bind(op.function)
  if differentiable(op):
    function = test_lowering.loss_gradient(function)
  with jax.debug_nans(True):
    jax.block_until_ready(jax.jit(function)(*case.sample()))


def without_jit(op):
  """Either mode, and what else evaluates primitives one by one."""
  arrays = arguments(op)
  name = next(iter(arrays))

  def loss(x):
    outs = jax.tree.leaves(op.function(**{**arrays, name: x}))
    return sum(jnp.sin(out).sum() for out in outs)

  def both_modes(x):
    _, tangent = jax.jvp(loss, (x,), (jnp.cos(x),))
    return tangent, jax.grad(loss)(x)

  x = arrays[name] / 8
  want = jax.jit(both_modes)(x)
  with jax.disable_jit():
    assert_same(both_modes(x), want)


def of_nothing(op):
  known = "".join(letters_of(op, name) for name in arguments(op))
  for letter in SIZES:
    sizes = {letter: 0} | ({"K": 0} if letter == "N" else {})
    if letter == "K" or letter not in known:
      continue  # query heads without a kv head are refused
    arrays = arguments(op, sizes)
    for implementation in ("xla", None, "pallas" if op.pallas else None):
      got = results(op, arrays, implementation=implementation)
      want = results(op, arrays, implementation="xla")
      assert [x.shape for x in got] == [x.shape for x in want]


def of_numpy_and_parameters(op):
  arrays = arguments(op)
  want = [np.asarray(x) for x in jax.tree.leaves(op.function(**arrays))]
  integers = {n for n, x in arrays.items() if x.dtype == jnp.int32}
  for make in (np.asarray, nnx.Param):
    given = {
      n: np.asarray(x).astype(np.int64) if n in integers else make(x)
      for n, x in arrays.items()
    }
    got = jax.tree.leaves(op.function(**given))
    assert_same(map(np.asarray, got), want, 0)


def of_integers_of_any_width(op):
  arrays = arguments(op)
  want = results(op, arrays)
  integers = [n for n, x in arrays.items() if x.dtype == jnp.int32]
  with jax.enable_x64(True):
    for dtype in (jnp.uint32, jnp.int64, jnp.uint16):
      cast = {n: arrays[n].astype(dtype) for n in integers}
      assert_same(results(op, {**arrays, **cast}), want)


def of_float16(op):
  arrays = arguments(op, dtype=jnp.float16)
  wide = {
    n: x.astype(jnp.float32) if x.dtype == jnp.float16 else x
    for n, x in arrays.items()
  }
  assert_same(results(op, arrays), results(op, wide), 4e-3)
  for out in jax.tree.leaves(op.function(**arrays)):
    assert out.dtype == jnp.float16 or op.name == "linear_cross_entropy"


def what_is_no_array_is_refused(op):
  arrays = arguments(op)
  for name, array in arrays.items():
    for bad in (object(), 2**70, array.astype(jnp.complex64)):
      with pytest.raises(ValueError, match=f"{op.name}: .*must be"):
        op.function(**{**arrays, name: bad})
  with pytest.raises(ValueError, match=f"{op.name}: config must be"):
    op.function(**arrays, config=object())


def what_is_not_true_or_false_is_refused(op):
  """To Python "no" is true."""
  arrays = arguments(op)
  for name in SWITCHES & inspect.signature(op.function).parameters.keys():
    if name in arrays:  # add_rms_norm's residual
      continue
    for bad in ("no", None, 2, 1.0, arrays, jnp.ones(3), jax.random.key(0)):
      with pytest.raises(
        ValueError, match=f"{op.name}: {name} must be True or"
      ):
        op.function(**arrays, **{name: bad})
    with pytest.raises(ValueError, match=f"{op.name}: {name} must be known"):
      jax.jit(lambda x, name=name: op.function(**arrays, **{name: x}))(True)
    for good in (0, np.False_, jnp.array(False)):
      jax.eval_shape(functools.partial(op.function, **{name: good}), **arrays)


def what_is_no_whole_number_or_name_is_refused(op):
  arrays = arguments(op)
  known = inspect.signature(op.function).parameters.keys()
  for name in WHOLE & known:
    for bad in (1.5, True, "4", int, jnp.float32(4), np.arange(3), jnp.ones(2)):
      with pytest.raises(ValueError, match=f"{op.name}: {name} must be"):
        op.function(**arrays, **{name: bad})
  for name in NAMES & known:
    for bad in ("none", 3, [], {}, np.ones(3), jnp.ones(3)):
      with pytest.raises(ValueError, match=f"{op.name}: {name} must be"):
        op.function(**arrays, **{name: bad})


def numbers_that_must_be_static_are_named(op):
  arrays = arguments(op)
  known = inspect.signature(op.function).parameters
  for name in ("logits_soft_cap", "z_loss", "valid_vocab_size"):
    if name in known:
      with pytest.raises(ValueError, match=f"{op.name}: {name} must be known"):
        jax.jit(lambda n, name=name: op.function(**arrays, **{name: n}))(2)


def exported_without_effects(op):
  for implementation in ("xla", None, "pallas" if op.pallas else None):
    function = functools.partial(op.function, implementation=implementation)
    program = exported(op, function=op.tests[0].bind(function))
    assert not program.ordered_effects and not program.unordered_effects


def exported_with_a_symbolic_batch(op):
  (batch,) = jax.export.symbolic_shape("batch")
  arrays = arguments(op)

  def run(arrays):
    return jax.tree.leaves(op.function(**arrays))

  specs = {
    n: jax.ShapeDtypeStruct(
      (batch, *x.shape[1:]) if letters_of(op, n)[0] == "B" else x.shape, x.dtype
    )
    for n, x in arrays.items()
  }
  jax.export.export(jax.jit(run), platforms=["tpu"])(specs)
  program = jax.export.export(jax.jit(run))(specs)
  for got, want in zip(program.call(arrays), run(arrays), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def two_platforms_at_once_are_refused_in_our_words(op):
  case = op.tests[0]
  if op.pallas:
    with pytest.raises(ValueError, match=f"{op.name}: .*one platform at"):
      exported(op, ("cpu", "tpu"), case.bind(op.function))


def forward_mode(op):
  arrays = arguments(op)
  if not differentiable(op):
    return
  name = next(iter(arrays))

  def of_first(implementation):
    def function(x):
      call = functools.partial(op.function, implementation=implementation)
      return jax.tree.leaves(call(**{**arrays, name: x}))[0]

    return function

  x = arrays[name]

  def with_tangent(function):
    return jax.jit(lambda x: jax.jvp(function, (x,), (jnp.cos(x),)))(x)

  pair = [with_tangent(of_first(i)) for i in (None, "xla")]
  got, want = ([np.asarray(x) for x in two] for two in pair)
  assert_same(got, want)
  for case in op.tests[1:]:  # every kind of problem; tracing is enough

    def tangent(x, *others, case=case):
      function = case.bind(op.function)
      return jax.jvp(lambda x: function(x, *others), (x,), (x,))

    jax.eval_shape(tangent, *case.specs)
  _, linear = jax.linearize(of_first(None), x)
  assert_same([np.asarray(linear(jnp.cos(x)))], [np.asarray(pair[1][1])])
  with pytest.raises(NotImplementedError, match=f"{op.name}: .*forward-mode"):
    function = of_first(None)
    tpu = jax.jit(lambda x: jax.jvp(function, (x,), (x,)))
    exported(op, function=tpu, arrays=[x])


def second_derivatives(op):
  arrays = arguments(op)
  if not differentiable(op):
    return
  name = next(iter(arrays))

  def curvature(implementation):
    def loss(x):
      call = functools.partial(op.function, implementation=implementation)
      out = jax.tree.leaves(call(**{**arrays, name: x}))[0]
      return (jnp.sin(out) ** 2).sum()

    return lambda x: jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())(x)

  x = arrays[name]
  got, want = (np.asarray(jax.jit(curvature(i))(x)) for i in (None, "xla"))
  assert_same([got], [want], 1e-4)
  if op.pallas:
    with pytest.raises(NotImplementedError, match="no second derivative"):
      exported(op, function=curvature(None), arrays=[x])
    with pytest.raises(NotImplementedError, match="no second derivative"):
      jax.make_jaxpr(curvature("pallas"))(x)


def second_derivatives_in_a_scan(op):
  """Whose body JAX takes apart; either mode over reverse mode."""
  arrays = arguments(op)
  if not differentiable(op):
    return
  name = next(iter(arrays))

  def gradient(implementation):
    call = functools.partial(op.function, implementation=implementation)

    @jax.checkpoint
    def layer(x, _):
      out = jax.tree.leaves(call(**{**arrays, name: x}))[0]
      return x + jnp.tanh(out).mean(), None

    def loss(x):
      return (jnp.sin(jax.lax.scan(layer, x, length=2)[0]) ** 2).sum()

    return jax.grad(loss)

  def reverse(implementation):
    f = gradient(implementation)
    return jax.grad(lambda x: (f(x) ** 2).sum())

  def forward(implementation):
    f = gradient(implementation)
    return lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1]

  x = arrays[name] / 4
  for second in (reverse, forward):
    got, want = (np.asarray(jax.jit(second(i))(x)) for i in (None, "xla"))
    assert_same([got], [want], 1e-4)
    if op.pallas:
      with pytest.raises(NotImplementedError, match="no second derivative"):
        exported(op, function=second(None), arrays=[x])
      with pytest.raises(NotImplementedError, match="no second derivative"):
        jax.make_jaxpr(second("pallas"))(x)


def under_vmap(op):
  """Of the gradient, and the gradient of it; twice too."""
  arrays = arguments(op)
  if not differentiable(op):
    return
  name = next(iter(arrays))

  def loss(x, implementation):
    call = functools.partial(op.function, implementation=implementation)
    outs = jax.tree.leaves(call(**{**arrays, name: x}))
    return jnp.stack([jnp.sin(out).sum() for out in outs]).sum()

  x = arrays[name] / 8
  many = jnp.stack([x, 2 * x])
  for implementation in (None, "xla"):
    one = functools.partial(loss, implementation=implementation)
    inside = jax.jit(jax.vmap(jax.grad(one)))(many)
    outside = jax.jit(jax.grad(lambda m, f=one: jax.vmap(f)(m).sum()))(many)
    want = np.stack([jax.jit(jax.grad(one))(x) for x in many])
    assert_same([np.asarray(inside), np.asarray(outside)], [want, want])


ROWS = [
  the_context_is_part_of_jits_key,
  on_a_mesh_with_rules,
  on_a_mesh_of_explicit_axes,
  on_a_mesh_of_either_kind_of_axes,
  with_a_width_that_is_split,
  in_a_partly_manual_mesh,
  sizes_that_do_not_divide_are_refused,
  no_more_collectives_than_the_reference,
  what_xla_cannot_split_is_refused_in_our_words,
  with_x64,
  whatever_the_matmul_precision,
  with_strict_promotion,
  with_debug_nans,
  without_jit,
  of_nothing,
  of_numpy_and_parameters,
  of_integers_of_any_width,
  of_float16,
  what_is_no_array_is_refused,
  what_is_not_true_or_false_is_refused,
  what_is_no_whole_number_or_name_is_refused,
  numbers_that_must_be_static_are_named,
  exported_without_effects,
  exported_with_a_symbolic_batch,
  two_platforms_at_once_are_refused_in_our_words,
  forward_mode,
  second_derivatives,
  second_derivatives_in_a_scan,
  under_vmap,
]


@pytest.fixture(scope="module")
def table():
  """What held, printed when all have been tried."""
  held = {}
  yield held
  width = max(len(row.__name__) for row in ROWS)
  print(f"\n{'':{width}}  " + " ".join(op.name for op in OPS))
  for row in ROWS:
    marks = [
      held.get((row.__name__, op.name), "-").center(len(op.name)) for op in OPS
    ]
    print(f"{row.__name__:{width}}  " + " ".join(marks))


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_holds(row, op, table):
  table[row.__name__, op.name] = "no"
  row(op)
  table[row.__name__, op.name] = "yes"


# --- at the door --------------------------------------------------------------


@pytest.mark.parametrize(
  "config",
  [
    kernels.RMSNormConfig,
    kernels.RopeConfig,
    kernels.FlashAttentionConfig,
    kernels.LinearCrossEntropyConfig,
  ],
)
def test_sizes_of_tiles_are_whole_numbers(config):
  for field in dataclasses.fields(config):
    for bad in ("128", 1024.0, True, 0, -128, [128], jnp.int32(1024)):
      message = f"{config.__name__}: {field.name} must"
      with pytest.raises(ValueError, match=message):
        config(**{field.name: bad})


def test_rules_have_known_letters_and_axes():
  for rules, message in (
    ({"Q": "data"}, "letter must be one of B, T, S, N, K, H, D, F, V, got 'Q'"),
    ({"B": "row"}, "wants a mesh axis among .*, got 'row'"),
    ({"B": ("data", "data")}, "must name each axis once"),
  ):
    with pytest.raises(ValueError, match=f"sharding: .*{message}"):
      with sharding(mesh_of(), rules):
        pass
  for bad in (None, "B", {"B": 5}):
    with pytest.raises(ValueError, match="sharding: rules must be mesh axes"):
      with sharding(mesh_of(), bad):  # type: ignore[arg-type]
        pass
  with pytest.raises(ValueError, match=r"mesh must be a jax\.sharding\.Mesh"):
    with sharding("data", {}):  # type: ignore[arg-type]
      pass
