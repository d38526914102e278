"""Page 5: RoPE of a step's queries, and of the new keys, in the kernel.

Sines and cosines come in a table, for all heads of a token.  A step rotates the
queries of the next one, before their first product.

Queries of several tokens are rotated before the kernel if a token's heads are
no whole registers; so are new keys of several heads, or that become int8, or
lie turned.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .. import _rope, _sincos
from .._frame import tpu
from .spec import Arrays, Problem, rotated
from .tiles import Call

_MANY_ROWS = 256  # of queries times heads, that XLA takes longer for


class Table(NamedTuple):
  """Of tokens; refs in the kernel.

  W is `_sincos.width` of H.
  """

  sin: Any  # [B, T, W] float32, of a block of tokens [block_q, W]
  cos: Any  # likewise


def before(p: Problem, a: Arrays, heads: int) -> Arrays:
  """The arrays, rotated where the kernel does not do it.

  What is returned has phases if it does.

  Args:
    p: the problem.
    a: the arrays.
    heads: of a row's queries, as the kernel takes them.
  """
  _, t, n, _ = a.q.shape
  if a.sin is None or t == 1 or heads % tpu.SUBLANES == 0:
    return a
  if t * n <= _MANY_ROWS:
    return rotated(a)
  of_rope = _rope.Problem(_rope.Rope().base_frequency, p.implementation, None)
  arrays = _rope.Arrays(a.q, None, sin=a.sin, cos=a.cos)
  return rotated(a)._replace(q=_rope.rotated(of_rope, arrays, a.q, 1))


def with_new_keys_rotated(a: Arrays) -> Arrays:
  """The arrays with new keys that XLA rotates; queries still are to be."""
  if a.sin is None or a.new_k is None:
    return a
  heads = a.new_k.shape[0] // a.sin.shape[0]  # each is a row, or none
  phases = jnp.repeat(a.sin, heads, axis=0), jnp.repeat(a.cos, heads, axis=0)
  return a._replace(new_k=_rope.apply_rope_reference(a.new_k, phases=phases))


def table_of(a: Arrays) -> Table:
  """Of all tokens that are to be rotated."""
  sin, cos = (x.astype(jnp.float32) for x in (a.sin, a.cos))
  return Table(*_sincos.of_both_halves(sin, cos))


# --- its operands -------------------------------------------------------------


class Queries(NamedTuple):
  """Refs in the kernel; R = block_q N rows."""

  q: Any  # [R, H]
  after: Any  # [G or, if to be rotated, R, H] of the next step; or None
  table: Table | None
  table_after: Table | None


def operands(
  call: Call, q: jax.Array, table: Table | None, goes_on: bool
) -> tuple[Queries, Queries]:
  """The queries as operands, and their blocks."""
  h = call.head_size
  q = q.reshape(call.batch, -1, h)
  of_each = 1 if table is None else call.batch // table.sin.shape[0]

  def blocks(rows: int, tokens: int, where: Any) -> tuple[Any, Any]:
    def of_token(*at: Any) -> tuple[Any, Any, Any]:
      b, i, _ = where(*at)
      return jax.lax.div(b, of_each), i, 0

    of_q = pl.BlockSpec((None, rows, h), where)
    if table is None:
      return of_q, None
    of_table = pl.BlockSpec((None, tokens, table.sin.shape[2]), of_token)
    return of_q, Table(of_table, of_table)

  def here(b: Any, i: Any, *_: Any) -> tuple[Any, Any, Any]:
    # What is rotated a step before is taken here at the first one alone.
    return (0, 0, 0) if table is not None and goes_on else (b, i, 0)

  of_q, of_table = blocks(call.rows, call.block_q, here)
  if not goes_on:
    return Queries(q, None, table, None), Queries(of_q, None, of_table, None)
  rows = call.softmax_rows if table is None else call.rows
  of_after, of_table_after = blocks(
    rows, call.block_q, functools.partial(_after, call, rows)
  )
  of_all = Queries(of_q, of_after, of_table, of_table_after)
  return Queries(q, q, table, table), of_all


def _after(call: Call, rows: int, b: Any, i: Any, *_: Any) -> Any:
  """The first rows of the queries of the step that comes next."""
  step = jnp.minimum(b * call.blocks_q + i + 1, call.steps - 1)
  b, i = (f(step, call.blocks_q) for f in (jax.lax.div, jax.lax.rem))
  return b, i * (call.rows // rows), 0


# --- in the kernel ------------------------------------------------------------


def queries(given: Queries, scratch: Any, index: Any) -> tuple[Any, Any]:
  """Refs of the queries of a step, by its index, and of those of the next one.

  Two steps in turn have those that are rotated, in the scratch [2, R, H].
  """
  if scratch is None:
    return given.q, given.after
  here = 0 if given.after is None else jax.lax.rem(index, 2)
  return scratch.at[here], scratch.at[1 - here]


def rotate(call: Call, q: Any, of: Table | None, to: Any) -> None:
  """The queries of a step, refs [R, H], if they are to be rotated."""
  if of is None:
    return
  tokens = call.tokens_rotated
  rows = tokens * call.heads

  def some(i: Any, _: None) -> None:
    here = pl.ds(pl.multiple_of(i * rows, rows), rows)
    token = pl.ds(pl.multiple_of(i * tokens, tokens), tokens)
    to[here] = _rotated(call, q[here], of.sin[token], of.cos[token])

  if tokens == call.block_q:
    to[...] = _rotated(call, q[...], of.sin[...], of.cos[...])
  else:
    jax.lax.fori_loop(0, call.block_q // tokens, some, None)


def _rotated(call: Call, q: Any, sin: Any, cos: Any) -> jax.Array:
  """[tokens N, H], by a table [tokens, W]."""
  shape = q.shape
  if sin.shape[0] > 1:
    q = q.reshape(-1, call.heads, shape[1])
    sin, cos = sin[:, None], cos[:, None]
  return _sincos.rotate(q, sin, cos).reshape(shape)
