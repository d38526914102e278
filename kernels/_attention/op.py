"""Page 14: the op, its public function, its problems."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._frame import room, switches
from .._frame.check import (
  Implementation,
  as_array,
  as_number,
  as_scalar,
  check_config,
  check_implementation,
  check_positive,
)
from .._frame.kernel import Saved, kernel_op
from .._frame.op import Case, Cost, Integers, Op, nbytes
from .._frame.sharding import Axes, Split
from .._rope import Rope, apply_rope
from . import rotation, tiles
from .backward import backward
from .door import as_qkv, as_rope, as_segments, as_window, check_layout
from .finite import plain_backward
from .forward import forward
from .heads import own_kv_heads
from .layout import Layout
from .shapes import LayoutName, from_btnh, to_btnh
from .spec import (
  Arrays,
  Outs,
  Problem,
  SegmentIds,
  Segments,
  Window,
  attention,
  flash_attention_reference,
  problem_of,
  refuse_arrays,
  sides,
)
from .stores import stored
from .tiles import FlashAttentionConfig

# --- the op -------------------------------------------------------------------


def _plain_forward(p: Problem, a: Arrays) -> Outs:
  """The reference, with lse as the kernel gives it."""
  outs = attention(dataclasses.replace(p, return_lse=True), a)
  layout = Layout.of_shapes(p, a.q.shape, a.k.shape)
  return outs._replace(lse=layout.of_lse(outs.lse / p.unit))


def _plain_linear(p: Problem, saved: Saved, d: Outs) -> Arrays:
  return _flash.reference_vjp(p, saved, d)


def _plain_backward(p: Problem, saved: Saved, d: Outs) -> Arrays:
  return plain_backward(_plain_linear, p, saved, d)


def _split(p: Problem, a: Arrays) -> Split:
  segments = None if a.segments is None else Segments("BT", "BS")
  positions = None if a.positions is None else "BT"
  return Split(
    Arrays(
      "BTNH",
      "BSKH",
      "BSKH",
      segments,
      positions,
      scale=None if a.scale is None else "B",
      window=None if a.window is None else "B-",
      base=None if a.base is None else "B",
    ),
    Outs("BTNH", "BNT" if p.return_lse else None),
    over="BN",
    fewer="K",
    follows=("K", "N"),
  )


def _on_device(op: Any, p: Problem, a: Arrays, axes: Mapping[str, Any]) -> Outs:
  """One device's batch elements and heads."""
  a = _with_own_kv_heads(a, axes)
  p = dataclasses.replace(p, config=tiles.choose(p, a))
  if not p.scale > 0:  # the kernels take a maximum before they scale
    sign = np.sign(p.scale).astype(a.q.dtype)
    a = a._replace(q=a.q * sign)
    p = dataclasses.replace(p, scale=abs(p.scale) or 1.0)
  known_base = a.positions is not None and a.base is None
  if known_base and not rotation.is_inside(p, a):
    a = _rotated_before(p, a)  # else the passes do it
  outs = op(p, a)
  if not p.return_lse:
    return outs._replace(lse=None)
  layout = Layout.of_shapes(p, a.q.shape, a.k.shape)
  return outs._replace(lse=layout.to_lse(outs.lse, a.q.shape) * p.unit)


def _with_own_kv_heads(a: Arrays, axes: Mapping[str, Axes]) -> Arrays:
  """Of the kv heads that a device has, those of its query heads."""
  heads = own_kv_heads(a.q.shape[2], a.k.shape[2], axes)
  if heads is None:
    return a
  k, v = (jnp.take(x, heads, axis=2, mode="clip") for x in (a.k, a.v))
  return a._replace(k=k, v=v)


def _rotated_before(p: Problem, a: Arrays) -> Arrays:
  q, k = (
    apply_rope(
      x,
      a.positions,
      base_frequency=p.base_frequency,
      implementation=p.implementation,
    )
    for x in (a.q, a.k)
  )
  return a._replace(q=q, k=k, positions=None)


_flash = kernel_op(
  "flash_attention",
  reference=attention,
  forward=forward,
  backward=backward,
  saves=(*Arrays._fields, *Outs._fields),
  names=("out", "lse"),
  vmap=("batch", "batch"),
  split=_split,
  around=_on_device,
  plain_forward=_plain_forward,
  plain_linear=_plain_linear,
  plain_backward=_plain_backward,
  stores=stored,
)

# --- public -------------------------------------------------------------------


@switches.plain
def flash_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float | None = None,
  is_causal: bool = False,
  segment_ids: SegmentIds = None,
  local_window_size: Window = None,
  logits_soft_cap: float | None = None,
  rope: Rope | None = None,
  return_lse: bool = False,
  layout: LayoutName | None = None,
  head_size: int | None = None,
  mask: None = None,
  bias: None = None,
  implementation: Implementation = None,
  config: FlashAttentionConfig | None = None,
) -> Any:
  """Softmax attention without the [T, S] matrix in memory.

  The conventions are those of `jax.nn.dot_product_attention`.  FlashAttention:
  Dao et al., arXiv 2205.14135; multi-query: Shazeer, arXiv 1911.02150.

  Args:
    q: [B, T, N, H] float32 or bfloat16.  Products of float32 are float32, six
      passes of the matrix unit; bfloat16 takes one.
    k: [B, S, K, H] of q's dtype; N is a multiple of K, and query head n reads
      kv head n // (N / K).  K = 1 is multi-query, K = N multi-head.
    v: [B, S, K, H].
    scale: multiplies the logits; None is 1 / sqrt(H).  A traced scalar too,
      which has a gradient: a learned temperature.
    is_causal: query i sees keys 0 to i: the first query is aligned with the
      first key, also where T and S differ.
    segment_ids: [B, T] integers of any width or booleans, or a pair ([B, T],
      [B, S]) for queries and keys.  A query sees keys of its own segment alone;
      0 is padding, which neither sees nor is seen: with one mask of real tokens
      the padding's queries give 0.  To hide padding from all queries and let
      its own see the real keys, as a mask [B, S] of keys does in most models,
      pass `(jnp.ones_like(mask), mask)`.
    local_window_size: (left, right), both inclusive: query i sees keys from
      i - left to i + right; one number is both.  Traced scalars too, as in a
      `lax.scan` over layers of which some are local: blocks that nobody sees
      are skipped all the same.
    logits_soft_cap: cap in cap * tanh(logits / cap), after the scale; a number.
    rope: rotates q and k by their positions first; needs T = S.  Its base may
      be a traced scalar, which has a gradient in the reference alone.
    return_lse: also return the log of the sum of exponentials.
    layout: how q, k, v and out lie in memory.  None: of the shapes above, as
      XLA likes it; projections write and read them heads first for nothing.
      "BTNH": row-major, as arrays from outside are.  "BNTH": heads first, q and
      out [B, N, T, H], k and v [B, K, S, H].  "BT(NH)": flat, [B, T, N H] and
      [B, S, K H].  The kernels read and write all three in place, and their
      gradients.  Where they cannot, XLA transposes to heads first and back:
      "BT(NH)" and "BTNH" with a head size that is no multiple of 128; and
      "BTNH" with several kv heads if N or K is neither 2, 4 nor a multiple of
      8, if T or S is no multiple of 8 and H is not 128, or if VMEM does not
      hold all keys of two kv heads.
    head_size: H, with "BT(NH)"; None with the others.
    mask: None; an array is refused, as flax's attention modules pass one.
    bias: None, likewise.
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: tile sizes; None picks them from the shape.

  Returns:
    out of q's shape and dtype, or (out, lse [B, N, T] float32).  A query that
    sees no key gives 0, zero gradient, and an lse of -inf.

  Raises:
    ValueError: on wrong shapes, dtypes or values.
  """
  op = "flash_attention"
  check_implementation(op, implementation)
  check_config(op, config, FlashAttentionConfig)
  refuse_arrays(op, mask=mask, bias=bias)
  dtype = as_array(op, "q", q).dtype
  check_layout(op, layout, head_size)
  q, k, v = as_qkv(op, q, k, v, layout, head_size)
  cap = logits_soft_cap
  cap = None if cap is None else as_number(op, "logits_soft_cap", cap)
  check_positive(op, logits_soft_cap=cap)
  problem, arrays = problem_of(
    q,
    k,
    v,
    scale=None if scale is None else as_scalar(op, "scale", scale),
    is_causal=bool(is_causal),
    segment_ids=as_segments(op, segment_ids, q, k),
    local_window_size=as_window(op, local_window_size),
    soft_cap=cap,
    rope=as_rope(op, rope, q, k),
    return_lse=bool(return_lse),
    layout=layout,
    implementation=implementation,
    config=config,
  )
  outs = _flash(problem, arrays)
  out = from_btnh(outs.out.astype(dtype), layout)
  here = room.current()
  if here is not None and dtype == outs.out.dtype:
    here.renamed(out, outs.out, functools.partial(from_btnh, layout=layout))
  return (out, outs.lse) if return_lse else out


# --- registration -------------------------------------------------------------


def _visible(t: int, s: int, is_causal: bool, window: Window) -> int:
  """Visible pairs of one head; a full causal square counts as its half."""
  if is_causal and window is None and t == s:
    return t * s // 2
  i = np.arange(t)
  low, high = np.zeros(t, int), np.full(t, s)
  if is_causal:
    high = np.minimum(high, i + 1)
  both = sides(window)
  if both is not None:
    low = np.maximum(low, i - both[0])
    high = np.minimum(high, i + both[1] + 1)
  return int(np.maximum(high - low, 0).sum())


def _cost(
  q,
  k,
  v,
  *,
  is_causal=False,
  local_window_size=None,
  segment_ids=None,
  layout: LayoutName | None = None,
  head_size=None,
  **_,
) -> tuple[Cost, Cost]:
  shapes = jax.eval_shape(
    lambda *xs: [to_btnh(x, layout, head_size) for x in xs], q, k
  )
  (batch, t, n, h), (_, s, *_) = (x.shape for x in shapes)
  pairs = _visible(t, s, is_causal, local_window_size)
  if isinstance(segment_ids, Integers):
    ids = segment_ids.draw(np.random.default_rng(0))[0]
    lengths = np.bincount(ids)[1:]
    pairs = sum(
      _visible(int(x), int(x), is_causal, local_window_size) for x in lengths
    )
  one = 2 * batch * n * h * pairs
  forward = nbytes(q, q, k, v)
  return Cost(2 * one, forward), Cost(5 * one, 2 * forward)


def _packed(shape: tuple[int, int], segments: int) -> Integers:
  """Segments 1, 2, ... of equal length."""
  row = np.arange(shape[1], dtype=np.int32) * segments // shape[1] + 1
  return Integers(shape, lambda _: np.broadcast_to(row, shape))


def _rope_at(shape: tuple[int, int]) -> Any:
  arange = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  return Rope(Integers(shape, lambda _: arange))  # type: ignore[arg-type]


def _case(name, shape, dtype=jnp.bfloat16, s=None, **kwargs) -> Case:
  """Of shape (B, T, N, K, H) and S keys, T of them by default."""
  b, t, n, k, h = shape
  of_layout = functools.partial(from_btnh, layout=kwargs.get("layout"))
  q, kv = (
    jax.eval_shape(of_layout, jax.ShapeDtypeStruct((b, *dims, h), dtype))
    for dims in ((t, n), (s or t, k))
  )
  if kwargs.get("layout") == "BT(NH)":
    kwargs["head_size"] = h
  return Case(name, (q, kv, kv), kwargs)


def _in_other_layouts(name: str, shape: tuple[int, ...]) -> tuple[Case, ...]:
  return (
    _causal(f"{name}_heads_first", shape, layout="BNTH"),
    _causal(f"{name}_flat", shape, layout="BT(NH)"),
  )


_causal = functools.partial(_case, is_causal=True)
_small = functools.partial(_causal, dtype=jnp.float32)
_WINDOW = {"local_window_size": (16, 0), "logits_soft_cap": 20.0}
_PACKED = {"segment_ids": _packed((2, 64), 3), "rope": _rope_at((2, 64))}
_GEMMA_2B = (1, 8192, 8, 1, 256)
_GEMMA_7B = (1, 8192, 16, 16, 256)
_LLAMA = (1, 8192, 32, 8, 128)

FLASH_ATTENTION = Op(
  name="flash_attention",
  function=flash_attention,
  reference=flash_attention_reference,
  cost=_cost,
  through_softmax=True,
  baselines=("attention",),
  tests=(
    _small("mqa_causal", (1, 128, 4, 1, 128)),
    _case("gqa_ragged", (2, 37, 4, 2, 64), jnp.float32, s=50),
    _small("window_cap", (1, 96, 2, 2, 128), **_WINDOW),
    _small("packed_rope", (2, 64, 2, 1, 128), **_PACKED),
    _causal("bf16", (1, 128, 2, 1, 256)),
    _small("heads_first", (1, 140, 4, 2, 64), layout="BNTH"),
    _case("flat", (2, 37, 4, 2, 128), jnp.float32, s=50, layout="BT(NH)"),
  ),
  benches=(
    _causal("gemma_2b_8k", _GEMMA_2B),
    _causal("gemma_2b_4k", (1, 4096, 8, 1, 256)),
    _causal("gemma_2b_4x2k", (4, 2048, 8, 1, 256)),
    _causal("gemma_7b_8k", _GEMMA_7B, layout="BTNH"),
    _causal("gemma_2b_32k", (1, 32768, 8, 1, 256)),
    _causal("llama_gqa_8k", _LLAMA, layout="BTNH"),
    _causal("window_1024", _GEMMA_2B, local_window_size=(1024, 0)),
    _causal("packed_8x1024", _GEMMA_2B, segment_ids=_packed((1, 8192), 8)),
    _causal("gemma_2b_8k_rope", _GEMMA_2B, rope=_rope_at((1, 8192))),
    *_in_other_layouts("gemma_2b_8k", _GEMMA_2B),
    *_in_other_layouts("gemma_7b_8k", _GEMMA_7B),
    *_in_other_layouts("llama_gqa_8k", _LLAMA),
  ),
)
