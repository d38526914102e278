"""Layers of a model in a scan, whose weights and gradients stay in stacks."""

import functools
import importlib
import math
import re
from typing import Any, Literal

import interpreter
import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
import v5e
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from pallas_gemma import kernels

pytestmark = pytest.mark.unoptimised

Residuals = Literal["gate_up", "none"]
IN_PLACE = ("gate", "up", "down")
SIZES = dict(layers=3, rows=32, d=128, f=256)
RAGGED = dict(layers=2, rows=23, d=100, f=200)
TURNS = importlib.import_module("pallas_gemma.kernels._layers.turns")
unset = TURNS.unset


def block(x, w, *, implementation, residuals: Residuals = "gate_up"):
  """A layer: two ops, with weights of either kind beside those in place."""
  norm = kernels.Norm(w["scale"], scale_offset=1.0)
  x = kernels.feed_forward(
    x @ w["mix"],
    *(w[name] for name in IN_PLACE),
    norm=norm,
    residual=True,
    implementation=implementation,
    config=kernels.FeedForwardConfig(residuals=residuals),
  )
  return x, jnp.sum(x, axis=-1)


def arrays(*, layers, rows, d, f, seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    wide = rng.standard_normal(shape) / math.sqrt(shape[-2])
    return jnp.asarray(wide, jnp.float32)

  weights = {
    "gate": draw(layers, d, f),
    "up": draw(layers, d, f),
    "down": draw(layers, f, d),
    "mix": draw(layers, d, d),
    "scale": draw(layers, d),
  }
  return draw(rows, d), weights


def scanned(x, weights, *, scan=jax.lax.scan, **kwargs):
  y, sums = scan(functools.partial(block, **kwargs), x, weights)
  return y, sums


in_place = functools.partial(kernels.scan_layers, in_place=IN_PLACE)


def outs_and_gradients(function, x, weights):
  """As one tree: the results, then the gradients, by random cotangents."""
  outs, back = jax.vjp(function, x, weights)
  rng = np.random.default_rng(1)
  d_outs = jax.tree.map(
    lambda y: jnp.asarray(rng.standard_normal(y.shape), y.dtype), outs
  )
  return outs, back(d_outs)


def assert_agree(got, want, tolerance=1e-5):
  def one(path, a, b):
    assert a.shape == b.shape, path
    scale = np.abs(np.asarray(b)).max(initial=0)
    off = np.abs(np.asarray(a) - b).max(initial=0)
    assert off <= tolerance * scale, path

  jax.tree_util.tree_map_with_path(one, got, want)


@pytest.fixture
def unset_is_nan(monkeypatch):
  """What is to be written is not a number until it is."""

  def nan(kind):
    return unset(kind) + jnp.nan

  monkeypatch.setattr(TURNS, "unset", nan)


# --- a scan, in place ---------------------------------------------------------


@pytest.mark.no_interpreter
@pytest.mark.parametrize("checkpoint", [None, jax.checkpoint])
@pytest.mark.parametrize("residuals", ["gate_up", "none"])
@pytest.mark.parametrize("implementation", ["xla", None])
def test_is_jax_scan(implementation, residuals, checkpoint, unset_is_nan):
  x, weights = arrays(**RAGGED)
  kwargs = dict(implementation=implementation, residuals=residuals)
  scan = functools.partial(in_place, checkpoint=checkpoint)
  got = outs_and_gradients(
    functools.partial(scanned, scan=scan, **kwargs), x, weights
  )
  want = outs_and_gradients(
    functools.partial(scanned, implementation="xla"), x, weights
  )
  assert_agree(got, want)


@pytest.mark.parametrize("residuals", ["gate_up", "none"])
@pytest.mark.parametrize("sizes", [SIZES, RAGGED], ids=["tiles", "ragged"])
def test_kernels_write_into_stacks(sizes, residuals, unset_is_nan):
  x, weights = arrays(**sizes)
  kwargs = dict(implementation="pallas", residuals=residuals)
  with pltpu.force_tpu_interpret_mode(interpreter.PARAMS):
    got = outs_and_gradients(
      functools.partial(scanned, scan=in_place, **kwargs), x, weights
    )
    want = outs_and_gradients(functools.partial(scanned, **kwargs), x, weights)
  assert_agree(got, want, 1e-6)  # the same kernels, in arrays of their own


@pytest.mark.no_interpreter
@pytest.mark.parametrize("form", ["geglu", "fused", "ungated"])
def test_with_fewer_weights(form, unset_is_nan):
  """Also where there is no w_up, or no w_down."""
  x, weights = arrays(**RAGGED)

  def layer(x, w):
    if form == "geglu":
      return kernels.geglu(x, w["gate"], w["up"]) @ w["down"], None
    gate = w["gate"] if form == "fused" else None
    up = None if form == "fused" else w["up"]
    return kernels.feed_forward(x, gate, up, w["down"]), None

  both = jnp.stack([weights["gate"], weights["up"]], axis=1)
  weights, names = {
    "geglu": (weights, ("gate", "up")),
    "fused": (weights | {"gate": both}, ("gate", "down")),
    "ungated": (weights, ("up", "down")),
  }[form]

  def run(scan, **kwargs):
    def function(x, weights):
      return scan(layer, x, weights, **kwargs)[0]

    return outs_and_gradients(function, x, weights)

  assert_agree(run(kernels.scan_layers, in_place=names), run(jax.lax.scan))


@pytest.mark.no_interpreter
def test_reverse_and_unrolled(unset_is_nan):
  x, weights = arrays(**SIZES)
  for options in (dict(reverse=True), dict(unroll=True), dict(unroll=2)):
    scans = [functools.partial(s, **options) for s in (in_place, jax.lax.scan)]
    got, want = (
      outs_and_gradients(
        functools.partial(scanned, scan=scan, implementation=None), x, weights
      )
      for scan in scans
    )
    assert_agree(got, want)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
  "order", [(None, jax.checkpoint), (jax.checkpoint, None)]
)
def test_in_parts(order, reverse, unset_is_nan):
  """Some layers keep what others compute again."""
  x, weights = arrays(**SIZES)
  f = functools.partial(block, implementation=None)
  first, rest = order
  parts = [kernels.ScanPart(f, 2, first), kernels.ScanPart(f, 1, rest)]

  def run(x, weights):
    return in_place(parts, x, weights, reverse=reverse)

  def whole(x, weights):
    return jax.lax.scan(f, x, weights, reverse=reverse)

  got = outs_and_gradients(run, x, weights)
  assert_agree(got, outs_and_gradients(whole, x, weights))


@pytest.mark.no_interpreter
def test_parts_must_be_all_layers():
  x, weights = arrays(**SIZES)
  f = functools.partial(block, implementation=None)
  for counts in ((2, 2), (3, 0), (2,), ()):
    parts = [kernels.ScanPart(f, count) for count in counts]
    with pytest.raises(ValueError, match="must be 3 layers, as xs has"):
      in_place(parts, x, weights)
  parts = [kernels.ScanPart(f, 3)]
  with pytest.raises(ValueError, match="its own checkpoint"):
    in_place(parts, x, weights, checkpoint=jax.checkpoint)


@pytest.mark.no_interpreter
def test_forward_mode():
  x, weights = arrays(**RAGGED)
  tangents = jax.tree.map(jnp.cos, (x, weights))
  got, want = (
    jax.jvp(
      functools.partial(scanned, scan=scan, implementation=None),
      (x, weights),
      tangents,
    )
    for scan in (in_place, jax.lax.scan)
  )
  assert_agree(got, want)


@pytest.mark.no_interpreter
def test_second_derivatives_of_the_reference():
  assert_same_curvature(scanned, in_place, *arrays(**RAGGED))


def assert_same_curvature(scanned, scan, x, weights):
  """By `scan`, as by JAX's own."""

  def curvature(scan):
    def loss(weights):
      y = scanned(x, weights, scan=scan, implementation="xla")[0]
      return jnp.sum(y**2)

    return jax.jvp(jax.grad(loss), (weights,), (weights,))[1]

  assert_agree(curvature(scan), curvature(jax.lax.scan), 1e-4)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("frozen", ["x", "weights", "up"])
def test_what_is_not_differentiated(frozen, unset_is_nan):
  x, weights = arrays(**RAGGED)

  def loss(scan, moving):
    stay = dict(x=x, **weights)
    stay |= moving
    y, _ = scanned(stay.pop("x"), stay, scan=scan, implementation=None)
    return jnp.sum(jnp.sin(y))

  fixed = set(weights) if frozen == "weights" else {frozen}
  moving = {k: v for k, v in dict(x=x, **weights).items() if k not in fixed}
  got, want = (
    jax.grad(functools.partial(loss, scan))(moving)
    for scan in (in_place, jax.lax.scan)
  )
  assert_agree(got, want)


@pytest.mark.no_interpreter
def test_a_layer_of_its_own(unset_is_nan):
  """Read as an array, or not at all."""
  x, weights = arrays(**SIZES)

  def layer(x, w):
    return jnp.tanh(x @ w["gate"] @ w["down"].astype(x.dtype)), None

  def loss(weights, scan):
    return jnp.sum(scan(layer, x, weights)[0])

  got = jax.grad(loss)(weights, in_place)
  assert_agree(got, jax.grad(loss)(weights, jax.lax.scan))
  assert not got["up"].any() and got["gate"].any()


@pytest.mark.no_interpreter
def test_over_a_mesh(unset_is_nan):
  """A layer's weights are split or gathered one layer at a time."""
  x, weights = arrays(**SIZES)
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))

  def run(scan):
    function = functools.partial(scanned, scan=scan, implementation=None)
    return jax.jit(functools.partial(outs_and_gradients, function))(x, weights)

  want = run(jax.lax.scan)
  for rules in ({"B": "data", "F": "model"}, {"B": "data", "D": "model"}):
    with kernels.sharding(mesh, rules):
      assert_agree(run(in_place), want)


# --- refusals -----------------------------------------------------------------


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  ("names", "change", "message"),
  [
    (("gate", "wrong"), {}, "'wrong', which is on no path"),
    (IN_PLACE, {"mix": jnp.zeros((5, 128, 128))}, "of one L"),
    (IN_PLACE, {"mix": jnp.zeros(())}, "of one L"),
    (("gate",), {}, "got 1 of 3"),
    ("gate", {}, "must be a collection of names, got 'gate'"),
    (None, {}, "must be a collection of names, got None"),
  ],
)
def test_refused(names, change, message):
  x, weights = arrays(**SIZES)
  function = functools.partial(block, implementation=None)
  with pytest.raises(ValueError, match=message):
    kernels.scan_layers(function, x, weights | change, in_place=names)


PART: Any = kernels.ScanPart(lambda carry, x: (carry, x), 1)


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  ("parts", "message"),
  [
    (None, "f must be a function or a sequence of ScanPart, got None"),
    ([block], "f must be a function or a sequence of ScanPart"),
    ([PART._replace(layers=1.0)], "layers must be an integer, got 1.0"),
  ],
)
def test_parts_are_refused(parts, message):
  x, weights = arrays(**SIZES)
  with pytest.raises(ValueError, match=f"scan_layers: {message}"):
    in_place(parts, x, weights)


@pytest.mark.no_interpreter
def test_what_is_no_switch_and_no_checkpoint_is_refused():
  x, weights = arrays(**SIZES)
  body: Any = block
  scan = functools.partial(kernels.scan_layers, body, x, weights)
  with pytest.raises(ValueError, match="reverse must be True or False"):
    scan(in_place=IN_PLACE, reverse="no")  # type: ignore[arg-type]
  with pytest.raises(ValueError, match="checkpoint must wrap f, .* got True"):
    scan(in_place=IN_PLACE, checkpoint=True)  # type: ignore[arg-type]


@pytest.mark.no_interpreter
def test_used_twice_is_refused():
  x, weights = arrays(**SIZES)

  def twice(x, w):
    x, _ = block(x, w, implementation=None)
    return block(x, w, implementation=None)

  with pytest.raises(ValueError, match="got a second use"):
    in_place(twice, x, weights)


@pytest.mark.no_interpreter
def test_leaked_into_an_inner_checkpoint_is_an_error():
  """Never a wrong gradient."""
  x, weights = arrays(**SIZES)

  def inner(x, w):
    @jax.checkpoint
    def rest(x):
      return block(x, w, implementation=None)

    return rest(x)

  with pytest.raises(jax.errors.UnexpectedTracerError):
    in_place(inner, x, weights)


# --- one layer of a stack, by its index ---------------------------------------


@pytest.mark.parametrize("sizes", [SIZES, RAGGED], ids=["tiles", "ragged"])
@pytest.mark.parametrize("op", ["geglu", "feed_forward"])
def test_layer_is_a_slice(op, sizes):
  x, weights = arrays(**sizes)
  names = IN_PLACE if op == "feed_forward" else IN_PLACE[:2]
  stacks = [weights[name] for name in names]

  def at(function, layer, x, *stacks, **kwargs):
    return function(x, *stacks, layer=layer, **kwargs)

  def sliced(function, x, *stacks, **kwargs):
    return function(x, *(w[1] for w in stacks), **kwargs)

  function, reference = (getattr(kernels, op + s) for s in ("", "_reference"))

  with pltpu.force_tpu_interpret_mode(interpreter.PARAMS):
    got = numerics.value_and_gradients(
      functools.partial(at, function, jnp.asarray(1), implementation="pallas"),
      [x, *stacks],
    )
    want = numerics.value_and_gradients(
      functools.partial(sliced, function, implementation="pallas"),
      [x, *stacks],
    )
  assert_agree(got, want, 1e-6)
  got = at(reference, 1, x, *stacks)
  assert_agree(got, sliced(reference, x, *stacks))
  assert_agree(at(function, 1, x, *stacks, implementation="xla"), got)


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  ("layer", "message"),
  [
    (3, "layer must be from 0 to 2, the last of the stack, got 3"),
    (-1, "layer must be from 0 to 2"),
    (1.0, "layer must be an integer"),
    (jnp.zeros(2, jnp.int32), r"single integer, got int32 \(2,\)"),
    (jnp.zeros(()), "single integer, got float32"),
    (None, r"w_gate must be \[D, F\]"),
  ],
)
def test_layer_is_checked(layer, message):
  x, weights = arrays(**SIZES)
  stacks = (weights[name] for name in IN_PLACE)
  with pytest.raises(ValueError, match=message):
    kernels.feed_forward(x, *stacks, layer=layer)


@pytest.mark.no_interpreter
def test_weights_without_a_layer_are_no_stack():
  x, weights = arrays(**SIZES)
  with pytest.raises(ValueError, match=r"w_gate must be \[L, D, F\]"):
    kernels.geglu(x, weights["gate"][0], weights["up"][0], layer=0)


# --- what XLA makes of it -----------------------------------------------------

_BYTES = {"bf16": 2, "f32": 4}


def moved(text, least):
  """Large results of copies, slices and broadcasts in a compiled program."""
  found = []
  for line in text.splitlines():
    match = re.match(r"\s+(?:ROOT )?%(\S+) = (.*?) (\S+)\(", line)
    if match is None:
      continue
    name, types, opcode = match.groups()
    words = "copy slice broadcast".split()
    is_move = any(word in opcode or word in name for word in words)
    sizes = [
      _BYTES.get(dtype, 0) * math.prod(map(int, filter(None, dims.split(","))))
      for dtype, dims in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", types)
    ]
    if is_move and max(sizes, default=0) >= least:
      found.append(name)
  return found


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
def test_nothing_of_a_layer_is_copied():
  """Neither weights, nor their gradients, nor what is kept."""
  x, weights = arrays(layers=3, rows=256, d=256, f=2048)
  specs = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weights
  )
  leaves, tree = jax.tree.flatten(specs)

  def program(scan):
    function = functools.partial(scanned, scan=scan, implementation=None)

    def run(x, *leaves):
      return outs_and_gradients(function, x, tree.unflatten(leaves))

    return v5e.compile(run, jax.ShapeDtypeStruct(x.shape, x.dtype), *leaves)

  least = 256 * 2048 * 4  # of a weight, and of what is kept of it
  assert not moved(program(in_place).as_text(), least)
  assert len(moved(program(jax.lax.scan).as_text(), least)) > 5
