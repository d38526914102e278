"""Page 10: the op, its public function, its problems."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._frame.check import (
  Implementation,
  check_float,
  check_implementation,
  check_integers,
  check_positive,
  check_shape,
)
from .._frame.kernel import Saved, kernel_op
from .._frame.op import Case, Cost, Integers, Op, nbytes
from .._frame.sharding import Split
from .._rope import Rope, apply_rope, check_rope
from . import rotation, tiles
from .backward import backward
from .finite import plain_backward
from .forward import forward
from .layout import lse_from_rows, lse_to_rows
from .spec import (
  Arrays,
  Outs,
  Problem,
  SegmentIds,
  Segments,
  Window,
  attention,
  flash_attention_reference,
  is_traced,
  problem_of,
  segments_of,
  sides,
)
from .tiles import FlashAttentionConfig

# --- the op -------------------------------------------------------------------


def _plain_forward(p: Problem, a: Arrays) -> Outs:
  """The reference, with lse as the kernel gives it."""
  outs = attention(dataclasses.replace(p, return_lse=True), a)
  return outs._replace(lse=lse_to_rows(outs.lse / p.unit, a.k.shape[2]))


def _plain_backward(p: Problem, saved: Saved, d: Outs) -> Arrays:
  return plain_backward(_flash.reference_vjp, p, saved, d)


def _split(p: Problem, a: Arrays) -> Split:
  # Split over heads, the kv heads go with their query heads; one that serves
  # them all is on every device.
  kv = "BSNH" if a.k.shape[2] > 1 else "BS-H"
  segments = None if a.segments is None else Segments("BT", "BS")
  positions = None if a.positions is None else "BT"
  return Split(
    Arrays(
      "BTNH",
      kv,
      kv,
      segments,
      positions,
      scale=None if a.scale is None else "B",
      window=None if a.window is None else "B-",
      base=None if a.base is None else "B",
    ),
    Outs("BTNH", "BNT" if p.return_lse else None),
    over="BN",
  )


def _on_device(op: Any, p: Problem, a: Arrays, axes: Mapping[str, Any]) -> Outs:
  """One device's batch elements and heads."""
  del axes
  segments, positions = jax.tree.map(
    lambda x: x.astype(jnp.int32), (a.segments, a.positions)
  )
  a = a._replace(segments=segments, positions=positions)
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
  return outs._replace(lse=lse_from_rows(outs.lse, a.q.shape) * p.unit)


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
  plain_backward=_plain_backward,
)

# --- public -------------------------------------------------------------------


def check_attention(op: str, q, k, v, window: Window, soft_cap) -> None:
  """What training and decoding attention ask of their common arguments."""
  for name, array in dict(q=q, k=k, v=v).items():
    if array.ndim != 4:
      letters = "[B, T, N, H]" if name == "q" else "[B, S, K, H]"
      raise ValueError(
        f"{op}: {name} must be {letters}, got shape {array.shape}"
      )
  check_float(op, q=q, k=k, v=v)
  if not q.dtype == k.dtype == v.dtype:
    raise ValueError(
      f"{op}: q, k and v must have one dtype, "
      f"got {q.dtype}, {k.dtype}, {v.dtype}"
    )
  check_shape(op, "v", v, k.shape, "the shape of k")
  batch, _, n, h = q.shape
  if (k.shape[0], k.shape[3]) != (batch, h):
    raise ValueError(
      f"{op}: k must be [B, S, K, H] with q's B = {batch} and H = {h}, "
      f"got {k.shape}"
    )
  if k.shape[2] == 0 or n % k.shape[2]:
    raise ValueError(
      f"{op}: query heads N must be a multiple of kv heads K, "
      f"got N = {n}, K = {k.shape[2]}"
    )
  _check_window(op, window)
  if is_traced(soft_cap):
    raise ValueError(
      f"{op}: logits_soft_cap must be known when the program is traced, got a "
      "traced value"
    )
  check_positive(op, logits_soft_cap=soft_cap)


def _check_window(op: str, window: Window) -> None:
  both = sides(window)
  if both is None:
    return
  good = len(both) == 2
  for side in both:
    if is_traced(side):
      check_shape(op, "local_window_size", side, (), "a scalar")
      check_integers(op, "local_window_size", side)
    else:
      good = good and side >= 0
  if not good:
    raise ValueError(
      f"{op}: local_window_size must be (left, right), both >= 0, got {window}"
    )


def _check_traced_float(op: str, name: str, value: Any) -> None:
  if is_traced(value):
    check_shape(op, name, value, (), "a scalar")
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise ValueError(f"{op}: {name} must be a float, got {value.dtype}")


def _check_segments(op: str, q, k, segment_ids: SegmentIds) -> None:
  if segment_ids is None:
    return
  if isinstance(segment_ids, tuple) and len(segment_ids) != 2:
    raise ValueError(
      f"{op}: segment_ids must be one array or a pair, got {len(segment_ids)}"
    )
  segments = segments_of(segment_ids)
  assert segments is not None
  for name, ids, array in (("query", segments.q, q), ("key", segments.k, k)):
    check_shape(
      op, f"{name} segment_ids", ids, array.shape[:2], f"[B, length] of {name}s"
    )
    check_integers(op, f"{name} segment_ids", ids)


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
    segment_ids: [B, T] integers, or a pair ([B, T], [B, S]) for queries and
      keys.  A query sees keys of its own segment alone; 0 is padding, which
      neither sees nor is seen.
    local_window_size: (left, right), both inclusive: query i sees keys from
      i - left to i + right; one number is both.  Traced scalars too, as in a
      `lax.scan` over layers of which some are local: blocks that nobody sees
      are skipped all the same.
    logits_soft_cap: cap in cap * tanh(logits / cap), after the scale; a number.
    rope: rotates q and k by their positions first; needs T = S.  Its base may
      be a traced scalar, which has a gradient in the reference alone.
    return_lse: also return the log of the sum of exponentials.
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: tile sizes; None picks them from the shape.

  Returns:
    out [B, T, N, H] of q's dtype, or (out, lse [B, N, T] float32).  A query
    that sees no key gives 0, zero gradient, and an lse of -inf.

  Raises:
    ValueError: on wrong shapes, dtypes or values.
  """
  op = "flash_attention"
  check_implementation(op, implementation)
  check_attention(op, q, k, v, local_window_size, logits_soft_cap)
  _check_segments(op, q, k, segment_ids)
  if rope is not None:
    if q.shape[1] != k.shape[1]:
      raise ValueError(
        f"{op}: rope needs as many keys as queries, "
        f"got T = {q.shape[1]}, S = {k.shape[1]}"
      )
    check_shape(op, "rope.positions", rope.positions, q.shape[:2], "[B, T]")
    check_integers(op, "rope.positions", rope.positions)
    base = rope.base_frequency
    _check_traced_float(op, "rope.base_frequency", base)
    check_rope(op, q.shape[3], 1.0 if is_traced(base) else float(base))
  _check_traced_float(op, "scale", scale)
  problem, arrays = problem_of(
    q,
    k,
    v,
    scale=scale,
    is_causal=is_causal,
    segment_ids=segment_ids,
    local_window_size=local_window_size,
    soft_cap=logits_soft_cap,
    rope=rope,
    return_lse=return_lse,
    implementation=implementation,
    config=config,
  )
  outs = _flash(problem, arrays)
  return tuple(outs) if return_lse else outs.out


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
  q, k, v, *, is_causal=False, local_window_size=None, segment_ids=None, **_
) -> tuple[Cost, Cost]:
  batch, t, n, h = q.shape
  pairs = _visible(t, k.shape[1], is_causal, local_window_size)
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
  q = jax.ShapeDtypeStruct((b, t, n, h), dtype)
  kv = jax.ShapeDtypeStruct((b, s or t, k, h), dtype)
  return Case(name, (q, kv, kv), kwargs)


_causal = functools.partial(_case, is_causal=True)
_small = functools.partial(_causal, dtype=jnp.float32)
_WINDOW = {"local_window_size": (16, 0), "logits_soft_cap": 20.0}
_PACKED = {"segment_ids": _packed((2, 64), 3), "rope": _rope_at((2, 64))}
_GEMMA_2B = (1, 8192, 8, 1, 256)

FLASH_ATTENTION = Op(
  name="flash_attention",
  function=flash_attention,
  reference=flash_attention_reference,
  cost=_cost,
  through_softmax=True,
  # Heads first; those of a single kv head lie so in either.
  own_layout=lambda q, k, *_, **__: k.shape[2] > 1,
  baselines=("attention",),
  tests=(
    _small("mqa_causal", (1, 128, 4, 1, 128)),
    _case("gqa_ragged", (2, 37, 4, 2, 64), jnp.float32, s=50),
    _small("window_cap", (1, 96, 2, 2, 128), **_WINDOW),
    _small("packed_rope", (2, 64, 2, 1, 128), **_PACKED),
    _causal("bf16", (1, 128, 2, 1, 256)),
  ),
  benches=(
    _causal("gemma_2b_8k", _GEMMA_2B),
    _causal("gemma_2b_4k", (1, 4096, 8, 1, 256)),
    _causal("gemma_2b_4x2k", (4, 2048, 8, 1, 256)),
    _causal("gemma_7b_8k", (1, 8192, 16, 16, 256)),
    _causal("gemma_2b_32k", (1, 32768, 8, 1, 256)),
    _causal("llama_gqa_8k", (1, 8192, 32, 8, 128)),
    _causal("window_1024", _GEMMA_2B, local_window_size=(1024, 0)),
    _causal("packed_8x1024", _GEMMA_2B, segment_ids=_packed((1, 8192), 8)),
    _causal("gemma_2b_8k_rope", _GEMMA_2B, rope=_rope_at((1, 8192))),
  ),
)
