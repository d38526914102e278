"""Page 2: queries and keys in memory, and in which order a kernel takes them.

A kernel sees rows: the G = N / K query heads of a kv head side by side, so that
one matmul serves all of them.  It reads and writes them where they lie,

    packed   [B K, T G, H]    the heads of a token one below the other, as
                              [B, T, N, H] has them with one kv head
    heads    [B N, T, H]      heads first, [B, N, T, H]
    flat     [B, T, N H]      the heads of a token side by side
    pairs    [B, T, N, H]     as it is with several kv heads, of which two come
                              together to VMEM, there heads first; see `words`

and keys as [B K, S, H], flat as [B, S, K H], of pairs as [B, S, K, H].  Of
packed queries, row t G + g is token t of head g.  Of the others, whose tokens
lie together, `chunk` tokens of one head follow each other; then as many of the
next head:

    chunk tokens of head 0 | the same tokens of head 1 | ... | the next tokens

so that what a mask cuts off a group of rows are whole rows of few tokens, and a
register never holds two heads.  lse has this order too, between the passes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._frame import tpu
from .spec import Problem

Kind = Literal["packed", "heads", "flat", "pairs"]


class Piece(NamedTuple):
  """Rows that are tokens of one head, in turn."""

  head: int  # of those of a kv head
  token: int  # the first, of a block's
  rows: int


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a kernel finds queries and keys.

  Attributes:
    kind: see above.
    kv_heads: K.
    group: query heads per kv head, G.
    chunk: tokens of one head that follow each other in the order of rows.
    head_size: H.
  """

  kind: Kind
  kv_heads: int
  group: int
  chunk: int
  head_size: int

  @classmethod
  def of(cls, p: Problem, kv_heads: int, group: int, head_size: int) -> Layout:
    """What the caller passes as it is, where a kernel can read it so.

    Else, heads first, which XLA may have to transpose to, but for `in_pairs`.
    """
    kind: Kind = "heads"
    if p.layout == "BT(NH)" and head_size % tpu.LANES == 0:
      kind = "flat"
    elif p.layout in ("BTNH", None) and kv_heads == 1 and not p.has_bias:
      kind = "packed"
    return cls(kind, kv_heads, group, _chunk(p, group), head_size)

  @classmethod
  def of_shapes(
    cls, p: Problem, q: tuple[int, ...], k: tuple[int, ...]
  ) -> Layout:
    """From the shapes [B, T, N, H] and [B, S, K, H]."""
    return cls.of(p, k[2], q[2] // k[2], q[3])

  @property
  def is_by_token(self) -> bool:
    """Whether all heads of a token come before the next token's."""
    return self.kind == "packed" or self.group == 1

  def in_pairs(self, p: Problem) -> Layout | None:
    """The same order of rows from [B, T, N, H] as it is, if that can be had.

    Only where the caller says that it lies so.  Where heads fill no tiles, XLA
    keeps the heads of a token apart anyway.
    """
    is_transposed = p.layout == "BTNH" and self.kind == "heads"
    counts = self.kv_heads, self.kv_heads * self.group
    whole = all(n in (2, 4) or n % tpu.SUBLANES == 0 for n in counts)
    if is_transposed and whole and self.head_size % tpu.LANES == 0:
      return dataclasses.replace(self, kind="pairs")
    return None

  @property
  def together(self) -> int:
    """How many kv heads come to VMEM together, for a step each."""
    return 2 if self.kind == "pairs" else 1

  def of_each_head(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what is kept of every kv head that is in VMEM."""
    return (self.together, *shape) if self.together > 1 else shape

  def rows(self, tokens: int) -> int:
    """How many rows so many tokens take; in lse, with whole chunks."""
    return self.group * (
      tokens if self.is_by_token else tpu.round_up(tokens, self.chunk)
    )

  def last_token(self, rows: int) -> int:
    """The end of the tokens that the first so many rows have among them."""
    if self.is_by_token:
      return pl.cdiv(rows, self.group)
    return pl.cdiv(rows, self.chunk * self.group) * self.chunk

  def tokens(self, row: jax.Array) -> tuple[jax.Array, int]:
    """What a row's token times a number is at most, and the number.

    A key `ahead` of the block's first token is not after a row's token where
    ahead * number <= the first result.
    """
    if self.is_by_token:  # a row's token is its index over G, which is spared
      return row, self.group
    size = self.chunk * self.group
    if size & (size - 1) == 0:
      chunk = row >> (size.bit_length() - 1)
    else:
      near = (row.astype(jnp.float32) + 0.5) * (1 / size)
      chunk = near.astype(jnp.int32)
    return chunk * self.chunk + (row & (self.chunk - 1)), 1

  # --- arrays ---

  def of_queries(self, x: jax.Array) -> jax.Array:
    """[B, T, N, H] as a kernel takes it."""
    b, t, n, h = x.shape
    if self.kind == "flat":
      return x.reshape(b, t, n * h)
    if self.kind == "packed":
      return x.reshape(b, t * n, h)
    if self.kind == "pairs":
      return x
    # K and G stay together: XLA would copy what it then cannot lay out freely.
    return x.swapaxes(1, 2).reshape(b * n, t, h)

  def to_queries(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse, to shape [B, T, N, H]."""
    b, t, n, h = shape
    if self.kind == "heads":
      return x.reshape(b, n, t, h).swapaxes(1, 2)
    return x.reshape(shape)

  def of_keys(self, x: jax.Array) -> jax.Array:
    """[B, S, K, H] as a kernel takes it."""
    b, s, kv_heads, h = x.shape
    if self.kind == "flat":
      return x.reshape(b, s, kv_heads * h)
    if self.kind == "pairs":
      return x
    return x.swapaxes(1, 2).reshape(b * kv_heads, s, h)

  def to_keys(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse, to shape [B, S, K, H], without padding."""
    b, s, kv_heads, h = shape
    x = x[:, :s]
    if self.kind in ("flat", "pairs"):
      return x.reshape(shape)
    return x.reshape(b, kv_heads, s, h).swapaxes(1, 2)

  def of_lse(self, lse: jax.Array) -> jax.Array:
    """[B, N, T] in the order of rows, [B K, 1, rows]."""
    b, n, t = lse.shape
    x = lse.reshape(b * self.kv_heads, self.group, t)
    if self.is_by_token:
      x = x.swapaxes(1, 2)
    else:
      x = jnp.pad(x, ((0, 0), (0, 0), (0, -t % self.chunk)))
      x = x.reshape(*x.shape[:2], -1, self.chunk).swapaxes(1, 2)
    return x.reshape(b * self.kv_heads, 1, -1)

  def of_rows(self, x: jax.Array) -> jax.Array:
    """[B, N, T, ...] in the order of rows, [B K, rows, ...]."""
    b, n, t, *rest = x.shape
    x = x.reshape(b * self.kv_heads, self.group, t, *rest)
    if self.is_by_token:
      x = x.swapaxes(1, 2)
    else:
      ends = [(0, 0)] * 2 + [(0, -t % self.chunk)] + [(0, 0)] * len(rest)
      x = jnp.pad(x, ends)
      x = x.reshape(*x.shape[:2], -1, self.chunk, *rest).swapaxes(1, 2)
    return x.reshape(b * self.kv_heads, -1, *rest)

  def to_lse(self, rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse, to [B, N, T], given q's shape [B, T, N, H]."""
    b, t, n, _ = shape
    chunk = 1 if self.is_by_token else self.chunk
    x = rows.reshape(b * self.kv_heads, -1, self.group, chunk).swapaxes(1, 2)
    return x.reshape(b, n, -1)[:, :, :t]

  def repeated(self, by_token: jax.Array) -> jax.Array:
    """[B, T] in the order of rows, [B, rows], the same for every head."""
    if self.is_by_token:
      return jnp.repeat(by_token, self.group, axis=1)
    b, t = by_token.shape
    x = jnp.pad(by_token, ((0, 0), (0, -t % self.chunk)))
    x = x.reshape(b, -1, 1, self.chunk)
    return jnp.broadcast_to(x, (*x.shape[:2], self.group, self.chunk)).reshape(
      b, -1
    )

  def by_row(self, by_token: jax.Array) -> jax.Array:
    """[tokens, W] by row, [rows, W], in a kernel."""
    tokens, width = by_token.shape
    if self.group == 1:
      return by_token
    if self.is_by_token:
      whole = (tokens, self.group, width)
      return jnp.broadcast_to(by_token[:, None, :], whole).reshape(-1, width)
    chunks = [
      by_token[t : t + self.chunk] for t in range(0, tokens, self.chunk)
    ]
    return jnp.concatenate([x for x in chunks for _ in range(self.group)])

  def pieces(self, start: int, size: int) -> Iterator[Piece]:
    """Of some rows of a block, those that are tokens of one head in turn.

    Packed, they are rows of no head.
    """
    if self.is_by_token:
      yield Piece(0, start, size)
      return
    row, end = start, start + size
    while row < end:
      chunk, rest = divmod(row, self.chunk * self.group)
      head, first = divmod(rest, self.chunk)
      count = min(self.chunk - first, end - row)
      yield Piece(head, chunk * self.chunk + first, count)
      row += count

  # --- blocks ---
  # The grid is (B K, blocks of queries), and of pairs (B K / 2, blocks, 2).

  def grid(self, batch: int, blocks: int) -> tuple[int, ...]:
    """The steps of a kernel."""
    groups = batch * self.kv_heads // self.together
    return (groups, blocks, *([self.together] if self.together > 1 else []))

  def batch(self, group: Any) -> jax.Array:
    """Which batch element the grid's first index stands for."""
    return jax.lax.div(group, self.kv_heads // self.together)

  def is_first_kv_head(self) -> jax.Array:
    """Whether a grid step is one of its batch element's first kv head."""
    steps = self.kv_heads // self.together
    is_first = jax.lax.rem(pl.program_id(0), steps) == 0
    return is_first & (pl.program_id(2) == 0) if self.together > 1 else is_first

  def lane_spec(self, rows: int) -> pl.BlockSpec:
    """A number for each of `rows` rows, of [B K, 1, rows]."""
    if self.kind == "pairs":
      return pl.BlockSpec(
        (None, 1, rows), lambda b, i, n, *_: (2 * b + n, 0, i)
      )
    return pl.BlockSpec((None, 1, rows), lambda b, i, *_: (b, 0, i))

  def query_spec(self, block_q: int) -> pl.BlockSpec:
    """`block_q` queries; of pairs all, in HBM."""
    if self.kind == "pairs":
      return pl.BlockSpec(memory_space=pl.ANY)
    kv_heads, group, head_size = self.kv_heads, self.group, self.head_size
    if self.kind == "flat":
      return pl.BlockSpec(
        (None, block_q, group * head_size),
        lambda b, i, *_: (
          jax.lax.div(b, kv_heads),
          i,
          jax.lax.rem(b, kv_heads),
        ),
      )
    if self.is_by_token:
      return pl.BlockSpec(
        (None, block_q * group, head_size), lambda b, i, *_: (b, i, 0)
      )
    return pl.BlockSpec((group, block_q, head_size), lambda b, i, *_: (b, i, 0))

  def key_spec(self, keys: int, **how: Any) -> pl.BlockSpec:
    """All keys of a kv head; of pairs those of all, in HBM."""
    if self.kind == "pairs":
      return pl.BlockSpec(memory_space=pl.ANY)
    kv_heads, head_size = self.kv_heads, self.head_size
    if self.kind == "flat":
      return pl.BlockSpec(
        (None, keys, head_size),
        lambda b, i, *_: (
          jax.lax.div(b, kv_heads),
          0,
          jax.lax.rem(b, kv_heads),
        ),
        **how,
      )
    return pl.BlockSpec(
      (None, keys, head_size), lambda b, i, *_: (b, 0, 0), **how
    )

  def key_place(self, head: Any, keys: Any) -> tuple[Any, ...]:
    """Where some keys of a kv head, of all B K, are in the whole array."""
    if self.kind != "flat":
      return head, keys, slice(None)
    batch = jax.lax.div(head, self.kv_heads)
    size = self.head_size
    first = pl.multiple_of(jax.lax.rem(head, self.kv_heads) * size, size)
    return batch, keys, pl.ds(first, size)

  def by_rows(self, ref: Any) -> Rows:
    """A block of queries, inside a kernel."""
    return Rows(ref, self)


class Rows(NamedTuple):
  """A block of queries in VMEM, to be taken and set by row: static indices."""

  ref: Any
  layout: Layout

  def load(self, start: int, size: int) -> jax.Array:
    """[size, H]."""
    parts = [self.ref[place] for place, _ in self._places(start, size)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

  def store(self, start: int, rows: jax.Array) -> None:
    """Of rows [size, H]."""
    for place, part in self._places(start, rows.shape[0]):
      self.ref[place] = rows[part].astype(self.ref.dtype)

  def _places(self, start: int, size: int) -> Iterator[tuple[Any, slice]]:
    """Where the rows from `start` on are, and which of these each place has."""
    layout = self.layout
    if layout.is_by_token:
      yield (pl.ds(start, size), slice(None)), slice(None)
      return
    at, flat = 0, layout.kind == "flat"
    for head, token, count in layout.pieces(start, size):
      tokens = pl.ds(token, count)
      lanes = pl.ds(head * layout.head_size, layout.head_size)
      part = slice(at, at + count)
      yield (tokens, lanes) if flat else (head, tokens, slice(None)), part
      at += count


def _chunk(p: Problem, group: int) -> int:
  """Tokens of a head in a row: a power of two, no more than the rows of all
  heads that go through the forward's softmax together.

  Blocks of either pass have whole chunks.
  """
  tiles = p.tiles
  chunk = math.gcd(tiles.block_q, tiles.block_q_bwd, tpu.LANES)
  while chunk > tpu.BFLOAT16_SUBLANES and chunk * group > tiles.rows:
    chunk //= 2
  return chunk
