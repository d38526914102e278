"""Attention reads and writes what the caller passes where it lies."""

import functools
import importlib
import re

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
from pallas_gemma.gemma import KERNELS
from pallas_gemma.kernels import (
  FlashAttentionConfig,
  Rope,
  flash_attention,
  flash_attention_reference,
)

WORDS, PAIR, TILES = (
  importlib.import_module(f"pallas_gemma.kernels._attention.{name}")
  for name in ("words", "pairs", "tiles")
)
LAYOUT = TILES.Layout
LAYOUTS = ("BTNH", "BNTH", "BT(NH)")
SMALL = FlashAttentionConfig(
  block_q=128, block_kv=128, rows=128, block_q_bwd=128, block_kv_bwd=128
)
KERNEL = functools.partial(
  flash_attention, implementation="pallas", config=SMALL
)
STRUCTURES = {"mqa": (4, 1), "gqa": (8, 4), "mha": (2, 2)}


def in_layout(x, layout):
  """[B, T, N, H] as a caller has it."""
  if layout == "BNTH":
    return x.swapaxes(1, 2)
  return x.reshape(*x.shape[:2], -1) if layout == "BT(NH)" else x


def head_size_of(layout, h):
  return h if layout == "BT(NH)" else None


def draw(layout, b, t, s, n, k, h, dtype=jnp.float32, seed=1):
  rng = np.random.default_rng(seed)
  return [
    in_layout(
      jnp.asarray(rng.standard_normal(shape, np.float32), dtype), layout
    )
    for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, h))
  ]


def agrees(layout, arrays, h, kernel=KERNEL, *, more=(), **kwargs):
  kwargs |= {"layout": layout, "head_size": head_size_of(layout, h)}
  numerics.assert_agrees(
    functools.partial(kernel, **kwargs),
    functools.partial(flash_attention_reference, **kwargs),
    arrays,
    *more,
    softmax=True,
  )


# --- numbers ------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", STRUCTURES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_layout_of_every_structure(layout, heads, dtype):
  """Ragged, with an lse and its cotangent; both passes."""
  arrays, other = (
    draw(layout, 1, 150, 150, *STRUCTURES[heads], 128, dtype, seed=seed)
    for seed in (1, 2)
  )
  agrees(layout, arrays, 128, more=[other], is_causal=True, return_lse=True)


@st.composite
def problems(draw_from):
  """Any problem, in any layout, of any heads, with any blocks."""
  t = draw_from(st.integers(20, 200))
  h = draw_from(st.sampled_from([16, 80, 128]))
  kv_heads, group = draw_from(st.integers(1, 3)), draw_from(st.integers(1, 5))
  kwargs = {
    "is_causal": draw_from(st.booleans()),
    "return_lse": draw_from(st.booleans()),
  }
  if draw_from(st.booleans()):
    kwargs["local_window_size"] = (draw_from(st.integers(0, 200)), 3)
  if draw_from(st.booleans()):
    ends = sorted(draw_from(st.tuples(st.integers(0, t), st.integers(0, t))))
    ids = np.searchsorted(ends, np.arange(t), side="right")
    kwargs["segment_ids"] = jnp.asarray((2 - ids)[None])
  if draw_from(st.booleans()):
    positions = np.random.default_rng(1).integers(0, 300, (1, t))
    kwargs["rope"] = Rope(jnp.asarray(positions, jnp.int32), 100.0)
  blocks = {
    name: draw_from(st.sampled_from([64, 128, 256]))
    for name in ("block_q", "block_q_bwd")
  }
  rows = draw_from(st.sampled_from([128, 256, 384]))
  config = FlashAttentionConfig(
    **blocks, rows=rows, block_kv=128, block_kv_bwd=128
  )
  return t, group * kv_heads, kv_heads, h, config, kwargs


@pytest.mark.parametrize("layout", LAYOUTS)
@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.given(problem=problems())
def test_any_problem(layout, problem):
  t, n, k, h, config, kwargs = problem
  kernel = functools.partial(
    flash_attention, implementation="pallas", config=config
  )
  agrees(layout, draw(layout, 1, t, t, n, k, h), h, kernel, **kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("h", [2, 64, 96, 128, 192])
def test_rotation_inside_for_every_head_size(layout, h):
  """No kernel of its own for RoPE, and the numbers of the reference.

  Kv heads share their sines, elements of the batch do not.
  """
  positions = jnp.outer(jnp.asarray([2, 3]), jnp.arange(140))
  kwargs = {"is_causal": True, "rope": Rope(positions, 100.0)}
  arrays = draw(layout, 2, 140, 140, 4, 2, h)
  function = functools.partial(
    KERNEL, layout=layout, head_size=head_size_of(layout, h), **kwargs
  )
  assert "apply_rope" not in str(jax.make_jaxpr(function)(*arrays))
  agrees(layout, arrays, h, **kwargs)


# Each has several pairs of kv heads or of blocks, and ends within a block.
PAIRS = {
  "not causal": ((1, 150, 200, 4, 4, 128), {"return_lse": True}),
  "fewer keys": ((1, 200, 90, 4, 2, 128), {"is_causal": True}),
  "more keys": ((1, 90, 300, 2, 2, 128), {"is_causal": True}),
  "a batch": ((2, 150, 150, 4, 4, 128), {"is_causal": True}),
  "three heads to one": ((1, 140, 140, 24, 8, 128), {"is_causal": True}),
  "window": (
    (1, 300, 300, 2, 2, 128),
    {"is_causal": True, "local_window_size": (40, 0), "logits_soft_cap": 5.0},
  ),
  "segments": (
    (1, 150, 150, 4, 4, 128),
    {"segment_ids": jnp.repeat(jnp.asarray([[1, 2, 0]]), 50, axis=1)},
  ),
  "rope": (
    (2, 152, 152, 4, 4, 128),
    {
      "is_causal": True,
      "rope": Rope(jnp.outer(jnp.asarray([1, 3]), jnp.arange(152)), 100.0),
    },
  ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_kv_heads(name, monkeypatch):
  """Row-major, by words of two heads, one step for either kv head."""
  monkeypatch.setattr(LAYOUT, "of_keys", in_place)
  shape, kwargs = PAIRS[name]
  arrays = draw("BTNH", *shape, dtype=jnp.bfloat16)
  agrees("BTNH", arrays, shape[-1], **kwargs)


def in_place(layout, x):
  assert layout.kind == "pairs"
  return x


def halves_swapped(words, dtype, apart=WORDS.apart):
  return apart(words, dtype)[::-1]


def of_the_first(hbm, layout, pair, tokens, row, place=WORDS.place):
  return place(hbm, layout, pair * 0, tokens, row)


MUTANTS = {
  "heads swapped": (WORDS, "apart", halves_swapped),
  "one head twice": (
    WORDS,
    "together",
    lambda heads, dtype, right=WORDS.together: right([heads[0]] * 2, dtype),
  ),
  "the first pair alone": (WORDS, "place", of_the_first),
  "keys of two pairs counted together": (
    WORDS.Blocks,
    "_moved",
    lambda blocks, pair: blocks.store.moved.at[1],
  ),
  "what lies past the end is not a number": (
    WORDS.Blocks,
    "clear_end",
    lambda blocks: None,
  ),
  "keys come at the first block alone": (
    PAIR.Visit,
    "_when_keys_come",
    lambda visit, body: pl.when(visit.block == 0)(body),
  ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_pairs_die(name, monkeypatch):
  monkeypatch.setattr(*MUTANTS[name])
  mutation.assert_killed(solves)


def test_the_original_of_pairs_lives():
  solves()


def solves():
  """Forward, of two pairs and two blocks, the second not whole."""
  numerics.assert_agrees(
    functools.partial(KERNEL, is_causal=True, layout="BTNH"),
    functools.partial(flash_attention_reference, is_causal=True),
    draw("BTNH", 1, 150, 150, 4, 4, 128, jnp.bfloat16),
    grad=False,
  )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_spans_of_keys(layout, monkeypatch):
  monkeypatch.setattr(
    "pallas_gemma.kernels._attention.memory.keys_that_fit", lambda *_: 128
  )
  arrays = draw(layout, 1, 300, 300, 4, 2, 128, jnp.bfloat16)
  agrees(layout, arrays, 128, is_causal=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap(layout):
  """Over a leading axis, one with more batch elements."""
  arrays = draw(layout, 3, 140, 140, 4, 2, 128)
  kernel = functools.partial(
    KERNEL, is_causal=True, layout=layout, head_size=head_size_of(layout, 128)
  )
  whole = kernel(*arrays)
  mapped = jax.vmap(kernel)(*(x[:, None] for x in arrays))
  np.testing.assert_array_equal(mapped[:, 0], whole)


# --- arguments ----------------------------------------------------------------


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"layout": "TNH"}, "layout must be one of 'BTNH', 'BNTH', 'BT.NH.', got"),
    ({"layout": "BT(NH)"}, "head_size must be a positive integer with layout"),
    ({"layout": "BT(NH)", "head_size": 0}, "head_size must be a positive"),
    ({"layout": "BT(NH)", "head_size": 8}, r"q must be \[B, T, N H\], got"),
    ({"head_size": 8}, "head_size must be None with layout None"),
    ({"layout": "BNTH"}, r"query heads N must be a multiple of kv heads K"),
  ],
)
def test_bad_layouts_are_refused(kwargs, message):
  q, k, v = draw("BTNH", 1, 5, 5, 4, 2, 8)
  k, v = (jnp.concatenate([x, x[:, :2]], axis=1) for x in (k, v))
  with pytest.raises(ValueError, match=f"flash_attention: {message}"):
    flash_attention(q, k, v, **kwargs)


@pytest.mark.no_interpreter
def test_a_width_that_is_no_multiple_is_refused():
  q, k, v = draw("BT(NH)", 1, 5, 5, 4, 2, 8)
  with pytest.raises(ValueError, match="must be a multiple of head_size = 3"):
    flash_attention(q, k, v, layout="BT(NH)", head_size=3)


# --- what XLA puts around the kernels -----------------------------------------

REAL = {"mqa": (8, 1, 256), "gqa": (32, 8, 128), "mha": (16, 16, 256)}


def moves(text):
  """Copies and transpositions of activations in a compiled program."""
  found = re.findall(r"= (\w+\[[\d,]*\])\S* (copy|transpose)\(", text)
  return [f"{kind} {shape}" for shape, kind in found if "2048" in shape]


@pytest.mark.no_interpreter
@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", REAL)
def test_nothing_is_copied(layout, heads):
  n, k, h = REAL[heads]

  def both(dout, *qkv):
    function = functools.partial(
      flash_attention,
      is_causal=True,
      layout=layout,
      head_size=head_size_of(layout, h),
    )
    out, vjp = jax.vjp(function, *qkv)
    return out, vjp(dout)

  q, kv = (
    jax.eval_shape(
      functools.partial(in_layout, layout=layout),
      jax.ShapeDtypeStruct((1, 2048, heads, h), jnp.bfloat16),
    )
    for heads in (n, k)
  )
  text = v5e.compile(both, q, q, kv, kv).as_text() or ""
  assert "flash_attention_bwd" in text
  assert not moves(text)


@pytest.mark.no_interpreter
@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.parametrize(
  "heads, by_default", [("mqa", False), ("gqa", True), ("mha", False)]
)
def test_nothing_is_copied_between_projections(heads, by_default):
  """A model's, RoPE inside, with the gradients of its weights and its input.

  By default, or as Gemma does it.
  """
  (n, k, h), width = REAL[heads], 640

  def attend(x, w_q, w_k, w_v, w_out):
    q = jnp.einsum("BTD,NDH->BTNH", x, w_q)
    k, v = (jnp.einsum("BTD,NDH->BTNH", x, w) for w in (w_k, w_v))
    rope = Rope(jnp.arange(2048)[None])
    if by_default:
      y = flash_attention(q, k, v, is_causal=True, rope=rope).swapaxes(1, 2)
    else:
      y = KERNELS.attend(q, k, v, is_causal=True, rope=rope)
    return jnp.einsum("BNTH,NHD->BTD", y, w_out)

  def both(dy, *arrays):
    y, vjp = jax.vjp(attend, *arrays)
    return y, vjp(dy)

  def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  x, of_keys = spec(1, 2048, width), spec(k, width, h)
  weights = spec(n, width, h), of_keys, of_keys, spec(n, h, width)
  text = v5e.compile(both, x, x, *weights).as_text() or ""
  assert "flash_attention_bwd" in text and "apply_rope" not in text
  assert not moves(text)
