"""Forward pass of flash attention, and what both passes share.

The kernels see *rows*: the G = N / K query heads of a kv head lie side by side
under their token, row r = t G + g, so that q is [B K, T G, H] and one matmul
serves all heads.  For multi-query attention this is how [B, T, N, H] lies
in memory already.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._sharding import like

LANES = 128
LOG2_E = math.log2(math.e)
# Hides a key.  Finite, so that a row that has seen no key yet stays a number:
# what it gathers is multiplied by exp2(MASKED - m) = 0 at its first key.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

# Of a v5e's 128 MiB; the compiler wants a little for itself.
VMEM_BYTES = 120 << 20

Window = tuple[int, int] | None
# Segment ids of queries [B, T] and keys [B, S], or nothing.
Ids = tuple[jax.Array, jax.Array] | tuple[()]
# Positions [B, T] and the timescale [H / 2] of each frequency, or nothing.
Turns = tuple[jax.Array, jax.Array] | tuple[()]

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


def visible(
  p: Problem,
  shape: tuple[int, int],
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


def taker(refs: Any) -> Callable[..., list[Any]]:
  """take(n, wanted): the next n refs, or n times None if they are not there."""
  supply = iter(refs)

  def take(n: int, wanted: bool = True) -> list[Any]:
    return [next(supply) if wanted else None for _ in range(n)]

  return take


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


def as_lanes(column: jax.Array) -> jax.Array:
  """[R, LANES], equal in all lanes, to [1, R]."""
  return jnp.concatenate(
    [column[r : r + LANES].T[:1] for r in range(0, column.shape[0], LANES)],
    axis=1,
  )


def wide(x: jax.Array, width: int) -> jax.Array:
  """[rows, LANES], equal in all lanes, at another width."""
  if width % LANES == 0:
    return jnp.tile(x, (1, width // LANES))
  return jnp.broadcast_to(x[:, :1], (x.shape[0], width))


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
  loop(full_first, full_last, False)
  if last is not full_last:
    loop(full_last, last, True)


# --- forward ------------------------------------------------------------------


def _kernel(
  *refs,
  p: Problem,
  block_kv: int,
  group_rows: int,
  kv_heads: int,
):
  """Refs, in order:

  bounds [2 B n_q] in SMEM: see `for_blocks`      with segment ids
  q [R, H], k [S, H], v [S, H]
  q_ids [1, R], k_ids [S / LANES, 1, LANES]       with segment ids
  positions [1, block_q], timescale [1, H / 2]    with RoPE
  o [R, H], lse [1, R]: outputs
  m [R, LANES]: running maximum of the logits
  l [R, LANES]: running sum, by lane
  acc [R, H] float32
  ids [R, LANES]                                  with segment ids
  q [R, H], k [S, H]: rotated                     with RoPE

  The diagonal's keys have the q block's own positions: they are rotated with
  its queries, and those before them have been.
  """
  take = taker(refs)
  (bounds_ref,) = take(1, p.segmented)
  q_ref, k_ref, v_ref = take(3)
  q_ids_ref, k_ids_ref = take(2, p.segmented)
  positions_ref, timescale_ref = take(2, p.rotated)
  o_ref, lse_ref, m_ref, l_ref, acc_ref = take(5)
  (ids_ref,) = take(1, p.segmented)
  q_turned_ref, k_turned_ref = take(2, p.rotated)
  rows = q_ref.shape[0]
  block_q = rows // p.group
  b, i = pl.program_id(0), pl.program_id(1)
  q0 = i * block_q
  groups = [pl.ds(r, group_rows) for r in range(0, rows, group_rows)]
  bounds = None
  if p.segmented:
    ids_ref[...] = as_column(q_ids_ref[...])
    place = 2 * (jax.lax.div(b, kv_heads) * pl.num_programs(1) + i)
    bounds = bounds_ref[place], bounds_ref[place + 1]
  if p.rotated:
    sin, cos = phases(positions_ref, timescale_ref)
    here = pl.ds(pl.multiple_of(q0, block_q), block_q)
    q_turned_ref[...] = turned(q_ref[...], sin, cos)
    k_turned_ref[here, :] = turned(k_ref[here, :], sin, cos)
    q_ref, k_ref = q_turned_ref, k_turned_ref

  def attend(key0: Any, widths: list[int], masked: bool, first: bool) -> None:
    """Each group of rows sees as many keys from key0 on as its width says."""
    # All groups' products before any softmax: the matrix unit works on one
    # group while the vector unit works on another.
    products = [
      dot(q_ref[g, :], k_ref[pl.ds(key0, width), :], 1, 1)
      for g, width in zip(groups, widths, strict=True)
    ]
    for g, s in zip(groups, products, strict=True):
      width = s.shape[1]
      v = v_ref[pl.ds(key0, width), :]
      s = raw_logits(p, s)
      if masked:
        ids = None
        if p.segmented:
          ids = wide(ids_ref[g, :], width), key_ids(k_ids_ref, key0, width)
        mask = visible(p, s.shape, 0, g.start, key0, q0, ids)
        s = jnp.where(mask, s, MASKED)
      m = jnp.broadcast_to(
        jnp.max(s, axis=1, keepdims=True), (s.shape[0], LANES)
      )
      if not first:
        m_old = m_ref[g, :]
        m = jnp.maximum(m_old, m)
      m_ref[g, :] = m
      weights = jnp.exp2((s - wide(m, width)) * p.base2)
      total = sum(weights[:, c : c + LANES] for c in range(0, width, LANES))
      out = dot(weights.astype(v.dtype), v, 1, 0)
      if not first:
        alpha = jnp.exp2((m_old - m) * p.base2)
        total += alpha * l_ref[g, :]
        out += wide(alpha, out.shape[1]) * acc_ref[g, :]
      l_ref[g, :] = total
      acc_ref[g, :] = out

  def start() -> None:
    m_ref[...] = jnp.full_like(m_ref, MASKED)
    l_ref[...] = jnp.zeros_like(l_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  def start_on_diagonal() -> None:
    # Up to each group's last query, in whole registers.
    ends = [-(-(g.start + g.size) // p.group) for g in groups]
    widths = [-(-end // LANES) * LANES for end in ends]
    attend(pl.multiple_of(q0, block_q), widths, True, True)

  if not has_diagonal(p, block_q, block_kv):
    start()
  elif p.t <= p.s:
    start_on_diagonal()
  else:
    pl.when(q0 < p.s)(start_on_diagonal)
    pl.when(q0 >= p.s)(start)

  def attend_block(block: Any, masked: bool) -> None:
    key0 = pl.multiple_of(block * block_kv, block_kv)
    attend(key0, [block_kv] * len(groups), masked, False)

  for_blocks(p, bounds, q0, block_q, block_kv, attend_block)

  for g in groups:
    m = as_lanes(m_ref[g, :])
    total = jnp.sum(l_ref[g, :], axis=1, keepdims=True)
    inverse = _reciprocal(total, o_ref.dtype)
    total = as_lanes(jnp.broadcast_to(total, (g.size, LANES)))
    lse = m + jnp.log2(total) * (1 / p.base2)
    if not p.sees_itself:
      # A row that has seen nothing.
      inverse = jnp.where(m_ref[g, :1] > MASKED / 2, inverse, 0.0)
      lse = jnp.where(m > MASKED / 2, lse, -jnp.inf)
    o_ref[g, :] = (acc_ref[g, :] * inverse).astype(o_ref.dtype)
    lse_ref[:, g] = lse


def phases(
  positions_ref: Any, timescale_ref: Any
) -> tuple[jax.Array, jax.Array]:
  """sin and cos [block_q, H / 2] of positions [1, block_q]."""
  lanes = timescale_ref.shape[1]
  positions = wide(as_column(positions_ref[...]), lanes).astype(jnp.float32)
  angle = positions / timescale_ref[...]
  return jnp.sin(angle), jnp.cos(angle)


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


def _reciprocal(x: jax.Array, dtype: Any) -> jax.Array:
  """1 / x, well within dtype's precision."""
  if dtype == jnp.float32:
    return 1.0 / x
  guess = pltpu.reciprocal(x, approx=True)
  return guess * (2.0 - x * guess)


def key_ids(k_ids_ref: Any, key0: Any, width: int) -> jax.Array:
  """[1, width] from ids [S / LANES, 1, LANES]."""
  first = key0 >> (LANES.bit_length() - 1)
  return jnp.concatenate(
    [k_ids_ref[first + i] for i in range(width // LANES)], axis=1
  )


def flash_fwd(
  p: Problem,
  config: Any,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  ids: Ids,
  turns: Turns = (),
  out_dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """out [BK, T G, H], and lse [BK, 1, T G] in `Problem.unit`s."""
  bk, tg, h = q.shape
  rows = config.block_q * p.group
  tile, whole, lane = tiles(bk, rows, k.shape[1], h)
  scalars, id_args, id_specs, id_scratch = [], [], [], []
  if p.segmented:
    scalars, id_args, id_specs = segment_operands(
      p, config.block_q, config.block_kv, bk, ids
    )
    id_scratch = [pltpu.VMEM((rows, LANES), jnp.int32)]
  turn_args, turn_specs = rope_operands(turns, config.block_q, bk)
  turn_scratch = [
    pltpu.VMEM((rows, h), q.dtype),
    pltpu.VMEM(k.shape[1:], k.dtype),
  ] * p.rotated
  kernel = functools.partial(
    _kernel,
    p=p,
    block_kv=config.block_kv,
    group_rows=math.gcd(rows, config.rows),
    kv_heads=bk // ids[0].shape[0] if ids else 1,
  )
  return pl.pallas_call(
    kernel,
    name="flash_attention_fwd",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(bk, pl.cdiv(tg, rows)),
      in_specs=[tile, whole, whole, *id_specs, *turn_specs],
      out_specs=[tile, lane],
      scratch_shapes=[
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, h), jnp.float32),
        *id_scratch,
        *turn_scratch,
      ],
    ),
    out_shape=[
      like(q.shape, out_dtype or q.dtype, q),
      like((bk, 1, tg), jnp.float32, q),
    ],
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
  )(*scalars, q, k, v, *id_args, *turn_args)


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


def _id_range(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
  """Least and greatest id of every block, padding aside; an empty range if
  there is nothing else."""
  ids = ids.reshape(ids.shape[0], -1, block)
  top = jnp.iinfo(jnp.int32).max
  low = jnp.min(jnp.where(ids == 0, top, ids), axis=2)
  return low, jnp.max(jnp.where(ids == 0, -top, ids), axis=2)
