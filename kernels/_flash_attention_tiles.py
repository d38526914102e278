"""What both passes of flash attention share: rows, masks, and which keys.

The kernels see *rows*: the G = N / K query heads of a kv head lie side by side
under their token, row r = t G + g, so that q is [B K, T G, H] and one matmul
serves all heads.  For multi-query attention this is how [B, T, N, H] lies in
memory already.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ._sincos import sin_cos

LANES = 128
LOG2_E = math.log2(math.e)
# Hides a key.  Finite, so that a row that has seen no key yet stays a number:
# what it gathers is multiplied by exp2(MASKED - m) = 0 at its first key.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

# Of a v5e's 128 MiB; the compiler wants a little for itself.
VMEM_BYTES = 120 << 20

Window = tuple[int, int] | None
# Segment ids of queries [B, T] and keys [B, S], or nothing.
Ids = tuple[jax.Array, ...]
# Positions [B, T] and the timescale [H / 2] of each frequency, or nothing.
Turns = tuple[jax.Array, ...]

# --- the problem --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
  """Everything that is not an array, in one hashable piece.

  Attributes:
    t: number of queries T.
    s: number of keys S; the arrays of keys may be padded beyond.
    group: query heads per kv head, G.
    scale: multiplies the logits; positive.
    is_causal: query i sees keys up to i.
    window: (left, right), both inclusive, or None.
    soft_cap: cap of the logits, or None.
    segmented: whether segment ids come along.
    rotated: whether the kernels rotate q and k by positions that come along.
    shift: index of the first key minus index of the first query.
  """

  t: int
  s: int
  group: int
  scale: float
  is_causal: bool
  window: Window
  soft_cap: float | None
  segmented: bool
  rotated: bool = False
  shift: int = 0

  @property
  def unit(self) -> float:
    """What the kernels count logits in: the scale, or the soft cap.

    So logits are q . k itself, or its tanh, and differences of them are formed
    before any rounding of a product.
    """
    return self.scale if self.soft_cap is None else self.soft_cap

  @property
  def base2(self) -> float:
    """Takes differences of logits to exponents of 2."""
    return self.unit * LOG2_E

  @property
  def sees_itself(self) -> bool:
    """Whether every query sees the key of its own index at least."""
    return self.shift == 0 and self.t <= self.s and not self.segmented


# --- rows and keys ------------------------------------------------------------


def to_rows(x: jax.Array, kv_heads: int) -> jax.Array:
  """[B, T, N, H] to [B K, T G, H]; for one kv head and G = 8 or more, free."""
  b, t, n, h = x.shape
  x = x.reshape(b, t, kv_heads, n // kv_heads, h).swapaxes(1, 2)
  return x.reshape(b * kv_heads, t * (n // kv_heads), h)


def from_rows(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B K, T G, H] to shape [B, T, N, H]."""
  b, t, n, h = shape
  group = rows.shape[1] // t
  return rows.reshape(b, n // group, t, group, h).swapaxes(1, 2).reshape(shape)


def to_keys(x: jax.Array) -> jax.Array:
  """[B, S, K, H] to [B K, S, H]; for one kv head, free."""
  b, s, kv_heads, h = x.shape
  return x.swapaxes(1, 2).reshape(b * kv_heads, s, h)


def from_keys(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B K, S, H] to shape [B, S, K, H]."""
  b, s, kv_heads, h = shape
  return keys.reshape(b, kv_heads, s, h).swapaxes(1, 2)


def pad_keys(keys: jax.Array, unit: int) -> jax.Array:
  """Zeros up to a whole number of blocks; masked, but they must be numbers."""
  return jnp.pad(keys, ((0, 0), (0, -keys.shape[1] % unit), (0, 0)))


def lse_to_rows(lse: jax.Array, kv_heads: int) -> jax.Array:
  """[B, N, T] to [B K, 1, T G]."""
  b, n, t = lse.shape
  rows = lse.reshape(b * kv_heads, n // kv_heads, t).swapaxes(1, 2)
  return rows.reshape(b * kv_heads, 1, t * (n // kv_heads))


def lse_from_rows(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B K, 1, T G] to [B, N, T], given q's shape."""
  b, t, n, _ = shape
  return (
    rows.reshape(b, -1, t, rows.shape[2] // t).swapaxes(2, 3).reshape(b, n, t)
  )


# --- spans --------------------------------------------------------------------
# A call holds all its keys in VMEM.  More than fit are taken in spans, each
# with the queries that see it: the forward merges the spans' results by their
# lse, the backward adds up dq.


@dataclasses.dataclass(frozen=True)
class Span:
  """Keys that one call holds, the queries for them, and their problem."""

  keys: slice
  queries: slice
  problem: Problem

  @property
  def rows(self) -> slice:
    """Of the queries, in [B K, T G, H]."""
    group = self.problem.group
    return slice(self.queries.start * group, self.queries.stop * group)

  def ids(self, ids: Ids) -> Ids:
    """The segment ids of its queries and keys."""
    return ids and (ids[0][:, self.queries], ids[1][:, self.keys])


def spans_of(p: Problem, keys: int) -> list[Span]:
  """All keys, `keys` at a time."""
  spans = []
  for k0 in range(0, p.s, keys):
    k1, q0, q1 = min(k0 + keys, p.s), 0, p.t
    if p.is_causal:
      q0 = k0
    if p.window is not None:
      left, right = p.window
      q0, q1 = max(q0, k0 - right), min(q1, k1 + left)
    if q0 < q1:
      problem = dataclasses.replace(p, t=q1 - q0, s=k1 - k0, shift=k0 - q0)
      spans.append(Span(slice(k0, k1), slice(q0, q1), problem))
  return spans


def over_batch(function):
  """`function` of arrays [B, ...] that vmap maps by a larger B."""
  function = jax.custom_batching.custom_vmap(function)

  @function.def_vmap
  def rule(axis_size, in_batched, *args):
    def merged(x, batched):
      if not batched:
        x = jnp.broadcast_to(x, (axis_size, *x.shape))
      return x.reshape(-1, *x.shape[2:])

    outs = function(*jax.tree.map(merged, args, tuple(in_batched)))
    split = [x.reshape(axis_size, -1, *x.shape[1:]) for x in outs]
    return tuple(split), (True,) * len(split)

  return function


# --- which keys ---------------------------------------------------------------


def _least(a: Any, b: Any) -> Any:
  return (
    min(a, b)
    if isinstance(a, int) and isinstance(b, int)
    else jnp.minimum(a, b)
  )


def _most(a: Any, b: Any) -> Any:
  return (
    max(a, b)
    if isinstance(a, int) and isinstance(b, int)
    else jnp.maximum(a, b)
  )


def kv_blocks(
  p: Problem, q0: Any, block_q: int, block_kv: int
) -> tuple[Any, ...]:
  """Which kv blocks the queries q0 to q0 + block_q need, by position.

      first      full_first      full_last      last
        |  masked    |   all visible  |  masked   |

  Returns:
    Those four block indices; each region excludes its end.
  """
  low, high, full_low, full_high = 0, p.s, 0, p.s
  first_q, last_q = q0 - p.shift, q0 - p.shift + block_q - 1
  if p.is_causal:
    high, full_high = _least(high, last_q + 1), _least(full_high, first_q + 1)
  if p.window is not None:
    left, right = p.window
    low, full_low = _most(low, first_q - left), _most(full_low, last_q - left)
    high = _least(high, last_q + right + 1)
    full_high = _least(full_high, first_q + right + 1)
  log2 = block_kv.bit_length() - 1  # a shift, where Mosaic divides at length
  first = low >> log2
  last = _most((high + block_kv - 1) >> log2, first)
  full_first = _least((full_low + block_kv - 1) >> log2, last)
  full_last = _most(_least(full_high >> log2, last), full_first)
  return first, full_first, full_last, last


def has_diagonal(p: Problem, block_q: int, block_kv: int) -> bool:
  """Whether a q block's last keys are those of its own indices.

  What a row sees of them does not depend on the block, and is cut out at
  compile time.
  """
  return p.is_causal and block_q % block_kv == 0 and p.shift == 0


def key_unit(p: Problem, block_q: int, block_kv: int) -> int:
  """What the keys are padded to a multiple of."""
  return block_q if has_diagonal(p, block_q, block_kv) else block_kv


def for_blocks(
  p: Problem,
  bounds: Any,
  q0: Any,
  block_q: int,
  block_kv: int,
  attend: Callable[[Any, bool], None],
) -> None:
  """Calls attend(block, masked) for every kv block that block q0 needs.

  Those of the diagonal, if there is one, are left out.

  bounds: with segment ids, the first kv block and the end of those whose ids
  meet this q block's; all of them are masked.
  """
  first, full_first, full_last, last = kv_blocks(p, q0, block_q, block_kv)
  if has_diagonal(p, block_q, block_kv):
    last = _least(q0 >> (block_kv.bit_length() - 1), -(-p.s // block_kv))
    full_last = _least(last, p.s // block_kv) if p.t > p.s else last
    full_first = _least(full_first, full_last)

  def loop(low: Any, high: Any, masked: bool) -> None:
    jax.lax.fori_loop(low, high, lambda i, _: attend(i, masked), None)

  if bounds is not None:
    loop(_most(first, bounds[0]), _least(last, bounds[1]), True)
    return
  if p.window is not None:
    loop(first, full_first, True)
  # Two at a time: the matrix unit starts on one while the vector unit ends the
  # other.
  pairs = (full_last - full_first) >> 1

  def pair(i: Any, _: None) -> None:
    attend(full_first + 2 * i, False)
    attend(full_first + 2 * i + 1, False)

  jax.lax.fori_loop(0, pairs, pair, None)
  loop(full_first + 2 * pairs, full_last, False)
  if last is not full_last:
    loop(full_last, last, True)


def visible(
  p: Problem,
  shape: tuple[int, ...],
  row_axis: int,
  row0: Any,
  key0: Any,
  q0: Any,
  ids: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
  """The mask of rows row0, ... after query q0 against keys key0, ...

  A row's query is its index over G; multiplying the key's index by G instead
  spares a division.
  """
  row = row0 + jax.lax.broadcasted_iota(jnp.int32, shape, row_axis)
  key = key0 + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - row_axis)
  ahead = key + (p.shift - q0)  # of the block's first query
  mask = key < p.s
  if p.is_causal:
    mask &= ahead * p.group <= row
  if p.window is not None:
    left, right = p.window
    mask &= row < (ahead + (left + 1)) * p.group
    mask &= (ahead - right) * p.group <= row
  if ids is not None:
    row_ids, key_ids = ids
    mask &= (row_ids == key_ids) & (key_ids != 0)
  return mask


# --- in the kernels -----------------------------------------------------------


def taker(refs: Any) -> Callable[..., list[Any]]:
  """take(n, wanted): the next n refs, or n times None if they are not there."""
  supply = iter(refs)

  def take(n: int, wanted: bool = True) -> list[Any]:
    return [next(supply) if wanted else None for _ in range(n)]

  return take


def dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
  """Contracts dimension a_dim of a with b_dim of b, in float32."""
  exact = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((a_dim,), (b_dim,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )


def raw_logits(p: Problem, s: jax.Array) -> jax.Array:
  """q . k to the logits in units of `Problem.unit`."""
  return s if p.soft_cap is None else jnp.tanh(s * (p.scale / p.soft_cap))


def as_column(lanes: jax.Array) -> jax.Array:
  """[1, R] to [R, LANES], equal in all lanes."""
  return jnp.concatenate(
    [
      jnp.broadcast_to(lanes[:, r : r + LANES], (LANES, LANES)).T
      for r in range(0, lanes.shape[1], LANES)
    ]
  )


def to_lanes(columns: Sequence[jax.Array]) -> jax.Array:
  """Arrays [LANES, LANES], each equal in all lanes, to the rows of one.

  They share a transposition, each in a lane of its own.
  """
  lane = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
  rows = []
  for start in range(0, len(columns), LANES):
    merged, *others = columns[start : start + LANES]
    for i, column in enumerate(others, 1):
      merged = jnp.where(lane == i, column, merged)
    rows.append(merged.T[: 1 + len(others)])
  return jnp.concatenate(rows)


def store_lanes(ref: Any, rows: jax.Array) -> None:
  """[n, LANES] into a ref [1, n LANES]."""
  for i in range(rows.shape[0]):
    ref[:, pl.ds(i * LANES, LANES)] = rows[i : i + 1]


def wide(x: jax.Array, width: int) -> jax.Array:
  """[rows, LANES], equal in all lanes, at another width."""
  if width % LANES == 0:
    return jnp.tile(x, (1, width // LANES))
  return jnp.broadcast_to(x[:, :1], (x.shape[0], width))


def key_ids(k_ids_ref: Any, key0: Any, width: int) -> jax.Array:
  """[1, width] from ids [S / LANES, 1, LANES]."""
  first = key0 >> (LANES.bit_length() - 1)
  return jnp.concatenate(
    [k_ids_ref[first + i] for i in range(width // LANES)], axis=1
  )


def phases(
  positions_ref: Any, timescale_ref: Any
) -> tuple[jax.Array, jax.Array]:
  """sin and cos [block_q, H / 2] of positions [1, block_q]."""
  lanes = timescale_ref.shape[1]
  positions = wide(as_column(positions_ref[...]), lanes).astype(jnp.float32)
  angle = positions / timescale_ref[...]
  return sin_cos(angle)


def turned(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Rotates rows [tokens times heads, H] by sin and cos [tokens, H / 2]."""
  tokens, half = sin.shape
  heads = x.shape[0] // tokens
  if heads > 1:
    sin, cos = (
      jnp.broadcast_to(y[:, None, :], (tokens, heads, half)).reshape(-1, half)
      for y in (sin, cos)
    )
  first = x[:, :half].astype(jnp.float32)
  second = x[:, half:].astype(jnp.float32)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=1).astype(x.dtype)


# --- operands -----------------------------------------------------------------


def tiles(bk: int, rows: int, keys: int, h: int) -> tuple[pl.BlockSpec, ...]:
  """Specs of [BK, T G, H], of [BK, S, H] kept whole, and of [BK, 1, T G]."""
  once = pl.Buffered(1) if bk == 1 else None  # nothing to load ahead
  return (
    pl.BlockSpec((None, rows, h), lambda b, i, *_: (b, i, 0)),
    pl.BlockSpec(
      (None, keys, h), lambda b, i, *_: (b, 0, 0), pipeline_mode=once
    ),
    pl.BlockSpec((None, 1, rows), lambda b, i, *_: (b, 0, i)),
  )


def segment_operands(
  p: Problem, block_q: int, block_kv: int, bk: int, ids: Ids
) -> tuple[list[jax.Array], list[jax.Array], list[pl.BlockSpec]]:
  """What a kernel needs of segment ids [B, T] and [B, S].

  Returns:
    Scalars: for every batch element and q block, the first kv block whose ids
    meet its own, and the end; then row ids and key ids with their specs.
  """
  if not ids:
    return [], [], []
  q_ids, k_ids = ids
  batch, s = k_ids.shape
  unit = key_unit(p, block_q, block_kv)
  heads = bk // batch
  padded = pl.cdiv(s, unit) * unit
  k_ids = jnp.pad(k_ids, ((0, 0), (0, padded - s)))
  t_padded = pl.cdiv(p.t, block_q) * block_q
  low_q, high_q = _id_range(
    jnp.pad(q_ids, ((0, 0), (0, t_padded - p.t))), block_q
  )
  low_k, high_k = _id_range(k_ids, block_kv)
  meet = (low_q[:, :, None] <= high_k[:, None, :]) & (
    low_k[:, None, :] <= high_q[:, :, None]
  )
  first = jnp.argmax(meet, axis=2)
  end = meet.shape[2] - jnp.argmax(meet[:, :, ::-1], axis=2)
  end = jnp.where(meet.any(axis=2), end, 0)
  bounds = jnp.stack([first, end], axis=-1).astype(jnp.int32).reshape(-1)
  blocks = padded // LANES
  row_spec = pl.BlockSpec(
    (None, 1, block_q * p.group), lambda b, i, *_: (jax.lax.div(b, heads), 0, i)
  )
  key_spec = pl.BlockSpec(
    (None, blocks, 1, LANES),
    lambda b, i, *_: (jax.lax.div(b, heads), 0, 0, 0),
  )
  row_ids = jnp.repeat(q_ids, p.group, axis=1)[:, None, :]
  ids_of_keys = k_ids.reshape(batch, blocks, 1, LANES)
  return [bounds], [row_ids, ids_of_keys], [row_spec, key_spec]


def _id_range(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
  """Least and greatest id of every block, padding aside; an empty range if
  there is nothing else."""
  ids = ids.reshape(ids.shape[0], -1, block)
  top = jnp.iinfo(jnp.int32).max
  low = jnp.min(jnp.where(ids == 0, top, ids), axis=2)
  return low, jnp.max(jnp.where(ids == 0, -top, ids), axis=2)


def rope_operands(
  turns: Turns, block_q: int, bk: int
) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
  """What a kernel needs to rotate, with its specs."""
  if not turns:
    return [], []
  positions, timescale = turns
  heads = bk // positions.shape[0]
  return [positions[:, None, :], timescale[None, :]], [
    pl.BlockSpec(
      (None, 1, block_q), lambda b, i, *_: (jax.lax.div(b, heads), 0, i)
    ),
    pl.BlockSpec((1, timescale.shape[0]), lambda b, i, *_: (0, 0)),
  ]
