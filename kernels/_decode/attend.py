"""Page 7: a block of queries meets a block of keys.

An int8 cache is converted: exactly, as bfloat16 has eight bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._attention.softmax import MASKED, row_maximum, sum_by_lane
from .._frame import tpu
from .stream import CacheRefs, Step
from .tiles import Call


class Rows(NamedTuple):
  """Scratch: the online softmax of the R rows of a block of queries."""

  m: Any  # [R, LANES] maximum of the logits so far, equal in all lanes
  total: Any  # [R, LANES] sum of the weights so far, a part in every lane
  acc: Any  # [R, H] sum of the weighted values so far
  coming: Any  # [G, block] products of the next G rows and keys


class Keys(NamedTuple):
  """Refs of blocks of the cache."""

  slots: CacheRefs
  others: Any  # [R, block] MASKED where a key is of another head; or None
  turned: bool  # whether a block of keys is [H, block], not [block, H]


def rows_types(call: Call) -> Rows:
  """What to ask the compiler for."""
  by_row = pltpu.VMEM((call.rows, tpu.LANES), jnp.float32)
  return Rows(
    m=by_row,
    total=by_row,
    acc=pltpu.VMEM((call.rows, call.head_size), jnp.float32),
    coming=pltpu.VMEM((call.softmax_rows, call.block_rows), jnp.float32),
  )


class After(NamedTuple):
  """What the product of rows and keys that comes next is of."""

  q: Any  # ref of the queries: the first group of them
  slot: Any


def begin(call: Call, q: Any, keys: Keys, slot: Any, s: Rows) -> None:
  """The product with the first block of keys, in a slot."""
  s.coming[...] = _product(q, keys, slot, pl.ds(0, call.softmax_rows))


def clear(s: Rows) -> None:
  """No key seen."""
  s.m[...] = jnp.full_like(s.m, MASKED)
  s.total[...] = jnp.zeros_like(s.total)
  s.acc[...] = jnp.zeros_like(s.acc)


def _product(q: Any, keys: Keys, slot: Any, rows: Any) -> jax.Array:
  """Of some rows and the keys of a slot."""
  k = _converted(keys.slots.k[slot], q.dtype)
  return tpu.dot(q[rows, :], k, tpu.NN if keys.turned else tpu.NT)


def _converted(x: jax.Array, dtype: Any) -> jax.Array:
  return x.astype(jnp.float32).astype(dtype) if x.dtype == jnp.int8 else x


# --- which keys ---------------------------------------------------------------


def others(call: Call) -> jax.Array:
  """What hides the keys of other kv heads than a row's own."""
  shape = call.rows, call.block_rows
  row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  key = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  head = row - _divided(row, call.heads) * call.heads
  own = _divided(head, call.heads // call.kv_heads)
  of_key = key - _divided(key, call.kv_heads) * call.kv_heads
  return jnp.where(own == of_key, 0.0, MASKED)


def _divided(x: jax.Array, by: int) -> jax.Array:
  """x // by, of numbers from 0 to 2^22: a vector unit does not divide whole."""
  if by & (by - 1) == 0:
    return x >> (by.bit_length() - 1)
  return ((x.astype(jnp.float32) + 0.5) * (1 / by)).astype(jnp.int32)


class Tile(NamedTuple):
  """A block of keys that the rows of a step meet."""

  call: Call
  step: Step
  block: Any
  slot: Any
  scale: Any  # the traced one, or None

  @property
  def key0(self) -> Any:
    """Position of its first key."""
    return self.block * self.call.block_kv

  def is_valid(self, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Whether a key, by its place along an axis, is and was copied."""
    k, row = (
      self.call.kv_heads,
      jax.lax.broadcasted_iota(jnp.int32, shape, axis),
    )
    valid = row < (self.step.high - self.key0) * k
    if self.step.left is not None:
      valid &= row >= (self.step.low - self.key0) * k
    return valid

  def is_visible(self, shape: tuple[int, ...], row0: int) -> jax.Array:
    """Whether rows, from row0 on, see its keys."""
    call, step = self.call, self.step
    row = row0 + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    # How far a key is ahead of the first query; a row's query, from it on, is
    # its index over N, which is spared.
    ahead = _divided(key, call.kv_heads) + (self.key0 - step.q0)
    visible = (ahead * call.heads <= row) & self.is_valid(shape, 1)
    if step.left is not None:
      visible &= row < (ahead + (step.left + 1)) * call.heads
    return visible


def to_keys(
  tile: Tile,
  q: Any,
  keys: Keys,
  s: Rows,
  following: After | None,
  *,
  masked: bool,
) -> None:
  """The online softmax over a block of keys.

  m'   = max(m, max_j s_j),    w_j = 2^(s_j - m'),    a = 2^(m - m')
  sum' = a sum + sum_j w_j
  acc' = a acc + sum_j w_j v_j

  Products come one group of rows ahead, past the end of the block: the matrix
  unit works on one group while the vector unit works on another.

  Args:
    tile: the block.
    q: ref of the queries.
    keys: refs of the blocks.
    s: the state; its `coming` has the products of the first group.
    following: what comes next, or None.
    masked: whether some of its keys may be hidden.
  """
  call, p = tile.call, tile.call.problem
  width, size = call.block_rows, call.softmax_rows
  v, k_scale, v_scale = _values(tile, q.dtype, keys, masked)
  product: Any = s.coming[...]
  for row in range(0, call.rows, size):
    g, after = pl.ds(row, size), row + size
    coming = None
    if after < call.rows:
      coming = _product(q, keys, tile.slot, pl.ds(after, size))
    elif following is not None:
      first = pl.ds(0, size)
      s.coming[...] = _product(following.q, keys, following.slot, first)
    logits = p.logits(_times(product, k_scale), tile.scale)
    if keys.others is not None:
      logits += keys.others[g, :]
    if masked:
      logits = jnp.where(tile.is_visible(logits.shape, row), logits, MASKED)
    before = s.m[g, :]
    m = jnp.maximum(before, row_maximum(logits))
    weights = jnp.exp2((logits - tpu.across(m, width)) * p.to_base_2)
    decay = jnp.exp2((before - m) * p.to_base_2)
    weights_v = _times(weights, v_scale).astype(v.dtype)
    acc = tpu.dot(weights_v, v, tpu.NT if keys.turned else tpu.NN)
    s.m[g, :] = m
    s.total[g, :] = decay * s.total[g, :] + sum_by_lane(weights)
    s.acc[g, :] = tpu.across(decay, acc.shape[1]) * s.acc[g, :] + acc
    product = coming


def _times(x: jax.Array, scale: jax.Array | None) -> jax.Array:
  return x if scale is None else x * scale


def _values(
  tile: Tile, dtype: Any, keys: Keys, masked: bool
) -> tuple[jax.Array, Any, Any]:
  """v and both scales; where masked, zeros for what was not copied.

  That may be anything, and anything times a weight of zero may be NaN.  What is
  multiplied by it before the mask does not matter.
  """
  v = _converted(keys.slots.v[tile.slot], dtype)
  k_scale, v_scale = (
    None if x is None else x[tile.slot]
    for x in (keys.slots.k_scale, keys.slots.v_scale)
  )
  if masked and v_scale is not None:
    v_scale = jnp.where(tile.is_valid(v_scale.shape, 1), v_scale, 0.0)
  elif masked:
    axis = 1 if keys.turned else 0
    v = jnp.where(tile.is_valid(v.shape, axis), v.astype(jnp.float32), 0.0)
  return v.astype(dtype), k_scale, v_scale
