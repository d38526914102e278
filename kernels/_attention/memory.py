"""Page 3: what of a problem fits VMEM.

A call of either kernel holds all its keys in VMEM, and what it needs for one
block of queries.  Whether the whole problem is one call, and whether RoPE is
inside, rests on the sums below.  They count

    windows   blocks of operands and results, in two buffers where the next one
              is loaded while this one is at work; of pairs, words and heads
    scratch   the kernel's `State`
    spills    intermediate tiles that the compiler finds no registers for

of which the first two are exact but for single rows, [1, R], which are small.
The last is the compiler's own, and here an upper bound of what was seen in
programs for v5e; `tests/test_flash_attention_memory.py` compiles next to it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from .._frame import tpu
from .._sincos import width
from .spec import Arrays, Problem, has_window

if TYPE_CHECKING:
  from .tiles import FlashAttentionConfig

# What the kernels ask of the compiler, and the model plans with.
VMEM_BYTES = 120 << 20


# Of how many keys a column of a mask's words has the bits; see `masks`.
MASK_KEYS = 32 * tpu.LANES


class BiasShape(NamedTuple):
  """Of a bias.

  Attributes:
    by_head: whether query heads have their own.
    itemsize: bytes of an element.
  """

  by_head: bool
  itemsize: int


class MaskShape(NamedTuple):
  """Of a mask that is an array.

  Attributes:
    repeats: how many elements of the batch share one.
    by_head: whether query heads have their own.
  """

  repeats: int
  by_head: bool


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of a problem, as the model of VMEM needs them.

  Attributes:
    t: queries, T.
    s: keys, S.
    batch: B.
    kv_heads: K.
    group: query heads per kv head.
    head_size: H.
    itemsize: bytes of an element of q, k and v.
    has_segments: whether there are segment ids.
    has_window: whether there is a local window.
    is_rotated: whether the kernel rotates q and k.
    has_pairs: whether two kv heads come together, as words; see `words`.
    is_partial: whether gradients are float32; see `Problem`.
    mask: of a mask that is an array.
    has_alibi: whether logits fall with the distance.
    has_dropout: whether some weights are dropped.
    bias: of a bias.
  """

  t: int
  s: int
  batch: int
  kv_heads: int
  group: int
  head_size: int
  itemsize: int
  has_segments: bool = False
  has_window: bool = False
  is_rotated: bool = False
  has_pairs: bool = False
  is_partial: bool = False
  mask: MaskShape | None = None
  has_alibi: bool = False
  has_dropout: bool = False
  bias: BiasShape | None = None

  @classmethod
  def of(cls, q: Any, k: Any) -> Sizes:
    """From q [B, T, N, H] and k [B, S, K, H], or their shapes and dtypes."""
    b, t, n, h = q.shape
    s, kv_heads = k.shape[1:3]
    group = n // kv_heads
    return cls(t, s, b, kv_heads, group, h, q.dtype.itemsize)

  @classmethod
  def of_problem(cls, p: Problem, a: Arrays) -> Sizes:
    """With all that the problem has beside q and k."""
    return dataclasses.replace(
      cls.of(a.q, a.k),
      has_segments=a.segments is not None,
      has_window=has_window(p, a),
      is_rotated=a.positions is not None,
      is_partial=p.is_partial,
      mask=_mask_shape(a),
      has_alibi=a.alibi is not None,
      has_dropout=a.dropout is not None,
      bias=_bias_shape(a),
    )

  @property
  def row_values(self) -> int:
    """Of a head, with its padding to whole lanes."""
    return tpu.lanes(self.head_size)

  @property
  def key_buffers(self) -> int:
    """While one kv head is at work the next is loaded, if there is one."""
    return 1 if self.batch * self.kv_heads == 1 else 2

  @property
  def key_bytes(self) -> int:
    """Of k and v, for each key."""
    times = self.copies if self.has_pairs else self.key_buffers
    return 2 * times * self.row_values * self.itemsize

  @property
  def kv_heads_inside(self) -> int:
    """Of how many kv heads there are sums, and rotated keys."""
    return 2 if self.has_pairs else 1

  @property
  def copies(self) -> int:
    """How many times an array's block is in VMEM while it comes or leaves:
    in two buffers, or two heads of it as words and as heads.
    """
    return 4 if self.has_pairs else 2

  @property
  def is_masked(self) -> bool:
    """Whether there are masks beside the diagonal's."""
    return self.has_segments or self.has_window or self.mask is not None

  def mask_bytes(self, block_q: int) -> tuple[int, int]:
    """Of the words of a block of queries, in two buffers: of the last column,
    that may be of few keys, and per key.
    """
    if self.mask is None:
      return 0, 0
    rows = block_q * (self.group if self.mask.by_head else 1)
    column = 2 * rows * tpu.LANES * 4
    return column, -(-column // MASK_KEYS)

  def bias_bytes(self, block_q: int, gradient: bool) -> int:
    """Of a block of queries for each key, in two buffers."""
    if self.bias is None:
      return 0
    rows = block_q * (self.group if self.bias.by_head else 1)
    return 2 * rows * (self.bias.itemsize + 4 * gradient)

  @property
  def is_float32(self) -> bool:
    """Products of float32 take its factors apart, in many more tiles."""
    return self.itemsize == 4


def _mask_shape(a: Arrays) -> MaskShape | None:
  if a.mask is None:
    return None
  repeats = a.q.shape[0] // a.mask.shape[0]
  return MaskShape(repeats, a.mask.shape[1] > 1)


def _bias_shape(a: Arrays) -> BiasShape | None:
  if a.bias is None:
    return None
  return BiasShape(a.bias.shape[1] > 1, a.bias.dtype.itemsize)


def forward_bytes(config: FlashAttentionConfig, x: Sizes) -> tuple[int, int]:
  """VMEM of the forward: in all but its keys, and per key."""
  rows, h = config.block_q * x.group, x.row_values
  q, out = rows * h * x.itemsize, rows * h * 4  # out of spans is float32
  state = rows * (2 * tpu.LANES + h) * 4
  fixed, per_key = x.copies * (q + out) + state, x.key_bytes
  if x.has_segments:  # by row, and those of keys in two buffers
    fixed, per_key = fixed + rows * tpu.LANES * 4, per_key + 2 * 4
  if x.has_dropout:  # likewise
    fixed, per_key = fixed + rows * tpu.LANES * 4, per_key + 2 * 4
  if x.is_rotated:  # q and k, rotated; sines and cosines, if heads share them
    fixed, per_key = fixed + q, per_key + x.kv_heads_inside * h * x.itemsize
    per_key += 2 * tpu.lanes(width(x.head_size)) * 4 * (x.kv_heads > 1)
  of_mask = x.mask_bytes(config.block_q)
  fixed, per_key = fixed + of_mask[0], per_key + of_mask[1]
  if x.has_alibi:  # a slope and a query of each row, in two buffers
    fixed += 4 * rows * tpu.LANES * 4
  per_key += x.bias_bytes(config.block_q, gradient=False)
  spilled_tiles = (6 if x.is_float32 else 3) + (x.bias is not None)
  return fixed + spilled_tiles * rows * config.block_kv * 4, per_key


def backward_bytes(config: FlashAttentionConfig, x: Sizes) -> tuple[int, int]:
  """VMEM of the backward: in all but its keys, and per key."""
  rows, h = config.block_q_bwd * x.group, x.row_values
  of_rows, wide = rows * h * x.itemsize, rows * h * 4
  # q, o, do; dq, which of spans is float32
  fixed = x.copies * (3 * of_rows + wide)
  fixed += wide  # dq, transposed
  # k and v; dk and dv, and their sums in float32.
  leaving = 4 if x.is_partial else x.itemsize
  per_key = x.key_bytes + x.kv_heads_inside * 2 * (leaving + 4) * h
  # A span of a window may end anywhere.
  is_ragged = x.t % config.block_q_bwd != 0 or x.has_window
  per_key += (x.has_segments + x.has_dropout) * 2 * 4
  per_key += x.bias_bytes(config.block_q_bwd, gradient=True)
  if x.is_rotated:  # k rotated, and the sine and cosine
    per_key += x.kv_heads_inside * h * x.itemsize
    per_key += 2 * tpu.lanes(width(x.head_size)) * 4
  of_mask = x.mask_bytes(config.block_q_bwd)
  fixed, per_key = fixed + of_mask[0], per_key + of_mask[1]
  if x.mask is not None:  # a column of it, rows in lanes
    fixed += rows * tpu.LANES * 4
  fixed += (is_ragged or x.is_rotated) * of_rows + is_ragged * of_rows  # q, do
  tiles_of_logits = 2 + 2 * (x.is_masked or x.has_dropout)
  tiles_of_logits += 2 * (x.bias is not None)
  spilled = tiles_of_logits * rows * config.block_kv_bwd * 4
  spilled += (3 + is_ragged + x.is_rotated) * wide
  if x.is_float32:
    spilled = 4 * (spilled + wide)
  return fixed + spilled, per_key


def keys_that_fit(name: str, fixed: int, per_key: int, unit: int) -> int:
  """How many keys one call holds, a multiple of `unit`.

  Raises:
    ValueError: if not even `unit` of them fit.
  """
  keys = (VMEM_BYTES - fixed) // per_key // unit * unit
  if keys <= 0:
    raise ValueError(
      f"flash_attention: the {name}'s tiles must fit {VMEM_BYTES} bytes of "
      f"VMEM, got {fixed + unit * per_key} with {unit} keys; use smaller blocks"
    )
  return keys
