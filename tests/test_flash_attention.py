"""What is particular to flash attention."""

import bisect
import dataclasses
import functools
import importlib
import sys

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
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pallas_gemma import kernels
from pallas_gemma.kernels import (
  FlashAttentionConfig,
  Rope,
  flash_attention,
  flash_attention_reference,
)


def page(name):
  return importlib.import_module(f"pallas_gemma.kernels._attention.{name}")


SPEC, TILES, BLOCKS = page("spec"), page("tiles"), page("blocks")
OPERANDS, NOTHING = page("operands"), page("nothing")
LAYOUT, ARGUMENTS = page("layout"), page("arguments")
MEMORY, ROTATION = page("memory"), page("rotation")
SPANS, FINITE = page("spans"), page("finite")
FORWARD, BACKWARD = page("forward"), page("backward")
TPU = FORWARD.tpu
SMALL = FlashAttentionConfig(
  block_q=128, block_kv=128, rows=128, block_q_bwd=128, block_kv_bwd=128
)
KERNEL = functools.partial(
  flash_attention, implementation="pallas", config=SMALL
)


def draw(b, t, s, n, k, h, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  return [
    jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
    for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, h))
  ]


def ids_of(*lengths):
  """[1, T] ids: a segment 1, 2, ... for every length; of the last, padding."""
  numbers = [*range(1, len(lengths)), 0]
  return jnp.asarray(np.repeat(numbers, lengths)[None], jnp.int32)


def positions_of(b, t):
  rng = np.random.default_rng(7)
  return jnp.asarray(rng.integers(0, 300, (b, t)), jnp.int32)


def agrees(arrays, kernel=KERNEL, grad=True, **kwargs):
  numerics.assert_agrees(
    functools.partial(kernel, **kwargs),
    functools.partial(flash_attention_reference, **kwargs),
    arrays,
    softmax=True,
    grad=grad,
  )


# --- any problem --------------------------------------------------------------


@st.composite
def problems(draw_from):
  t = draw_from(st.one_of(st.integers(1, 180), st.sampled_from([1, 127, 131])))
  same = draw_from(st.booleans())
  s = t if same else draw_from(st.integers(1, 180))
  n, k = draw_from(st.sampled_from([(1, 1), (2, 1), (4, 2), (8, 1), (3, 3)]))
  kwargs = {
    "is_causal": draw_from(st.booleans()),
    "local_window_size": draw_from(
      st.sampled_from([None, (0, 0), (1, 0), (0, 1), (40, 7), (300, 300)])
    ),
    "logits_soft_cap": draw_from(st.sampled_from([None, 3.0])),
    "scale": draw_from(st.sampled_from([None, 0.3, -0.1])),
    "return_lse": draw_from(st.booleans()),
  }
  rng = np.random.default_rng(draw_from(st.integers(0, 99)))
  match draw_from(st.sampled_from(["none", "none", "packed", "scattered"])):
    case "packed":
      kwargs["segment_ids"] = tuple(
        jnp.sort(jnp.asarray(rng.integers(0, 4, (2, length)), jnp.int32))
        for length in (t, s)
      )
    case "scattered":
      kwargs["segment_ids"] = tuple(
        jnp.asarray(rng.integers(0, 3, (2, length)), jnp.int32)
        for length in (t, s)
      )
  if same and draw_from(st.booleans()):
    kwargs["rope"] = Rope(positions_of(2, t), 100.0)
  h = draw_from(st.sampled_from([64, 80, 96, 128, 192, 256]))
  dtype = draw_from(st.sampled_from([jnp.float32, jnp.bfloat16]))
  block = draw_from(st.sampled_from([128, 256]))
  config = dataclasses.replace(SMALL, block_kv=block, block_kv_bwd=block)
  hypothesis.assume(most_keys_seen(t, s, **kwargs) > 1)
  return (2, t, s, n, k, h, dtype), kwargs, config


def most_keys_seen(t, s, is_causal, local_window_size, segment_ids=None, **_):
  """By any one query.  The gradient of a softmax over one key is 0, for plain
  jnp exactly; `test_one_key` is for that.
  """
  mask = page("positions").visible_pairs(
    jnp.arange(t), jnp.arange(s), is_causal, local_window_size
  )
  if segment_ids is not None:
    q_ids, k_ids = (ids[:, None] for ids in segment_ids)
    mask &= (q_ids.swapaxes(1, 2) == k_ids) & (k_ids != 0)
  return int(mask.sum(axis=-1).max())


@hypothesis.settings(max_examples=6)
@hypothesis.given(problems())
def test_any_problem_meets_the_bar(problem):
  shape, kwargs, config = problem
  seeds = range(-(-64 // shape[1]))  # enough numbers for their statistics
  numerics.assert_agrees(
    functools.partial(KERNEL, **kwargs | {"config": config}),
    functools.partial(flash_attention_reference, **kwargs),
    *(draw(*shape, seed=seed) for seed in seeds),
    softmax=True,
  )


# --- mutants ------------------------------------------------------------------

# Each problem is the smallest that has what its mutants break.
STEPS = jnp.asarray([1, 3])  # between positions, which count from anywhere
PROBLEMS = {
  "causal": ((1, 256, 256, 1, 1, 64), {"is_causal": True}),
  "grouped": ((1, 40, 40, 4, 2, 64), {"is_causal": True}),
  "ragged": ((1, 150, 130, 1, 1, 64), {"return_lse": True}),
  "more keys": ((1, 100, 300, 1, 1, 64), {"is_causal": True}),
  "many keys": ((1, 130, 400, 2, 1, 64), {}),
  "window": ((1, 150, 150, 2, 1, 64), {"local_window_size": (20, 5)}),
  "soft cap": ((1, 40, 40, 1, 1, 64), {"logits_soft_cap": 2.0}),
  "segments": (
    (1, 300, 300, 1, 1, 64),
    {"segment_ids": ids_of(100, 60, 130, 10), "return_lse": True},
  ),
  # Blocks of one id after others, and own keys that are another segment's.
  "whole segments": (
    (2, 384, 384, 1, 1, 64),
    {
      "is_causal": True,
      "segment_ids": (
        jnp.concatenate([ids_of(60, 260, 64), ids_of(384, 0)]),
        jnp.concatenate([ids_of(60, 260, 64), 1 + (ids_of(128, 256, 0) == 1)]),
      ),
    },
  ),
  "rope": (
    (1, 130, 130, 1, 1, 256),
    {"is_causal": True, "rope": Rope(positions_of(1, 130))},
  ),
  "shared rope": (
    (2, 20, 20, 2, 2, 64),
    {"is_causal": True, "rope": Rope(jnp.outer(STEPS, jnp.arange(20)), 100.0)},
  ),
}


def is_first_of_all(layout):
  return pl.program_id(0) == 0


def one_id_at_the_start(block):
  return block.kv_blocks.full_first <= block.q0 // 128


def one_id_at_the_end(block):
  return block.q0 // 128 < block.kv_blocks.full_last


def no_ids_for_others(block, attend, take_ids):
  FOR_OTHER_KEYS(block, attend)


def one_of_two_twice(low, high, body):
  pairs = (high - low) >> 1
  for first, end, step in ((0, pairs, 2), (0, pairs, 1), (2 * pairs, None, 1)):
    end = high - low if end is None else end
    jax.lax.fori_loop(
      first, end, lambda i, _, by=step: body(low + by * i), None
    )


def no_odd_block(low, high, body):
  LOOP_IN_PAIRS(low, low + (high - low) // 2 * 2, body)


def a_block_too_few(meet):
  first, end = FIRST_AND_END(meet)
  return first, end - 1


def heads_swapped(layout, x, of_queries=LAYOUT.Layout.of_queries):
  b, t, n, h = x.shape
  grouped = x.reshape(b, t, -1, layout.kv_heads, h)
  return of_queries(layout, grouped.swapaxes(2, 3).reshape(x.shape))


def out_not_rescaled(s, g, decay, total, acc):
  return total + decay * s.total[g, :], acc + s.acc[g, :]


def sum_not_rescaled(s, g, decay, total, acc):
  _, acc = ADD_DECAYED(s, g, decay, total, acc)
  return total + s.total[g, :], acc


def lane_of_another(columns):
  return TO_LANES([*columns[1:], columns[0]])


def the_last_alone(ref, at, new, *, starts):
  ref[at] = new


FOR_OTHER_KEYS = BLOCKS.Block.for_other_keys
LOOP_IN_PAIRS, FIRST_AND_END = BLOCKS._loop_in_pairs, OPERANDS._first_and_end
ADD_DECAYED, TO_LANES = FORWARD._add_decayed, TPU.columns_to_lanes
# A problem, and the step that is wrong.  Where the results show it, the
# gradients are not asked for.
FORWARD_MUTANTS = {
  "query sees one key ahead": (
    "causal",
    (BLOCKS, "_not_after", lambda key, row, group: key * group <= row + group),
  ),
  "window one short on the left": (
    "window",
    (BLOCKS, "_before", lambda row, key, group: row < (key - 1) * group),
  ),
  "window one short on the right": (
    "window",
    (BLOCKS, "_not_after", lambda key, row, group: (key + 1) * group <= row),
  ),
  "keys past the end": (
    "ragged",
    (BLOCKS, "_exists", lambda key, call: key < call.s + 9),
  ),
  "one of two blocks twice": (
    "many keys",
    (BLOCKS, "_loop_in_pairs", one_of_two_twice),
  ),
  "no odd block": ("many keys", (BLOCKS, "_loop_in_pairs", no_odd_block)),
  "rows' statistics mixed": (
    "ragged",
    (TPU, "columns_to_lanes", lane_of_another),
  ),
  "no rescale of out": ("causal", (FORWARD, "_add_decayed", out_not_rescaled)),
  "no rescale of the sum": (
    "causal",
    (FORWARD, "_add_decayed", sum_not_rescaled),
  ),
  "lse without the sum": ("ragged", (FORWARD, "lse_of", lambda m, total, p: m)),
  "padding is seen": (
    "segments",
    (BLOCKS, "_same_segment", lambda ids: ids.rows == ids.keys),
  ),
  "a block too few": (
    "segments",
    (OPERANDS, "_first_and_end", a_block_too_few),
  ),
  "rows that see nothing": (
    "segments",
    (NOTHING, "is_nothing", lambda m, total: m > jnp.inf),
  ),
  "one id, whatever comes before": (
    "whole segments",
    (BLOCKS.Block, "_has_one_id", property(one_id_at_the_end)),
  ),
  "one id, whatever comes after": (
    "whole segments",
    (BLOCKS.Block, "_has_one_id", property(one_id_at_the_start)),
  ),
  "ids of the block before": (
    "whole segments",
    (BLOCKS.Block, "for_other_keys", no_ids_for_others),
  ),
  "no rotation of k": (
    "rope",
    (FORWARD, "_rotated_k", lambda i, own, sin, cos: i.k[own, :]),
  ),
  "sines of the first element of the batch": (
    "shared rope",
    (LAYOUT.Layout, "is_first_kv_head", is_first_of_all),
  ),
  "heads swapped": (
    "grouped",
    (LAYOUT.Layout, "of_queries", heads_swapped),
  ),
}
BACKWARD_MUTANTS = {
  "no di": ("causal", (BACKWARD, "_minus_di", lambda dw, s, here: dw)),
  "lse has no gradient": (
    "ragged",
    (BACKWARD, "_lse_part_of_di", lambda p, i: 0.0),
  ),
  "no derivative of the soft cap": (
    "soft cap",
    (BACKWARD, "_through_soft_cap", lambda p, logits, dlogits: dlogits),
  ),
  "gradients without scale": ("causal", (BACKWARD, "_scaled", lambda p, x: x)),
  "dk of the last block alone": ("causal", (BACKWARD, "_add", the_last_alone)),
  "dk never set": (
    "more keys",
    (BACKWARD, "_diagonal_starts_dk", lambda call: call.has_diagonal),
  ),
  "rows past the end": (
    "ragged",
    (FINITE, "_zero_unless", lambda inside, rows: rows.load(0, len(inside))),
  ),
  "dq and dk rotated the wrong way": (
    "rope",
    (BACKWARD, "_rotate_back", BACKWARD.rotate),
  ),
  "dq and dk not rotated back": (
    "rope",
    (BACKWARD, "_rotate_back", lambda x, sin, cos: x),
  ),
  "sines of the first element of the batch": (
    "shared rope",
    (LAYOUT.Layout, "is_first_kv_head", is_first_of_all),
  ),
}


@functools.cache
def expected(name):
  """A problem's arrays, and the reference's results: plain, and in float64."""
  shape, kwargs = PROBLEMS[name]
  arrays = draw(*shape)
  reference = functools.partial(flash_attention_reference, **kwargs)
  return arrays, *numerics.expected(reference, arrays)


def solves(name, grad=True):
  arrays, plain, truth = expected(name)
  kernel = functools.partial(KERNEL, **PROBLEMS[name][1])
  run = numerics.value_and_gradients if grad else numerics.values
  got = run(kernel, arrays, jit=True)
  plain, truth = ({k: v[k] for k in got} for v in (plain, truth))
  numerics.assert_within_bar(got, plain, truth, softmax=True)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_mutants_originals_live(name):
  solves(name)


@pytest.mark.parametrize("name", FORWARD_MUTANTS)
def test_mutants_die(name, monkeypatch):
  problem, wrong = FORWARD_MUTANTS[name]
  monkeypatch.setattr(*wrong)
  mutation.assert_killed(solves, problem, False)


@pytest.mark.parametrize("name", BACKWARD_MUTANTS)
def test_mutants_of_the_gradient_die(name, monkeypatch):
  problem, wrong = BACKWARD_MUTANTS[name]
  monkeypatch.setattr(*wrong)
  mutation.assert_killed(solves, problem)


# --- extremes -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_large_logits(dtype):
  """Up to 1e4 and more: weights are 0 or 1, and nothing overflows."""
  q, k, v = draw(1, 140, 140, 2, 1, 64, dtype)
  agrees([q * 40, k * 40, v], is_causal=True)


def test_equal_logits():
  """Every visible key weighs the same."""
  q, k, v = draw(1, 140, 140, 1, 1, 64)
  out = KERNEL(jnp.ones_like(q), jnp.ones_like(k), v, is_causal=True)
  mean = jnp.cumsum(v, axis=1) / jnp.arange(1, 141)[:, None, None]
  np.testing.assert_allclose(out, mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "t, kwargs", [(1, {}), (70, {"local_window_size": (0, 0)})]
)
def test_one_key(t, kwargs):
  """The value itself, and no gradient but the rounding of do . v - do . o."""
  h = 64
  q, k, v = draw(1, t, t, 1, 1, h)
  out, vjp = jax.vjp(functools.partial(KERNEL, **kwargs), q, k, v)
  np.testing.assert_allclose(out, v, rtol=1e-6)
  dout = draw(1, t, t, 1, 1, h, seed=1)[0]
  dq, dk, dv = vjp(dout)
  np.testing.assert_allclose(dv, dout, rtol=1e-6)
  # Two sums of H products, each rounded once for every term at worst.
  bound = 2 * h * np.finfo(np.float32).eps * (jnp.abs(dout * v).sum(-1)).max()
  assert jnp.abs(dq).max() <= bound * h**-0.5 * jnp.abs(k).max()
  assert jnp.abs(dk).max() <= bound * h**-0.5 * jnp.abs(q).max()


def test_rows_that_see_nothing():
  """Zero output, zero gradient and an lse of -inf; no NaN anywhere."""
  q, k, v = draw(1, 60, 60, 2, 1, 64)
  kernel = functools.partial(
    KERNEL, segment_ids=jnp.zeros((1, 60), jnp.int32), return_lse=True
  )
  (out, lse), vjp = jax.vjp(kernel, q, k, v)
  assert not out.any() and (lse == -jnp.inf).all()
  for gradient in vjp((jnp.ones_like(out), jnp.ones_like(lse))):
    assert not gradient.any()


@pytest.mark.parametrize("b, t, s", [(0, 4, 4), (1, 0, 4), (1, 4, 0)])
def test_empty_arrays(b, t, s):
  q, k, v = draw(b, t, s, 2, 1, 64)
  out, vjp = jax.vjp(KERNEL, q, k, v)
  assert out.shape == q.shape and not out.any()
  assert [g.shape for g in vjp(out)] == [q.shape, k.shape, v.shape]


# --- more keys than VMEM holds ------------------------------------------------


@pytest.mark.parametrize(
  "h, kwargs",
  [
    (64, {"is_causal": True, "return_lse": True}),
    (
      64,
      {"local_window_size": (40, 10), "segment_ids": ids_of(90, 200, 10)},
    ),
    (256, {"is_causal": True, "rope": Rope(positions_of(1, 300))}),
  ],
  ids=["causal", "window", "rope"],
)
def test_spans_of_keys(h, kwargs, monkeypatch):
  """Where VMEM holds 128 keys, three calls give what one gives."""
  monkeypatch.setattr(MEMORY, "keys_that_fit", lambda *_: 128)
  agrees(draw(1, 300, 300, 1, 1, h), **kwargs)


def test_each_span_has_the_queries_that_see_it():
  problem = SPEC.Problem(scale=1.0, is_causal=True, window=(50, 0))
  layout = LAYOUT.Layout("packed", 1, 2, 128, 64)
  whole = TILES.Call(problem, 1, 2, 128, 128, 128, 0, 300, 0, 300, layout)
  spans = SPANS.of_call(whole, 128)
  assert [(s.keys.start, s.queries) for s in spans] == [
    (0, slice(0, 178)),
    (128, slice(128, 300)),
    (256, slice(256, 300)),
  ]


def test_tiles_that_cannot_fit_are_refused():
  config = FlashAttentionConfig(block_q=32768)
  q = jax.ShapeDtypeStruct((1, 32768, 1, 256), jnp.float32)
  kernel = functools.partial(KERNEL, config=config)
  with pytest.raises(ValueError, match="flash_attention: the forward's tiles"):
    jax.eval_shape(kernel, q, q, q)


def test_vmem_is_reported():
  """16 MiB of float32 dk and dv, as much again of k, v, dk and dv."""
  q = jax.ShapeDtypeStruct((1, 8192, 8, 256), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, 8192, 1, 256), jnp.bfloat16)
  config = FlashAttentionConfig.fitting(8, 256)
  forward, backward = config.vmem_bytes(q, k)
  assert 8 << 20 < forward < backward
  assert 32 << 20 < backward < MEMORY.VMEM_BYTES


# --- windows ------------------------------------------------------------------


@pytest.mark.parametrize("side", [2**28, 2**30, 2**31 - 1, sys.maxsize])
def test_a_window_without_a_limit(side):
  """Is none on that side, and nothing overflows."""
  q, k, v = draw(1, 40, 40, 8, 1, 64)
  for window in (side, (side, side), (side, 0)):
    left_only = isinstance(window, tuple) and window[1] == 0
    want = flash_attention_reference(q, k, v, is_causal=left_only)
    got = flash_attention_reference(q, k, v, local_window_size=window)
    np.testing.assert_array_equal(got, want)
  if side == sys.maxsize:
    agrees([q, k, v], local_window_size=(side, 0))


def test_a_window_that_hides_nothing_is_no_window():
  """Local layers on sequences shorter than their window cost no masks."""
  q = jax.ShapeDtypeStruct((1, 512, 1, 64), jnp.float32)

  def window(left, right, is_causal):
    seen = ARGUMENTS.Seen(is_causal, None, (left, right))
    problem, _ = ARGUMENTS.problem_of(q, q, q, seen, ARGUMENTS.Weights())
    return problem.window

  assert window(1024, 0, True) is None and window(511, 511, False) is None
  assert window(510, 0, True) == (510, 0)
  assert window(1024, 0, False) == (512, 0)


# --- segments -----------------------------------------------------------------


def test_blocks_of_other_segments_are_skipped():
  problem = SPEC.Problem(scale=1.0, is_causal=True)
  layout = LAYOUT.Layout("packed", 1, 1, 128, 64)
  call = TILES.Call(problem, 1, 1, 128, 128, 128, 0, 512, 0, 512, layout)
  ids = ids_of(128, 256, 100, 28)
  bounds, *_ = OPERANDS.segment_operands(call, SPEC.Segments(ids, ids))
  assert bounds.reshape(-1, 4)[:, [0, 3]].tolist() == [
    [0, 1],
    [1, 3],
    [1, 3],
    [3, 4],
  ]


# --- transformations ----------------------------------------------------------


@pytest.mark.parametrize("kv_axis", [None, 0])
def test_vmap(kv_axis):
  """Mapped over q, with one set of keys for all or with one for each."""
  q, k, v = draw(6, 40, 40, 2, 1, 64)
  q = q.reshape(3, 2, *q.shape[1:])
  k, v = (
    x[:2] if kv_axis is None else x.reshape(3, 2, *x.shape[1:]) for x in (k, v)
  )
  ids = jnp.concatenate([ids_of(15, 20, 5)] * 2)
  kwargs = {"is_causal": True, "segment_ids": ids}
  mapped = [
    jax.vmap(functools.partial(f, **kwargs), (0, kv_axis, kv_axis))
    for f in (KERNEL, flash_attention_reference)
  ]
  numerics.assert_agrees(*mapped, [q, k, v], softmax=True)


@pytest.mark.parametrize("kv_axis", [None, 0])
def test_vmap_of_more_than_rotates_inside(kv_axis, monkeypatch):
  """VMEM just holds what one example needs, and another's keys beside: not."""
  q, k, v = draw(2, 300, 300, 1, 1, 256)
  q = q[:, None]
  k, v = (x[:1] if kv_axis is None else x[:, None] for x in (k, v))
  kwargs = {"is_causal": True, "rope": Rope(positions_of(1, 300))}
  problem = SPEC.Problem(scale=1.0, is_causal=True, config=SMALL)
  positions = kwargs["rope"].positions
  one = SPEC.Arrays(
    q[0], k.reshape(-1, *q.shape[2:])[:1], None, None, positions
  )
  two = jax.tree.map(lambda x: jnp.concatenate([x, x]), one)

  def is_enough(vmem):
    monkeypatch.setattr(MEMORY, "VMEM_BYTES", vmem)
    try:
      return ROTATION.is_inside(problem, one)
    except ValueError:  # not even one block of keys fits
      return False

  assert is_enough(
    bisect.bisect_left(range(MEMORY.VMEM_BYTES), True, key=is_enough)
  )
  assert not ROTATION.is_inside(problem, two)
  mapped = [
    jax.vmap(functools.partial(f, **kwargs), (0, kv_axis, kv_axis))
    for f in (KERNEL, flash_attention_reference)
  ]
  numerics.assert_agrees(*mapped, [q, k, v], softmax=True)


def rope_gradient(q, k, v, positions):
  return loss_gradient(rope=Rope(positions))(q, k, v)


def gemma_2b(*lead, t):
  """Shapes of q, k, v and positions, under leading dimensions to be mapped."""
  q = jax.ShapeDtypeStruct((*lead, 1, t, 8, 256), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((*lead, 1, t, 1, 256), jnp.bfloat16)
  return q, k, k, jax.ShapeDtypeStruct((*lead, 1, t), jnp.int32)


@v5e.needs_compiler
@pytest.mark.no_interpreter
def test_vmap_of_rope_compiles_at_real_sizes():
  """Two examples whose backward needs 140 MiB with the rotation inside."""
  specs = gemma_2b(2, t=16384)
  program = v5e.compile(jax.vmap(rope_gradient), *specs).as_text()
  assert "apply_rope_bwd" in (program or "")


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  "lead, mapped",
  [
    ((2, 2), jax.vmap(jax.vmap(rope_gradient))),
    (
      (4,),
      lambda *arrays: jax.lax.map(
        lambda x: rope_gradient(*x), arrays, batch_size=2
      ),
    ),
  ],
  ids=["nested", "lax.map"],
)
def test_other_maps_of_rope_lower(lead, mapped):
  exported = jax.export.export(jax.jit(mapped), platforms=["tpu"])
  assert (
    "flash_attention_bwd" in exported(*gemma_2b(*lead, t=8192)).mlir_module()
  )


@pytest.mark.no_interpreter
@pytest.mark.parametrize("saved, calls", [(True, 1), (False, 2)])
def test_checkpoint_by_name_saves_the_forward(saved, calls):
  names = ("flash_attention_out", "flash_attention_lse") if saved else ()

  @functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names(*names),
  )
  def layer(q, k, v):
    out = flash_attention(q * 2, k, v, is_causal=True, implementation="pallas")
    return jnp.tanh(out)

  loss = jax.value_and_grad(lambda *qkv: layer(*qkv).sum(), (0, 1, 2))
  exported = jax.export.export(jax.jit(loss), platforms=["tpu"])
  text = exported(*draw(1, 256, 256, 2, 1, 64)).mlir_module()
  assert text.count('kernel_name = "flash_attention_fwd"') == calls
  assert text.count('kernel_name = "flash_attention_bwd"') == 1


# --- meshes -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["explicit", "auto", "shard_map"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_split_over_a_mesh(how, kv_heads):
  """Batch and heads split over eight devices.

  The one kv head of multi-query attention is on all devices, and its gradient
  is summed over them.
  """
  kind = AxisType.Explicit if how == "explicit" else AxisType.Auto
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
  q, k, v = draw(4, 20, 20, 4, kv_heads, 64)

  def loss(q, k, v):
    return (KERNEL(q, k, v, is_causal=True) ** 2).sum()

  gradient = jax.grad(loss, (0, 1, 2))
  want = gradient(q, k, v)
  heads = PartitionSpec("data", None, "model")
  kv_spec = heads if kv_heads > 1 else PartitionSpec("data")
  if how == "shard_map":
    gradient = jax.grad(
      lambda *args: jax.shard_map(
        lambda *a: jax.lax.psum(loss(*a), ("data", "model")),
        mesh=mesh,
        in_specs=(heads, kv_spec, kv_spec),
        out_specs=PartitionSpec(),
      )(*args),
      (0, 1, 2),
    )
  q, k, v = (
    jax.device_put(x, NamedSharding(mesh, spec))
    for x, spec in ((q, heads), (k, kv_spec), (v, kv_spec))
  )
  rules = {"B": "data", "N": "model"} if how == "auto" else {}
  with jax.set_mesh(mesh), kernels.sharding(mesh, rules):
    got = jax.jit(gradient)(q, k, v)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)


def test_a_split_head_size_is_refused():
  mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    sharding = NamedSharding(mesh, PartitionSpec(None, None, None, "model"))
    q, k, v = (jax.device_put(x, sharding) for x in draw(1, 64, 64, 2, 1, 64))
    with pytest.raises(ValueError, match="flash_attention: can be split over"):
      jax.jit(KERNEL)(q, k, v)


def loss_gradient(**kwargs):
  def loss(q, k, v):
    out = flash_attention(q, k, v, is_causal=True, **kwargs)
    return out.astype(jnp.float32).sum()

  return jax.grad(loss, (0, 1, 2))


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
def test_compiles_for_eight_chips():
  mesh = jax.sharding.Mesh(
    np.reshape(v5e.devices("2x4", (2, 4, 1)), (4, 2)),
    ("data", "model"),
    axis_types=(AxisType.Explicit,) * 2,
  )

  def struct(shape, *spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

  q = struct((4, 2048, 16, 256), "data", None, "model")
  k = struct((4, 2048, 1, 256), "data")
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    text = jax.jit(loss_gradient()).lower(q, k, k).compile().as_text() or ""
  assert "flash_attention_bwd" in text
  assert "all-gather" not in text and "all-reduce" in text  # of dk and dv


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
def test_little_memory_beside_the_results():
  """No partial sums of dq, no transposed copies: at most a mebibyte."""
  q = jax.ShapeDtypeStruct((1, 8192, 8, 256), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, 8192, 1, 256), jnp.bfloat16)

  def both(q, k, v, dout):
    out, vjp = jax.vjp(
      functools.partial(flash_attention, is_causal=True), q, k, v
    )
    return out, vjp(dout)

  memory = v5e.compile(both, q, k, k, q).memory_analysis()
  assert memory is not None and memory.temp_size_in_bytes <= 1 << 20


# --- refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
  "change, message",
  [
    ({"q": (2, 8, 64)}, r"q must be \[B, T, N, H\]"),
    ({"k": (1, 8, 1, 32)}, "k must be"),
    ({"q": (1, 8, 3, 64), "k": (1, 8, 2, 64)}, "multiple of kv heads K"),
    ({"local_window_size": (-1, 0)}, "both >= 0"),
    ({"logits_soft_cap": 0.0}, "positive or None, got 0"),
    ({"segment_ids": (4,)}, "query segment_ids must be"),
    ({"implementation": "cuda"}, "'pallas', 'xla' or None, got 'cuda'"),
  ],
)
def test_bad_input_is_refused(change, message):
  arguments = {"q": (1, 8, 2, 64), "k": (1, 8, 1, 64), **change}
  q, k = (jnp.zeros(arguments.pop(name)) for name in ("q", "k"))
  v = jnp.zeros((1, 8, 1, 64)) if "k" in change and k.shape[3] == 32 else k
  if "segment_ids" in arguments:
    arguments["segment_ids"] = jnp.zeros(arguments["segment_ids"], jnp.int32)
  with pytest.raises(ValueError, match=f"flash_attention: .*{message}"):
    flash_attention(q, k, v, **arguments)


def test_rope_needs_as_many_keys_as_queries():
  q, k, v = draw(1, 8, 9, 2, 1, 64)
  with pytest.raises(ValueError, match="rope needs as many keys as queries"):
    flash_attention(q, k, v, rope=Rope(jnp.zeros((1, 8), jnp.int32)))


@pytest.mark.parametrize(
  "change, message",
  [
    ({"block_q": 0}, "a multiple of 16, got 0"),
    ({"block_q_bwd": 24}, "a multiple of 16, got 24"),
    ({"block_kv": 384}, "a power of two, at least 128, got 384"),
    ({"block_kv_bwd": 64}, "a power of two, at least 128, got 64"),
    ({"rows": 100}, "a multiple of 128, got 100"),
  ],
)
def test_config_is_validated_at_birth(change, message):
  with pytest.raises(ValueError, match=f"FlashAttentionConfig: .*{message}"):
    FlashAttentionConfig(**change)


def test_config_changes_speed_alone():
  config = dataclasses.replace(SMALL, block_q=256, rows=256, block_q_bwd=256)
  arrays = draw(1, 260, 260, 1, 1, 64)
  agrees(arrays, functools.partial(KERNEL, config=config), is_causal=True)
