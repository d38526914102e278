"""Page 3: tile sizes, and the kernel's call."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from .._frame import tpu
from .._frame.check import is_size
from .._frame.tuned import power_of_two
from .cache import Layout
from .spec import Arrays, Problem

# Of one block of keys.  Smaller ones do not hide the loop around them, larger
# ones leave more of the last block of a row to wait for.
_BLOCK_BYTES = 256 << 10
_CHUNK = 128  # tokens of the shortest copy, where a cache's length allows it
_ROWS = 2048  # of queries times heads in a grid step
_HELD_BYTES = 1 << 20  # of new keys in float32, of all rows of the batch
_SOFTMAX_ROWS = 256  # that go through the softmax together


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeAttentionConfig:
  """Tile sizes.  They change speed, never results beyond rounding.

  Attributes:
    block_kv: tokens of the cache that are computed with at a time; a power of
      two, at least 128.  None is 256 KiB of keys.
    block_q: queries per grid step, each with all its heads; a multiple of 16,
      or all of them.  None is some 2048 rows.
    slots: blocks of the cache that VMEM holds: one in work, one that may be on
      its way back, the others on their way.  At least 3.
  """

  block_kv: int | None = None
  block_q: int | None = None
  slots: int = 6

  def __post_init__(self):
    kv, q, slots = self.block_kv, self.block_q, self.slots
    wanted = {
      "block_kv": (
        kv is None or (is_size(kv, tpu.LANES) and kv == power_of_two(kv)),
        f"a power of two, at least {tpu.LANES}, or None",
      ),
      "block_q": (
        q is None or is_size(q, tpu.BFLOAT16_SUBLANES),
        f"a positive multiple of {tpu.BFLOAT16_SUBLANES}, or None",
      ),
      "slots": (is_size(slots) and slots >= 3, "an integer, at least 3"),
    }
    for name, (good, what) in wanted.items():
      if not good:
        raise ValueError(
          f"DecodeAttentionConfig: {name} must be {what}, "
          f"got {getattr(self, name)!r}"
        )


@dataclasses.dataclass(frozen=True)
class Call:
  """A kernel call; all static.

  Attributes:
    problem: what is computed.
    batch: B.
    t: queries of a row.
    heads: N.
    kv_heads: K.
    head_size: H.
    layer_rows: rows, or pages, of a layer of the cache.
    page: tokens of a row of the cache, or of a page.
    pages: of a row.
    keys: that there is room for in a row; past them, it is padding.
    tile: rows of the cache that are written together.
    block_q: queries per grid step.
    block_kv: tokens of a block.
    chunk: tokens of the shortest copy.
    slots: blocks that VMEM holds.
    turned: whether keys lie in lanes, [H, S], and not [S K, H].
    rotates: whether the kernel rotates the queries.
    rotates_new: whether it rotates the new keys.
  """

  problem: Problem
  batch: int
  t: int
  heads: int
  kv_heads: int
  head_size: int
  layer_rows: int
  page: int
  pages: int
  keys: int
  tile: int
  block_q: int
  block_kv: int
  chunk: int
  slots: int
  turned: bool
  rotates: bool
  rotates_new: bool

  @property
  def rows(self) -> int:
    """Queries times heads of a grid step."""
    return self.block_q * self.heads

  @property
  def softmax_rows(self) -> int:
    """Rows that go through the softmax together."""
    whole = self.rows % _SOFTMAX_ROWS == 0
    return _SOFTMAX_ROWS if whole else self.rows

  @property
  def blocks_q(self) -> int:
    """Grid steps of a row."""
    return -(-self.t // self.block_q)

  @property
  def steps(self) -> int:
    """Grid steps in all."""
    return self.batch * self.blocks_q

  @property
  def block_rows(self) -> int:
    """Keys of a block, of all kv heads."""
    return self.block_kv * self.kv_heads

  @property
  def new_rows(self) -> int:
    """Keys that come along, of all kv heads."""
    return self.t * self.kv_heads

  @property
  def held(self) -> int:
    """Rows of the batch whose new keys are in VMEM together: all, or one."""
    row = self.head_size if self.turned else tpu.lanes(self.head_size)
    size = 4 * row * self.batch * self.new_rows
    return self.batch if size <= _HELD_BYTES else 1

  @property
  def tokens_rotated(self) -> int:
    """Queries that are rotated together, with all their heads."""
    for tokens in (32, 16, 8):
      if (
        self.block_q % tokens == 0 and tokens * self.heads <= 2 * _SOFTMAX_ROWS
      ):
        return tokens
    return self.block_q

  @property
  def is_contiguous(self) -> bool:
    """Whether a whole block lies in one piece."""
    if self.pages == 1:
      return self.page >= self.block_kv
    return self.page % self.block_kv == 0


class Sizes(NamedTuple):
  """Of a cache as the kernel takes it: [X, S, K, H], or turned [X, 1, H, S].

  Attributes:
    rows: or pages, of a layer.
    tokens: of a row, or a page.
    kv_heads: K; 1 where heads are apart.
    unit: tokens of which there must be a multiple to be copied: whole tiles of
      memory, or, where they lie in lanes as scales do, whole registers.
    axis: that of tokens.
  """

  rows: int
  tokens: int
  kv_heads: int
  unit: int
  axis: int

  @classmethod
  def of(cls, a: Arrays, layout: Layout) -> Sizes:
    """From the arrays as they are given, and how their cache is laid out."""
    rows, tokens, kv_heads, _ = a.k.shape[-4:]
    if layout.is_by_head:
      rows, kv_heads = rows * kv_heads, 1
    unit = 4 // a.k.dtype.itemsize * tpu.SUBLANES
    if layout.is_turned or a.k_scale is not None:
      unit = max(unit, tpu.LANES)
    axis = -1 if layout.is_turned else -3
    return cls(rows, tokens, kv_heads, unit // math.gcd(unit, kv_heads), axis)

  @property
  def in_chunks(self) -> bool:
    """Whether there is."""
    return self.tokens % self.unit == 0


def call_of(p: Problem, a: Arrays, sizes: Sizes, length: int) -> Call:
  """The call for arrays whose cache has a length that can be copied.

  Args:
    p: the problem.
    a: the arrays, as the kernel takes them.
    sizes: of their cache.
    length: of the cache, or of a page, before it was padded to that.
  """
  b, t, n, h = a.q.shape
  layer_rows, page, kv_heads, chunk, axis = sizes
  pages = 1 if a.table is None else a.table.shape[1]
  itemsize = a.k.dtype.itemsize
  config = p.config or DecodeAttentionConfig()
  while chunk < _CHUNK and page % (2 * chunk) == 0:
    chunk *= 2
  most = power_of_two(page * pages)
  block_kv = config.block_kv or _block_kv(kv_heads * h * itemsize)
  block_kv = max(min(block_kv, most), chunk)
  # A block is a whole number of chunks, and of registers of logits.
  block_kv = tpu.round_up(block_kv, math.lcm(chunk, tpu.LANES))
  block_q = config.block_q or _block_q(n)
  if block_q >= t:
    block_q = t
    if t * n > _SOFTMAX_ROWS:
      some = _SOFTMAX_ROWS // math.gcd(n, _SOFTMAX_ROWS)
      block_q = tpu.round_up(t, some)
  return Call(
    problem=p,
    batch=b,
    t=t,
    heads=n,
    kv_heads=kv_heads,
    head_size=h,
    layer_rows=layer_rows,
    page=page,
    pages=pages,
    keys=length * pages,
    tile=_tile(t * kv_heads, itemsize, chunk * kv_heads),
    block_q=block_q,
    block_kv=block_kv,
    chunk=chunk,
    slots=config.slots,
    turned=axis == -1,
    rotates=a.sin is not None,
    rotates_new=_rotates_new(a, sizes),
  )


def _rotates_new(a: Arrays, sizes: Sizes) -> bool:
  """Whether new keys come as they are put in, each with its own position."""
  if a.sin is None or a.new_k is None or a.k_scale is not None:
    return False
  is_turned = sizes.axis == -1
  return not is_turned and a.new_k.shape[::2] == (a.sin.shape[0], 1)


def _tile(new_rows: int, itemsize: int, chunk_rows: int) -> int:
  """Whole tiles of memory; a few of them where there is much to write."""
  packed = 4 // itemsize * tpu.SUBLANES
  if new_rows <= tpu.SUBLANES and packed <= tpu.BFLOAT16_SUBLANES:
    return tpu.SUBLANES
  many = 4 * packed
  return many if new_rows >= 4 * many and chunk_rows % many == 0 else packed


def _block_kv(token_bytes: int) -> int:
  """The power of two of tokens that take so many bytes."""
  tokens = max(_BLOCK_BYTES // token_bytes, 1)
  return max(1 << (tokens.bit_length() - 1), tpu.LANES)


def _block_q(heads: int) -> int:
  queries = max(_ROWS // heads, 1)
  return max(1 << (queries.bit_length() - 1), tpu.BFLOAT16_SUBLANES)


def vmem_bytes(call: Call, a: Arrays) -> int:
  """What the kernel takes of VMEM; an estimate."""
  h = tpu.lanes(call.head_size)
  slot = call.block_rows * (call.head_size if call.turned else h)
  slots = 2 * call.slots * slot * a.k.dtype.itemsize
  state = call.rows * (2 * tpu.LANES + h) * 4
  queries = 4 * call.rows * h * a.q.dtype.itemsize
  queries += 2 * call.softmax_rows * h * a.q.dtype.itemsize
  logits = 4 * call.softmax_rows * call.block_rows * 4
  if call.rotates:
    queries += 8 * call.block_q * h * 4
    queries += 4 * call.rows * h * a.q.dtype.itemsize
  new = 0 if a.new_k is None else 2 * call.held * call.new_rows * h * 12
  return slots + state + queries + logits + new
