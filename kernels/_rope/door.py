"""Page 6: what the public functions are given, as the op takes it, or refused.

Read it when an error message brings you here: nothing is computed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._frame.check import (
  as_array,
  as_floats,
  as_integers,
  as_scalar,
  as_switch,
  check_shape,
  is_traced,
)
from .frequencies import RopeFrequencies
from .spec import BASE_FREQUENCY, Rope


def as_rope(
  op: str, rope: Any, shape: tuple[Any, ...], prefix: str = "rope."
) -> Rope:
  """A rope that fits x of `shape` [B, T, N, H], or positions alone.

  Args:
    op: for errors.
    rope: a `Rope`, or positions.
    shape: of what is rotated.
    prefix: how errors call the rope's parts.

  Returns:
    A rope of int32 positions [B, T], or [streams, B, T], a base that is a
    number or traced, and float32 phases [B, T, F].
  """
  if not isinstance(rope, Rope):
    rope = Rope(as_array(op, "rope", rope))
  if rope.phases is not None or rope.frequencies is not None:
    _check_alone(op, rope, prefix)
  interleaved = as_switch(op, f"{prefix}interleaved", rope.interleaved)
  if rope.phases is not None:
    phases = _as_phases(op, rope.phases, shape, prefix)
    return Rope(None, interleaved=interleaved, phases=phases)
  frequencies = rope.frequencies
  if frequencies is not None:
    frequencies = _as_frequencies(op, frequencies, shape[3], prefix)
  positions = _as_positions(op, rope.positions, shape, frequencies, prefix)
  base = as_base(op, shape[3], rope.base_frequency)
  return Rope(positions, base, frequencies, interleaved)


def as_base(op: str, head_size: int, base_frequency: Any) -> Any:
  """The base, a number or traced; refuses what is not rotated in halves."""
  if head_size % 2:
    raise ValueError(f"{op}: RoPE needs an even head size H, got {head_size}")
  base = as_scalar(op, "base_frequency", base_frequency)
  if isinstance(base, float) and not base > 0:
    raise ValueError(f"{op}: base_frequency must be positive, got {base}")
  return base


def _check_alone(op: str, rope: Rope, prefix: str) -> None:
  """Whether nothing is said twice."""
  base = rope.base_frequency
  said = {
    f"{prefix}phases": rope.phases is not None,
    f"{prefix}frequencies": rope.frequencies is not None,
    f"{prefix}base_frequency": is_traced(base) or base != BASE_FREQUENCY,
  }
  if sum(said.values()) > 1:
    raise ValueError(
      f"{op}: wanted one of {', '.join(said)}, got "
      f"{' and '.join(name for name, given in said.items() if given)}"
    )
  if rope.phases is not None and rope.positions is not None:
    raise ValueError(
      f"{op}: {prefix}positions must be None with {prefix}phases, got both"
    )


def _as_frequencies(
  op: str, frequencies: Any, head_size: int, prefix: str
) -> RopeFrequencies:
  name = f"{prefix}frequencies"
  if not isinstance(frequencies, RopeFrequencies):
    raise ValueError(
      f"{op}: {name} must be a RopeFrequencies or None, got "
      f"{type(frequencies).__name__}"
    )
  values = as_array(op, name, frequencies.values).astype(jnp.float32)
  _check_pairs(op, name, values, head_size)
  return dataclasses.replace(frequencies, values=values)


def _check_pairs(op: str, name: str, values: jax.Array, head_size: int) -> None:
  pairs = values.shape[-1]
  if not 1 <= pairs <= head_size // 2:
    raise ValueError(
      f"{op}: {name} must be of 1 to {head_size // 2} pairs, the half of "
      f"H = {head_size}, got {pairs}"
    )


def _as_positions(
  op: str,
  value: Any,
  shape: tuple[Any, ...],
  frequencies: RopeFrequencies | None,
  prefix: str,
) -> jax.Array:
  name, (b, t) = f"{prefix}positions", shape[:2]
  positions = as_integers(op, name, value)
  streams = None if frequencies is None else frequencies.streams
  if streams is not None and positions.ndim == 3:
    least = max(streams) + 1
    if positions.shape[1:] != (b, t) or positions.shape[0] < least:
      raise ValueError(
        f"{op}: {name} must be [streams, B, T] with at least {least} streams, "
        f"B = {b} and T = {t}, got {positions.shape}"
      )
    return positions[:least]
  if positions.shape in ((t,), (1, t)) and positions.shape != (b, t):
    return jnp.broadcast_to(positions.reshape(1, t), (b, t))
  check_shape(op, name, positions, (b, t), "[B, T] of x, or [T]")
  return positions


def _as_phases(
  op: str, phases: Any, shape: tuple[Any, ...], prefix: str
) -> tuple[jax.Array, jax.Array]:
  name = f"{prefix}phases"
  if not isinstance(phases, tuple | list) or len(phases) != 2:
    raise ValueError(
      f"{op}: {name} must be a pair (sin, cos), got {type(phases).__name__}"
    )
  sin, cos = as_floats(op, **{f"{name}[0]": phases[0], f"{name}[1]": phases[1]})
  check_shape(op, f"{name}[1]", cos, sin.shape, f"the shape of {name}[0]")
  b, t = shape[:2]
  if sin.shape[:-1] not in ((t,), (b, t)):
    raise ValueError(
      f"{op}: {name} must be [B, T, F] or [T, F] with B = {b} and T = {t}, got "
      f"shape {sin.shape}"
    )
  _check_pairs(op, name, sin, shape[3])
  whole = (b, t, sin.shape[-1])
  sin, cos = (
    jnp.broadcast_to(x.astype(jnp.float32), whole) for x in (sin, cos)
  )
  return sin, cos
