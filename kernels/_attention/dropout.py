"""Dropout of weights, by a seed: which are kept is computed, never stored.

Whether a weight is kept follows from a hash of the seed, its place in the
batch, its head, query and key: two words, each mixed well, are put together,

    x = row ^ key,   x = c x,   x = x ^ x >> 15,   x = d x     modulo 2^32

and kept is what is not among the first `rate` of all numbers.  The word of a
row has the seed and all places but the key's; both are made before the op, of
indices in whole arrays.  So nothing depends on tiles or on how a mesh splits
them, and the backward pass finds the same weights: forward and backward, kernel
and reference, call `kept`.  It is six operations of the vector unit for each
register of logits: a v5e multiplies integers as fast as it adds them.

The constants are those of murmur3's finaliser (A. Appleby, public domain).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from .._frame import tpu
from . import operands
from .spec import Dropout
from .tiles import Call

_FACTORS = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_STEP = np.uint32(0x9E3779B9)

# --- before the op ------------------------------------------------------------


def words(seed: Any, q: Any, k: Any, is_shared: bool) -> Dropout:
  """The words of all rows and keys.

  Args:
    seed: an integer scalar, of which 32 bits count.
    q: [B, T, N, H].
    k: [B, S, K, H].
    is_shared: whether the batch and the heads drop alike.
  """
  (b, t, n, _), s = q.shape, k.shape[1]
  seed = jnp.asarray(seed).astype(jnp.uint32)
  of_batch = _next(_mixed(seed), 1 if is_shared else b)
  rows = _next(_next(of_batch, t), 1 if is_shared else n)
  keys = _next(_mixed(seed ^ _STEP), s)
  return Dropout(
    jnp.broadcast_to(_signed(rows), (b, t, n)),
    jnp.broadcast_to(_signed(keys), (b, s)),
  )


def _next(word: jax.Array, count: int) -> jax.Array:
  """A word for each of the places 0 to count - 1, in one more dimension."""
  places = jnp.arange(1, count + 1, dtype=jnp.uint32)
  return _mixed(word[..., None] + places * _STEP)


def _mixed(x: jax.Array) -> jax.Array:
  """murmur3's finaliser."""
  for shift, factor in zip((16, 13), _FACTORS, strict=True):
    x = (x ^ (x >> shift)) * factor
  return x ^ (x >> 16)


def _signed(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, jnp.int32)


# --- in the kernels and the reference -----------------------------------------


def kept(rate: float, rows: jax.Array, keys: jax.Array) -> jax.Array:
  """Which weights are kept, of the words of their rows and keys; booleans."""
  x = (rows ^ keys) * _FACTORS[0].astype(np.int32)
  x ^= jax.lax.shift_right_logical(x, jnp.full_like(x, 15))
  x *= _FACTORS[1].astype(np.int32)
  dropped = min(round(rate * 2**32), 2**32 - 1)
  return x >= np.int32(dropped - 2**31)


def kept_of(rate: float, words: Dropout) -> jax.Array:
  """[B, N, T, S], in plain jnp."""
  rows = words.rows.swapaxes(1, 2)[..., None]
  return kept(rate, rows, words.keys[:, None, None, :])


# --- as operands --------------------------------------------------------------


class Refs(NamedTuple):
  """What a kernel has of the words."""

  rows: Any  # [1, R]
  keys: Any  # [S / LANES, 1, LANES]


def operands_of(
  call: Call, words: Dropout | None
) -> tuple[Refs | None, Refs | None]:
  """Operands and their block specs; None without dropout."""
  if words is None:
    return None, None
  layout = call.layout
  keys = operands.padded_ids(words.keys, call.key_unit)
  keys = keys.reshape(keys.shape[0], -1, 1, tpu.LANES)
  of_keys = pl.BlockSpec(
    (None, *keys.shape[1:]), lambda b, i, *_: (layout.batch(b), 0, 0, 0)
  )
  rows = layout.of_lse(words.rows.swapaxes(1, 2))
  return Refs(rows, keys), Refs(layout.lane_spec(call.rows), of_keys)


# --- in a kernel --------------------------------------------------------------


def of_rows_below(
  call: Call, refs: Refs, rows: jax.Array, key0: Any, width: int
) -> jax.Array:
  """Which of a tile [rows, keys] are kept, forward.

  Args:
    call: the kernel's.
    refs: its words.
    rows: those of the tile's rows, [rows, LANES].
    key0: the first key.
    width: how many keys.
  """
  keys = operands.in_lanes(refs.keys, key0, width)
  return kept(call.problem.dropout_rate, tpu.across(rows, width), keys)


def of_rows_beside(
  call: Call, refs: Refs, rows: Any, key0: Any, width: int
) -> jax.Array:
  """The same of [keys, rows], backward; the rows are a slice."""
  keys = tpu.lanes_to_column(operands.in_lanes(refs.keys, key0, width))
  return kept(
    call.problem.dropout_rate, refs.rows[:, rows], tpu.across(keys, rows.size)
  )
