"""Page 3: what is rotated by what, and the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._frame import switches
from .._frame.check import (
  Implementation,
  as_integers,
  as_whole_number,
  register_with_numbers,
)
from .frequencies import RopeFrequencies
from .tiles import RopeConfig

BASE_FREQUENCY = 10_000.0  # of which nobody said anything else


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding that an op applies where it reads its inputs.

  Attributes:
    positions: [B, T] integers, of queries and keys alike; or [T], the same for
      the whole batch.  With frequencies of several streams [streams, B, T], or
      one of the former for all of them.  None with phases.
    base_frequency: the base of the geometric series of wavelengths; a traced
      one is carried through `jit` and `scan` as positions are.
    frequencies: those of a model that has others than a base says, or rotates a
      part of each head; they take the place of the base.
    interleaved: pairs are neighbours, as in GPT-J and the Llama of its authors;
      not an element of each half, as in GPT-NeoX, Gemma and Hugging Face's
      Llama.
    phases: (sin, cos), each [B, T, F] or [T, F] float32, in the place of all
      the above but `interleaved`; the first 2 F elements of a head are rotated.
  """

  positions: Any = None
  base_frequency: Any = BASE_FREQUENCY
  frequencies: RopeFrequencies | None = None
  interleaved: bool = False
  phases: tuple[Any, Any] | None = None

  @property
  def is_plain(self) -> bool:
    """Half against half of whole heads, by the frequencies of a base."""
    has_others = self.frequencies is not None or self.phases is not None
    return not (has_others or self.interleaved)

  def precomputed(self, head_size: int) -> Rope:
    """The same rotation by its phases, which are float32.

    For a scan over layers: XLA would compute those of positions in each layer.

    Args:
      head_size: H, of the heads that will be rotated.

    Raises:
      ValueError: if H is odd, or positions are no integers.
    """
    op = "Rope.precomputed"
    size = as_whole_number(op, "head_size", head_size)
    if size < 2 or size % 2:
      raise ValueError(f"{op}: head_size must be even, got {head_size}")
    rope = self
    if self.phases is None:
      positions = as_integers(op, "positions", self.positions)
      rope = dataclasses.replace(self, positions=positions)
    phases = phases_of(rope, size, jnp.float32)
    return Rope(interleaved=self.interleaved, phases=phases)

  def is_of_halves(self, head_size: int) -> bool:
    """Half against half of whole heads, by whatever frequencies or phases."""
    pairs = head_size // 2
    if self.phases is not None:
      pairs = self.phases[0].shape[-1]
    elif self.frequencies is not None:
      pairs = self.frequencies.values.shape[-1]
    return not self.interleaved and 2 * pairs == head_size


register_with_numbers(
  Rope,
  ["positions", "frequencies", "phases"],
  ["base_frequency", "interleaved"],
)

# --- the reference ------------------------------------------------------------


@switches.plain
def apply_rope_reference(
  x: jax.Array,
  positions: jax.Array | None = None,
  *,
  base_frequency: float | jax.Array = BASE_FREQUENCY,
  frequencies: RopeFrequencies | None = None,
  interleaved: bool = False,
  phases: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
  """The maths of the room's docstring in plain jnp.  The specification."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  rope = Rope(positions, base_frequency, frequencies, phases=phases)
  sin, cos = (_per_token(phase) for phase in phases_of(rope, x.shape[-1], wide))
  pairs = sin.shape[-1]
  turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
  if interleaved:
    first, second = turning[..., 0::2], turning[..., 1::2]
  else:
    first, second = turning[..., :pairs], turning[..., pairs:]
  first, second = first.astype(wide), second.astype(wide)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  if interleaved:
    y = jnp.stack(rotated, axis=-1).reshape(turning.shape)
  else:
    y = jnp.concatenate(rotated, axis=-1)
  return jnp.concatenate([y.astype(x.dtype), rest], axis=-1)


def phases_of(
  rope: Rope, head_size: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
  """Sines and cosines [B, T, F] or [T, F] of a dtype, times any scale."""
  if rope.phases is not None:
    sin, cos = (phase.astype(dtype) for phase in rope.phases)
    return sin, cos
  frequencies = rope.frequencies
  angle = _angles(
    head_size // 2, rope.positions, rope.base_frequency, frequencies, dtype
  )
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  if frequencies is not None and frequencies.attention_scale != 1.0:
    sin, cos = (frequencies.attention_scale * p for p in (sin, cos))
  return sin, cos


def _per_token(angle: jax.Array) -> jax.Array:
  """[T, F] or [B, T, F] to [B, T, 1, F], or what broadcasts to it."""
  return angle[..., None, :] if angle.ndim == 3 else angle[None, :, None, :]


def _angles(
  half: int, positions: Any, base: Any, frequencies: Any, dtype: Any
) -> jax.Array:
  if frequencies is None:
    # Position over timescale, as the released model has it: the product with
    # the reciprocal differs in the last bit, which large positions magnify.
    timescale = rope_timescale(half, base, dtype)
    return positions[..., None].astype(dtype) / timescale
  values = jnp.asarray(frequencies.values).astype(dtype)
  if positions.ndim == 3:  # [streams, B, T] to [B, T, F]
    streams = jnp.asarray(frequencies.streams)
    positions = jnp.moveaxis(positions[streams], 0, -1)
  else:
    positions = positions[..., None]
  return positions.astype(dtype) * values


def rope_timescale(half: int, base_frequency: Any, dtype) -> jax.Array:
  """Tokens per radian of each of the `half` frequencies."""
  exponent = jnp.arange(half, dtype=dtype) / half
  return jnp.asarray(base_frequency, dtype) ** exponent


def rotation_of(
  rotate: Callable[..., jax.Array], rope: Rope, **options: Any
) -> Callable[[jax.Array], jax.Array]:
  """x -> `rotate` of x by what a Rope says."""

  def of(x: jax.Array) -> jax.Array:
    return rotate(
      x,
      rope.positions,
      base_frequency=rope.base_frequency,
      frequencies=rope.frequencies,
      interleaved=rope.interleaved,
      phases=rope.phases,
      **options,
    )

  return of


# --- the problem --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
  """Everything that is not an array; a traced base frequency is one.

  Attributes:
    base_frequency: of a plain rotation.
    implementation: as the caller gave it.
    config: tile sizes, None for the op's own choice.
    attention_scale: multiplies what is rotated.
    streams: of each frequency, as in `RopeFrequencies`.
    interleaved: as in `Rope`.
  """

  base_frequency: float
  implementation: Implementation
  config: RopeConfig | None
  attention_scale: float = 1.0
  streams: tuple[int, ...] | None = None
  interleaved: bool = False


class Arrays(NamedTuple):
  """What the op is given."""

  x: Any  # [B, T, N, H]
  positions: Any  # [B, T] int32, or [streams, B, T], or None
  base: Any = None  # [] float32, if the base frequency is traced
  frequencies: Any = None  # [F] float32, if they are given
  sin: Any = None  # [B, T, F] float32, if phases are given
  cos: Any = None  # [B, T, F] float32


class Outs(NamedTuple):
  """What the op gives."""

  y: Any  # [B, T, N, H]


def reference(p: Problem, a: Arrays) -> Outs:
  """The specification, of the op's records."""
  frequencies = None
  if a.frequencies is not None:
    frequencies = RopeFrequencies(a.frequencies, p.attention_scale, p.streams)
  y = apply_rope_reference(
    a.x,
    a.positions,
    base_frequency=p.base_frequency if a.base is None else a.base,
    frequencies=frequencies,
    interleaved=p.interleaved,
    phases=None if a.sin is None else (a.sin, a.cos),
  )
  return Outs(y)
