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
  as_switch,
  check_config,
  check_implementation,
)
from .._frame.kernel import Saved, kernel_op
from .._frame.op import Op
from .._frame.sharding import Axes, Split
from .._rope import Rope, apply_rope, rotated_apart
from . import masks, problems, ring, rotation, tiles
from .arguments import Seen, Weights, problem_of
from .backward import backward
from .door import (
  as_drop,
  as_parts,
  as_qkv,
  as_rope,
  as_seen,
  as_weights,
  check_layout,
  of_one_head_size,
)
from .finite import plain_backward
from .forward import forward
from .heads import own_kv_heads
from .layout import Layout
from .reference import (
  attention,
  flash_attention_reference,
  with_sinks,
)
from .ring_order import in_context, in_time
from .shapes import LayoutName, from_btnh
from .spec import (
  Arrays,
  Dropout,
  Outs,
  Problem,
  SegmentIds,
  Segments,
  Window,
)
from .stores import stored
from .tiles import FlashAttentionConfig

# --- the op -------------------------------------------------------------------


def _plain_forward(p: Problem, a: Arrays) -> Outs:
  """The reference, with lse as the kernel gives it."""
  p = dataclasses.replace(p, return_lse=True)
  outs = attention(p, a)
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
      sinks=None if a.sinks is None else "N",
      mask=_letters(a, a.mask),
      bias=_letters(a, a.bias),
      alibi=None if a.alibi is None else "-N",
      first_position=None if a.first_position is None else "B",
      dropout=None if a.dropout is None else Dropout("BTN", "BS"),
    ),
    Outs("BTNH", "BNT" if p.return_lse else None),
    over="BTN",
    fewer="K",
    follows=("K", "N"),
    alike=("S", "T"),
  )


def _letters(a: Arrays, scores: Any) -> str | None:
  """Of [B or 1, N or 1, T, S]."""
  if scores is None:
    return None
  parts, heads = scores.shape[:2]
  batch = "B" if parts == a.q.shape[0] else "-"
  return batch + ("N" if heads == a.q.shape[2] else "-") + "--"


def _on_device(op: Any, p: Problem, a: Arrays, axes: Mapping[str, Any]) -> Outs:
  """One device's part, with its sinks."""
  if a.sinks is None:
    return _attended(op, p, a, axes)
  with_lse, keys = (
    dataclasses.replace(p, return_lse=True),
    a._replace(sinks=None),
  )
  outs = with_sinks(_attended(op, with_lse, keys, axes), a.sinks)
  return outs if p.return_lse else outs._replace(lse=None)


def _attended(op: Any, p: Problem, a: Arrays, axes: Mapping[str, Any]) -> Outs:
  """One device's batch elements and heads, and its part of the tokens."""
  ring_axes = axes.get("T", ())
  if p.context_parts > 1 and not ring_axes:
    whole = dataclasses.replace(p, context_parts=1)
    outs = _attended(op, whole, in_time(a, p.context_parts), axes)
    return in_context(outs, p.context_parts)
  if ring_axes:
    ring.check(p, a, ring_axes)
  p, a = masks.folded(p, _with_own_kv_heads(a, axes))
  if not p.scale > 0:  # the kernels take a maximum before they scale
    sign = np.sign(p.scale).astype(a.q.dtype)
    a = a._replace(q=a.q * sign)
    p = dataclasses.replace(p, scale=abs(p.scale) or 1.0)
  if ring_axes:
    a = a if a.positions is None else rotation.by_op(p, a)
    outs = ring.attend(p, a, ring_axes)
    return outs._replace(lse=outs.lse * p.unit if p.return_lse else None)
  p = dataclasses.replace(p, config=tiles.choose(p, a))
  known_base = a.positions is not None and a.base is None
  if known_base and not rotation.is_inside(p, a):
    a = rotation.by_op(p, a)  # else the passes do it
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


def attend(op: str, p: Problem, a: Arrays) -> Outs:
  """The op, by a public function of that name.

  Raises:
    ValueError: if there is a mask, and tokens are in another order.
  """
  if a.mask is not None and p.context_parts > 1:
    raise ValueError(
      f"{op}: mask must be None with context_parts > 1, got shape "
      f"{a.mask.shape}"
    )
  return _flash(p, a)


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
  context_parts: int = 1,
  mask: jax.Array | None = None,
  bias: jax.Array | None = None,
  sinks: jax.Array | None = None,
  query_offset: int | jax.Array = 0,
  prefix_lengths: jax.Array | None = None,
  chunk_size: int | None = None,
  alibi_slopes: jax.Array | None = None,
  dropout_rate: float = 0.0,
  dropout_seed: int | jax.Array | None = None,
  deterministic: bool = False,
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
    v: [B, S, K, H]; or of another head size, but in "BT(NH)", which out has
      too: the smaller of the two is filled up with zeros.
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
      be a traced scalar, which has a gradient in the reference alone.  What is
      not half against half by a base (frequencies, phases, neighbours) is done
      by `apply_rope` before, with one more pass over q and k.
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
    context_parts: n, if tokens are in the order of `context_order(T, n)`; of
      which is_causal and the window know the time.  Over a mesh that splits T
      among n devices all of them have equal work then.
    mask: booleans [B, N, T, S], or 1 in place of some, True where a query sees
      a key, of those that the arguments above leave visible.  One of keys
      alone, [B, 1, 1, S], goes by segment ids.  Of others the kernels skip
      blocks that hide everything, and compute those that hide nothing without
      a mask; it takes T S / 8 bytes more, for all heads that share it.  What it
      hides must be finite, also where segment_ids hide it.
    bias: floats of such a shape, added to the logits, after the soft cap; with
      a gradient.  The kernels read it as it is, but in full T and S: it takes
      T S values for each of its heads and batch elements.  Its gradient, where
      it is asked for, takes as much; or, of what is shared, T S float32 for
      each element of the batch, times K if heads share it, else times N.
    sinks: [N] floats: of each query head the logit of one more key, of value
      0, which every query sees; with a gradient.  They scale the kernels'
      results by lse, in plain jnp.
    query_offset: position of the first query among the keys, of which
      is_causal, the window and chunks know: S - T aligns the last query with
      the last key.  An integer; or an array, [] or [B], by a mask [B, 1, T, S].
    prefix_lengths: [B] integers: all see the keys before, beside what is_causal
      leaves visible; by a mask [B, 1, T, S].
    chunk_size: a query sees keys of its own chunk of so many positions alone;
      by segment ids, and with segment_ids by a mask [1, 1, T, S].
    alibi_slopes: [N] floats: slope |i - j| is subtracted from a head's logits,
      after the soft cap, i and j being the positions of query and key that
      is_causal knows of, in one segment or several.  They have no gradient.
    dropout_rate: the part of the weights that is dropped, after the softmax;
      what is kept is divided by 1 - dropout_rate.  A number, from 0 to below 1.
    dropout_seed: an integer scalar, as
      `jax.random.bits(key, (), "uint32")`: of it and of a weight's place in the
      whole batch, its head, query and key follows whether it is dropped, the
      same for all implementations, tiles and meshes.  Under vmap, what has one
      seed drops alike.
    deterministic: whether nothing is dropped, whatever the rate; True or False.
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
  dtype = as_array(op, "q", q).dtype
  check_layout(op, layout, head_size)
  q, k, v = as_qkv(op, q, k, v, layout, head_size, True)
  rope = as_rope(op, rope, q, k)
  rotate = functools.partial(apply_rope, implementation=implementation)
  rope, q, k = rotated_apart(rope, rotate, q, k)
  parts = as_parts(op, context_parts, q, k)
  ids, window = segment_ids, local_window_size
  seen = Seen(is_causal, ids, window, mask, query_offset, prefix_lengths)
  seen = as_seen(op, q, k, seen._replace(chunk_size=chunk_size), parts)
  weights = Weights(scale, logits_soft_cap, rope, bias, sinks, alibi_slopes)
  drops_none = as_switch(op, "deterministic", deterministic)
  drop = as_drop(op, 0.0 if drops_none else dropout_rate, dropout_seed)
  weights = as_weights(op, q, k, weights._replace(drop=drop))
  problem, arrays = problem_of(
    *of_one_head_size(q, k, v),
    *(seen, weights),
    return_lse=as_switch(op, "return_lse", return_lse),
    layout=layout,
    context_parts=parts,
    implementation=implementation,
    config=config,
  )
  outs = attend(op, problem, arrays)
  out = from_btnh(outs.out[..., : v.shape[3]].astype(dtype), layout)
  here = room.current()
  if here is not None and out.size == outs.out.size and dtype == q.dtype:
    here.renamed(out, outs.out, functools.partial(from_btnh, layout=layout))
  return (out, outs.lse) if return_lse else out


# --- registration -------------------------------------------------------------

FLASH_ATTENTION = Op(
  name="flash_attention",
  function=flash_attention,
  reference=flash_attention_reference,
  cost=problems.cost_of,
  through_softmax=True,
  baselines=("attention",),
  tests=problems.TESTS,
  benches=problems.BENCHES,
)
