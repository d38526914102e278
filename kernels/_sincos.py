"""Sine and cosine of one angle, for kernels.

`jnp.sin` and `jnp.cos` each reduce their argument to a quadrant in a way that
is right for every float32, which on a vector unit takes far longer than the
two polynomials.  Here the reduction is shared, and is for the angles of
rotations: |angle| < 2^31, as int32 positions give.

Reduction, without more precision than float32 has.  An angle is taken apart
into a sum of three digits and a rest,

    angle = 2^20 d2 + 2^9 d1 + d0 + rest        d integers, |rest| <= 1/2

of 12, 11 and 9 bits, sign included.  Each digit counts units of so many
radians; a unit, in turns and without the whole ones, is stored in two parts,
high + low.  The high part has so few bits that its product with the digit is
exact in float32, and so is the sum of these products: all of them are multiples
of 2^-14 below 2^10.  From this exact sum the quarter turns are taken.  Only
what remains is rounded, and it is small: less than a quarter turn, to which the
low parts and the rest are added.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from ._frame import tpu

_TURN = Fraction("6.283185307179586476925286766559005768394338798750")
# Units of the digits, in radians, and what the high parts are multiples of.
_PLACES = ((1 << 20, 2**-12), (1 << 9, 2**-14), (1, 2**-14))

# Of sin(r) / r - 1 and cos(r) - 1 in powers of r^2, for |r| <= pi / 4: the
# series are wrong by 5e-9 and 2e-10 at most, less than a tenth of an ulp of 1.
_SIN = (-0.16666654, 0.0083321608, -0.00019515296)
_COS = (-0.5, 0.041666646, -0.0013887316, 2.4433157e-05)


def _parts(place: int, unit: float) -> tuple[float, float]:
  """A place's turns, modulo whole ones: a multiple of `unit`, and the rest."""
  turns = Fraction(place) / _TURN
  turns -= round(turns)
  high = round(turns / Fraction(unit)) * Fraction(unit)
  return float(high), float(np.float32(turns - high))


_WEIGHTS = tuple(_parts(*place) for place in _PLACES)
_TURNS_PER_RADIAN = float(1 / _TURN)


def sin_cos(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sine and cosine of angles in radians, |angle| < 2^31.

  Args:
    angle: float32 of any shape.

  Returns:
    Two arrays of that shape, float32, within 2e-7 of the truth.
  """
  rest, high, low = angle, jnp.zeros_like(angle), jnp.zeros_like(angle)
  for (place, _), (high_part, low_part) in zip(_PLACES, _WEIGHTS, strict=True):
    digit = _round(rest * (1 / place))
    rest -= digit * place
    high += digit * high_part
    low += digit * low_part
  low += rest * _TURNS_PER_RADIAN
  quarter = _round((high + low) * 4.0)
  r = ((high - quarter * 0.25) + low) * (2 * math.pi)
  square = r * r
  sin = r + r * square * _polynomial(square, _SIN)
  cos = 1.0 + square * _polynomial(square, _COS)
  return _after_quarters(quarter.astype(jnp.int32), sin, cos)


def _after_quarters(
  quarter: jax.Array, sin: jax.Array, cos: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Sine and cosine of an angle so many quarter turns further on.

  With each, sine becomes cosine and cosine becomes minus sine.
  """
  odd = (quarter & 1) == 1
  sin, cos = jnp.where(odd, cos, sin), jnp.where(odd, sin, cos)
  sin = jnp.where((quarter & 2) == 2, -sin, sin)
  cos = jnp.where(((quarter + 1) & 2) == 2, -cos, cos)
  return sin, cos


def _round(x: jax.Array) -> jax.Array:
  return jax.lax.round(x, jax.lax.RoundingMethod.TO_NEAREST_EVEN)


def _polynomial(x: jax.Array, coefficients: tuple[float, ...]) -> jax.Array:
  total = jnp.full_like(x, coefficients[-1])
  for coefficient in coefficients[-2::-1]:
    total = total * x + coefficient
  return total


# --- for kernels that rotate their own inputs ---------------------------------
# A row is two halves, which a rotation mixes.  Where these are whole registers,
# sines are needed for one half alone.  Else both halves have theirs, those of
# the first with the sign that it wants, and the halves change places by a
# rotation of lanes.


def timescales(timescale: jax.Array) -> jax.Array:
  """[..., H / 2] as `phases` wants it: a negative one gives a negative sine."""
  if timescale.shape[-1] % tpu.LANES == 0:
    return timescale
  return jnp.concatenate([-timescale, timescale], axis=-1)


def width(head_size: int) -> int:
  """Of the sines and cosines of a row: H / 2 or H."""
  half = head_size // 2
  return half if half % tpu.LANES == 0 else head_size


def phases(
  positions: jax.Array, timescale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """sin and cos [tokens, W] of positions [1, tokens] and timescale [1, W]."""
  column = tpu.lanes_to_column(positions)
  column = tpu.across(column, timescale.shape[1]).astype(jnp.float32)
  return sin_cos(column / timescale)


def of_both_halves(
  sin: jax.Array, cos: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """sin and cos [..., W], from those of one half, [..., H / 2]."""
  if sin.shape[-1] % tpu.LANES == 0:
    return sin, cos
  both = functools.partial(jnp.concatenate, axis=-1)
  return both([-sin, sin]), both([cos, cos])


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Rotates rows [..., H] by sin and cos [..., W]."""
  half, wide = x.shape[-1] // 2, x.astype(jnp.float32)
  if sin.shape[-1] == x.shape[-1]:
    rotated = wide * cos + _halves_swapped(wide) * sin
  else:
    first, second = wide[..., :half], wide[..., half:]
    parts = [first * cos - second * sin, second * cos + first * sin]
    rotated = jnp.concatenate(parts, axis=-1)
  return rotated.astype(x.dtype)


def _halves_swapped(x: jax.Array) -> jax.Array:
  half = x.shape[-1] // 2
  if x.shape[-1] % tpu.LANES == 0:
    return pltpu.roll(x, half, x.ndim - 1)
  return jnp.concatenate([x[..., half:], x[..., :half]], axis=-1)
