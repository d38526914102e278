"""ALiBi: logits that fall with the distance between a query and a key.

    s_j - slope |i - j|       of a head of that slope, query i and key j

Press et al., arXiv 2108.12409.  A distance is a whole number, exact in float32,
and so no row's logits lose bits to how far it is from the first.  What belongs
to a row, its slope and its query, lies beside it: the forward has rows in
sublanes, and reads both equal in all lanes; the backward has rows in lanes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._frame import tpu
from .blocks import Block
from .spec import Arrays
from .tiles import Call

# --- as operands --------------------------------------------------------------


class Refs(NamedTuple):
  """Of the rows of a block of queries: forward [R, LANES], backward [1, R]."""

  slopes: Any  # negative, in units of `Problem.unit`
  tokens: Any  # queries, counted from the block's first, and what is not known


def operands_of(
  call: Call, a: Arrays, in_lanes: bool
) -> tuple[Refs | None, Refs | None]:
  """Operands and their block specs; None without slopes.

  Args:
    call: the kernel's.
    a: its arrays, slopes [P, N] of P parts of the batch among them, or None.
    in_lanes: whether the kernel has rows in lanes.
  """
  if a.alibi is None:
    return None, None
  slopes, first = a.alibi, a.first_position
  parts, heads = slopes.shape
  layout, repeats = call.layout, a.q.shape[0] // parts
  of_logits = slopes.astype(jnp.float32) * (-1 / call.problem.unit)
  by_query = (parts, heads, call.block_q)
  by_row = layout.of_lse(jnp.broadcast_to(of_logits[:, :, None], by_query))
  token = jnp.arange(call.block_q, dtype=jnp.float32)
  known = jnp.zeros(1) if first is None else first.astype(jnp.float32)
  token = layout.repeated(known[:, None] + token)[:, None, :]

  def head(b: Any, i: Any, *rest: Any) -> tuple[Any, ...]:
    del i
    part = jax.lax.div(layout.batch(b), repeats)
    own = b if layout.together == 1 else layout.together * b + rest[0]
    return part * call.kv_heads + jax.lax.rem(own, call.kv_heads), 0, 0

  def element(b: Any, *_: Any) -> tuple[Any, ...]:
    return 0 if first is None else layout.batch(b), 0, 0

  if not in_lanes:
    by_row, token = (
      jnp.broadcast_to(
        x.swapaxes(-1, -2), (*x.shape[:-2], x.shape[-1], tpu.LANES)
      )
      for x in (by_row, token)
    )
  specs = Refs(
    pl.BlockSpec((None, *by_row.shape[1:]), head),
    pl.BlockSpec((None, *token.shape[1:]), element),
  )
  return Refs(by_row, token), specs


# --- in a kernel --------------------------------------------------------------


def of_rows_below(
  block: Block, refs: Refs, rows: Any, key0: Any, width: int
) -> jax.Array:
  """What is added to a tile of logits [rows, keys], forward."""
  ahead = _ahead(block, key0, (1, width), 1)
  slopes, tokens = (tpu.across(x[rows, :], width) for x in refs)
  return _penalty(block, slopes, tokens - ahead)


def of_rows_beside(
  block: Block, refs: Refs, rows: Any, key0: Any, width: int
) -> jax.Array:
  """The same of [keys, rows], backward."""
  ahead = _ahead(block, key0, (width, tpu.LANES), 0)
  slopes, tokens = (x[:, rows] for x in refs)
  return _penalty(block, slopes, tokens - tpu.across(ahead, rows.size))


def _ahead(
  block: Block, key0: Any, shape: tuple[int, ...], axis: int
) -> jax.Array:
  """How far each key is ahead of the block's first query."""
  call = block.call
  first = call.first_q + call.problem.first_position + block.q0
  key = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
  return (key + (key0 + call.first_k - first)).astype(jnp.float32)


def _penalty(block: Block, slopes: jax.Array, behind: jax.Array) -> jax.Array:
  """Of keys so far `behind` a row's query."""
  # Under a causal mask none that is visible is ahead.
  is_causal = block.call.problem.is_causal
  return slopes * (behind if is_causal else jnp.abs(behind))
