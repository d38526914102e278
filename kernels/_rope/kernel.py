"""Page 5: the kernel, of both passes.

One grid step: a tile of tokens, and some or all of their heads.

  1. angles  of every token: its position over each frequency's timescale, or
             times each frequency
  2. phases  their sine and cosine, once for all heads; or those that are given
  3. rotate  each element of a pair against the other

A pair is an element of each half of a head, and the sines of one half do for
both.  Where pairs are neighbours, or a part of the head is rotated, every lane
has its own sine, of the sign that it wants, and the other of its pair comes to
it by a rotation of lanes.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .._frame.kernel import Saved
from .._frame.manual import varying_like
from .._sincos import sin_cos
from .spec import Arrays, Outs, Problem, rope_timescale
from .tiles import RopeConfig

_VMEM_BYTES = 64 << 20


class _Inputs(NamedTuple):
  positions: Any = None  # [streams, rows] int32, if phases are not given
  timescale: Any = None  # [1, W] float32, by a base
  frequencies: Any = None  # [streams, W] float32, if they are given
  sin: Any = None  # [rows, W] float32, if phases are given
  cos: Any = None  # [rows, W] float32
  x: Any = None  # [rows, heads, H], or [rows, H] of a single head; always there


class _Outputs(NamedTuple):
  y: Any  # as x


class _Pairs(NamedTuple):
  """Which lanes are rotated, and against which."""

  head_size: int  # H
  size: int  # R, of the lanes that are rotated
  are_neighbours: bool
  scale: float  # the attention scale

  @property
  def are_halves(self) -> bool:
    """Whether sines are those of the pairs, W = H / 2; else W = H."""
    return not self.are_neighbours and self.size == self.head_size

  @property
  def width(self) -> int:
    """W, of the sines of a token."""
    return self.head_size // 2 if self.are_halves else self.head_size

  def odd(self, values: jax.Array, rest: float = 0.0) -> jax.Array:
    """[..., F] to [..., W], where a first of a pair has its negative.

    Args:
      values: sines; or frequencies, of which a negative one gives such a sine.
      rest: for the lanes that are not rotated.
    """
    return values if self.are_halves else self._spread(-values, values, rest)

  def even(self, values: jax.Array, rest: float) -> jax.Array:
    """The same for cosines, which are alike."""
    return values if self.are_halves else self._spread(values, values, rest)

  def _spread(
    self, first: jax.Array, second: jax.Array, rest: float
  ) -> jax.Array:
    if self.are_neighbours:
      both = jnp.stack([first, second], axis=-1)
      lanes = both.reshape(*first.shape[:-1], self.size)
    else:
      lanes = jnp.concatenate([first, second], axis=-1)
    more = [(0, 0)] * (lanes.ndim - 1) + [(0, self.head_size - self.size)]
    return jnp.pad(lanes, more, constant_values=rest)


def _kernel(i: _Inputs, o: _Outputs, *, pairs: _Pairs, sign: Literal[1, -1]):
  sin, cos = _phases(i)
  sin *= sign
  if pairs.scale != 1.0:
    sin, cos = _scaled(sin, cos, pairs)
  if i.x.ndim == 3:
    sin, cos = sin[:, None, :], cos[:, None, :]
  if pairs.are_halves:
    _rotate_tile(i.x, o.y, sin, cos)
  else:
    x = i.x[...].astype(jnp.float32)
    y = x * cos + _partners(x, pairs) * sin
    o.y[...] = y.astype(o.y.dtype)


def _phases(i: _Inputs) -> tuple[jax.Array, jax.Array]:
  """Sine and cosine [rows, W]."""
  if i.sin is not None:
    return i.sin[...], i.cos[...]
  if i.timescale is not None:
    angle = _by_token(i.positions[...]) / i.timescale[...]
    return sin_cos(angle)
  # A frequency of another stream is zero.
  angles = [
    _by_token(i.positions[s : s + 1, :]) * i.frequencies[s : s + 1, :]
    for s in range(i.frequencies.shape[0])
  ]
  return sin_cos(functools.reduce(jnp.add, angles))


def _scaled(
  sin: jax.Array, cos: jax.Array, pairs: _Pairs
) -> tuple[jax.Array, jax.Array]:
  """Times the attention scale, where a lane is rotated."""
  sin *= pairs.scale  # of the lanes that are not, it is zero
  if pairs.size == pairs.head_size:
    return sin, cos * pairs.scale
  lane = jax.lax.broadcasted_iota(jnp.int32, cos.shape, cos.ndim - 1)
  return sin, jnp.where(lane < pairs.size, cos * pairs.scale, cos)


def _by_token(positions: jax.Array) -> jax.Array:
  """[1, rows] integers in lanes to [rows, 1] float32 in sublanes."""
  return tpu.lanes_to_column(positions)[:, :1].astype(jnp.float32)


def _rotate_tile(x_ref: Any, y_ref: Any, sin: jax.Array, cos: jax.Array):
  half = x_ref.shape[-1] // 2
  x = x_ref[...].astype(jnp.float32)
  if half % tpu.LANES == 0:
    first, second = x[..., :half], x[..., half:]
    y_ref[..., :half] = (first * cos - second * sin).astype(y_ref.dtype)
    y_ref[..., half:] = (second * cos + first * sin).astype(y_ref.dtype)
  else:
    y_ref[...] = _rotate_lanes(x, sin, cos).astype(y_ref.dtype)


def _rotate_lanes(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Of halves that are not whole registers: instead of taking them apart, the
  lanes are rotated by a half."""
  half = x.shape[-1] // 2
  swapped = jnp.concatenate([x[..., half:], x[..., :half]], axis=-1)
  cos = jnp.concatenate([cos, cos], axis=-1)
  sin = jnp.concatenate([-sin, sin], axis=-1)
  return x * cos + swapped * sin


def _partners(x: jax.Array, pairs: _Pairs) -> jax.Array:
  """[..., H] of which each lane has the other of its pair.

  A lane that is not rotated has zero: its sine is zero, but x might be
  infinite elsewhere.
  """
  distance = 1 if pairs.are_neighbours else pairs.size // 2
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  later, earlier = _rolled(x, -distance), _rolled(x, distance)
  if pairs.are_neighbours:
    partners = jnp.where(lane % 2 == 0, later, earlier)
  else:
    partners = jnp.where(lane < distance, later, earlier)
  return jnp.where(lane < pairs.size, partners, 0.0)


def _rolled(x: jax.Array, lanes: int) -> jax.Array:
  """x of which each lane has what was `lanes` before it."""
  width = x.shape[-1]
  lanes %= width
  if width % tpu.LANES == 0:
    return pltpu.roll(x, lanes, x.ndim - 1)
  return jnp.concatenate([x[..., -lanes:], x[..., :-lanes]], axis=-1)


# --- the call -----------------------------------------------------------------


def rotated(
  p: Problem, a: Arrays, x: jax.Array, sign: Literal[1, -1]
) -> jax.Array:
  """x rotated by the positions of `a`, or back by them."""
  b, t, n, h = x.shape
  config = p.config or RopeConfig.fitting(n, h, x.dtype)
  rows, heads = config.rows, min(config.heads or n, n)
  if n == 1:
    tile = pl.BlockSpec((rows, h), lambda i, j: (i, 0))
  else:
    tile = pl.BlockSpec((rows, heads, h), lambda i, j: (i, j, 0))
  tokens = x.reshape((b * t, h) if n == 1 else (b * t, n, h))
  pairs = _pairs(p, a, h)
  inputs, specs = _operands(p, a, pairs, rows)
  tables = 0 if a.sin is None else pairs.width
  (outs,) = pl.pallas_call(
    functools.partial(_kernel, pairs=pairs, sign=sign),
    name="apply_rope_fwd" if sign == 1 else "apply_rope_bwd",
    grid=(pl.cdiv(b * t, rows), pl.cdiv(n, heads)),
    in_specs=[specs._replace(x=tile)],
    out_specs=[_Outputs(tile)],
    out_shape=[_Outputs(varying_like(x, tokens.shape, x.dtype))],
    compiler_params=tpu.compiler_params(_vmem_bytes(x, rows, heads, tables)),
  )(inputs._replace(x=tokens))
  return outs.y.reshape(x.shape)


def _pairs(p: Problem, a: Arrays, head_size: int) -> _Pairs:
  size = head_size
  for given in (a.frequencies, a.sin):
    if given is not None:
      size = 2 * given.shape[-1]
  return _Pairs(head_size, size, p.interleaved, p.attention_scale)


def _operands(
  p: Problem, a: Arrays, pairs: _Pairs, rows: int
) -> tuple[_Inputs, _Inputs]:
  """By what the kernel rotates, and its blocks; without x."""
  if a.sin is not None:
    by_token = pl.BlockSpec((rows, pairs.width), _tile_of_rows)
    sin, cos = (phase.reshape(-1, phase.shape[-1]) for phase in (a.sin, a.cos))
    inputs = _Inputs(sin=pairs.odd(sin), cos=pairs.even(cos, 1.0))
    return inputs, _Inputs(sin=by_token, cos=by_token)
  streams = 1 if a.positions.ndim == 2 else a.positions.shape[0]
  positions = _in_lanes(a.positions, streams)
  of_tokens = pl.BlockSpec((streams, rows), _tile_of_tokens)
  whole = pl.BlockSpec((streams, pairs.width), lambda i, j: (0, 0))
  if a.frequencies is None:
    timescale = pairs.odd(_timescale(p, a, pairs.head_size))
    inputs = _Inputs(positions, timescale)
    return inputs, _Inputs(of_tokens, whole)
  frequencies = pairs.odd(_by_stream(p, a.frequencies, streams))
  inputs = _Inputs(positions, frequencies=frequencies)
  return inputs, _Inputs(of_tokens, frequencies=whole)


def _by_stream(p: Problem, frequencies: jax.Array, streams: int) -> jax.Array:
  """[streams, F], zero where another stream has the frequency."""
  rows = frequencies[None, :].astype(jnp.float32)
  if streams == 1:
    return rows
  own = jnp.arange(streams)[:, None] == jnp.asarray(p.streams)[None, :]
  return jnp.where(own, rows, 0.0)


def _vmem_bytes(x: jax.Array, rows: int, heads: int, tables: int) -> int:
  """For x and y in two buffers each, and float32 values; and two tables."""
  sublanes = 1 if x.shape[2] == 1 else tpu.round_up(heads, tpu.SUBLANES)
  tile = rows * sublanes * tpu.lanes(x.shape[3])
  needed = (2 * 2 * x.dtype.itemsize + 3 * 4) * tile
  needed += 2 * 2 * 4 * rows * tpu.lanes(tables)
  got = f"heads of H = {x.shape[3]}"
  return tpu.vmem_to_ask("apply_rope", needed, _VMEM_BYTES, got)


def _tile_of_tokens(i: Any, j: Any) -> tuple[Any, Any]:
  """Of [streams, B T]: positions are the same for all heads."""
  del j
  return 0, i


def _tile_of_rows(i: Any, j: Any) -> tuple[Any, Any]:
  """Of [B T, W]: phases are the same for all heads."""
  del j
  return i, 0


def _in_lanes(positions: jax.Array, streams: int = 1) -> jax.Array:
  return positions.reshape(streams, -1).astype(jnp.int32)


def _timescale(p: Problem, a: Arrays, head_size: int) -> jax.Array:
  base = p.base_frequency if a.base is None else a.base
  return rope_timescale(head_size // 2, base, jnp.float32)[None]


def forward(p: Problem, a: Arrays) -> Outs:
  """The rotation."""
  return Outs(rotated(p, a, a.x, 1))


def backward(p: Problem, saved: Saved, d: Outs) -> Arrays:
  """A rotation's transpose is the rotation by the negative angle."""
  return Arrays(rotated(p, saved.arrays, d.y, -1), None)
