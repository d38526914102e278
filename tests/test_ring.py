"""Attention over devices that share a sequence."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import v5e
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pallas_gemma import kernels
from pallas_gemma.kernels import Rope, context_order, flash_attention

pytestmark = pytest.mark.unoptimised

plain = functools.partial(flash_attention, implementation="xla")


def draw(t, n=4, kv_heads=1, h=16, s=None, batch=2, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (t, n), (s or t, kv_heads), (s or t, kv_heads)
  return [
    jax.random.normal(key, (batch, *shape, h), dtype)
    for key, shape in zip(keys, shapes, strict=True)
  ]


def results(function, *arrays):
  """out, lse and the gradients of something of both."""

  def loss(*arrays):
    out, lse = function(*arrays)
    tokens, sizes = jnp.arange(out.shape[1]), jnp.arange(out.shape[3])
    weight = jnp.cos(tokens)[:, None, None] + jnp.sin(sizes)
    seen = jnp.where(jnp.isfinite(lse), lse, 0.0)
    return (out * weight).sum() + jnp.sin(seen).sum(), (out, lse)

  gradient = jax.value_and_grad(loss, range(len(arrays)), has_aux=True)
  (_, outs), grads = jax.jit(gradient)(*arrays)
  return [*outs, *grads]


def on_a_ring(function, *arrays, devices=4, kind=AxisType.Auto):
  mesh = jax.make_mesh((devices,), ("context",), axis_types=(kind,))
  place = NamedSharding(mesh, P(None, "context"))
  arrays = [jax.device_put(x, place) for x in arrays]
  rules = {"T": "context"} if kind == AxisType.Auto else {}
  with jax.set_mesh(mesh), kernels.sharding(mesh, rules):
    return results(function, *arrays)


def packed(length, parts):
  """Segments, some of padding, and positions in a context's order."""
  ids, positions = np.ones((2, length), np.int32), np.arange(length)
  ids[:, 20:], ids[0, 41:] = 2, 0
  order = context_order(length, parts)
  positions = jnp.asarray(np.tile(positions[order], (2, 1)))
  return dict(segment_ids=jnp.asarray(ids[:, order]), rope=Rope(positions))


_SLOPES = jnp.asarray([0.5, 0.25, 0.125, 0.0625])
CASES: dict[str, dict[str, Any]] = {
  "zigzag": dict(is_causal=True, context_parts=4, rope=None),
  "packed": dict(is_causal=True, context_parts=4, kv_heads=2),
  "window": dict(is_causal=True, context_parts=4, local_window_size=(9, 0)),
  "in_time": dict(is_causal=True, logits_soft_cap=3.0, kind=AxisType.Explicit),
  "alibi": dict(is_causal=True, context_parts=4, alibi_slopes=_SLOPES),
  "dropped": dict(
    alibi_slopes=_SLOPES, kv_heads=2, dropout_rate=0.3, dropout_seed=5
  ),
  "full": dict(s=32, kv_heads=4, segment_ids=None, rope=None),
}


@pytest.mark.no_interpreter
@pytest.mark.parametrize("name", CASES)
def test_a_ring_gives_what_one_device_does(name):
  options = dict(CASES[name], return_lse=True)
  kind = options.pop("kind", AxisType.Auto)
  sizes = {n: options.pop(n) for n in ("s", "kv_heads") if n in options}
  options = packed(48, options.get("context_parts", 1)) | options
  arrays = draw(48, **sizes)
  function = functools.partial(flash_attention, **options)
  got = on_a_ring(function, *arrays, kind=kind)
  want = results(functools.partial(plain, **options), *arrays)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "options",
  [
    dict(is_causal=True, context_parts=2),
    dict(alibi_slopes=_SLOPES[:2], dropout_rate=0.3, dropout_seed=5),
  ],
)
def test_the_kernels_go_round(options):
  # In the interpreter all devices must call as many kernels: no causal ALiBi.
  arrays = draw(64, n=2, h=128, batch=1)
  options = options | dict(return_lse=True)
  kernel = functools.partial(
    flash_attention, implementation="pallas", **options
  )
  got = on_a_ring(kernel, *arrays, devices=2)
  want = results(functools.partial(plain, **options), *arrays)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.no_interpreter
def test_an_order_of_context_without_a_ring():
  arrays = draw(24)
  options = dict(is_causal=True, context_parts=3, return_lse=True)
  order, back = context_order(24, 3), context_order(24, 3, inverse=True)
  assert (order[back] == np.arange(24)).all()
  assert order[:8].tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
  got = results(functools.partial(flash_attention, **options), *arrays)
  in_time = [x[:, back] for x in arrays]
  out, lse = plain(*in_time, is_causal=True, return_lse=True)
  np.testing.assert_allclose(got[0], out[:, order], atol=1e-5)
  np.testing.assert_allclose(got[1], lse[..., order], atol=1e-5)


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
def test_only_keys_travel_and_while_kernels_run():
  chips = np.array(v5e.devices("2x2", (2, 2, 1)))
  mesh = Mesh(chips, ("context",), axis_types=(AxisType.Auto,))
  place = NamedSharding(mesh, P(None, "context"))
  q, k = (
    jax.ShapeDtypeStruct((1, 2048, n, 128), jnp.bfloat16, sharding=place)
    for n in (2, 1)
  )

  def loss(*arrays):
    out = flash_attention(*arrays, is_causal=True, context_parts=4)
    return out.astype(jnp.float32).sum()

  gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
  with kernels.sharding(mesh, {"T": "context"}):
    text = gradient.lower(q, k, k).compile().as_text() or ""
  assert not re.search("all-(reduce|gather|to-all)|reduce-scatter", text)
  bodies = [
    computation
    for computation in text.split("\n\n")
    if " conditional(" in computation and "permute-start(" in computation
  ]
  # Forward k and v go on, backward dk and dv too.
  counts = [len(re.findall("permute-start[(]", body)) for body in bodies]
  assert [n for n in sorted(counts) if n in (2, 4)] == sorted(counts)
  assert {2, 4} <= set(counts)
  for body in bodies:
    first, last = body.index("permute-start("), body.rindex("permute-done(")
    assert first < body.index(" conditional(") < last
  assert "collective-permute(" not in text


def test_what_a_ring_cannot_do_is_said_in_words():
  cases: Any = (
    ((16.0, 2), "length must be an integer"),
    ((16, "2"), "parts must be an integer"),
  )
  for bad, message in cases:
    with pytest.raises(ValueError, match=f"context_order: {message}"):
      context_order(*bad)
  with pytest.raises(ValueError, match="inverse must be True or False"):
    context_order(16, 2, inverse="no")  # type: ignore[arg-type]
  with pytest.raises(ValueError, match="a multiple of 2 x 4 parts, got 20"):
    flash_attention(*draw(20), is_causal=True, context_parts=4)
  with pytest.raises(ValueError, match="must be 1 or the 4 devices"):
    on_a_ring(
      functools.partial(flash_attention, is_causal=True, context_parts=2),
      *draw(16),
    )
  with pytest.raises(ValueError, match="need T = S, got 16 and 32"):
    on_a_ring(
      functools.partial(flash_attention, is_causal=True), *draw(16, s=32)
    )
