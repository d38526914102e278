"""Page 6: new keys and values, put into the blocks on their way through VMEM.

A block that has a place for some of them gets them before it is computed with;
the tiles that changed go back to the cache, and nothing else.  New keys lie at
any row of a tile, whose rows are packed in 16 or 8 bits, so they are kept in
float32, in columns of 128 lanes: there, a load may begin anywhere.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .._sincos import rotate
from .cache import quantized
from .rotate import Table, with_new_keys_rotated
from .spec import Arrays
from .stream import CacheRefs, Step, Stream
from .tiles import Call


def new_types(call: Call, quantized: bool) -> CacheRefs:
  """Scratch, with room before and after, for what is put in.

  It is of as many rows of the batch as are held together: as operands of the
  kernel [held T K, H] and [1, held T K]; turned, [H, held T].
  """
  new_rows = call.held * call.new_rows
  columns = tpu.lanes(call.head_size) // tpu.LANES
  rows = tpu.round_up(new_rows + 2 * call.tile, tpu.SUBLANES)
  values = pltpu.VMEM((columns, rows, tpu.LANES), jnp.float32)
  lanes = tpu.lanes(new_rows) + 3 * tpu.LANES
  if call.turned:
    values = pltpu.VMEM((call.head_size, lanes), jnp.float32)
  scale = pltpu.VMEM((1, lanes), jnp.float32) if quantized else None
  return CacheRefs(values, values, scale, scale)


class New(NamedTuple):
  """New keys and values; refs in the kernel."""

  rows: CacheRefs
  table: Table | None  # [held T, W]: the keys are to be rotated


def operands(call: Call, a: Arrays, table: Table | None) -> tuple[New, New]:
  """The new keys and values, in the cache's dtype, and their blocks."""
  if not call.rotates_new:
    a = with_new_keys_rotated(a)
  count = call.batch // call.held
  shape = count, call.held * call.new_rows, call.head_size
  k_scale, v_scale, v_from = None, None, 0
  if a.k_scale is None:
    k, v = (x.astype(a.k.dtype).reshape(shape) for x in (a.new_k, a.new_v))
  else:  # XLA takes half the time for both at once
    values, scale = quantized(jnp.stack((a.new_k, a.new_v)))
    k = v = values.reshape(2 * count, *shape[1:])
    k_scale = v_scale = scale.reshape(2 * count, 1, -1)
    v_from = count
  if call.turned:
    k, v = (x.swapaxes(1, 2) for x in (k, v))

  def block(x: Any, start: int) -> pl.BlockSpec | None:
    def index(b: Any, *_: Any) -> tuple[Any, ...]:
      return start + (b if call.held == 1 else 0), 0, 0

    return None if x is None else pl.BlockSpec((None, *x.shape[1:]), index)

  of_rows = CacheRefs(
    block(k, 0), block(v, v_from), block(k_scale, 0), block(v_scale, v_from)
  )
  rows, of_table = CacheRefs(k, v, k_scale, v_scale), None
  if not call.rotates_new or table is None:
    return New(rows, None), New(of_rows, None)
  table = Table(*(x.reshape(*shape[:2], -1) for x in table))
  of_table = Table(*(block(x, 0) for x in table))
  return New(rows, table), New(of_rows, of_table)


def take(call: Call, new: New, scratch: CacheRefs) -> None:
  """New keys and values, as `put` wants them."""
  for name, ref in new.rows.in_rows(call).items():
    to, rows = getattr(scratch, name), ref[...].astype(jnp.float32)
    if new.table is not None and name == "k":
      rows = rotate(ref[...], new.table.sin[...], new.table.cos[...])
      rows = rows.astype(jnp.float32)
    for column in range(to.shape[0]):
      first = column * tpu.LANES
      width = min(call.head_size - first, tpu.LANES)
      part = rows[:, first : first + width]
      to[column, pl.ds(call.tile, rows.shape[0]), pl.ds(0, width)] = part
  for name, lanes in new.rows.in_lanes(call).items():
    to = getattr(scratch, name)
    to[:, pl.ds(tpu.LANES, lanes.shape[1])] = lanes[...].astype(jnp.float32)


def put(
  stream: Stream, scratch: CacheRefs, step: Step, block: Any, slot: Any
) -> None:
  """Into a block that has arrived in a slot.

  A row's last step sees all new keys: from there what has changed goes back to
  the cache.  Those before it only put them in.

  Args:
    stream: of the call.
    scratch: the new keys, taken.
    step: the grid step.
    block: the block.
    slot: where it is.
  """
  call, goes = stream.call, step.is_last
  key0, first = block * call.block_kv, stream.scalars.first(call, step.b)
  has_room = (first < key0 + call.block_kv) & (first + call.t > key0)

  @pl.when(has_room)
  def _():
    k = call.kv_heads
    # Rows of the block: the first new one, and the end of them.
    row0 = (first - key0) * k
    end = stream.scalars.end(call, step.b) - key0
    end = jnp.minimum(end, call.block_kv) * k
    end = jnp.minimum(end, row0 + call.new_rows)
    place = _Place(stream, scratch, step.b, block, slot, row0, end)
    if stream.at.tiles is not None:
      sent = place.each(call.tile, functools.partial(_put_tile, place, goes))
      stream.at.tiles[slot] = jnp.where(goes, sent, 0)
    if stream.at.lanes is not None:
      sent = place.each(tpu.LANES, functools.partial(_put_lanes, place, goes))
      stream.at.lanes[slot] = jnp.where(goes, sent, 0)


class _Place(NamedTuple):
  """Where new rows go in a block: from row0, which may be negative, to end."""

  stream: Stream
  scratch: CacheRefs
  b: Any
  block: Any
  slot: Any
  row0: Any
  end: Any

  def each(self, size: int, body: Any) -> Any:
    """body(row) for every group of `size` rows with new ones; their number."""
    first = jax.lax.div(jnp.maximum(self.row0, 0), size)
    last = jax.lax.div(jnp.maximum(self.end, 0) + (size - 1), size)

    def one(i: Any, _: None) -> None:
      body(pl.multiple_of(i * size, size))

    jax.lax.fori_loop(first, last, one, None)
    return jnp.maximum(last - first, 0)

  @property
  def first_held(self) -> Any:
    """The row's first new key among those that are held."""
    call = self.stream.call
    return 0 if call.held == 1 else self.b * call.new_rows

  def is_new(self, index: jax.Array) -> jax.Array:
    """Whether a row of the block, by its index, is."""
    return (index >= self.row0) & (index < self.end)


def _put_tile(place: _Place, goes: Any, row: Any) -> None:
  stream, call = place.stream, place.stream.call
  start = place.first_held + (row - place.row0) + call.tile
  shape = call.tile, call.head_size
  is_new = place.is_new(row + jax.lax.broadcasted_iota(jnp.int32, shape, 0))
  for name, slots in stream.slots.in_rows(call).items():
    new = getattr(place.scratch, name)
    columns = [
      new[column, pl.ds(start, call.tile), :] for column in range(new.shape[0])
    ]
    rows = jnp.concatenate(columns, axis=1)[:, : call.head_size]
    tile = place.slot, pl.ds(row, call.tile)
    old = slots[tile]
    both = jnp.where(is_new, rows, old.astype(jnp.float32))
    slots[tile] = both.astype(old.dtype)

  @pl.when(goes)
  def _():
    stream.send_tile(place.b, place.block, place.slot, row)


def _put_lanes(place: _Place, goes: Any, row: Any) -> None:
  """A register of lanes: the new ones are rotated to their places."""
  stream = place.stream
  start = place.first_held + (row - place.row0) + tpu.LANES
  whole = jax.lax.div(start, tpu.LANES) * tpu.LANES
  is_new = place.is_new(
    row + jax.lax.broadcasted_iota(jnp.int32, (1, tpu.LANES), 1)
  )
  for name, slots in stream.slots.in_lanes(stream.call).items():
    new = getattr(place.scratch, name)
    wide = new[:, pl.ds(pl.multiple_of(whole, tpu.LANES), 2 * tpu.LANES)]
    rotated = pltpu.roll(wide, 2 * tpu.LANES - (start - whole), 1)
    lanes = place.slot, slice(None), pl.ds(row, tpu.LANES)
    old = slots[lanes]
    both = jnp.where(is_new, rotated[:, : tpu.LANES], old.astype(jnp.float32))
    slots[lanes] = both.astype(old.dtype)

  @pl.when(goes)
  def _():
    stream.send_lanes(place.b, place.block, place.slot, row)
