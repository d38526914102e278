"""Fused RMSNorm: the op, and the kernels of `add_rms_norm` too.

Maths, for every row x in R^D of the input, a scale s in R^D and an offset o
(1 for Gemma, whose stored scale is centred at zero; 0 for Llama):

    r  = rsqrt(mean(x^2) + epsilon)         one scalar per row, float32
    y  = x * r * (o + s)

    g  = dy * (o + s)                       backward
    dx = r * (g - x * mean(g * x) / (mean(x^2) + epsilon))
    ds = sum over rows of dy * x * r

Without a scale o + s is 1.  `add_rms_norm`, in `_add_rms_norm.py`, normalises
h = x + residual, rounded to the wider of their dtypes, and returns h too; the
kernels here do either, and write y in a dtype of its own.

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

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ._frame import switches, tpu
from ._frame.check import Implementation
from ._frame.kernel import Saved, kernel_op
from ._frame.manual import varying_like
from ._frame.op import Cost, Op, nbytes
from ._frame.sharding import Axes, Split, leading_dims
from ._row_norm import (
  BENCHES,
  TESTS,
  Arrays,
  Norm,
  Outs,
  Problem,
  RMSNormConfig,
  RowNorm,
  as_rows,
  cases,
  epsilon_operand,
  problem_of,
)

# --- specification ------------------------------------------------------------


@switches.plain
def rms_norm_reference(
  x: jax.Array,
  scale: jax.Array | None = None,
  *,
  epsilon: float | jax.Array = 1e-6,
  scale_offset: float | jax.Array = 0.0,
  out_dtype: Any = None,
) -> jax.Array:
  """The maths of the module docstring in plain jnp.  The specification."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  x_wide = x.astype(wide)
  mean_square = jnp.mean(x_wide * x_wide, axis=-1, keepdims=True)
  r = jax.lax.rsqrt(mean_square + epsilon)
  gain = 1.0 if scale is None else scale_offset + scale.astype(wide)
  return (x_wide * r * gain).astype(out_dtype or x.dtype)


# --- the problem --------------------------------------------------------------
# `Problem`, `Arrays` (x, residual, scale, epsilon) and `Outs` (y, h) are those
# of both ops, in `_row_norm.py`; rms_norm has no residual and no sum h.


def reference(p: Problem, a: Arrays) -> Outs:
  """The specification of both ops."""
  h = None if a.residual is None else a.x + a.residual
  x, norm = a.x if h is None else h, p.norm.at(a.epsilon)
  y = rms_norm_reference(
    x,
    a.scale,
    epsilon=norm.epsilon,
    scale_offset=norm.scale_offset,
    out_dtype=p.out_dtype,
  )
  return Outs(y, h)


# --- forward ------------------------------------------------------------------
# One grid step: a tile of rows, whole.
#   1. add        h = x + residual, rounded, if there is a residual
#   2. normalise  y = h * rsqrt(mean(h^2) + epsilon) * (offset + scale)


class _ForwardInputs(NamedTuple):
  x: Any  # [rows, D]
  residual: Any  # [rows, D], or None
  scale: Any  # [1, D], or None
  epsilon: Any  # [1, 1], or None if it is static


class _ForwardOutputs(NamedTuple):
  y: Any  # [rows, D]
  h: Any  # [rows, D], or None


def _float32(ref: Any) -> jax.Array:
  return ref[...].astype(jnp.float32)


def _whole(ref: Any) -> Any:
  return None if ref is None else ref[...]


def _as_row(scale: Any) -> Any:
  return None if scale is None else scale[None, :]


def _forward_kernel(i: _ForwardInputs, o: _ForwardOutputs, *, norm: RowNorm):
  x = _float32(i.x)
  if i.residual is not None:
    h = x + _float32(i.residual)
    o.h[...] = h.astype(o.h.dtype)
    x = _float32(o.h)  # the norm is that of the sum as it is returned
  # x * rsqrt(mean(x^2) + epsilon) * (offset + scale)
  y = norm.at(i.epsilon).of(x, _whole(i.scale))
  o.y[...] = y.astype(o.y.dtype)


def forward(p: Problem, a: Arrays) -> Outs:
  """One kernel, with the addition or without."""
  x, residual = as_rows(a.x), as_rows(a.residual)
  has, d = residual is not None, x.shape[1]
  of_sum = jnp.promote_types(x.dtype, residual.dtype) if has else x.dtype
  h = varying_like(x, x.shape, of_sum)
  n, rows = x.shape[0], p.rows(h)
  epsilon, one = epsilon_operand(a.epsilon)
  tile = pl.BlockSpec((rows, d), lambda i: (i, 0))
  whole = pl.BlockSpec((1, d), lambda i: (0, 0))
  gain = None if a.scale is None else whole
  vmem = p.vmem_bytes(h, 4 if has else 2, 1)
  y = varying_like(x, x.shape, p.dtype_of(h))
  (outs,) = pl.pallas_call(
    functools.partial(_forward_kernel, norm=p.norm),
    name="add_rms_norm_fwd" if has else "rms_norm_fwd",
    grid=(pl.cdiv(n, rows),),
    in_specs=[_ForwardInputs(tile, tile if has else None, gain, one)],
    out_specs=[_ForwardOutputs(tile, tile if has else None)],
    out_shape=[_ForwardOutputs(y, h if has else None)],
    compiler_params=tpu.compiler_params(vmem),
  )(_ForwardInputs(x, residual, _as_row(a.scale), epsilon))
  return Outs(*jax.tree.map(lambda y: y.reshape(a.x.shape), outs))


# --- backward -----------------------------------------------------------------
# One grid step: a tile of rows, whole.
#   1. gradients  dx of the tile, and every row's part of dscale
#   2. add        the gradient that reaches h = x + residual by other ways
#   3. narrow     the same gradient again, if one of the inputs is narrower
#   4. sum        dscale over rows, in the block that stays for all steps


class _BackwardInputs(NamedTuple):
  x: Any  # [rows, D], of rms_norm; the sum h, of add_rms_norm
  scale: Any  # [1, D], or None
  epsilon: Any  # [1, 1], or None if it is static
  dy: Any  # [rows, D]
  dh: Any  # [rows, D], or None


class _BackwardOutputs(NamedTuple):
  dx: Any  # [rows, D] of x's dtype, or the sum's
  dnarrow: Any  # [rows, D] of a narrower input of the sum, or None
  dscale: Any  # [1, D] float32, the same block for every grid step, or None


def _backward_kernel(
  i: _BackwardInputs, o: _BackwardOutputs, *, norm: RowNorm, n: int
):
  step, rows = pl.program_id(0), i.x.shape[0]
  x, dy = _float32(i.x), _float32(i.dy)
  # g = dy * (offset + scale),  r = rsqrt(mean(x^2) + epsilon)
  # r * (g - x * mean(g * x) * r^2)   and   dy * x * r
  dx, dscale = norm.at(i.epsilon).gradients(x, _whole(i.scale), dy)
  if i.dh is not None:
    dx += _float32(i.dh)
  o.dx[...] = dx.astype(o.dx.dtype)
  if o.dnarrow is not None:
    o.dnarrow[...] = dx.astype(o.dnarrow.dtype)
  if o.dscale is None:
    return

  @pl.when(step == 0)
  def _():
    o.dscale[...] = jnp.zeros_like(o.dscale)

  if n % rows:
    # Rows past n hold undefined data, and this is the only sum across rows.
    dscale = tpu.zero_past(dscale, n - step * rows, axis=0)
  _add(o.dscale, jnp.sum(dscale, axis=0, keepdims=True))


def _add(ref: Any, part: jax.Array) -> None:
  ref[...] += part


def backward(p: Problem, saved: Saved, d: Outs) -> Arrays:
  """One kernel, with the gradient of the sum or without."""
  has = d.h is not None
  x, scale = saved.outs.h if has else saved.arrays.x, saved.arrays.scale
  shape, x = x.shape, as_rows(x)
  (n, width), rows = x.shape, p.rows(x)
  epsilon, one = epsilon_operand(saved.arrays.epsilon)
  vmem = p.vmem_bytes(x, (4 if has else 3) + (p.narrow is not None), 3.5)
  tile = pl.BlockSpec((rows, width), lambda i: (i, 0))
  whole = pl.BlockSpec((1, width), lambda i: (0, 0))
  gain = None if scale is None else whole
  like = functools.partial(varying_like, x)
  types = _BackwardOutputs(
    like(x.shape, x.dtype),
    None if p.narrow is None else like(x.shape, p.narrow[1]),
    None if scale is None else like((1, width), jnp.float32),
  )
  (grads,) = pl.pallas_call(
    functools.partial(_backward_kernel, norm=p.norm, n=n),
    name="add_rms_norm_bwd" if has else "rms_norm_bwd",
    grid=(pl.cdiv(n, rows),),
    in_specs=[_BackwardInputs(tile, gain, one, tile, tile if has else None)],
    out_specs=[_BackwardOutputs(tile, types.dnarrow and tile, gain)],
    out_shape=[types],
    compiler_params=tpu.compiler_params(vmem),
  )(_BackwardInputs(x, _as_row(scale), epsilon, as_rows(d.y), as_rows(d.h)))
  dx = grads.dx.reshape(shape)
  given = Arrays(dx, dx if has else None, None)
  if scale is not None:
    given = given._replace(scale=grads.dscale[0].astype(scale.dtype))
  if p.narrow is None:
    return given
  return given._replace(**{p.narrow[0]: grads.dnarrow.reshape(shape)})


# --- the op ------------------------------------------------------------------


def split(p: Problem, a: Arrays) -> Split:
  """Over rows."""
  del p
  rows = leading_dims(a.x.ndim - 1) + "D"
  added = None if a.residual is None else rows
  epsilon = None if a.epsilon is None else ""
  scale = None if a.scale is None else "D"
  arrays = Arrays(rows, added, scale, epsilon)
  return Split(arrays, Outs(rows, added), over="BTD")


def around(op: Any, p: Problem, a: Arrays, axes: Mapping[str, Axes]) -> Outs:
  """A device with whole rows; one with a part of each sums over the others."""
  if not axes.get("D"):
    return op(p, a)
  h = a.x if a.residual is None else a.x + a.residual
  y = p.norm.at(a.epsilon).of_split(h.astype(jnp.float32), a.scale, axes["D"])
  return Outs(y.astype(p.dtype_of(h)), None if a.residual is None else h)


_rms_norm = kernel_op(
  "rms_norm",
  reference=reference,
  forward=forward,
  backward=backward,
  saves=("x", "scale", "epsilon"),
  split=split,
  around=around,
)

# --- public -------------------------------------------------------------------


@switches.plain
def rms_norm(
  x: jax.Array,
  scale: jax.Array | None = None,
  *,
  epsilon: float | jax.Array = 1e-6,
  scale_offset: float | jax.Array = 0.0,
  out_dtype: Any = None,
  implementation: Implementation = None,
  config: RMSNormConfig | None = None,
) -> jax.Array:
  """Root-mean-square normalisation, y = x / rms(x) * (scale_offset + scale).

  Zhang and Sennrich, arXiv 1910.07467; Gemma's form, arXiv 2403.08295 §2.

  Args:
    x: [..., D] float32, bfloat16 or float16.
    scale: [D] float32, bfloat16 or float16, whatever x is; None for none, y = x
      / rms(x), and then without an offset.
    epsilon: added to the mean square, in the units of x squared; it may be
      traced, and so may the offset, but the kernel has no gradient for it.
    scale_offset: added to the scale: 1.0 for Gemma, where a stored zero means
      an identity scale; 0.0 for Llama.
    out_dtype: of the result, float32, bfloat16 or float16; None is x's.
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: tile sizes; None picks them from the shape.

  Returns:
    [..., D] of x's dtype, or `out_dtype`.  The arithmetic is float32.

  Raises:
    ValueError: on a scale of another shape than (D,), another dtype, an offset
      without a scale, or a negative epsilon.
  """
  norm, op = Norm(scale, epsilon, scale_offset), "rms_norm"
  given = problem_of(op, x, None, norm, out_dtype, implementation, config)
  y = _rms_norm(*given).y
  return y if out_dtype is None else y.astype(out_dtype)


# --- registration -------------------------------------------------------------


def _cost(x, scale, **_) -> tuple[Cost, Cost]:
  row, gain = nbytes(x), nbytes(scale)
  return Cost(0, 2 * row + gain), Cost(0, 3 * row + 2 * gain)


OP = Op(
  name="rms_norm",
  function=rms_norm,
  reference=rms_norm_reference,
  cost=_cost,
  tests=cases(1, *TESTS),
  benches=cases(1, *BENCHES),
)
