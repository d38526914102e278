"""A mask given as an array, which no arithmetic on positions can replace.

Of the blocks that a pass works on, those that hide everything are not visited,
and those that hide nothing are computed without a mask.  Of the others the mask
is read in words: a word has a bit for a key of each of 32 registers' lanes,

    bit j of words[c, t, l]   whether query t sees key 4096 c + 128 j + l

so that 128 keys of a query are a bit of 128 lanes, and nothing has to be moved
to take them apart.  It takes T S / 8 bytes, once for all heads that share it.
Which blocks are which is found once for both passes, of the words.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .._frame.manual import varying_like
from . import reference
from .layout import Layout
from .memory import MASK_KEYS
from .positions import visible_pairs
from .spec import Arrays, Problem
from .tiles import Call

# Of bytes a register has 32 rows.  A block of the mask is of so many bytes.
_TOKENS = 32
_PACKED_BYTES = 2 << 20

# --- before the kernels -------------------------------------------------------


class Masks(NamedTuple):
  """What the kernels read of a mask; P is B, or 1 for the whole batch, times K
  if heads have masks of their own.
  """

  words: Any  # [P, S / 4096, T, LANES] int32; of heads, G rows for each query
  forward: Any  # [P, n_q, n_kv] int32, 0 for an empty block, 1, or 2 for a full
  backward: Any  # the same of the backward's blocks


def folded(p: Problem, a: Arrays) -> tuple[Problem, Arrays]:
  """One mask for all that hides keys."""
  if a.mask is None:
    return p, a
  if p.query_offset or a.window is not None or a.segments is not None:
    mask = reference.visible(p, a)
  else:
    q_index, k_index = (jnp.arange(x.shape[1]) for x in (a.q, a.k))
    seen = visible_pairs(q_index, k_index, p.is_causal, p.window)
    mask = a.mask & seen
  a = a._replace(mask=mask, window=None, segments=None)
  p = dataclasses.replace(p, is_causal=False, window=None, query_offset=0)
  return p, a


def prepared(p: Problem, a: Arrays) -> Arrays:
  """With what the kernels read of a mask, for the tiles of the problem."""
  if a.mask is None:
    return a
  layout = Layout.of_shapes(p, a.q.shape, a.k.shape)
  parts, heads, t, s = a.mask.shape
  words = _words(a.mask.reshape(parts * heads, t, s))
  columns = words.shape[1]
  group = heads // layout.kv_heads if heads > 1 else 1
  by_kv_head = words.reshape(-1, group, columns, t, tpu.LANES)
  kinds = [
    _kinds(by_kv_head, s, block_q, block_kv)
    for block_q, block_kv in (
      (p.tiles.block_q, p.tiles.block_kv),
      (p.tiles.block_q_bwd, p.tiles.block_kv_bwd),
    )
  ]
  if heads > 1:
    by_head = words.reshape(parts, heads, columns, t, tpu.LANES)
    by_row = layout.of_rows(by_head.transpose(0, 1, 3, 2, 4))
    words = by_row.swapaxes(1, 2)
  return a._replace(masks=Masks(words, *kinds))


class Mask(NamedTuple):
  """Ref, in `_pack`."""

  mask: Any  # [tokens, S] 0 or 1 in bytes


class Words(NamedTuple):
  """Ref, in `_pack`."""

  words: Any  # [S / 4096, tokens, LANES] int32


def _pack(i: Mask, o: Words) -> None:
  """Bytes of eight keys are one by shifts of whole words, of four queries."""
  planes = i.mask.shape[1] // tpu.LANES
  for column in range(o.words.shape[0]):
    word = jnp.zeros(o.words.shape[1:], jnp.int32)
    for first in range(32 * column, min(32 * column + 32, planes), 8):
      octet = jnp.zeros((o.words.shape[1] // 4, tpu.LANES), jnp.int32)
      for n in range(first, min(first + 8, planes)):
        lanes = i.mask[:, pl.ds(n * tpu.LANES, tpu.LANES)]
        octet |= pltpu.bitcast(lanes, jnp.int32) << (n - first)
      of_byte = pltpu.bitcast(octet, jnp.uint8).astype(jnp.int32)
      word |= of_byte << (first % 32)
    o.words[column] = word


def _words(mask: jax.Array) -> jax.Array:
  """[P, T, S] booleans as words [P, S / 4096, T, LANES]."""
  parts, t, s = mask.shape
  ends = (-t % _TOKENS, -s % tpu.LANES)
  mask = jnp.pad(mask, [(0, 0), *[(0, end) for end in ends]]).astype(jnp.uint8)
  _, tokens, keys = mask.shape
  columns = pl.cdiv(keys, MASK_KEYS)
  block = _TOKENS
  while tokens % (2 * block) == 0 and 2 * block * keys <= _PACKED_BYTES:
    block *= 2
  of_words = pl.BlockSpec(
    (None, columns, block, tpu.LANES), lambda p, i: (p, 0, i, 0)
  )
  (packed,) = pl.pallas_call(
    _pack,
    name="flash_attention_mask",
    grid=(parts, tokens // block),
    in_specs=[Mask(pl.BlockSpec((None, block, keys), lambda p, i: (p, i, 0)))],
    out_specs=[Words(of_words)],
    out_shape=[
      Words(varying_like(mask, (parts, columns, tokens, tpu.LANES), jnp.int32))
    ],
    # Of the rest XLA may take room for the bytes, which then miss HBM.
    compiler_params=tpu.compiler_params(8 * _PACKED_BYTES),
  )(Mask(mask))
  return packed.words[:, :, :t]


def _kinds(words: jax.Array, s: int, block_q: int, block_kv: int) -> jax.Array:
  """Of every block of words [P, G, S / 4096, T, LANES]: [P, n_q, n_kv]."""
  parts, _, columns, t, _ = words.shape
  ends = -t % block_q

  def over_queries(fill: np.int32, reduce: Any) -> jax.Array:
    x = jnp.pad(words, [(0, 0)] * 3 + [(0, ends), (0, 0)], constant_values=fill)
    x = x.reshape(*x.shape[:3], -1, block_q, tpu.LANES)
    x = jax.lax.reduce(x, fill, reduce, (1, 4, 5))  # [P, columns, n_q]
    planes = jnp.arange(32, dtype=jnp.int32)
    bits = jax.lax.shift_right_logical(
      *jnp.broadcast_arrays(x[..., None], planes)
    ) & np.int32(1)
    bits = bits.swapaxes(1, 2).reshape(parts, -1, columns * 32)
    return bits.reshape(*bits.shape[:2], -1, block_kv // tpu.LANES) > 0

  some = over_queries(np.int32(0), jax.lax.bitwise_or).any(axis=3)
  every = over_queries(np.int32(-1), jax.lax.bitwise_and).all(axis=3)
  kinds = some.astype(jnp.int32) + every.astype(jnp.int32)
  return kinds[..., : pl.cdiv(s, block_kv)]


# --- as operands --------------------------------------------------------------


def plan_of(call: Call, kinds: jax.Array | None) -> jax.Array | None:
  """For each block of queries the blocks of keys to visit, the full ones first.

  Of kinds [P, n_q, n_kv]: how many are full, how many there are, and their
  indices; [P n_q (2 + n_kv)] int32.  None without a mask.
  """
  if kinds is None:
    return None
  first = call.first_k // call.block_kv
  kinds = kinds[..., first : first + pl.cdiv(call.s, call.block_kv)]
  order = jnp.argsort(2 - kinds, axis=-1, stable=True).astype(jnp.int32)
  full = (kinds == 2).sum(axis=-1, keepdims=True, dtype=jnp.int32)
  visited = (kinds > 0).sum(axis=-1, keepdims=True, dtype=jnp.int32)
  return jnp.concatenate([full, visited, order], axis=-1).reshape(-1)


def operands_of(call: Call, masks: Masks | None) -> tuple[Any, Any]:
  """The words and their block spec; None without a mask."""
  if masks is None:
    return None, None
  columns = pl.cdiv(call.s, MASK_KEYS)
  first = call.first_k // MASK_KEYS
  words = masks.words[:, first : first + columns]
  block = (None, columns, mask_rows(call), tpu.LANES)
  return words, pl.BlockSpec(
    block, lambda b, i, *_: (part_of(call, b), 0, i, 0)
  )


def part_of(call: Call, group: Any) -> Any:
  """Which of the P parts a kv head, or pair of them, of the grid reads."""
  assert call.mask is not None
  batch = call.layout.batch(group)
  if call.mask.repeats > 1:
    batch = jax.lax.div(batch, call.mask.repeats)
  if not call.mask.by_head:
    return batch
  return batch * call.kv_heads + jax.lax.rem(group, call.kv_heads)


def mask_rows(call: Call) -> int:
  """Rows of words for a block of queries."""
  assert call.mask is not None
  return call.rows if call.mask.by_head else call.block_q


# --- in a kernel --------------------------------------------------------------


def by_rows(call: Call, words: Any, key0: Any, start: int, size: int) -> Any:
  """Of rows `start` to `start + size` of a block: words [size, LANES] whose
  lowest bits are those of the keys from key0 on.
  """
  assert call.mask is not None
  column = words.at[jax.lax.div(key0, MASK_KEYS)]
  if call.mask.by_head:
    return _shifted(column[pl.ds(start, size), :], key0)
  layout, group = call.layout, call.group
  if layout.is_by_token and start % group == 0 == size % group:
    tokens = column[pl.ds(start // group, size // group), :]
    return layout.by_row(_shifted(tokens, key0))
  return layout.by_row(_shifted(column[...], key0))[start : start + size]


def _shifted(words: jax.Array, key0: Any) -> jax.Array:
  return words >> (jax.lax.div(key0, tpu.LANES) & 31)


def _bit(n: int) -> np.int32:
  return np.uint32(1 << n).astype(np.int32)


def visible(words: jax.Array, width: int, axis: int) -> jax.Array:
  """The mask of `width` keys along an axis, of their words' lowest bits."""
  planes = [(words & _bit(n)) != 0 for n in range(width // tpu.LANES)]
  return planes[0] if len(planes) == 1 else jnp.concatenate(planes, axis=axis)


class Scratch(NamedTuple):
  """Of the backward, whose rows are in lanes."""

  words: Any  # [LANES, R], of one column
  column: Any  # [1] in SMEM: which; -1 for none


def scratch(call: Call) -> Scratch:
  """What to ask the compiler for."""
  words = pltpu.VMEM((tpu.LANES, call.rows), jnp.int32)
  return Scratch(words, pltpu.SMEM((1,), jnp.int32))


def load_column(call: Call, words: Any, key0: Any, s: Scratch) -> None:
  """Has the words of the keys at key0 in scratch, if they are not there."""
  column = jax.lax.div(key0, MASK_KEYS)

  @pl.when(s.column[0] != column)
  def _():
    rows = by_rows(call, words, column * MASK_KEYS, 0, call.rows)
    for r in range(0, call.rows, tpu.LANES):
      s.words[:, pl.ds(r, tpu.LANES)] = rows[r : r + tpu.LANES].T
    s.column[0] = column


def column_at(ref: Any, key0: Any) -> jax.Array:
  """What `load_column` has loaded, the bits of the keys at key0 lowest."""
  return _shifted(ref[...], key0)
