"""A bias given as an array, read and differentiated a block at a time.

It lies as the caller has it, [B or 1, N or 1, T, S].  A grid step has that of
its queries and heads to all keys in VMEM; where the heads of a token are apart,
so rows are never packed, see `Problem.has_bias`.  Forward, a tile of it is read
by rows.  Backward, it is transposed beside the matmuls, and so is its gradient,
which is that of the logits: of heads that share a bias it is added up in the
kernel; of kv heads and of the batch, outside.

Traffic: the bias once in either pass, its gradient once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._frame.manual import varying_like
from .softmax import MASKED
from .tiles import Call

# --- as operands --------------------------------------------------------------


def spec_of(call: Call, bias: Any, batch: int) -> pl.BlockSpec | None:
  """The block of a grid step, [G or 1, block_q, S]; None without a bias.

  Args:
    call: the kernel's.
    bias: [P, N or 1, T, S], the call's part; or None.
    batch: B, a multiple of P.
  """
  if bias is None:
    return None
  layout, repeats = call.layout, batch // bias.shape[0]
  by_head = bias.shape[1] > 1

  def place(b: Any, i: Any, *_: Any) -> tuple[Any, ...]:
    part = jax.lax.div(layout.batch(b), repeats)
    return part, jax.lax.rem(b, call.kv_heads) if by_head else 0, i, 0

  heads = _heads(call, bias)
  return pl.BlockSpec((None, heads, call.block_q, call.padded_keys), place)


def _heads(call: Call, bias: Any) -> int:
  """How many a kv head has biases of."""
  return call.group if bias.shape[1] > 1 else 1


def gradient_of(
  call: Call, bias: Any, batch: int, wanted: bool
) -> tuple[Any, pl.BlockSpec | None]:
  """Type and block spec of what the kernel gives, [B K, G or 1, T, S].

  It is float32 where several are to be added up.  None if not wanted.
  """
  if bias is None or not wanted:
    return None, None
  heads = _heads(call, bias)
  shape = batch * call.kv_heads, heads, call.t, call.s
  is_whole = shape[0] * heads == bias.shape[0] * bias.shape[1]
  dtype = bias.dtype if is_whole else jnp.float32
  block = (None, heads, call.block_q, call.padded_keys)
  of_step = pl.BlockSpec(block, lambda b, i, *_: (b, 0, i, 0))
  return varying_like(bias, shape, dtype), of_step


def summed(found: Any, bias: Any, kv_heads: int) -> Any:
  """The gradient of the bias, of what the kernel gave; None if it did not."""
  if found is None:
    return None
  # Of each part: those that share it, by kv heads.
  found = found.reshape(bias.shape[0], -1, kv_heads, *found.shape[1:])
  found = found.sum(axis=1 if bias.shape[1] > 1 else (1, 2))
  return found.reshape(bias.shape).astype(bias.dtype)


# --- in a kernel --------------------------------------------------------------


def added_below(
  call: Call, ref: Any, logits: jax.Array, row0: Any, keys: Any
) -> jax.Array:
  """Logits [rows, keys] with their bias, forward."""
  return _added(call, logits, _of_rows(call, ref, row0, logits.shape[0], keys))


def added_beside(
  call: Call, ref: Any, logits: jax.Array, row0: Any, keys: Any
) -> jax.Array:
  """The same of [keys, rows], backward."""
  tile = _of_rows(call, ref, row0, logits.shape[1], keys)
  return _added(call, logits, tile.astype(jnp.float32).T)


def _added(call: Call, logits: jax.Array, tile: jax.Array) -> jax.Array:
  """No lower than what hides a key."""
  wide = tile.astype(jnp.float32) * (1 / call.problem.unit)
  return jnp.maximum(logits + wide, MASKED)


def _of_rows(call: Call, ref: Any, start: int, size: int, keys: Any) -> Any:
  """A tile of a bias, [size, keys], of the rows from `start` on."""
  last = ref.shape[0] - 1
  parts = [
    ref[min(piece.head, last), pl.ds(piece.token, piece.rows), keys]
    for piece in call.layout.pieces(start, size)
  ]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def store(call: Call, ref: Any, start: int, rows: jax.Array, keys: Any) -> None:
  """Sets that of a gradient, adding up what heads share; of whole chunks."""
  last, at = ref.shape[0] - 1, 0
  found: dict[tuple[int, int, int], jax.Array] = {}
  for piece in call.layout.pieces(start, rows.shape[0]):
    part = rows[at : at + piece.rows]
    place = min(piece.head, last), piece.token, piece.rows
    found[place] = found[place] + part if place in found else part
    at += piece.rows
  for (head, token, count), part in found.items():
    ref[head, pl.ds(token, count), keys] = part.astype(ref.dtype)
