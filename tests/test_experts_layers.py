"""Experts in a scan over layers, whose weights stay in stacks."""

import functools
import importlib
import math
from typing import Any

import interpreter
import jax
import jax.numpy as jnp
import mutation
import numerics
import numpy as np
import pytest
import v5e
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from pallas_gemma import kernels
from pallas_gemma.kernels import ExpertBiases, FeedForwardConfig
from test_layers import (
  assert_agree,
  assert_same_curvature,
  in_place,
  moved,
  outs_and_gradients,
  unset_is_nan,
)

pytestmark = pytest.mark.unoptimised

__all__ = ["unset_is_nan"]  # a fixture
PREFETCH, FORWARD, BACKWARD = (
  importlib.import_module(f"pallas_gemma.kernels._gated.{name}")
  for name in ("prefetch", "forward", "backward")
)
LAYERS, EXPERTS = 3, 4
# Of each layer, one expert has no row; some rows are none's.
GROUP_SIZES = jnp.asarray([[7, 0, 20, 3], [0, 30, 1, 1], [9, 9, 9, 0]])
SIZES = dict(rows=32, d=128, f=256)
RAGGED = dict(rows=35, d=100, f=200)
# Two row tiles and two of F, as far as there are so many rows and columns.
TILES = kernels.FeedForwardTiles(16, 128)
CONFIG = FeedForwardConfig(forward=TILES, backward=TILES)


def arrays(*, rows, d, f, layers=LAYERS, experts=EXPERTS, seed=0):
  """The rows, and of all layers the weights, biases and group sizes."""
  rng = np.random.default_rng(seed)

  def draw(*shape):
    wide = rng.standard_normal((layers, *shape)) / math.sqrt(shape[-2])
    return jnp.asarray(wide, jnp.float32)

  return draw(rows, d)[0], {
    "gate": draw(experts, d, f),
    "up": draw(experts, d, f),
    "down": draw(experts, f, d),
    "mix": draw(d, d),
    "b_gate": draw(experts, f),
    "b_up": draw(experts, f),
    "b_down": draw(experts, d),
  }


FORMS = ("apart", "columns", "ungated")


def formed(weights, form):
  """Those of a form."""
  weights = dict(weights)
  if form == "columns":
    for name in ("gate", "b_gate"):
      other = weights.pop(name.replace("gate", "up"))
      weights[name] = jnp.concatenate([weights[name], other], axis=-1)
  if form == "ungated":
    del weights["gate"], weights["b_gate"]
  return weights


def experts_of(x, w, sizes, **kwargs):
  """The op, of the weights that there are."""
  biases = ExpertBiases(*(w.get(f"b_{n}") for n in ExpertBiases._fields))
  given = w.get("gate"), w.get("up"), w["down"]
  return kernels.expert_feed_forward(x, *given, sizes, biases=biases, **kwargs)


def block(x, w, **kwargs):
  """A layer: experts, whose group sizes are its own, beside other weights."""
  w, sizes = w
  x = x @ w["mix"]
  x = x + experts_of(x, w, sizes, **kwargs)
  return x, jnp.sum(x, axis=-1)


def weights_of(w):
  """The op's arguments."""
  return w["gate"], w["up"], w["down"]


def scanned(x, weights, *, scan=jax.lax.scan, sizes=GROUP_SIZES, **kwargs):
  body = functools.partial(block, **kwargs)
  return scan(body, x, (weights, sizes))


def in_stacks(weights, **kwargs):
  """A scan in which the weights of experts stay in their stacks."""
  names = [n for n in ("gate", "up", "down") if n in weights]
  return functools.partial(kernels.scan_layers, in_place=names, **kwargs)


def config_of(residuals):
  return FeedForwardConfig(forward=TILES, backward=TILES, residuals=residuals)


# --- a scan, in place ---------------------------------------------------------


@pytest.mark.no_interpreter
@pytest.mark.parametrize("checkpoint", [None, jax.checkpoint])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", ["xla", None])
def test_is_jax_scan(implementation, form, checkpoint, unset_is_nan):
  x, weights = arrays(**RAGGED)
  weights = formed(weights, form)
  run = functools.partial(scanned, implementation=implementation)
  scan = in_stacks(weights, checkpoint=checkpoint)
  got = outs_and_gradients(functools.partial(run, scan=scan), x, weights)
  plain = functools.partial(scanned, implementation="xla")
  assert_agree(got, outs_and_gradients(plain, x, weights))


@pytest.mark.parametrize("residuals", ["gate_up", "none"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [SIZES, RAGGED], ids=["tiles", "ragged"])
def test_kernels_write_into_stacks(sizes, form, residuals, unset_is_nan):
  x, weights = arrays(**sizes)
  weights = formed(weights, form)
  run = functools.partial(scanned, config=config_of(residuals))
  with pltpu.force_tpu_interpret_mode(interpreter.PARAMS):
    by_kernels = functools.partial(
      run, scan=in_stacks(weights), implementation="pallas"
    )
    got = outs_and_gradients(by_kernels, x, weights)
  plain = functools.partial(run, implementation="xla")
  assert_agree(got, outs_and_gradients(plain, x, weights))


@pytest.mark.no_interpreter
def test_biases_may_stay_as_well(unset_is_nan):
  x, weights = arrays(**SIZES)
  names = [name for name in weights if name != "mix"]
  scan = functools.partial(kernels.scan_layers, in_place=names)
  got, want = (
    outs_and_gradients(functools.partial(scanned, scan=s), x, weights)
    for s in (scan, jax.lax.scan)
  )
  assert_agree(got, want)


@pytest.mark.no_interpreter
def test_forward_mode():
  x, weights = arrays(**RAGGED)
  tangents = jax.tree.map(jnp.cos, (x, weights))
  got, want = (
    jax.jvp(functools.partial(scanned, scan=scan), (x, weights), tangents)
    for scan in (in_stacks(weights), jax.lax.scan)
  )
  assert_agree(got, want)


@pytest.mark.no_interpreter
def test_second_derivatives_of_the_reference():
  x, weights = arrays(**RAGGED)
  assert_same_curvature(scanned, in_stacks(weights), x, weights)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("frozen", ["x", "weights", "up"])
def test_what_is_not_differentiated(frozen, unset_is_nan):
  x, weights = arrays(**RAGGED)

  def loss(scan, moving):
    stay = dict(x=x, **weights) | moving
    y, _ = scanned(stay.pop("x"), stay, scan=scan)
    return jnp.sum(jnp.sin(y))

  fixed = set(weights) if frozen == "weights" else {frozen}
  moving = {k: v for k, v in dict(x=x, **weights).items() if k not in fixed}
  got, want = (
    jax.grad(functools.partial(loss, scan))(moving)
    for scan in (in_stacks(weights), jax.lax.scan)
  )
  assert_agree(got, want)


@pytest.mark.no_interpreter
def test_examples_take_turns(unset_is_nan):
  """Under vmap; each has rows and group sizes of its own."""
  x, weights = arrays(**SIZES)
  xs = jnp.stack([x, jnp.flip(x)])
  sizes = jnp.stack([GROUP_SIZES, jnp.flip(GROUP_SIZES, 1)])

  def run(scan):
    def loss(weights, x, sizes):
      return jnp.sum(jnp.sin(scanned(x, weights, scan=scan, sizes=sizes)[0]))

    of_example = jax.value_and_grad(loss)
    return jax.vmap(of_example, (None, 0, 0))(weights, xs, sizes)

  assert_agree(run(in_stacks(weights)), run(jax.lax.scan))


@pytest.mark.no_interpreter
@pytest.mark.parametrize("form", FORMS)
def test_over_a_mesh(form, unset_is_nan):
  """A layer's weights are split or gathered one layer at a time."""
  x, weights = arrays(**SIZES)
  weights = formed(weights, form)
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))

  def run(scan):
    function = functools.partial(scanned, scan=scan)
    return jax.jit(functools.partial(outs_and_gradients, function))(x, weights)

  want = run(jax.lax.scan)
  for rules in ({"B": "data", "F": "model"}, {"B": "data", "D": "model"}):
    with kernels.sharding(mesh, rules):
      assert_agree(run(in_stacks(weights)), want)


# --- one layer of a stack, by its index ---------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [SIZES, RAGGED], ids=["tiles", "ragged"])
def test_layer_is_a_slice(sizes, form):
  x, weights = arrays(**sizes)
  del weights["mix"]
  weights = formed(weights, form)
  names, stacks = list(weights), list(weights.values())
  rows, kwargs = GROUP_SIZES[1], dict(config=CONFIG)

  def at(layer, x, *stacks, **kwargs):
    w = dict(zip(names, stacks, strict=True))
    return experts_of(x, w, rows, layer=layer, **kwargs)

  def sliced(x, *stacks, **kwargs):
    w = dict(zip(names, (w[1] for w in stacks), strict=True))
    return experts_of(x, w, rows, **kwargs)

  with pltpu.force_tpu_interpret_mode(interpreter.PARAMS):
    by_kernels = functools.partial(
      at, jnp.asarray(1), implementation="pallas", **kwargs
    )
    got = numerics.value_and_gradients(by_kernels, [x, *stacks])
  want = numerics.value_and_gradients(
    functools.partial(sliced, implementation="xla"), [x, *stacks]
  )
  assert_agree(got, want)
  plain = functools.partial(at, 1, implementation="xla")
  assert_agree(numerics.value_and_gradients(plain, [x, *stacks]), want)


@pytest.mark.no_interpreter
def test_layer_of_the_reference():
  x, weights = arrays(**RAGGED)

  def run(weights, layer=None):
    biases = ExpertBiases(*(weights[f"b_{n}"] for n in ExpertBiases._fields))
    gate, up, down = weights_of(weights)
    return kernels.expert_feed_forward_reference(
      x, gate, up, down, GROUP_SIZES[2], biases=biases, layer=layer
    )

  own = {name: w[2] for name, w in weights.items()}
  assert_agree(run(weights, layer=2), run(own))


@pytest.mark.no_interpreter
def test_exported_for_tpu():
  """Also with the number of rows left open, in plain jnp."""
  x, weights = arrays(**SIZES)
  stacks = weights_of(weights)

  def loss(x, gate, up, down):
    sizes = GROUP_SIZES[1]
    y = kernels.expert_feed_forward(x, gate, up, down, sizes, layer=1)
    return jnp.sum(y)

  (rows,) = jax.export.symbolic_shape("rows")
  open_rows = jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype)
  step = jax.jit(jax.grad(loss, argnums=(0, 1)))
  known = jax.export.export(step, platforms=("tpu",))(x, *stacks)
  assert "expert_feed_forward_bwd" in known.mlir_module()
  for platform in ("tpu", "cpu"):
    program = jax.export.export(step, platforms=(platform,))
    program = program(open_rows, *stacks)
  assert_agree(program.call(x, *stacks), step(x, *stacks))


# --- refusals -----------------------------------------------------------------


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  ("layer", "message"),
  [
    (3, "layer must be from 0 to 2, the last of the stack, got 3"),
    (1.0, "layer must be an integer"),
    (jnp.zeros(2, jnp.int32), r"layer must be a single integer, got int32 \(2"),
    (None, r"w_down must be \[E, F, D\] with D = 128"),
  ],
)
def test_layer_is_checked(layer, message):
  x, weights = arrays(**SIZES)
  stacks = weights_of(weights)
  with pytest.raises(ValueError, match=f"expert_feed_forward: {message}"):
    kernels.expert_feed_forward(x, *stacks, GROUP_SIZES[0], layer=layer)


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"down": 0}, r"w_down must be \[L, E, F, D\], with layer, with D = 128"),
    ({"gate": 0}, r"w_gate must be \(3, 4, 128, 256\) \(\[L, E, D, F\]\)"),
    ({"up": None}, r"w_gate must be \(3, 4, 128, 512\) \(\[L, E, D, 2F\]\)"),
    ({"b_down": 0}, r"biases.down must be \(3, 4, 128\) \(that of w_down\)"),
  ],
)
def test_stacks_are_checked(change, message):
  x, weights = arrays(**SIZES)
  for name, index in change.items():
    own = weights.pop(name)
    if index is None:
      del weights[f"b_{name}"]
    else:
      weights[name] = own[index]
  with pytest.raises(ValueError, match=f"expert_feed_forward: {message}"):
    experts_of(x, weights, GROUP_SIZES[0], layer=0)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("op", ["feed_forward", "expert_feed_forward"])
def test_all_weights_stay_or_none(op):
  """In the same words."""
  x, weights = arrays(**SIZES)
  sizes = [GROUP_SIZES[0]] if op == "expert_feed_forward" else []
  if not sizes:
    weights = {name: w[:, 0] for name, w in weights.items()}

  def layer(x, w, layer=None):
    function = getattr(kernels, op)
    return function(x, *weights_of(w), *sizes, layer=layer), None

  words = (
    f"{op}: all weights must stay in their stacks, or none, and layer must be "
    "None with them; got"
  )
  with pytest.raises(ValueError, match=f"{words} 1 of 3, and layer None"):
    kernels.scan_layers(layer, x, weights, in_place=("gate",))
  with pytest.raises(ValueError, match=f"{words} 3 of 3, and layer 1"):
    in_place(functools.partial(layer, layer=1), x, weights)


# --- mutants ------------------------------------------------------------------


def _without_layer(function: Any) -> Any:
  """Which takes weights of the first one."""

  def of_first(scalars, *args):
    first = [jnp.zeros_like(scalars.layer[0])]
    return function(scalars._replace(layer=first), *args)

  return of_first


@pytest.mark.parametrize("module", [FORWARD, BACKWARD], ids=["fwd", "bwd"])
def test_another_layers_weights_are_noticed(module, monkeypatch):
  x, weights = arrays(**SIZES)
  del weights["mix"]

  def gradients(implementation):
    def loss(weights):
      y = experts_of(
        x,
        weights,
        GROUP_SIZES[1],
        layer=1,
        implementation=implementation,
        config=CONFIG,
      )
      return jnp.sum(jnp.sin(y))

    return jax.value_and_grad(loss)(weights)

  want = gradients("xla")
  fetched = _without_layer(PREFETCH.fetched)
  monkeypatch.setattr(module, "fetched", fetched)

  def agree():
    with pltpu.force_tpu_interpret_mode(interpreter.PARAMS):
      assert_agree(gradients("pallas"), want)

  mutation.assert_killed(agree)


# --- what XLA makes of it -----------------------------------------------------


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
@pytest.mark.parametrize("form", ["apart", "ungated"])
def test_nothing_of_a_layer_is_copied(form):
  """Neither experts' weights, nor their gradients, nor what is kept."""
  assert not moves(form, in_stacks)
  assert len(moves(form, lambda _: jax.lax.scan)) > 5


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
def test_halves_of_gradients_are_all_that_is_copied():
  """Of both branches in one weight XLA puts the gradient together."""
  found = moves("columns", in_stacks)
  assert len(found) <= 1, found


ROWS, WIDTH, HIDDEN = 1024, 256, 2048


def moves(form, scan_of):
  """Large copies, as many bytes as a layer keeps of a product, or more."""
  x, weights = arrays(layers=LAYERS, rows=ROWS, d=WIDTH, f=HIDDEN)
  del weights["mix"]  # whose gradient XLA casts
  weights = formed(weights, form)
  weights = {n: w for n, w in weights.items() if not n.startswith("b_")}
  sizes = jnp.full((LAYERS, EXPERTS), ROWS // EXPERTS, jnp.int32)
  leaves, tree = jax.tree.flatten((x, weights, sizes))

  def layer(x, w):
    w, sizes = w
    return jnp.tanh(experts_of(x, w, sizes)), None

  def program(*leaves):
    x, weights, sizes = tree.unflatten(leaves)

    def run(x, weights):
      return scan_of(weights)(layer, x, (weights, sizes))[0]

    return outs_and_gradients(run, x, weights)

  specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves]
  text = v5e.compile(program, *specs).as_text()
  return moved(text, WIDTH * HIDDEN * 4 * EXPERTS)
