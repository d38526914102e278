"""Gated linear units: GeGLU, SwiGLU, ReGLU.

Maths, for rows x in R^D, weights Wg, Wu [D, F], activation a:

    h = a(x Wg) * (x Wu)            Shazeer, arXiv 2002.05202

    dgate = dh * up * a'(gate)      backward, from gate = x Wg and up = x Wu
    dup   = dh * a(gate)
    dx    = dgate Wg^T + dup Wu^T
    dWg   = x^T dgate,   dWu = x^T dup

Traffic: bound by the MXU at thousands of rows: 2 matmuls forward, 4 backward
from saved gate and up, 6 when they are computed again.  The kernel reads the
weights once, x once for every F tile, and writes h once; gate and up exist in
VMEM alone unless they are saved.

Tiling: F tiles outside, row tiles inside; D is whole, so a tile of h is
finished in the step that starts it.  `_geglu_bwd.py` has the backward kernel.

             Wg Wu  +----+----+----+
                    | j=0| j=1| j=2|        a tile of both stays for all rows
      x  +---+      +----+----+----+
     i=0 |   |   h  | 0  | 2  | 4  |        the numbers are the order of steps
         +---+      +----+----+----+
     i=1 |   |      | 1  | 3  | 5  |
         +---+      +----+----+----+

With a norm the rows are outside: a tile of x is normalised once, into VMEM, for
all F tiles, and the weights are read once for every row tile.
"""

from __future__ import annotations

import functools
import types

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._activation import Activation, activate
from ._gated import (
  MODES,
  Static,
  by_rows,
  check,
  gate_and_up,
  gated,
  matmul_flops,
  model_cases,
  normed,
  small_cases,
  with_vjp,
)
from ._geglu_tiles import (
  COMPILER_PARAMS,
  FeedForwardConfig,
  dot,
  forward_tiles,
  normed_tile,
)
from ._norm import Norm
from ._op import Cost, Implementation, Op, nbytes
from ._sharding import leading_dims, like, per_device

# --- specification ------------------------------------------------------------


def geglu_reference(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  *,
  activation: Activation = "gelu_tanh",
  norm: Norm | None = None,
) -> jax.Array:
  """Two matmuls, the activation of one times the other.  The specification."""
  products = gate_and_up(normed(x, norm), w_gate, w_up)
  return gated(*products, activation, x.dtype)


# --- kernel -------------------------------------------------------------------


def _fwd_kernel(*refs, names: tuple[str, ...], static: Static):
  r = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
  x = normed_tile(static.norm, r)
  gate, up = (dot(x, w[...].astype(x.dtype)) for w in (r.w_gate, r.w_up))
  if hasattr(r, "gate"):
    r.gate[...] = gate.astype(r.gate.dtype)
    r.up[...] = up.astype(r.up.dtype)
  r.h[...] = (activate(static.activation, gate) * up).astype(r.h.dtype)


def _forward(
  static: Static, x: jax.Array, *operands: jax.Array, save: bool
) -> tuple[jax.Array, ...]:
  """h, and what is to be saved."""
  (w_gate, w_up), scale = static.split(operands)
  (n, d), f = x.shape, w_gate.shape[1]
  problem = static.problem(x, *operands, saved=save)
  tiles = forward_tiles("geglu", problem, static.config)

  def block(shape, index):
    """`index` is of the row tile and the F tile."""
    if problem.normed:
      return pl.BlockSpec(shape, index)
    return pl.BlockSpec(shape, lambda j, i: index(i, j))

  weight = block((d, tiles.cols), lambda i, j: (0, j))
  inputs = {
    "x": (x, block((tiles.rows, d), lambda i, j: (i, 0))),
    "w_gate": (w_gate, weight),
    "w_up": (w_up, weight),
  }
  tile = block((tiles.rows, tiles.cols), lambda i, j: (i, j))
  wide = (like((n, f), x.dtype, x), tile)
  outputs = {"h": wide} | ({"gate": wide, "up": wide} if save else {})
  scratch = {}
  if problem.normed:
    inputs["scale"] = (scale[0][None, :], block((1, d), lambda i, j: (0, 0)))
    if save:
      outputs["normed"] = (like((n, d), x.dtype, x), inputs["x"][1])
    else:
      scratch["normed"] = pltpu.VMEM((tiles.rows, d), x.dtype)
  grid = (pl.cdiv(n, tiles.rows), pl.cdiv(f, tiles.cols))
  results = pl.pallas_call(
    functools.partial(
      _fwd_kernel, names=(*inputs, *outputs, *scratch), static=static
    ),
    name="geglu_fwd",
    grid=grid if problem.normed else grid[::-1],
    in_specs=[spec for _, spec in inputs.values()],
    out_specs=[spec for _, spec in outputs.values()],
    out_shape=[shape for shape, _ in outputs.values()],
    scratch_shapes=list(scratch.values()),
    compiler_params=COMPILER_PARAMS,
  )(*(array for array, _ in inputs.values()))
  return tuple(results)


def _finish(static: Static, gate, up, dtype) -> jax.Array:
  return gated(gate, up, static.activation, dtype)


_geglu = with_vjp("geglu", _forward, _finish)

# --- public -------------------------------------------------------------------


def geglu(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  *,
  activation: Activation = "gelu_tanh",
  norm: Norm | None = None,
  implementation: Implementation = None,
  config: FeedForwardConfig | None = None,
) -> jax.Array:
  """Gated linear unit, activation(x w_gate) * (x w_up).

  Shazeer, arXiv 2002.05202; Gemma, arXiv 2403.08295 §2, takes the tanh
  approximation of GELU.

  Args:
    x: [..., D] float32 or bfloat16.
    w_gate: [D, F] float32 or bfloat16, the activated branch; computed with in
      x's dtype, to which the kernel casts its tiles.
    w_up: [D, F], the linear branch.
    activation: "gelu_tanh", "gelu" (exact), "silu" (SwiGLU) or "relu".
    norm: RMSNorm to be taken of x first, in the same pass over x; None for
      none.
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: what is kept for the backward pass, and tile sizes; None keeps gate
      and up, and what a norm makes of x, under the names "geglu_gate",
      "geglu_up" and "geglu_normed" for remat policies.

  Returns:
    [..., F] of x's dtype; sums and activation in float32.

  Raises:
    ValueError: on a wrong shape or dtype, an unknown activation, or an x whose
      last dimension is split over a mesh.
  """
  check("geglu", x, w_gate, w_up, activation, norm, implementation)
  if implementation == "xla" or 0 in (x.size, w_gate.size):
    return geglu_reference(x, w_gate, w_up, activation=activation, norm=norm)
  static = Static.of(activation, implementation, config, norm)
  rows = leading_dims(x.ndim - 1)
  scale = () if norm is None else (norm.scale,)
  return per_device(
    "geglu",
    functools.partial(by_rows, functools.partial(_geglu, static)),
    (x, w_gate, w_up, *scale),
    ((*rows, "D"), ("Dw", "F"), ("Dw", "F"), *[("Dw",) for _ in scale]),
    (*rows, "F"),
    splits="BTF",
    gathers=("Dw",),
  )


# --- registration -------------------------------------------------------------


def _cost(x, w_gate, w_up, **_) -> tuple[Cost, Cost]:
  one = matmul_flops(x, w_gate)
  h_bytes = nbytes(x) // x.shape[-1] * w_gate.shape[1]
  moved = nbytes(x, w_gate, w_up) + h_bytes
  return Cost(2 * one, moved), Cost(4 * one, 2 * moved)


OP = Op(
  name="geglu",
  function=geglu,
  reference=geglu_reference,
  cost=_cost,
  tests=small_cases(down=False),
  benches=model_cases(down=False),
  modes=MODES,
)
