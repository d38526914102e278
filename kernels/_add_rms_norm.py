"""RMSNorm with the residual addition before it, in one pass over HBM.

Maths, for every row of x and of the residual, in R^D:

    h = x + residual                 rounded to the wider of their dtypes
    y = rms_norm(h)

    dh += the gradient of the norm   backward: both inputs get dh, which is
                                     given as far as it comes by other ways

Traffic: forward 2 reads and 2 writes of [R, D], backward 3 reads and 1 write:
bound by HBM.  Apart, the two would write h and read it once more.

A residual stream in float32 beside sub-layers in bfloat16 is read and written
as it is: x, residual and y have dtypes of their own.

Tiling: that of `_rms_norm.py`, whose kernels these are.
"""

from __future__ import annotations

from typing import Any

import jax

from ._frame import switches
from ._frame.check import Implementation
from ._frame.kernel import Saved, kernel_op
from ._frame.op import Cost, Op, nbytes
from ._rms_norm import (
  around,
  backward,
  forward,
  reference,
  rms_norm_reference,
  split,
)
from ._row_norm import (
  BENCHES,
  TESTS,
  Arrays,
  Norm,
  Outs,
  Problem,
  RMSNormConfig,
  cases,
  problem_of,
)

# --- specification ------------------------------------------------------------


@switches.plain
def add_rms_norm_reference(
  x: jax.Array,
  residual: jax.Array,
  scale: jax.Array | None = None,
  *,
  epsilon: float | jax.Array = 1e-6,
  scale_offset: float | jax.Array = 0.0,
  out_dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """The residual addition, then the norm of the sum.  The specification."""
  h = x + residual
  y = rms_norm_reference(
    h,
    scale,
    epsilon=epsilon,
    scale_offset=scale_offset,
    out_dtype=out_dtype,
  )
  return y, h


# --- the op -------------------------------------------------------------------


def _plain_backward(p: Problem, saved: Saved, d: Outs) -> Arrays:
  """The reference's gradients from the sum h, which alone is saved."""

  def of_sum(h: jax.Array, scale: Any, epsilon: Any) -> jax.Array:
    return reference(p, Arrays(h, None, scale, epsilon)).y

  a = saved.arrays
  dh, dscale, depsilon = jax.vjp(of_sum, saved.outs.h, a.scale, a.epsilon)[1](
    d.y
  )
  dh += d.h
  given = Arrays(dh, dh, dscale, depsilon)
  if p.narrow is None:
    return given
  name, dtype = p.narrow
  return given._replace(**{name: dh.astype(dtype)})


_add_rms_norm = kernel_op(
  "add_rms_norm",
  reference=reference,
  forward=forward,
  backward=backward,
  saves=("scale", "epsilon", "h"),
  plain_backward=_plain_backward,
  split=split,
  around=around,
)

# --- public -------------------------------------------------------------------


@switches.plain
def add_rms_norm(
  x: jax.Array,
  residual: jax.Array,
  scale: jax.Array | None = None,
  *,
  epsilon: float | jax.Array = 1e-6,
  scale_offset: float | jax.Array = 0.0,
  out_dtype: Any = None,
  implementation: Implementation = None,
  config: RMSNormConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The residual addition and the norm of the sum, in one pass over HBM.

  Args:
    x: [..., D] float32, bfloat16 or float16, a sub-layer's output.
    residual: [..., D] of x's shape, the residual stream; of two dtypes the
      wider is that of the sum.
    scale: as in `rms_norm`.
    epsilon: as in `rms_norm`.
    scale_offset: as in `rms_norm`.
    out_dtype: of the norm, bfloat16 beside a stream in float32; None is that of
      the sum.
    implementation: as in `rms_norm`.
    config: tile sizes; None picks them from the shape.

  Returns:
    (normed, x + residual), both [..., D].  The norm is that of the sum as
    returned, after rounding.

  Raises:
    ValueError: as `rms_norm`, and if residual differs from x in shape.
  """
  norm, op = Norm(scale, epsilon, scale_offset), "add_rms_norm"
  given = problem_of(op, x, residual, norm, out_dtype, implementation, config)
  y, h = _add_rms_norm(*given)
  return y if out_dtype is None else y.astype(out_dtype), h


# --- registration -------------------------------------------------------------


def _cost(x, residual, scale, **_) -> tuple[Cost, Cost]:
  row, gain = nbytes(x), nbytes(scale)
  return Cost(0, 4 * row + gain), Cost(0, 4 * row + 2 * gain)


OP = Op(
  name="add_rms_norm",
  function=add_rms_norm,
  reference=add_rms_norm_reference,
  cost=_cost,
  tests=cases(2, *TESTS),
  benches=cases(2, *BENCHES),
)
