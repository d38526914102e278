"""Page 4: tile sizes, and the kernels' calls."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._frame import tpu
from .._frame.check import is_size
from .._frame.tuned import power_of_two, tuned_config
from . import memory
from .layout import Layout
from .memory import MASK_KEYS, MaskShape, Sizes
from .spec import Arrays, Problem, has_window

# --- configuration ------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashAttentionConfig:
  """Tile sizes.  They change speed, never results beyond rounding.

  Attributes:
    block_q: queries per grid step of the forward, each with all heads of its
      kv head; a multiple of 16.
    block_kv: keys per step of its inner loop; a power of two, at least 128.
    rows: queries times heads that go through the softmax together; those of
      one grid step are interleaved.  A multiple of 128.
    block_q_bwd: as block_q, of the backward.
    block_kv_bwd: as block_kv, of the backward.
  """

  block_q: int = 128
  block_kv: int = 256
  rows: int = 256
  block_q_bwd: int = 128
  block_kv_bwd: int = 256

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if name.startswith("block_q"):
        good, wanted = is_size(value, 16), "a multiple of 16"
      elif name.startswith("block_kv"):
        good = is_size(value, tpu.LANES) and value & (value - 1) == 0
        wanted = f"a power of two, at least {tpu.LANES}"
      else:
        good = is_size(value, tpu.LANES)
        wanted = f"a multiple of {tpu.LANES}"
      if not good:
        raise ValueError(
          f"FlashAttentionConfig: {name} must be positive and {wanted}, "
          f"got {value!r}"
        )

  @classmethod
  def fitting(
    cls, group: int, head_size: int, dtype: Any = jnp.bfloat16
  ) -> FlashAttentionConfig:
    """Tiles of 2048 rows, whatever the number of heads among them.

    Of float32, whose products take several passes of the matrix unit and long
    to compile, 1024.  Small heads have a softmax as long as their matmuls; what
    it costs for each block of keys is spread over more of them.  block_q is a
    power of two, so that blocks of keys divide it and there is a diagonal; of
    many small heads, whose blocks of keys would be short, there are 4096 rows.
    The backward of these would not fit the instruction memory, nor gain.
    """
    rows = 1024 if dtype == jnp.float32 else 2048
    many_small = head_size <= tpu.LANES and group > 4 and rows == 2048
    if many_small:
      rows = 4096
    block_q = 1 << (rows // min(group, 128)).bit_length() - 1
    block_q = min(max(block_q, 16), 1024)
    small_softmax_share = head_size > tpu.LANES and group > 1
    block_kv = min(256 if small_softmax_share else 512, block_q)
    block_kv = max(block_kv, tpu.LANES)
    most_bwd = 256 if many_small else 1024
    return cls(
      block_q=block_q,
      block_kv=block_kv,
      block_q_bwd=min(block_q, most_bwd),
      block_kv_bwd=min(block_kv, most_bwd),
    )

  def vmem_bytes(self, q: Any, k: Any) -> tuple[int, int]:
    """VMEM that one call of the forward and one of the backward take.

    An estimate, on which the number of keys to a call rests.

    Args:
      q: [B, T, N, H], or its shape and dtype.
      k: [B, S, K, H], likewise.
    """
    sizes = Sizes.of(q, k)
    config = self.clipped(sizes.t, sizes.s, sizes.group)
    of_passes = (
      memory.forward_bytes(config, sizes),
      memory.backward_bytes(config, sizes),
    )
    forward, backward = (
      fixed + min(sizes.s * per_key, memory.VMEM_BYTES - fixed)
      for fixed, per_key in of_passes
    )
    return forward, backward

  def clipped(self, t: int, s: int, group: int) -> FlashAttentionConfig:
    """No larger than the problem, and with rows a multiple of 128."""
    unit = max(tpu.LANES // math.gcd(group, tpu.LANES), 16)

    def queries(block: int) -> int:
      return min(tpu.round_up(block, unit), tpu.round_up(t, unit))

    most_keys = max(power_of_two(s), tpu.LANES)
    return dataclasses.replace(
      self,
      block_q=queries(self.block_q),
      block_kv=min(self.block_kv, most_keys),
      block_q_bwd=queries(self.block_q_bwd),
      block_kv_bwd=min(self.block_kv_bwd, most_keys),
    )


def choose(p: Problem, a: Arrays) -> FlashAttentionConfig:
  """The caller's config, else the tuned one, else one that fits."""
  (_, t, n, h), (_, s, kv_heads, _) = a.q.shape, a.k.shape
  config, group = p.config, n // kv_heads
  if config is None:
    mask = "causal" if p.is_causal else "full"
    mask += "_window" if has_window(p, a) else ""
    mask += "" if a.segments is None else "_segments"
    mask = mask if a.mask is None else "array"
    found = tuned_config(
      "flash_attention",
      heads=n,
      kv_heads=kv_heads,
      head_size=h,
      length=power_of_two(max(t, s)),
      dtype=a.q.dtype.name,
      mask=mask,
    )
    config = FlashAttentionConfig(**found) if found else None
  config = config or _untuned(p, group, h, a.q.dtype)
  config = config.clipped(t, s, group)
  if a.bias is not None and p.config is None:
    config = _beside_bias(config, Sizes.of_problem(p, a))
  if a.mask is not None:  # no block has keys of two columns
    most = min(config.block_kv, MASK_KEYS), min(config.block_kv_bwd, MASK_KEYS)
    config = dataclasses.replace(config, block_kv=most[0], block_kv_bwd=most[1])
  return config


def _untuned(
  p: Problem, group: int, head_size: int, dtype: Any
) -> FlashAttentionConfig:
  """`fitting`, for what else is known of the problem."""
  config = FlashAttentionConfig.fitting(group, head_size, dtype)
  if group == 2 and head_size > tpu.LANES and dtype != jnp.float32:
    # A diagonal of square blocks is one block, and less of a program: with a
    # soft cap that of 1024 x 256 would not fit the instruction memory.
    config = dataclasses.replace(config, block_q_bwd=512, block_kv_bwd=512)
  if p.window is None:
    return config
  # Of a block of queries and the keys before it some are never seen: about as
  # many as a block is long.
  left, right = p.window
  width = power_of_two(left + 1 + (0 if p.is_causal else right))
  most_q, most_bwd = max(width // 2, 256), max(width // 4, 256)
  return dataclasses.replace(
    config,
    block_q=min(config.block_q, most_q),
    block_q_bwd=min(config.block_q_bwd, most_bwd),
    block_kv_bwd=min(config.block_kv_bwd, most_bwd),
  )


def _beside_bias(
  config: FlashAttentionConfig, x: Sizes
) -> FlashAttentionConfig:
  """Fewer queries to a step, if a bias to all keys would not fit else."""
  sums = {"": memory.forward_bytes, "_bwd": memory.backward_bytes}
  for end, bytes_of in sums.items():
    while True:
      fixed, per_key = bytes_of(config, x)
      half = getattr(config, f"block_q{end}") // 2
      fits = fixed + per_key * x.s <= memory.VMEM_BYTES
      if fits or half * x.group < 2 * tpu.LANES or half % 16:
        break
      config = dataclasses.replace(config, **{f"block_q{end}": half})
  return config


# --- calls --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
  """One kernel call: its part of a problem, and its tiles; all static.

  Attributes:
    problem: the whole.
    kv_heads: K.
    group: query heads per kv head, G.
    block_q: queries per grid step.
    block_kv: keys per step of the inner loop.
    softmax_rows: rows that go through the softmax together.
    first_q: index of its first query.
    t: how many queries it has.
    first_k: index of its first key.
    s: how many keys it has; the arrays of keys may be padded beyond.
    layout: how it finds them.
    mask: of a mask that is an array.
  """

  problem: Problem
  kv_heads: int
  group: int
  block_q: int
  block_kv: int
  softmax_rows: int
  first_q: int
  t: int
  first_k: int
  s: int
  layout: Layout
  mask: MaskShape | None = None

  @property
  def shift(self) -> int:
    """Position of the first key minus that of the first query."""
    return self.first_k - self.first_q - self.problem.query_offset

  @property
  def rows(self) -> int:
    """Per grid step."""
    return self.block_q * self.group

  @property
  def has_ragged_end(self) -> bool:
    """Whether the last block of queries hangs over the end."""
    return self.t % self.block_q != 0

  @property
  def has_diagonal(self) -> bool:
    """Whether a q block's last keys are those of its own indices.

    What a row sees of them does not depend on the block, and is cut out at
    compile time.
    """
    aligned = self.block_q % self.block_kv == 0 and self.shift == 0
    return self.problem.is_causal and aligned

  @property
  def key_unit(self) -> int:
    """What the arrays of keys are padded to a multiple of."""
    return self.block_q if self.has_diagonal else self.block_kv

  @property
  def padded_keys(self) -> int:
    """How many keys VMEM has place for."""
    return tpu.round_up(self.s, self.key_unit)

  @property
  def brings_own_keys(self) -> bool:
    """Whether every key is of the indices of a block of queries, and no block
    before needs it.
    """
    return self.has_diagonal and self.t >= self.s

  @property
  def sees_itself(self) -> bool:
    """Whether, but for segments, every query sees the key of its index."""
    aligned = self.shift == 0 and self.t <= self.s
    return aligned and not self.problem.is_partial and self.mask is None

  @property
  def queries(self) -> slice:
    """Its part of [..., T]."""
    return slice(self.first_q, self.first_q + self.t)

  @property
  def keys(self) -> slice:
    """Its part of [..., S]."""
    return slice(self.first_k, self.first_k + self.s)


def forward_call(p: Problem, x: Sizes) -> Call:
  """The whole problem as one call of the forward kernel."""
  block_q, block_kv = p.tiles.block_q, p.tiles.block_kv
  softmax_rows = math.gcd(block_q * x.group, p.tiles.rows)
  tiles = block_q, block_kv, softmax_rows
  call = Call(p, x.kv_heads, x.group, *tiles, *_whole(p, x))
  return _in_pairs(call, x, memory.forward_bytes)


def backward_call(p: Problem, x: Sizes) -> Call:
  """The whole problem as one call of the backward kernel."""
  block_q, block_kv = p.tiles.block_q_bwd, p.tiles.block_kv_bwd
  tiles = block_q, block_kv, block_q * x.group
  call = Call(p, x.kv_heads, x.group, *tiles, *_whole(p, x))
  return _in_pairs(call, x, memory.backward_bytes)


def _whole(p: Problem, x: Sizes) -> tuple[Any, ...]:
  """All queries and keys, and how they lie."""
  layout = Layout.of(p, x.kv_heads, x.group, x.head_size)
  return 0, x.t, 0, x.s, layout, x.mask


def _in_pairs(call: Call, x: Sizes, bytes_of: Any) -> Call:
  """The call by pairs of kv heads, if it can be had and holds all keys."""
  layout = call.layout.in_pairs(call.problem)
  # A copy ends between registers where these lie beside each other.
  whole = call.t % tpu.SUBLANES == 0 and call.s % tpu.SUBLANES == 0
  by_head = call.mask is not None and call.mask.by_head
  if by_head or call.problem.has_bias:
    return call
  if layout is None or not (whole or x.head_size == tpu.LANES):
    return call
  fixed, per_key = bytes_of(call.problem.tiles, _sizes(x, layout))
  fits = fixed + per_key * call.padded_keys <= memory.VMEM_BYTES
  return dataclasses.replace(call, layout=layout) if fits else call


def _sizes(x: Sizes, layout: Layout) -> Sizes:
  return dataclasses.replace(x, has_pairs=layout.kind == "pairs")


def forward_keys(call: Call, x: Sizes) -> int:
  """How many keys one call of the forward holds."""
  sums = memory.forward_bytes(call.problem.tiles, _sizes(x, call.layout))
  return _keys_that_fit("forward", sums, call)


def backward_keys(call: Call, x: Sizes) -> int:
  """How many keys one call of the backward holds."""
  sums = memory.backward_bytes(call.problem.tiles, _sizes(x, call.layout))
  return _keys_that_fit("backward", sums, call)


def _keys_that_fit(name: str, sums: tuple[int, int], call: Call) -> int:
  keys = memory.keys_that_fit(name, *sums, call.key_unit)
  if call.mask is None or keys >= call.s:
    return keys
  return memory.keys_that_fit(name, *sums, MASK_KEYS)


# --- the operands -------------------------------------------------------------


class Operands(NamedTuple):
  """q, k and v as a call takes them."""

  q: jax.Array
  k: jax.Array
  v: jax.Array


class Specs(NamedTuple):
  """Blocks of queries, of whole keys, and of lanes [B K, 1, rows]."""

  q: pl.BlockSpec
  k: pl.BlockSpec
  lanes: pl.BlockSpec


def operands(call: Call, a: Arrays) -> tuple[Operands, Specs]:
  """Of q [B, T, N, H], k and v [B, S, K, H]."""
  layout = call.layout
  k, v = (layout.of_keys(x) for x in (a.k, a.v))
  if layout.kind != "pairs":
    k, v = (padded(x, call) for x in (k, v))
  one_head = a.k.shape[0] * call.kv_heads == 1  # nothing to load ahead
  once = {"pipeline_mode": pl.Buffered(1)} if one_head else {}
  specs = Specs(
    layout.query_spec(call.block_q),
    layout.key_spec(k.shape[1], **once),
    layout.lane_spec(call.rows),
  )
  return Operands(layout.of_queries(a.q), k, v), specs


def padded(keys: jax.Array, call: Call) -> jax.Array:
  """Keys with zeros up to a whole number of blocks.

  They are masked, but must be numbers.
  """
  more = -keys.shape[1] % call.key_unit
  return jnp.pad(keys, ((0, 0), (0, more), (0, 0)))
