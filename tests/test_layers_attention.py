"""Attention in a scan over layers: what it keeps lies in stores."""

import functools
import importlib
from typing import Any

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import v5e
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from pallas_gemma import kernels
from test_layers import assert_agree, moved, outs_and_gradients

pytestmark = pytest.mark.unoptimised

TURNS = importlib.import_module("pallas_gemma.kernels._layers.turns")
unset = TURNS.unset
IN_PLACE = ("q", "kv", "out")
SIZES = dict(layers=3, b=1, t=128, d=32, n=2, k=1, h=128)


def block(x, w, *, layout: Any = "BNTH", rope=False, implementation=None):
  """A layer's attention, and the sum of its result for the scan to stack."""
  heads = "BNTH" if layout == "BNTH" else "BTNH"
  of_keys = heads.replace("N", "K")
  q = kernels.layer_einsum(f"BTD,NDH->{heads}", x, w["q"])
  k, v = kernels.layer_einsum(f"BTD,CKDH->C{of_keys}", x, w["kv"])
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  y = kernels.flash_attention(
    q,
    k,
    v,
    is_causal=True,
    layout=layout,
    rope=kernels.Rope(positions) if rope else None,
    implementation=implementation,
  )
  y = kernels.layer_einsum(f"{heads},NHD->BTD", y, w["out"])
  return x + y, jnp.sum(y, axis=-1)


def arrays(*, layers, b, t, d, n, k, h, seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    wide = rng.standard_normal(shape) / np.sqrt(shape[-2])
    return jnp.asarray(wide, jnp.float32)

  weights = {
    "q": draw(layers, n, d, h),
    "kv": draw(layers, 2, k, d, h),
    "out": draw(layers, n, h, d),
  }
  return draw(b, t, d), weights


in_place = functools.partial(kernels.scan_layers, in_place=IN_PLACE)


def scanned(x, weights, *, scan=jax.lax.scan, **kwargs):
  return scan(functools.partial(block, **kwargs), x, weights)


def plain(x, weights, **kwargs):
  return scanned(x, weights, implementation="xla", **kwargs)


@pytest.fixture
def unset_is_nan(monkeypatch):
  """What is to be written is not a number until it is."""

  def nan(kind):
    return unset(kind) + jnp.nan

  monkeypatch.setattr(TURNS, "unset", nan)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("checkpoint", [None, jax.checkpoint])
def test_is_jax_scan(checkpoint, unset_is_nan):
  x, weights = arrays(**SIZES)
  scan = functools.partial(in_place, checkpoint=checkpoint)
  got = outs_and_gradients(functools.partial(scanned, scan=scan), x, weights)
  assert_agree(got, outs_and_gradients(plain, x, weights))


@pytest.mark.parametrize(
  ("layout", "sizes"),
  [
    ("BNTH", dict(rope=True)),
    ("BTNH", {}),
    # Keys that are padded have no stores.
    ("BNTH", dict(t=100)),
  ],
  ids=["heads", "packed", "ragged"],
)
def test_kernels_read_and_write_stores(layout, sizes, unset_is_nan):
  rope = sizes.pop("rope", False) if sizes else False
  x, weights = arrays(**SIZES | sizes)
  options = dict(layout=layout, rope=rope)
  with pltpu.force_tpu_interpret_mode(interpreter.PARAMS):
    kwargs = options | dict(implementation="pallas")
    got = outs_and_gradients(
      functools.partial(scanned, scan=in_place, **kwargs), x, weights
    )
    want = outs_and_gradients(functools.partial(scanned, **kwargs), x, weights)
  assert_agree(got, want, 1e-6)  # the same kernels, in arrays of their own


@pytest.mark.no_interpreter
def test_in_parts_and_reversed(unset_is_nan):
  """Some layers keep what others compute again."""
  x, weights = arrays(**SIZES)
  for order in ((None, jax.checkpoint), (jax.checkpoint, None)):
    parts = [
      kernels.ScanPart(block, layers, checkpoint)
      for layers, checkpoint in zip((2, 1), order, strict=True)
    ]

    def run(x, weights, parts=parts):
      return in_place(parts, x, weights, reverse=True)

    got = outs_and_gradients(run, x, weights)
    want = outs_and_gradients(
      lambda x, w: jax.lax.scan(block, x, w, reverse=True), x, weights
    )
    assert_agree(got, want)


@pytest.mark.no_interpreter
def test_forward_mode_and_second_derivatives():
  x, weights = arrays(**SIZES)
  tangents = jax.tree.map(jnp.cos, (x, weights))
  got, want = (
    jax.jvp(functools.partial(scanned, scan=scan), (x, weights), tangents)
    for scan in (in_place, jax.lax.scan)
  )
  assert_agree(got, want)

  def curvature(scan):
    def loss(weights):
      return jnp.sum(plain(x, weights, scan=scan)[0] ** 2)

    return jax.jvp(jax.grad(loss), (weights,), (weights,))[1]

  assert_agree(curvature(in_place), curvature(jax.lax.scan), 1e-4)


@pytest.mark.no_interpreter
def test_forward_mode_of_the_kernels_is_refused():
  x, weights = arrays(**SIZES)
  run = functools.partial(scanned, scan=in_place)
  tangent = jax.jit(lambda *a: jax.jvp(run, a, a))
  with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
    jax.export.export(tangent, platforms=["tpu"])(x, weights)


@pytest.mark.parametrize("mapped", ["x", "weights"])
def test_vmap(mapped, unset_is_nan):
  """Of several examples there are no such stacks: nothing is read there."""
  x, weights = arrays(**SIZES | dict(layers=2))
  more = jax.tree.map(lambda a: jnp.stack([a, a / 2]), (x, weights))
  axes = (0, None) if mapped == "x" else (None, 0)
  args = (more[0], weights) if mapped == "x" else (x, more[1])

  def run(scan, implementation):
    function = functools.partial(
      scanned, scan=scan, implementation=implementation
    )
    return jax.vmap(functools.partial(outs_and_gradients, function), axes)

  with pltpu.force_tpu_interpret_mode(interpreter.PARAMS):
    got = run(in_place, "pallas")(*args)
  assert_agree(got, run(jax.lax.scan, "xla")(*args), 2e-5)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("frozen", ["x", "q", "out", "weights"])
def test_what_is_not_differentiated(frozen, unset_is_nan):
  x, weights = arrays(**SIZES)
  fixed = set(weights) if frozen == "weights" else {frozen}
  moving = {k: v for k, v in dict(x=x, **weights).items() if k not in fixed}

  def loss(scan, moving):
    stay = dict(x=x, **weights) | moving
    y, _ = scanned(stay.pop("x"), stay, scan=scan)
    return jnp.sum(jnp.sin(y))

  got, want = (
    jax.grad(functools.partial(loss, scan))(moving)
    for scan in (in_place, jax.lax.scan)
  )
  assert_agree(got, want)


@pytest.mark.no_interpreter
def test_inside_of_another_trace_there_is_no_room(unset_is_nan):
  """An inner checkpoint, jit or branch keeps what it keeps by itself."""
  x, weights = arrays(**SIZES)

  def attend(q, k, v):
    return kernels.flash_attention(q, k, v, is_causal=True, layout="BNTH")

  def layer(x, w, *, wrap):
    q = kernels.layer_einsum("BTD,NDH->BNTH", x, w["q"])
    k, v = kernels.layer_einsum("BTD,CKDH->CBKTH", x, w["kv"])
    y = wrap(attend)(q, k, v)
    return x + kernels.layer_einsum("BNTH,NHD->BTD", y, w["out"]), None

  def branch(f):
    return lambda *a: jax.lax.cond(
      a[0][0, 0, 0, 0] > 1e9, lambda q, *_: q, f, *a
    )

  want = outs_and_gradients(lambda *a: plain(*a)[0], x, weights)
  for wrap in (jax.checkpoint, jax.jit, branch):
    run = functools.partial(layer, wrap=wrap)
    got = outs_and_gradients(
      lambda x, w, run=run: in_place(run, x, w)[0], x, weights
    )
    assert_agree(got, want)


@pytest.mark.no_interpreter
def test_over_a_mesh(unset_is_nan):
  x, weights = arrays(**SIZES | dict(b=4, d=64))
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))

  def run(scan):
    function = functools.partial(scanned, scan=scan)
    return jax.jit(functools.partial(outs_and_gradients, function))(x, weights)

  want = run(jax.lax.scan)
  with kernels.sharding(mesh, {"B": "data", "N": "model"}):
    assert_agree(run(in_place), want)


@pytest.mark.no_interpreter
def test_a_product_with_an_array():
  x, weights = arrays(**SIZES)
  w = weights["q"][0]
  got = kernels.layer_einsum("BTD,NDH->BNTH", x.astype(jnp.bfloat16), w)
  want = jnp.einsum("BTD,NDH->BNTH", *(a.astype(jnp.bfloat16) for a in (x, w)))
  assert got.dtype == jnp.bfloat16
  assert jnp.array_equal(got, want)


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
def test_nothing_of_attention_is_copied():
  """Neither q, nor what attention gives, on either way."""
  x, weights = arrays(layers=3, b=1, t=1024, d=256, n=8, k=1, h=256)
  specs = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weights
  )
  leaves, tree = jax.tree.flatten(specs)

  def program(scan):
    function = functools.partial(scanned, scan=scan, rope=True)

    def run(x, *leaves):
      return outs_and_gradients(function, x, tree.unflatten(leaves))

    x_spec = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    return v5e.compile(run, x_spec, *leaves).as_text()

  least = 8 * 1024 * 256 * 2  # of q
  here, there = (program(scan) for scan in (in_place, jax.lax.scan))

  def for_kernels(text):
    # A layer's own array, taken out of its stack: q, and the result.
    return [x for x in moved(text, least) if x.startswith("dynamic-slice")]

  assert not for_kernels(here)
  assert len(for_kernels(there)) == 2
