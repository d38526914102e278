"""RMSNorm of whole rows in VMEM, for its own kernels and for others' input.

`_rms_norm.py` has the maths and the derivation.  All arithmetic is float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ._frame import tpu
from ._frame.check import (
  Implementation,
  as_array,
  as_float_dtype,
  as_floats,
  as_scalar,
  check_config,
  check_float,
  check_implementation,
  check_shape,
  is_size,
  register_with_numbers,
)
from ._frame.op import Case


@dataclasses.dataclass(frozen=True)
class Norm:
  """RMSNorm that an op takes of its input where it reads it.

  Attributes:
    scale: [D] float32, bfloat16 or float16, whatever the input is; None for
      none, as the norms of queries and keys may be.
    epsilon: added to the mean square, in the units of the input squared.
    scale_offset: added to the scale: 1.0 for Gemma, 0.0 for Llama.
  """

  scale: jax.Array | None = None
  epsilon: Any = 1e-6
  scale_offset: Any = 0.0


register_with_numbers(Norm, ["scale"], ["epsilon", "scale_offset"])


def as_norm(
  op: str, x: jax.Array, norm: Norm, prefix: str = ""
) -> tuple[RowNorm, jax.Array | None, jax.Array | None]:
  """A norm that fits x: what is static of it, its scale, a traced epsilon.

  A traced offset becomes part of the scale.  `prefix` is how errors call it.
  """
  name, scale = f"{prefix}scale", norm.scale
  if scale is not None:
    scale = as_array(op, name, scale)
    check_float(op, **{name: scale})
    check_shape(op, name, scale, x.shape[-1:], "x's last dimension")
  epsilon = as_scalar(op, f"{prefix}epsilon", norm.epsilon)
  offset = as_scalar(op, f"{prefix}scale_offset", norm.scale_offset)
  if isinstance(epsilon, float) and not epsilon >= 0:
    raise ValueError(
      f"{op}: {prefix}epsilon must not be negative, got {epsilon}"
    )
  if scale is None and not (isinstance(offset, float) and offset == 0):
    raise ValueError(
      f"{op}: {prefix}scale_offset must be 0 without a scale, got {offset}"
    )
  if scale is not None and not isinstance(offset, float):
    scale, offset = scale.astype(jnp.float32) + offset, 0.0
  if isinstance(epsilon, float):
    return RowNorm(epsilon, offset), scale, None
  return RowNorm(None, offset), scale, epsilon


@dataclasses.dataclass(frozen=True)
class RowNorm:
  """The norm of a tile of rows, and its gradients; hashable.

  Attributes:
    epsilon: as in `Norm`; None while it is an array of the op's.
    scale_offset: as in `Norm`.
  """

  epsilon: Any
  scale_offset: float

  def at(self, epsilon: Any) -> RowNorm:
    """This norm with an epsilon that is an array [1, 1]; None leaves it."""
    if epsilon is None:
      return self
    return dataclasses.replace(self, epsilon=epsilon[...])

  def of(self, x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """The norm of x [rows, D] with a scale [1, D], or none."""
    r = jax.lax.rsqrt(self._mean_square(x))
    return x * r * self._gain(scale)

  def of_split(
    self, x: jax.Array, scale: jax.Array | None, axes: tuple[str, ...]
  ) -> jax.Array:
    """The norm of rows of which every device has a part [..., D / devices].

    Plain jnp: the sum of the squares is all that the devices exchange.
    """
    squares = jax.lax.psum(jnp.sum(x * x, axis=-1, keepdims=True), axes)
    width = x.shape[-1] * jax.lax.axis_size(axes)
    return x * jax.lax.rsqrt(squares / width + self.epsilon) * self._gain(scale)

  def gradients(
    self, x: jax.Array, scale: jax.Array | None, dy: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """dx [rows, D], and each row's part of dscale [rows, D]."""
    mean_square = self._mean_square(x)
    r = jax.lax.rsqrt(mean_square)
    g = dy * self._gain(scale)
    if x.shape[1] > 1:
      mean_gx = jnp.mean(g * x, axis=-1, keepdims=True)
      dx = r * (g - x * (mean_gx / mean_square))
    else:
      # One column: the difference is epsilon / mean_square, and nothing but
      # rounding error would be left of it if it were computed as above.
      dx = r * (g * (self.epsilon / mean_square))
    return dx, dy * x * r

  def _mean_square(self, x: jax.Array) -> jax.Array:
    return jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon

  def _gain(self, scale: jax.Array | None) -> Any:
    if scale is None:
      return 1.0
    return self.scale_offset + scale.astype(jnp.float32)


def as_rows(x: Any) -> Any:
  """[..., D] as [R, D]; None stays None."""
  return None if x is None else x.reshape(-1, x.shape[-1])


def epsilon_operand(epsilon: Any) -> tuple[Any, Any]:
  """A traced epsilon as an operand [1, 1], and its block; None for None."""
  if epsilon is None:
    return None, None
  return epsilon.reshape(1, 1), pl.BlockSpec((1, 1), lambda *_: (0, 0))


# --- tiles of rows ------------------------------------------------------------

_TILE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNormConfig:
  """Tile sizes.  They change speed, never results beyond rounding.

  Attributes:
    rows: rows per grid step; a multiple of 16 (the bfloat16 sublane count).
  """

  rows: int = 256

  def __post_init__(self):
    if not is_size(self.rows, tpu.BFLOAT16_SUBLANES):
      raise ValueError(
        f"RMSNormConfig: rows must be a positive multiple of 16, "
        f"got {self.rows!r}"
      )

  @classmethod
  def fitting(cls, width: int, dtype: jnp.dtype) -> RMSNormConfig:
    """Tiles of a megabyte per operand.

    Large enough to hide a grid step's overhead behind its copies, small enough
    that the first load and the last store, which nothing hides, cost little.
    Two buffers per operand and float32 temporaries are far from filling VMEM.
    """
    row_bytes = tpu.lanes(width) * jnp.dtype(dtype).itemsize
    rows = _TILE_BYTES // row_bytes // 16 * 16
    return cls(rows=min(max(rows, 16), 1024))


# --- the problem of rms_norm and add_rms_norm ---------------------------------

_VMEM_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Problem:
  """Everything that is not an array.

  Attributes:
    norm: what is static of the norm.
    implementation: as the caller gave it.
    config: tile sizes, None for the op's own choice.
    out_dtype: of the norm; None is that of x, or of the sum.
    narrow: which of "x" and "residual" is narrower than their sum, and its
      dtype; None if both are of one.
  """

  norm: RowNorm
  implementation: Implementation
  config: RMSNormConfig | None
  out_dtype: Any = None
  narrow: tuple[str, Any] | None = None

  def dtype_of(self, x: jax.Array) -> Any:
    """Of the norm of x, or of the sum x."""
    return self.out_dtype or x.dtype

  def widest(self, x: jax.Array) -> jnp.dtype:
    """Of the arrays of a kernel with x, or with the sum x."""
    return max(x.dtype, jnp.dtype(self.dtype_of(x)), key=lambda d: d.itemsize)

  def rows(self, x: jax.Array) -> int:
    """Rows per grid step."""
    config = self.config or RMSNormConfig.fitting(x.shape[-1], self.widest(x))
    return config.rows

  def vmem_bytes(self, x: jax.Array, arrays: int, values: float) -> int:
    """For tiles of so many operands and, at the worst, float32 values."""
    lanes, op = tpu.lanes(x.shape[-1]), f"{'add_' * (arrays > 3)}rms_norm"
    tile = self.rows(x) * lanes
    needed = int((2 * arrays * self.widest(x).itemsize + 4 * values) * tile)
    needed += 3 * 4 * lanes  # the scale, and its gradient's two buffers
    return tpu.vmem_to_ask(op, needed, _VMEM_BYTES, f"D = {x.shape[-1]}")


class Arrays(NamedTuple):
  """What the op is given; rms_norm has no residual."""

  x: Any  # [..., D]
  residual: Any  # [..., D]
  scale: Any  # [D], or None
  epsilon: Any = None  # [] float32, if it is traced


class Outs(NamedTuple):
  """What the op gives; rms_norm has no sum."""

  y: Any  # [..., D], the norm
  h: Any  # [..., D], x + residual


def problem_of(
  op: str,
  x: Any,
  residual: Any,
  norm: Norm,
  out_dtype: Any,
  implementation: Implementation,
  config: RMSNormConfig | None,
) -> tuple[Problem, Arrays]:
  """What either op is given, checked."""
  check_implementation(op, implementation)
  check_config(op, config, RMSNormConfig)
  out_dtype = as_out_dtype(op, out_dtype)
  (x,) = as_floats(op, x=x)
  if x.ndim == 0:
    raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
  row_norm, scale, epsilon = as_norm(op, x, norm)
  problem = Problem(row_norm, implementation, config, out_dtype)
  if residual is None:
    return problem, Arrays(x, None, scale, epsilon)
  (residual,) = as_floats(op, residual=residual)
  check_shape(op, "residual", residual, x.shape, "the shape of x")
  of_sum = jnp.promote_types(x.dtype, residual.dtype)
  for name, array in dict(x=x, residual=residual).items():
    if array.dtype == jnp.bfloat16 != of_sum:  # float16 goes by float32
      problem = dataclasses.replace(problem, narrow=(name, array.dtype))
  return problem, Arrays(x, residual, scale, epsilon)


def as_out_dtype(op: str, out_dtype: Any) -> Any:
  """What the kernels write, in float32 what a TPU does not compute with."""
  dtype = as_float_dtype(op, "out_dtype", out_dtype)
  return jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype


# --- problems of the ops of their own -----------------------------------------


def cases(arrays: int, *problems) -> tuple[Case, ...]:
  """Cases with `arrays` inputs of one shape and the scale."""
  cases = []
  for name, shape, dtype, *scale_dtype in problems:
    tensor = jax.ShapeDtypeStruct(shape, dtype)
    scale = jax.ShapeDtypeStruct(shape[-1:], *(scale_dtype or [jnp.float32]))
    cases.append(Case(name, (*[tensor] * arrays, scale), {"scale_offset": 1.0}))
  return tuple(cases)


TESTS = (
  ("one_tile", (256, 128), jnp.float32),
  ("ragged_rows", (3, 100, 256), jnp.float32),
  ("ragged_width", (40, 100), jnp.float32),
  ("wide", (17, 2047), jnp.float32),
  ("tiles", (2100, 384), jnp.float32),
  ("column", (33, 1), jnp.float32),
  ("bf16", (2, 64, 256), jnp.bfloat16),
  ("bf16_ragged", (5, 7, 100), jnp.bfloat16, jnp.bfloat16),
)
BENCHES = (
  ("gemma_2b_64k", (65536, 2048), jnp.bfloat16),
  ("gemma_2b_8k", (8192, 2048), jnp.bfloat16),
  ("gemma_7b_64k", (65536, 3072), jnp.bfloat16),
  ("gemma_7b_8k", (8192, 3072), jnp.bfloat16),
)
