"""What the model of VMEM lets one call of flash attention hold, compiles.

Each problem has as many keys as one call may have and a block more, hence a
call that is full, and another.  `-m sweep` compiles more of them.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest
import v5e
from pallas_gemma.kernels import FlashAttentionConfig, Rope, flash_attention

MEMORY, TILES, SPEC, ROTATION = (
  importlib.import_module(f"pallas_gemma.kernels._attention.{name}")
  for name in ("memory", "tiles", "spec", "rotation")
)
pytestmark = [pytest.mark.no_interpreter, v5e.needs_compiler]
F32, BF16 = jnp.float32, jnp.bfloat16
WINDOW = (4096, 0)


def of_length(length, b=1, n=8, k=1, h=256, dtype=BF16, ids=False, rope=False):
  """Shapes of q, k, v, segment ids and positions."""
  q = jax.ShapeDtypeStruct((b, length, n, h), dtype)
  kv = jax.ShapeDtypeStruct((b, length, k, h), dtype)
  integers = jax.ShapeDtypeStruct((b, length), jnp.int32)
  return q, kv, kv, integers if ids else None, integers if rope else None


def most_keys(backward, arrays, **kwargs):
  """That one call holds, and what they are a multiple of."""
  call, sizes = calls_and_sizes(backward, arrays, **kwargs)
  keys = TILES.backward_keys if backward else TILES.forward_keys
  return keys(call, sizes), call.key_unit


def calls_and_sizes(backward, arrays, is_causal=True, **kwargs):
  """The whole problem as one call."""
  problem = SPEC.Problem(
    scale=1.0,
    is_causal=is_causal,
    window=kwargs.get("local_window_size"),
    layout=kwargs.get("layout"),
  )
  q, k, v, ids, positions = arrays
  segments = None if ids is None else SPEC.Segments(ids, ids)
  a = SPEC.Arrays(q, k, v, segments, positions)
  problem = dataclasses.replace(problem, config=TILES.choose(problem, a))
  sizes = MEMORY.Sizes.of_problem(problem, a)
  call = TILES.backward_call if backward else TILES.forward_call
  return call(problem, sizes), sizes


def program(backward, **kwargs):
  def forward(q, k, v, ids, positions):
    rope = None if positions is None else Rope(positions)
    return flash_attention(q, k, v, segment_ids=ids, rope=rope, **kwargs)

  def gradients(q, k, v, *rest):
    def loss(q, k, v):
      return forward(q, k, v, *rest).astype(F32).sum()

    return jax.grad(loss, (0, 1, 2))(q, k, v)

  return gradients if backward else forward


def compiles(function, arrays):
  present = [x for x in arrays if x is not None]

  def of_present(*values):
    supply = iter(values)
    return function(*(None if x is None else next(supply) for x in arrays))

  return v5e.compile(of_present, *present).as_text() or ""


def swept(*values):
  return pytest.param(*values, marks=pytest.mark.sweep)


@pytest.mark.parametrize(
  "backward, shape, kwargs",
  [
    (False, {}, {}),
    (False, {"dtype": F32, "ids": True}, {}),
    (True, {"ids": True}, {"local_window_size": WINDOW}),
    swept(False, {"ids": True}, {"local_window_size": WINDOW}),
    swept(False, {"dtype": F32}, {}),
    swept(False, {"n": 1, "h": 64, "ids": True}, {}),
    swept(False, {"h": 512}, {"logits_soft_cap": 50.0}),
    swept(False, {"b": 2, "h": 128}, {"is_causal": False}),
    swept(False, {"n": 32, "k": 8, "h": 128, "ids": True}, {}),
    swept(True, {}, {}),
    swept(True, {}, {"is_causal": False, "logits_soft_cap": 50.0}),
    swept(True, {"dtype": F32, "ids": True}, {}),
    swept(True, {"n": 1, "h": 64, "ids": True}, {"local_window_size": WINDOW}),
    swept(True, {"h": 512}, {"local_window_size": WINDOW}),
    swept(True, {"dtype": F32, "h": 512}, {}),
    swept(True, {"b": 2, "h": 192, "ids": True}, {}),
    swept(True, {"n": 32, "k": 8, "h": 128}, {}),
  ],
)
def test_a_full_call_compiles(backward, shape, kwargs):
  kwargs = {"is_causal": True} | kwargs
  keys, unit = most_keys(backward, of_length(1 << 20, **shape), **kwargs)
  # Not a whole number of blocks: what lies past the end takes room as well.
  arrays = of_length(keys + unit - 1, **shape)
  text = compiles(program(backward, **kwargs), arrays)
  assert "flash_attention_bwd" in text or not backward


GQA, MHA = {"n": 32, "k": 8, "h": 128}, {"n": 16, "k": 16}


@pytest.mark.parametrize(
  "backward, shape",
  [
    (False, MHA | {"b": 2, "ids": True}),
    (True, MHA),
    swept(False, GQA | {"dtype": F32}),
    swept(True, GQA | {"rope": True}),
    swept(True, GQA | {"ids": True}),
    swept(True, MHA | {"dtype": F32}),
  ],
)
def test_the_longest_in_pairs_compiles(backward, shape):
  """Row-major, in place; what is longer is taken heads first, in spans."""

  def kind(length):
    arrays = of_length(length, **shape)
    call, _ = calls_and_sizes(backward, arrays, layout="BTNH")
    return call.layout.kind

  longest = 1024
  while kind(longest + 1024) == "pairs":
    longest += 1024
  assert longest > 4096
  arrays = of_length(longest - 8, **shape)  # the last block is not whole
  compiles(program(backward, is_causal=True, layout="BTNH"), arrays)


@pytest.mark.parametrize(
  "shape", [{}, swept({"ids": True}), swept(GQA), swept(MHA)]
)
def test_the_longest_rotation_inside_compiles(shape):
  """A block more, and q and k are rotated before."""
  shape = shape | {"rope": True}

  def text(length):
    return compiles(program(True, is_causal=True), of_length(length, **shape))

  arrays = of_length(1 << 20, **shape)
  keys, _ = most_keys(True, arrays, is_causal=True)
  assert "apply_rope" not in text(keys)


@pytest.mark.sweep
@pytest.mark.parametrize("length", [1 << 16, 1 << 17, 1 << 18])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_long_sequences_compile(length, dtype):
  compiles(program(True, is_causal=True), of_length(length, dtype=dtype))


def test_every_default_leaves_room_for_keys():
  """Whatever the number of heads: a block of keys at least, in both passes."""
  for dtype in (F32, BF16):
    for n in (1, 2, 8, 32, 64):
      for h in (64, 256, 512):
        shape = {"n": n, "h": h, "dtype": dtype, "ids": True, "rope": True}
        for backward in (False, True):
          arrays = of_length(4096, **shape)
          assert most_keys(backward, arrays, is_causal=True)[0] >= 1024
          config = FlashAttentionConfig.fitting(n, h, dtype)
          assert max(config.vmem_bytes(*arrays[:2])) <= MEMORY.VMEM_BYTES
