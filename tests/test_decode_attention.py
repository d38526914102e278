"""Decode attention: numbers, caches in every form, and what XLA puts around."""

import functools
import importlib
import itertools
import re
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
from jax.sharding import NamedSharding, PartitionSpec
from pallas_gemma.kernels import (
  DecodeAttentionConfig,
  QuantizedCache,
  Rope,
  RopeFrequencies,
  decode_attention,
  decode_attention_reference,
  sharding,
)

append, attend, rotate, stream = (
  importlib.import_module(f"pallas_gemma.kernels._decode.{name}")
  for name in ("append", "attend", "rotate", "stream")
)

_sincos = importlib.import_module("pallas_gemma.kernels._sincos")

SMALL = DecodeAttentionConfig(block_kv=128, slots=3)
KERNEL = functools.partial(
  decode_attention, implementation="pallas", config=SMALL
)


def draw(b, t, s, n, k, h, dtype=jnp.float32, lengths=None, seed=1):
  """q, both caches, the lengths, and new keys and values."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

  if lengths is None:
    lengths = rng.integers(t, s + 1, b)
  new = normal(b, t, k, h), normal(b, t, k, h)
  caches = normal(b, s, k, h), normal(b, s, k, h)
  return normal(b, t, n, h), caches, jnp.asarray(lengths, jnp.int32), new


def poisoned(caches, lengths):
  """NaN from each row's length on."""

  def poison(x):
    beyond = jnp.arange(x.shape[1]) >= lengths[:, None]
    return jnp.where(beyond[..., None, None], jnp.asarray(jnp.nan, x.dtype), x)

  return tuple(map(poison, caches))


def in_pages(caches, page, seed=1):
  """Caches in pages in any order, and the table."""
  b, s, *rest = caches[0].shape
  order = np.random.default_rng(seed).permutation(b * s // page)
  pages = (x.reshape(-1, page, *rest) for x in caches)
  table = jnp.asarray(order.reshape(b, -1), jnp.int32)
  return tuple(jnp.zeros_like(x).at[order].set(x) for x in pages), table


def agrees(q, caches, lengths, kernel: Callable = KERNEL, **kwargs):
  """Against float64, values alone: gradients are those of the reference."""
  leaves, tree = jax.tree.flatten((q, caches, lengths, kwargs.pop("new", None)))

  def bound(function):
    def run(*leaves):
      q, caches, lengths, new = jax.tree.unflatten(tree, leaves)
      return function(q, caches[0], caches[1], lengths, new=new, **kwargs)

    return run

  reference = bound(decode_attention_reference)
  numerics.assert_agrees(bound(kernel), reference, leaves, grad=False)


# --- numbers ------------------------------------------------------------------


@st.composite
def problems(draw_from):
  """Any problem with any cache."""
  pick = functools.partial(st.sampled_from)
  k, group = draw_from(st.integers(1, 4)), draw_from(st.integers(1, 4))
  t, h = draw_from(pick([1, 2, 5, 17])), draw_from(pick([20, 64, 128, 160]))
  dtype = draw_from(pick([jnp.float32, jnp.bfloat16]))
  s = draw_from(pick([96, 200, 256]))
  b = draw_from(st.integers(1, 3))
  lengths = [draw_from(st.integers(0, s)) for _ in range(b)]
  form = draw_from(pick(["dense", "pages", "int8"]))
  flags = {
    name: draw_from(st.booleans())
    for name in ("new", "layer", "rope", "window", "cap", "lse")
  }
  return (b, t, s, k * group, k, h, dtype, lengths), form, flags


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(problem=problems())
def test_any_problem(problem):
  (b, t, s, *sizes), form, flags = problem
  n, k, h, dtype, lengths = sizes
  q, caches, lengths, new = draw(b, t, s, n, k, h, dtype, lengths)
  kwargs = {"return_lse": flags["lse"]}
  if form == "int8":
    caches = tuple(QuantizedCache.quantize(x) for x in caches[:2])
  else:
    caches = poisoned(caches, lengths)
  if form == "pages":
    page = s // 4 if s != 256 else 128
    caches, kwargs["page_table"] = in_pages(caches, page)
  if flags["layer"]:
    caches = jax.tree.map(lambda x: jnp.stack([x * 0, x]), caches)
    kwargs["layer"] = jnp.int32(1)
  if flags["new"]:
    kwargs["new"] = new
  if flags["rope"]:
    positions = lengths[:, None] - t + jnp.arange(t)
    kwargs["rope"] = Rope(jnp.maximum(positions, 0), 100.0)
  if flags["window"]:
    kwargs["local_window_size"] = (40, 0)
  if flags["cap"]:
    kwargs["logits_soft_cap"] = 5.0
  agrees(q, caches, lengths, **kwargs)


LENGTHS = [0, 1, 5, 128, 129, 300, 384, 511, 512]


@pytest.mark.parametrize("k, h", [(1, 128), (2, 128), (3, 128), (2, 64)])
def test_rows_of_all_lengths(k, h):
  """Of nothing, less than the queries, whole blocks, and all there is."""
  q, caches, lengths, new = draw(9, 3, 512, 2 * k, k, h, lengths=LENGTHS)
  caches = poisoned(caches, lengths)
  agrees(q, caches, lengths, new=new, return_lse=True)


@pytest.mark.parametrize("window, h", [(None, 128), ((60, 0), 64)])
def test_queries_in_several_blocks(window, h):
  """Each of them puts the new keys in; the last sends them to the cache."""
  q, caches, lengths, new = draw(
    2, 40, 384, 16, 1, h, jnp.bfloat16, lengths=[200, 384]
  )
  config = DecodeAttentionConfig(block_kv=128, block_q=16, slots=3)
  kernel = functools.partial(KERNEL, config=config)
  caches = poisoned(caches, lengths)
  agrees(q, caches, lengths, kernel, new=new, local_window_size=window)


def test_pages_that_are_no_whole_tiles():
  q, caches, lengths, new = draw(2, 3, 96, 4, 1, 64, jnp.bfloat16)
  caches, table = in_pages(caches, 24)
  agrees(q, caches, lengths, new=new, page_table=table)


@pytest.mark.parametrize(
  "rules, quantized", [({}, False), ({"S": "x"}, False), ({"S": "x"}, True)]
)
def test_what_a_cache_is_padded_to_is_not_seen(rules, quantized):
  """By a row with more keys than a cache, or a device's part of it, has."""
  s = 24 if rules else 20
  q, caches, lengths, new = draw(2, 2, s, 4, 1, 16, lengths=[s, 13])
  lengths += jnp.asarray([0 if rules else 3, 0])
  if quantized:
    caches = tuple(map(QuantizedCache.quantize, caches))
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
  with sharding(mesh, rules):
    agrees(q, caches, lengths, new=new)


@pytest.mark.parametrize("form", ["dense", "pages", "int8"])
def test_many_queries_of_several_kv_heads(form):
  """Heads are taken apart; the new keys are in the cache first."""
  h = 128 if form == "dense" else 32
  q, caches, lengths, new = draw(2, 36, 160, 8, 2, h, lengths=[160, 50])
  kwargs = {"return_lse": True, "local_window_size": (70, 0)}
  if form == "int8":
    caches = tuple(QuantizedCache.quantize(x) for x in caches[:2])
  else:
    caches = poisoned(caches, lengths)
  if form == "pages":
    caches, kwargs["page_table"] = in_pages(caches, 80)
  caches = jax.tree.map(lambda x: jnp.stack([x * 0, x]), caches)
  agrees(q, caches, lengths, new=new, layer=jnp.int32(1), **kwargs)


ROTATED = {
  "of one token": (2, 1, 4, 1, 128),
  "heads that fill registers": (2, 3, 8, 1, 256),
  "heads that do not": (2, 3, 4, 1, 128),
  "heads apart, a table for each": (2, 2, 24, 3, 128),
  "turned": (2, 3, 8, 1, 64),
  "in several blocks": (1, 40, 16, 1, 128),
  "by a kernel of its own": (1, 66, 4, 1, 64),
}


@pytest.mark.parametrize("name", ROTATED)
def test_rope(name):
  """In the kernel, or not: what is rotated where depends on the sizes."""
  b, t, n, k, h = ROTATED[name]
  q, caches, lengths, new = draw(b, t, 256, n, k, h, lengths=[200, 131][:b])
  config = DecodeAttentionConfig(block_kv=128, block_q=16, slots=3)
  kernel = functools.partial(KERNEL, config=config)
  positions = lengths[:, None] - t + jnp.arange(t) * 2
  caches = poisoned(caches, lengths)
  agrees(q, caches, lengths, kernel, new=new, rope=Rope(positions, 50.0))


LLAMA3 = RopeFrequencies.llama3(1e4, 128, factor=8, original_length=64)


@pytest.mark.parametrize(
  "rope",
  [
    {"frequencies": LLAMA3},
    {"frequencies": RopeFrequencies.plain(1e4, 128, rotated=0.5)},
    {"interleaved": True},
  ],
)
def test_other_rotations(rope):
  """The kernel does those of whole heads, half against half."""
  q, caches, lengths, new = draw(2, 1, 128, 8, 1, 128)
  rope = Rope(lengths[:, None], **rope)
  agrees(q, caches, lengths, new=new, rope=rope)
  agrees(q, caches, lengths, new=new, rope=rope.precomputed(128))


def test_a_base_that_is_traced():
  q, caches, lengths, new = draw(2, 1, 128, 8, 2, 128)

  def kernel(*args, rope, **kwargs):
    def run(base):
      return KERNEL(*args, rope=Rope(rope.positions, base), **kwargs)

    return jax.jit(run)(jnp.float32(50.0))

  agrees(q, caches, lengths, kernel, new=new, rope=Rope(lengths[:, None], 50.0))


def test_numbers_that_are_traced():
  q, caches, lengths, _ = draw(2, 2, 256, 4, 2, 64)

  def of(function):
    return jax.jit(
      lambda scale, left: function(
        q, *caches, lengths, scale=scale, local_window_size=(left, 0)
      )
    )(-0.3, 50)

  want = of(decode_attention_reference)
  np.testing.assert_allclose(of(KERNEL), want, rtol=1e-5, atol=1e-5)


def test_rows_are_independent():
  """A row's bits are the same whatever the other rows hold."""
  q, caches, lengths, new = draw(3, 1, 256, 4, 2, 64, lengths=[200, 60, 256])

  def first(caches, lengths):
    return KERNEL(q, caches[0], caches[1], lengths, new=new)[0][0]

  want = first(caches, lengths)
  other = [x.at[1:].set(jnp.nan) for x in caches]
  np.testing.assert_array_equal(first(other, lengths.at[1:].set(100)), want)


def test_the_tail_of_a_cache_stays_as_it_is():
  q, caches, lengths, new = draw(1, 1, 128, 2, 1, 64, lengths=[70])
  _, k, _ = KERNEL(q, *caches, lengths, new=new)
  np.testing.assert_array_equal(k[0, 69], new[0][0, 0])
  np.testing.assert_array_equal(
    np.delete(k[0], 69, axis=0), np.delete(caches[0][0], 69, axis=0)
  )


@pytest.mark.parametrize("h, groups", [(128, 2), (16, 1)])
def test_scales_in_other_groups_than_the_kernel_reads(h, groups):
  q, caches, lengths, new = draw(1, 2, 128, 4, 4, h, lengths=[21])
  want, grouped = (
    [QuantizedCache.quantize(jnp.stack([x, x]), head_groups=g) for x in caches]
    for g in (None, groups)
  )
  assert grouped[0].scale.shape == (2, 1, groups, 1, 128 * 4 // groups)
  assert grouped[0].scale.shape != want[0].scale.shape
  np.testing.assert_array_equal(grouped[0].dequantize(), want[0].dequantize())
  agrees(q, grouped, lengths, new=new, layer=1)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("groups", [1, 2])
def test_heads_in_too_few_groups_are_not_split(groups):
  """Each device would have the whole cache."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
  q, caches, lengths, _ = draw(1, 1, 64, 8, 4, 16)
  caches = [QuantizedCache.quantize(x, head_groups=groups) for x in caches]
  with sharding(mesh, {"N": "x"}), pytest.raises(ValueError, match="groups"):
    decode_attention(q, *caches, lengths)


def test_heads_that_do_not_fall_into_groups():
  with pytest.raises(ValueError, match="head_groups must divide .* K = 3"):
    QuantizedCache.empty((2, 8, 3, 16), head_groups=2)
  with pytest.raises(ValueError, match="head_groups must divide"):
    QuantizedCache.quantize(jnp.ones((2, 8, 3, 16)), head_groups=0)
  shapes: Any = ((8, 16), (2, 8, 3, 0), "shape")
  for shape in shapes:
    with pytest.raises(ValueError, match="shape must be"):
      QuantizedCache.empty(shape)
  with pytest.raises(ValueError, match="shape must be"):
    QuantizedCache.quantize(jnp.ones((3, 16)))


def test_int8_holds_what_was_quantized():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 3, 16)))
  cache = QuantizedCache.quantize(x)
  assert cache.values.dtype == jnp.int8 and cache.scale.shape == (2, 3, 1, 7)
  top = jnp.abs(x).max(-1, keepdims=True)
  assert (jnp.abs(cache.dequantize() - x) <= top / 253).all()
  zeros = QuantizedCache.quantize(jnp.zeros((1, 2, 1, 4)))
  empty = QuantizedCache.empty((1, 2, 1, 4))
  assert jax.tree.all(jax.tree.map(jnp.array_equal, zeros, empty))


@pytest.mark.parametrize("layer, pages", [(2, (0, 7)), (-1, (-3, 1))])
def test_what_is_out_of_bounds_is_another(layer, pages):
  """A layer, or page: the kernel's copies have no bounds of their own."""
  q, caches, _, new = draw(2, 1, 128, 2, 1, 128)
  caches, _ = in_pages(caches, 128)
  k, v = (jnp.stack((x, -x)) for x in caches)
  lengths = jnp.array([100, 128])

  @jax.jit
  def run(layer, table):
    return KERNEL(q, k, v, lengths, new=new, layer=layer, page_table=table)

  def column(pages):
    return jnp.array(pages, jnp.int32)[:, None]

  got = run(jnp.int32(layer), column(pages))
  other = run(jnp.int32(min(max(layer, 0), 1)), column([0, 1]))
  assert jax.tree.all(jax.tree.map(jnp.array_equal, got, other))


# --- mutants ------------------------------------------------------------------


def _off_by_one(step):
  def wrong(*args):
    return step(*args) + 1

  return wrong


def _wrong_page(self, b, token):
  size, pages = self.call.page, self.call.pages
  return self.scalars.table[b * pages + token // size - 1], token % size


def _earlier(self):
  return self.b * self.stream.call.new_rows - 1


def _a_key_before(self):
  return self.block * self.call.block_kv - 1


MUTANTS = {
  "a key too many": (attend.Tile, "key0", property(_a_key_before)),
  "a query too late": (
    stream.Scalars,
    "first",
    _off_by_one(stream.Scalars.first),
  ),
  "a page before": (stream.Stream, "_place", _wrong_page),
  "a key before": (append._Place, "first_held", property(_earlier)),
  "other heads": (
    attend,
    "others",
    lambda call: jnp.zeros((call.rows, call.block_rows)),
  ),
  "the same queries again": (
    rotate,
    "_after",
    lambda call, rows, b, i, *_: (b, i, 0),
  ),
  "not rotated": (_sincos, "rotate", lambda x, sin, cos: x),
  "no window": (
    attend.Tile,
    "is_visible",
    lambda self, shape, row0: self.is_valid(shape, 1),
  ),
  "all of them": (stream.Step, "sees_all", lambda self, call, block: True),
}


def solves(h=128, page=64):
  """Pages, a window, RoPE, new keys, two kv heads."""
  q, caches, lengths, new = draw(3, 2, 256, 8, 2, h, lengths=[256, 70, 130])
  caches, table = in_pages(poisoned(caches, lengths), page)
  agrees(
    q,
    caches,
    lengths,
    new=new,
    page_table=table,
    local_window_size=(50, 0),
    rope=Rope(lengths[:, None] + jnp.arange(2), 50.0),
  )


@pytest.mark.parametrize("sizes", [(128, 64), (64, 128)])
def test_the_mutants_originals_live(sizes):
  solves(*sizes)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name, monkeypatch):
  monkeypatch.setattr(*MUTANTS[name])
  mutation.assert_killed(solves)


@pytest.mark.parametrize("name", ["a page before", "a key before"])
def test_mutants_of_turned_keys_die(name, monkeypatch):
  monkeypatch.setattr(*MUTANTS[name])
  mutation.assert_killed(solves, 64, 128)


# --- on devices ---------------------------------------------------------------


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  "letter, k", [*itertools.product("SBN", (1, 4)), ("N", 2)]
)
@pytest.mark.parametrize("quantized", [False, True])
def test_on_a_mesh(letter, k, quantized):
  """A cache split along its length, its rows or its heads."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
  q, caches, lengths, new = draw(4, 2, 64, 8, k, 16, lengths=[64, 3, 17, 33])
  if quantized:
    groups = k if letter == "N" else 1
    caches = tuple(
      QuantizedCache.quantize(x, head_groups=groups) for x in caches
    )
  kwargs = {"return_lse": True, "local_window_size": (30, 0)}

  def run(q, caches, lengths, new):
    return decode_attention(q, caches[0], caches[1], lengths, new=new, **kwargs)

  want = jax.jit(run)(q, caches, lengths, new)
  split = letter if letter != "N" or k % 4 == 0 else ""

  def place(x):
    letters = "BK-S" if x.shape[2] == 1 else "BSKH"
    spec = [
      "x" if d == split or (d, split) == ("K", "N") else None for d in letters
    ]
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

  placed = jax.tree.map(place, caches)
  with sharding(mesh, {letter: "x"}):
    got = jax.jit(run)(q, placed, lengths, new)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)


# --- what XLA puts around the kernel ------------------------------------------


def _scanned(q, caches, lengths, new):
  """A decoding step's attention: all layers of a cache that is carried."""

  def layer(carry, index):
    out, caches = carry
    out, *caches = decode_attention(
      q + out, caches[0], caches[1], lengths, new=new, layer=index
    )
    return (out, tuple(caches)), None

  layers = jax.tree.leaves(caches)[0].shape[0]
  (out, caches), _ = jax.lax.scan(layer, (q * 0, caches), jnp.arange(layers))
  return out, caches


@pytest.mark.no_interpreter
@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.parametrize(
  "n, k, h, quantized",
  [
    (8, 1, 256, False),
    (32, 8, 128, False),
    (8, 1, 256, True),
    (12, 3, 128, False),
    (8, 2, 128, True),
    (8, 4, 64, False),
    (8, 4, 64, True),
  ],
)
def test_a_carried_cache_is_never_copied(n, k, h, quantized):
  b, s = 4, 2048
  shape = 3, b, s, k, h
  cache = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  if quantized:
    cache = jax.eval_shape(functools.partial(QuantizedCache.empty, shape))
  q, new = (
    jax.ShapeDtypeStruct((b, 1, heads, h), jnp.bfloat16) for heads in (n, k)
  )
  lengths = jax.ShapeDtypeStruct((b,), jnp.int32)
  leaves, tree = jax.tree.flatten((q, (cache, cache), lengths, (new, new)))

  def run(*leaves):
    return _scanned(*jax.tree.unflatten(tree, leaves))

  donated = tuple(i for i, x in enumerate(leaves) if max(x.shape) >= s)
  compiled = v5e.compile(run, *leaves, donate_argnums=donated)
  text = compiled.as_text() or ""
  assert "decode_attention" in text
  large = rf"= \w+\[[\d,]*(?:{s}|{s * k})[\d,]*\]\S* (?:copy|fusion)\("
  assert not re.findall(large, text)
  memory = compiled.memory_analysis()
  assert memory is not None and memory.temp_size_in_bytes <= 1 << 20


# --- at the door --------------------------------------------------------------


def _arguments():
  q, caches, lengths, new = draw(2, 1, 64, 4, 2, 16)
  return {
    "q": q,
    "k_cache": caches[0],
    "v_cache": caches[1],
    "lengths": lengths,
    "new": new,
  }


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  "change, message",
  [
    ({"q": jnp.ones((2, 4, 16))}, r"q must be \[B, T, N, H\], got shape"),
    ({"k_cache": jnp.ones((2, 64, 2, 8))}, r"k_cache must be \[B, S, K, H\]"),
    (
      {name: jnp.ones((3, 64, 2, 16)) for name in ("k_cache", "v_cache")},
      "with q's B = 2, got shape",
    ),
    ({"v_cache": jnp.ones((2, 32, 2, 16))}, "v_cache must be"),
    ({"q": jnp.ones((2, 1, 3, 16))}, "N must be a multiple of kv heads K"),
    ({"lengths": jnp.ones(3, jnp.int32)}, r"lengths must be .*\[B\]"),
    ({"new": jnp.ones((2, 1, 2, 16))}, r"new must be a pair \(k, v\)"),
    ({"new": (jnp.ones((2, 2, 2, 16)),) * 2}, r"new\[0\] must be"),
    ({"layer": 0}, r"k_cache must be \[L, B, S, K, H\]"),
    ({"page_table": jnp.zeros((3, 1), jnp.int32)}, "page_table must be"),
    (
      {name: jnp.ones((3, 2, 64, 2, 16)) for name in ("k_cache", "v_cache")}
      | {"layer": 3},
      "layer must be from 0 to 2, the last of the stack, got 3",
    ),
    (
      {"k_cache": QuantizedCache.empty((2, 64, 2, 16))},
      "must both be a QuantizedCache, or neither",
    ),
    (
      {
        "k_cache": QuantizedCache(
          jnp.zeros((2, 64, 2, 16), jnp.int8), jnp.zeros((2, 64, 2))
        )
      },
      r"k_cache.scale must be .*S K",
    ),
    ({"config": 1}, "config must be a DecodeAttentionConfig"),
    ({"rope": Rope(jnp.zeros((2, 3), jnp.int32))}, "rope.positions must be"),
  ],
)
def test_bad_arguments_are_refused(change, message):
  with pytest.raises(ValueError, match=f"decode_attention: .*{message}"):
    decode_attention(**_arguments() | change)


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  "field, value",
  [
    ("block_kv", 100),
    ("block_kv", "128"),
    ("block_q", 3),
    ("block_q", 16.0),
    ("slots", 2),
    ("slots", None),
  ],
)
def test_bad_configs_are_refused(field, value):
  with pytest.raises(ValueError, match=f"DecodeAttentionConfig: {field} must"):
    DecodeAttentionConfig(**{field: value})


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  "lengths, table, message",
  [
    ([64, 65], [[0], [1]], "lengths must be at most S = 64, got 65"),
    ([64, 64], [[0], [2]], "page_table must be from 0 to 1, got 2"),
  ],
)
def test_checkify_finds_what_cannot_be_refused(lengths, table, message):
  arguments = _arguments()
  del arguments["new"]

  @jax.jit
  @functools.partial(checkify.checkify, errors=checkify.user_checks)
  def run(lengths, table):
    return decode_attention(
      **arguments | {"lengths": lengths}, page_table=table
    )

  good = jnp.asarray([[0], [1]])
  run(jnp.asarray([64, 1]), good)[0].throw()
  error, _ = run(jnp.asarray(lengths), jnp.asarray(table))
  with pytest.raises(checkify.JaxRuntimeError, match=message):
    error.throw()
