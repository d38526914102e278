"""Fused RMSNorm, alone and with the residual addition before it.

Maths, for every row x in R^D of the input, a scale s in R^D and an offset o
(1 for Gemma, whose stored scale is centred at zero; 0 for Llama):

    r  = rsqrt(mean(x^2) + epsilon)         one scalar per row, float32
    y  = x * r * (o + s)

    g  = dy * (o + s)                       backward
    dx = r * (g - x * mean(g * x) / (mean(x^2) + epsilon))
    ds = sum over rows of dy * x * r

`add_rms_norm` normalises h = x + residual, rounded to the inputs' dtype, and
returns h too; its backward adds the gradient that reaches h by other ways.

Traffic: forward reads x and writes y; backward reads x and dy and writes dx
(r is recomputed: it costs nothing beside the bytes).  With the residual:
forward 2 reads and 2 writes, backward 3 reads and 1 write.  About 4 flops per
element against 4 bytes in bfloat16, where a v5e can do 240 per byte: bound by
HBM.  On v5e, 65536 rows of 2048 in bfloat16 take 983,040 cycles forward at
819 GB/s.  XLA needs 3 passes forward and 6 backward, against 2 and 3 here.

Tiling: the grid walks row tiles; a row is never split, so one VMEM pass
suffices.  ds stays in VMEM from the first tile to the last.

        D (whole row)
      +--------------+
      |    tile 0    | rows      grid = (ceil(R / rows),)
      +--------------+
      |    tile 1    |           the last tile may hang over the end: what it
      +--------------+           holds there is undefined, and is kept out of ds
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._norm import Norm, RowNorm, check_norm
from ._op import (
  Case,
  Cost,
  Implementation,
  Op,
  check_float,
  check_implementation,
  check_shape,
  dispatch,
  nbytes,
)
from ._sharding import leading_dims, like, per_device

# --- specification ------------------------------------------------------------


def rms_norm_reference(
  x: jax.Array,
  scale: jax.Array,
  *,
  epsilon: float = 1e-6,
  scale_offset: float = 0.0,
) -> jax.Array:
  """The maths of the module docstring in plain jnp.  The specification."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  x_wide = x.astype(wide)
  mean_square = jnp.mean(x_wide * x_wide, axis=-1, keepdims=True)
  r = jax.lax.rsqrt(mean_square + epsilon)
  return (x_wide * r * (scale_offset + scale.astype(wide))).astype(x.dtype)


def add_rms_norm_reference(
  x: jax.Array,
  residual: jax.Array,
  scale: jax.Array,
  *,
  epsilon: float = 1e-6,
  scale_offset: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """The residual addition, then the norm of the sum.  The specification."""
  h = x + residual
  y = rms_norm_reference(h, scale, epsilon=epsilon, scale_offset=scale_offset)
  return y, h


# --- configuration ------------------------------------------------------------

_TILE_BYTES = 1 << 20
_VMEM_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNormConfig:
  """Tile sizes.  They change speed, never results beyond rounding.

  Attributes:
    rows: rows per grid step; a multiple of 16 (the bfloat16 sublane count).
  """

  rows: int = 256

  def __post_init__(self):
    if self.rows <= 0 or self.rows % 16:
      raise ValueError(
        f"RMSNormConfig: rows must be a positive multiple of 16, "
        f"got {self.rows}"
      )

  @classmethod
  def fitting(cls, width: int, dtype: jnp.dtype) -> RMSNormConfig:
    """Tiles of a megabyte per operand.

    Large enough to hide a grid step's overhead behind its copies, small enough
    that the first load and the last store, which nothing hides, cost little;
    with two buffers per operand and the float32 temporaries a grid step stays
    far below `_VMEM_BYTES`.
    """
    row_bytes = pl.cdiv(width, 128) * 128 * jnp.dtype(dtype).itemsize
    rows = _TILE_BYTES // row_bytes // 16 * 16
    return cls(rows=min(max(rows, 16), 1024))


@dataclasses.dataclass(frozen=True)
class _Static:
  """Everything that is not an array, in one hashable piece."""

  norm: RowNorm
  implementation: Implementation
  config: RMSNormConfig


def _row_tiles(rows: int, width: int) -> tuple[pl.BlockSpec, pl.BlockSpec]:
  """Block specs of a [R, D] operand and of a [1, D] operand."""
  return (
    pl.BlockSpec((rows, width), lambda i: (i, 0)),
    pl.BlockSpec((1, width), lambda i: (0, 0)),
  )


# The grid runs in order, as the sum over tiles needs; a v5e has one core, so
# nothing is lost where it would not have to.
_PARAMS = pltpu.CompilerParams(vmem_limit_bytes=_VMEM_BYTES)


# --- forward ------------------------------------------------------------------


def _fwd_kernel(
  x_ref,  # [rows, D]
  scale_ref,  # [1, D]
  y_ref,  # [rows, D]
  *,
  static: _Static,
):
  x = x_ref[...].astype(jnp.float32)
  y_ref[...] = static.norm.of(x, scale_ref[...]).astype(y_ref.dtype)


def _add_fwd_kernel(
  x_ref,  # [rows, D]
  residual_ref,  # [rows, D]
  scale_ref,  # [1, D]
  y_ref,  # [rows, D]
  h_ref,  # [rows, D]
  *,
  static: _Static,
):
  wide = x_ref[...].astype(jnp.float32) + residual_ref[...].astype(jnp.float32)
  h_ref[...] = wide.astype(h_ref.dtype)
  _fwd_kernel(h_ref, scale_ref, y_ref, static=static)


def _fwd(static: _Static, x: jax.Array, scale: jax.Array) -> jax.Array:
  n, d = x.shape
  tile, whole = _row_tiles(static.config.rows, d)
  return pl.pallas_call(
    functools.partial(_fwd_kernel, static=static),
    name="rms_norm_fwd",
    grid=(pl.cdiv(n, static.config.rows),),
    in_specs=[tile, whole],
    out_specs=tile,
    out_shape=like(x.shape, x.dtype, x),
    compiler_params=_PARAMS,
  )(x, scale[None, :])


def _add_fwd(
  static: _Static, x: jax.Array, residual: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  n, d = x.shape
  tile, whole = _row_tiles(static.config.rows, d)
  y, h = pl.pallas_call(
    functools.partial(_add_fwd_kernel, static=static),
    name="add_rms_norm_fwd",
    grid=(pl.cdiv(n, static.config.rows),),
    in_specs=[tile, tile, whole],
    out_specs=[tile, tile],
    out_shape=[like(x.shape, x.dtype, x)] * 2,
    compiler_params=_PARAMS,
  )(x, residual, scale[None, :])
  return y, h


# --- backward -----------------------------------------------------------------


def _bwd_kernel(
  x_ref,  # [rows, D]
  scale_ref,  # [1, D]
  dy_ref,  # [rows, D]
  *refs,  # dh [rows, D] of add_rms_norm; then the outputs:
  # dx_ref [rows, D]
  # dscale_ref [1, D] float32, revisited by every grid step
  static: _Static,
  n: int,
):
  *dh_ref, dx_ref, dscale_ref = refs
  i = pl.program_id(0)
  rows = x_ref.shape[0]
  x = x_ref[...].astype(jnp.float32)
  dy = dy_ref[...].astype(jnp.float32)
  dx, dscale = static.norm.gradients(x, scale_ref[...], dy)
  if dh_ref:
    dx += dh_ref[0][...].astype(jnp.float32)
  dx_ref[...] = dx.astype(dx_ref.dtype)

  @pl.when(i == 0)
  def _():
    dscale_ref[...] = jnp.zeros_like(dscale_ref)

  # Rows past n hold undefined data, and this is the only sum across rows.
  row_ids = i * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
  if n % rows:
    dscale = jnp.where(row_ids < n, dscale, 0.0)
  dscale_ref[...] += jnp.sum(dscale, axis=0, keepdims=True)


def _bwd(
  static: _Static, x: jax.Array, scale: jax.Array, *cotangents: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """dx and dscale from (dy,) for rms_norm, from (dy, dh) for add_rms_norm."""
  n, d = x.shape
  tile, whole = _row_tiles(static.config.rows, d)
  dx, dscale = pl.pallas_call(
    functools.partial(_bwd_kernel, static=static, n=n),
    name="rms_norm_bwd" if len(cotangents) == 1 else "add_rms_norm_bwd",
    grid=(pl.cdiv(n, static.config.rows),),
    in_specs=[tile, whole, *[tile] * len(cotangents)],
    out_specs=[tile, whole],
    out_shape=[like(x.shape, x.dtype, x), like((1, d), jnp.float32, x)],
    compiler_params=_PARAMS,
  )(x, scale[None, :], *cotangents)
  return dx, dscale[0].astype(scale.dtype)


# --- differentiation ----------------------------------------------------------
# Residuals are the inputs of the norm: x, or the sum h, which is an output.


def _reference(static: _Static, x: jax.Array, scale: jax.Array) -> jax.Array:
  return rms_norm_reference(
    x,
    scale,
    epsilon=static.norm.epsilon,
    scale_offset=static.norm.scale_offset,
  )


def _reference_bwd(
  static: _Static, x: jax.Array, scale: jax.Array, dy: jax.Array, *dh: jax.Array
) -> tuple[jax.Array, jax.Array]:
  _, vjp = jax.vjp(functools.partial(_reference, static), x, scale)
  dx, dscale = vjp(dy)
  return (dx + dh[0] if dh else dx), dscale


def _rms_norm_primal(
  static: _Static, x: jax.Array, scale: jax.Array
) -> jax.Array:
  return dispatch(
    static.implementation,
    functools.partial(_fwd, static),
    functools.partial(_reference, static),
    x,
    scale,
  )


def _backward(static: _Static, *args: jax.Array) -> tuple[jax.Array, ...]:
  return dispatch(
    static.implementation,
    functools.partial(_bwd, static),
    functools.partial(_reference_bwd, static),
    *args,
  )


_rms_norm = jax.custom_vjp(_rms_norm_primal, nondiff_argnums=(0,))
_rms_norm.defvjp(
  lambda static, x, scale: (_rms_norm_primal(static, x, scale), (x, scale)),
  lambda static, saved, dy: _backward(static, *saved, dy),
)


def _add_rms_norm_primal(
  static: _Static, x: jax.Array, residual: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  def reference(x, residual, scale):
    h = x + residual
    return _reference(static, h, scale), h

  return dispatch(
    static.implementation,
    functools.partial(_add_fwd, static),
    reference,
    x,
    residual,
    scale,
  )


def _add_rms_norm_fwd(static, x, residual, scale):
  y, h = _add_rms_norm_primal(static, x, residual, scale)
  return (y, h), (h, scale)


def _add_rms_norm_bwd(static, saved, cotangents):
  dh, dscale = _backward(static, *saved, *cotangents)
  return dh, dh, dscale


_add_rms_norm = jax.custom_vjp(_add_rms_norm_primal, nondiff_argnums=(0,))
_add_rms_norm.defvjp(_add_rms_norm_fwd, _add_rms_norm_bwd)

# --- public -------------------------------------------------------------------


def _check(op: str, x, scale, epsilon, implementation) -> None:
  check_implementation(op, implementation)
  if x.ndim == 0:
    raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
  check_float(op, x=x)
  check_norm(op, x, Norm(scale, epsilon))


def _by_rows(function, *args: jax.Array):
  """Applies `function` to args [..., D] seen as [R, D]; scale comes last."""
  *tensors, scale = args
  shape = tensors[0].shape
  rows = [t.reshape(-1, shape[-1]) for t in tensors]
  return jax.tree.map(lambda y: y.reshape(shape), function(*rows, scale))


def rms_norm(
  x: jax.Array,
  scale: jax.Array,
  *,
  epsilon: float = 1e-6,
  scale_offset: float = 0.0,
  implementation: Implementation = None,
  config: RMSNormConfig | None = None,
) -> jax.Array:
  """Root-mean-square normalisation, y = x / rms(x) * (scale_offset + scale).

  Zhang and Sennrich, arXiv 1910.07467; Gemma's form, arXiv 2403.08295 §2.

  Args:
    x: [..., D] float32 or bfloat16.
    scale: [D] float32 or bfloat16.
    epsilon: added to the mean square, in the units of x squared.
    scale_offset: added to the scale: 1.0 for Gemma, where a stored zero means
      an identity scale; 0.0 for Llama.
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: tile sizes; None picks them from the shape.

  Returns:
    [..., D] of x's dtype.  The arithmetic is float32.

  Raises:
    ValueError: on a scale of another shape than (D,), a dtype other than
      float32 or bfloat16, a negative epsilon, or an x whose last dimension is
      split over a mesh.
  """
  _check("rms_norm", x, scale, epsilon, implementation)
  if implementation == "xla" or x.size == 0:
    return rms_norm_reference(
      x, scale, epsilon=epsilon, scale_offset=scale_offset
    )
  config = config or RMSNormConfig.fitting(x.shape[-1], x.dtype)
  static = _Static(RowNorm(epsilon, scale_offset), implementation, config)
  dims = (*leading_dims(x.ndim - 1), "D")
  return per_device(
    "rms_norm",
    functools.partial(_by_rows, functools.partial(_rms_norm, static)),
    (x, scale),
    (dims, ("D",)),
    dims,
    splits="BT",
  )


def add_rms_norm(
  x: jax.Array,
  residual: jax.Array,
  scale: jax.Array,
  *,
  epsilon: float = 1e-6,
  scale_offset: float = 0.0,
  implementation: Implementation = None,
  config: RMSNormConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The residual addition and the norm of the sum, in one pass over HBM.

  Args:
    x: [..., D] float32 or bfloat16, a sub-layer's output.
    residual: [..., D] of x's shape and dtype, the residual stream.
    scale: as in `rms_norm`.
    epsilon: as in `rms_norm`.
    scale_offset: as in `rms_norm`.
    implementation: as in `rms_norm`.
    config: tile sizes; None picks them from the shape.

  Returns:
    (normed, x + residual), both [..., D] of x's dtype.  The norm is that of the
    sum as returned, after rounding.

  Raises:
    ValueError: as `rms_norm`, and if residual differs from x in shape or dtype.
  """
  op = "add_rms_norm"
  _check(op, x, scale, epsilon, implementation)
  check_shape(op, "residual", residual, x.shape, "the shape of x")
  if residual.dtype != x.dtype:
    raise ValueError(
      f"{op}: residual must have x's dtype {x.dtype}, got {residual.dtype}"
    )
  if implementation == "xla" or x.size == 0:
    return add_rms_norm_reference(
      x, residual, scale, epsilon=epsilon, scale_offset=scale_offset
    )
  config = config or RMSNormConfig.fitting(x.shape[-1], x.dtype)
  static = _Static(RowNorm(epsilon, scale_offset), implementation, config)
  dims = (*leading_dims(x.ndim - 1), "D")
  return per_device(
    op,
    functools.partial(_by_rows, functools.partial(_add_rms_norm, static)),
    (x, residual, scale),
    (dims, dims, ("D",)),
    (dims, dims),
    splits="BT",
  )


# --- registration -------------------------------------------------------------


def _cost(x, scale, **_) -> tuple[Cost, Cost]:
  row, gain = nbytes(x), nbytes(scale)
  return Cost(0, 2 * row + gain), Cost(0, 3 * row + 2 * gain)


def _add_cost(x, residual, scale, **_) -> tuple[Cost, Cost]:
  row, gain = nbytes(x), nbytes(scale)
  return Cost(0, 4 * row + gain), Cost(0, 4 * row + 2 * gain)


def _cases(arrays: int, *problems) -> tuple[Case, ...]:
  """Cases with `arrays` inputs of one shape and the scale."""
  cases = []
  for name, shape, dtype, *scale_dtype in problems:
    tensor = jax.ShapeDtypeStruct(shape, dtype)
    scale = jax.ShapeDtypeStruct(shape[-1:], *(scale_dtype or [jnp.float32]))
    cases.append(Case(name, (*[tensor] * arrays, scale), {"scale_offset": 1.0}))
  return tuple(cases)


_TESTS = (
  ("one_tile", (256, 128), jnp.float32),
  ("ragged_rows", (3, 100, 256), jnp.float32),
  ("ragged_width", (40, 100), jnp.float32),
  ("wide", (17, 2047), jnp.float32),
  ("tiles", (2100, 384), jnp.float32),
  ("column", (33, 1), jnp.float32),
  ("bf16", (2, 64, 256), jnp.bfloat16),
  ("bf16_ragged", (5, 7, 100), jnp.bfloat16, jnp.bfloat16),
)
_BENCHES = (
  ("gemma_2b_64k", (65536, 2048), jnp.bfloat16),
  ("gemma_2b_8k", (8192, 2048), jnp.bfloat16),
  ("gemma_7b_64k", (65536, 3072), jnp.bfloat16),
  ("gemma_7b_8k", (8192, 3072), jnp.bfloat16),
)

OP = Op(
  name="rms_norm",
  function=rms_norm,
  reference=rms_norm_reference,
  cost=_cost,
  tests=_cases(1, *_TESTS),
  benches=_cases(1, *_BENCHES),
)
ADD_OP = Op(
  name="add_rms_norm",
  function=add_rms_norm,
  reference=add_rms_norm_reference,
  cost=_add_cost,
  tests=_cases(2, *_TESTS),
  benches=_cases(2, *_BENCHES),
)
