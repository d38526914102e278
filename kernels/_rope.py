"""Rotary position embedding (RoPE), half-split.

Maths, for a head x in R^H at position p, with h = H / 2 and 0 <= i < h:

    angle_i  = p / base_frequency^(i / h)       float32, whatever x's dtype
    y_i      = x_i     cos(angle_i) - x_(i+h) sin(angle_i)
    y_(i+h)  = x_(i+h) cos(angle_i) + x_i     sin(angle_i)

The backward is the same rotation by -angle; nothing is saved but p.

Traffic: x read once, y written once, in both directions.

Tiling: none yet; there is no Pallas kernel for this op.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ._op import (
  Case,
  Cost,
  Implementation,
  Integers,
  Op,
  check_float,
  check_implementation,
  check_shape,
  nbytes,
)

# --- specification ------------------------------------------------------------


def apply_rope_reference(
  x: jax.Array, positions: jax.Array, *, base_frequency: float = 10_000.0
) -> jax.Array:
  """The maths of the module docstring in plain jnp.  The specification."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  half = x.shape[-1] // 2
  exponent = jnp.arange(half, dtype=wide) / half
  timescale = jnp.asarray(base_frequency, wide) ** exponent
  # Position over timescale, as the released model has it: the product with the
  # reciprocal differs in the last bit, which large positions magnify.
  angle = positions[..., None, None].astype(wide) / timescale  # [B, T, 1, h]
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


# --- public -------------------------------------------------------------------


def check_rope(op: str, head_size: int, base_frequency: float) -> None:
  """Refuses what cannot be rotated in halves."""
  if head_size % 2:
    raise ValueError(f"{op}: RoPE needs an even head size H, got {head_size}")
  if not base_frequency > 0:
    raise ValueError(
      f"{op}: base_frequency must be positive, got {base_frequency}"
    )


def check_integers(op: str, name: str, array: jax.Array) -> None:
  """Refuses arrays that are not integers."""
  if not jnp.issubdtype(array.dtype, jnp.integer):
    raise ValueError(f"{op}: {name} must be integers, got {array.dtype}")


def apply_rope(
  x: jax.Array,
  positions: jax.Array,
  *,
  base_frequency: float = 10_000.0,
  implementation: Implementation = None,
  config: None = None,
) -> jax.Array:
  """Rotates each head by its token's position (RoFormer, arXiv 2104.09864).

  The two halves of a head are rotated against each other, as in GPT-NeoX,
  Llama and Gemma; not neighbouring pairs.

  Args:
    x: [B, T, N, H] float32 or bfloat16; H is even.
    positions: [B, T] integers, in tokens; any values, as packing needs.
    base_frequency: the base of the geometric series of wavelengths.
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: reserved for the kernel's tile sizes.

  Returns:
    [B, T, N, H] of x's dtype.  Phases and products are float32.

  Raises:
    ValueError: on a wrong shape or dtype, an odd H, or a base that is not
      positive.
    NotImplementedError: for implementation="pallas".
  """
  op = "apply_rope"
  check_implementation(op, implementation, pallas=OP.pallas)
  if x.ndim != 4:
    raise ValueError(f"{op}: x must be [B, T, N, H], got shape {x.shape}")
  check_float(op, x=x)
  check_shape(op, "positions", positions, x.shape[:2], "[B, T] of x")
  check_integers(op, "positions", positions)
  check_rope(op, x.shape[-1], base_frequency)
  return apply_rope_reference(x, positions, base_frequency=base_frequency)


# --- registration -------------------------------------------------------------


def _cost(x, positions, **_) -> tuple[Cost, Cost]:
  moved = 2 * nbytes(x) + nbytes(positions)
  return Cost(0, moved), Cost(0, moved)


def _case(name: str, shape: tuple[int, ...], dtype, top: int = 8192) -> Case:
  positions = Integers(
    shape[:2], lambda rng: rng.integers(0, top, shape[:2], np.int32)
  )
  return Case(name, (jax.ShapeDtypeStruct(shape, dtype), positions))


OP = Op(
  name="apply_rope",
  function=apply_rope,
  reference=apply_rope_reference,
  cost=_cost,
  tests=(
    _case("mqa", (2, 24, 8, 256), jnp.float32),
    _case("ragged", (1, 19, 3, 80), jnp.float32),
    _case("far", (1, 16, 2, 64), jnp.float32, top=1_000_000),
    _case("bf16", (2, 16, 4, 128), jnp.bfloat16),
  ),
  benches=(
    _case("gemma_2b_64k", (8, 8192, 8, 256), jnp.bfloat16),
    _case("gemma_2b_8k", (1, 8192, 8, 256), jnp.bfloat16),
  ),
  pallas=False,
)
