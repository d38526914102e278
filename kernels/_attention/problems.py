"""The problems of flash attention: what they cost, those of tests and models.

Read it when a problem is to be added.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._frame.op import Case, Cost, Integers, nbytes
from .._rope import Rope
from .shapes import LayoutName, shape_in, to_btnh
from .spec import Window, sides

# --- cost ---------------------------------------------------------------------


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


def cost_of(
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


# --- cases --------------------------------------------------------------------


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
  layout = kwargs.get("layout")
  q, kv = (
    jax.ShapeDtypeStruct(shape_in(dims, layout), dtype)
    for dims in ((b, t, n, h), (b, s or t, k, h))
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
_SLOPES = jax.ShapeDtypeStruct((4,), jnp.float32)
_BIAS = jax.ShapeDtypeStruct((1, 2, 128, 128), jnp.float32)
_GEMMA_2B = (1, 8192, 8, 1, 256)
_GEMMA_7B = (1, 8192, 16, 16, 256)
_LLAMA = (1, 8192, 32, 8, 128)

TESTS = (
  _small("mqa_causal", (1, 128, 4, 1, 128)),
  _case("gqa_ragged", (2, 37, 4, 2, 64), jnp.float32, s=50),
  _small("window_cap", (1, 96, 2, 2, 128), **_WINDOW),
  _small("packed_rope", (2, 64, 2, 1, 128), **_PACKED),
  _causal("bf16", (1, 128, 2, 1, 256)),
  _small("heads_first", (1, 140, 4, 2, 64), layout="BNTH"),
  _causal("dropout", (2, 128, 4, 2, 64), dropout_rate=0.3, dropout_seed=7),
  _causal("bias", (1, 128, 2, 1, 64), bias=_BIAS),
  _case("alibi", (1, 140, 4, 2, 64), jnp.float32, alibi_slopes=_SLOPES),
  _case("flat", (2, 37, 4, 2, 128), jnp.float32, s=50, layout="BT(NH)"),
)

BENCHES = (
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
)
