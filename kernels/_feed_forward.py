"""The gated feed-forward block, in one kernel forward and one backward.

Maths, for rows x in R^D, weights Wg, Wu [D, F] and Wd [F, D], activation a:

    h = a(x Wg) * (x Wu)            Shazeer, arXiv 2002.05202
    y = h Wd

and with a norm and the residual, as a transformer's block has them,

    h = a(norm(x) Wg) * (norm(x) Wu)
    y = x + h Wd

`_geglu_bwd.py` has the backward pass.

Traffic: bound by the MXU at thousands of rows: 3 matmuls forward, 6 backward
from saved gate and up, 8 when they are computed again.  h exists one tile at a
time, in VMEM.  The kernel reads x and writes y once; it reads the weights once
for every row tile, 1.6 GiB for 8192 rows of Gemma 2B in tiles of 1024, a
quarter of what HBM moves in the time of the products.

Tiling: row tiles outside, F tiles inside; y is summed over F tiles in VMEM.  A
norm is taken of a row tile before its first F tile, and the residual is added
after its last: neither touches HBM.

                 F                          grid = (row tiles, F tiles)
        Wg Wu +----+----+----+
              | j=0| j=1| j=2|   D
     x        +----+----+----+     y
    +---+     +----+----+----+   +---+
    | i | ->  | h0 | h1 | h2 | ->| i |      y += h_j Wd_j
    +---+     +----+----+----+   +---+
"""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._activation import Activation, activate
from ._gated import (
  MODES,
  Static,
  by_rows,
  check,
  gated,
  matmul_flops,
  model_cases,
  small_cases,
  with_vjp,
)
from ._geglu import geglu_reference
from ._geglu_tiles import (
  COMPILER_PARAMS,
  FeedForwardConfig,
  dot,
  forward_tiles,
  normed_tile,
  zero_past,
)
from ._norm import Norm
from ._op import Cost, Implementation, Op, check_float, check_shape, nbytes
from ._sharding import leading_dims, like, per_device, split_axes

# --- specification ------------------------------------------------------------


def feed_forward_reference(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  w_down: jax.Array,
  *,
  activation: Activation = "gelu_tanh",
  norm: Norm | None = None,
  residual: bool = False,
) -> jax.Array:
  """The gated unit and the projection back to D.  The specification."""
  h = geglu_reference(x, w_gate, w_up, activation=activation, norm=norm)
  y = _down(h, w_down)
  return x + y if residual else y


def _down(h: jax.Array, w_down: jax.Array) -> jax.Array:
  wide = jnp.promote_types(h.dtype, jnp.float32)
  y = jnp.matmul(h, w_down.astype(h.dtype), preferred_element_type=wide)
  return y.astype(h.dtype)


# --- kernel -------------------------------------------------------------------


def _fwd_kernel(*refs, names: tuple[str, ...], static: Static, f: int):
  r = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
  y_sum = getattr(r, "y_sum", r.y)  # a float32 y is its own sum
  j, cols = pl.program_id(1), r.w_gate.shape[1]
  x = normed_tile(static.norm, r)
  gate, up = (dot(x, w[...].astype(x.dtype)) for w in (r.w_gate, r.w_up))
  if hasattr(r, "gate"):
    r.gate[...] = gate.astype(r.gate.dtype)
    r.up[...] = up.astype(r.up.dtype)
  h = (activate(static.activation, gate) * up).astype(x.dtype)
  w_down = r.w_down[...].astype(x.dtype)
  if f % cols:
    h = zero_past(h, f - j * cols, axis=1)
    w_down = zero_past(w_down, f - j * cols, axis=0)
  # A selection costs nothing beside the product; to clear the sum would.
  y_sum[...] = jnp.where(j == 0, 0.0, y_sum[...]) + dot(h, w_down)

  if y_sum is not r.y or static.residual:

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
      y = y_sum[...]
      if static.residual:
        y += r.x[...].astype(jnp.float32)
      r.y[...] = y.astype(r.y.dtype)


def _forward(
  static: Static, x: jax.Array, *operands: jax.Array, save: bool
) -> tuple[jax.Array, ...]:
  """y, and what is to be saved."""
  (w_gate, w_up, w_down), scale = static.split(operands)
  (n, d), f = x.shape, w_gate.shape[1]
  problem = static.problem(x, *operands, saved=save)
  tiles = forward_tiles("feed_forward", problem, static.config)
  row = pl.BlockSpec((tiles.rows, d), lambda i, j: (i, 0))
  up = pl.BlockSpec((d, tiles.cols), lambda i, j: (0, j))
  down = pl.BlockSpec((tiles.cols, d), lambda i, j: (j, 0))
  both = pl.BlockSpec((tiles.rows, tiles.cols), lambda i, j: (i, j))
  inputs = {
    "x": (x, row),
    "w_gate": (w_gate, up),
    "w_up": (w_up, up),
    "w_down": (w_down, down),
  }
  outputs = {"y": (like((n, d), x.dtype, x), row)}
  if save:
    saved = (like((n, f), x.dtype, x), both)
    outputs |= {"gate": saved, "up": saved}
  scratch = {}
  if problem.normed:
    whole = pl.BlockSpec((1, d), lambda i, j: (0, 0))
    inputs["scale"] = (scale[0][None, :], whole)
    if save:
      outputs["normed"] = outputs["y"]
    else:
      scratch["normed"] = pltpu.VMEM((tiles.rows, d), x.dtype)
  if x.dtype != jnp.float32:
    scratch["y_sum"] = pltpu.VMEM((tiles.rows, d), jnp.float32)
  results = pl.pallas_call(
    functools.partial(
      _fwd_kernel, names=(*inputs, *outputs, *scratch), static=static, f=f
    ),
    name="feed_forward_fwd",
    grid=(pl.cdiv(n, tiles.rows), pl.cdiv(f, tiles.cols)),
    in_specs=[spec for _, spec in inputs.values()],
    out_specs=[spec for _, spec in outputs.values()],
    out_shape=[shape for shape, _ in outputs.values()],
    scratch_shapes=list(scratch.values()),
    compiler_params=COMPILER_PARAMS,
  )(*(array for array, _ in inputs.values()))
  return tuple(results)


def _finish(static: Static, gate, up, dtype, w_down) -> jax.Array:
  return _down(gated(gate, up, static.activation, dtype), w_down)


_feed_forward = with_vjp("feed_forward", _forward, _finish)

# --- public -------------------------------------------------------------------


def feed_forward(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  w_down: jax.Array,
  *,
  activation: Activation = "gelu_tanh",
  norm: Norm | None = None,
  residual: bool = False,
  implementation: Implementation = None,
  config: FeedForwardConfig | None = None,
) -> jax.Array:
  """The gated feed-forward block, geglu(x, w_gate, w_up) w_down.

  Args:
    x: [..., D] float32 or bfloat16.
    w_gate: [D, F], as in `geglu`.
    w_up: [D, F], as in `geglu`.
    w_down: [F, D] float32 or bfloat16.
    activation: as in `geglu`.
    norm: as in `geglu`.
    residual: whether x itself, before the norm, is added to the result.  Where
      F is split by a `shard_map` of your own, whose sum over F is yours too,
      leave it out and add x after that sum.
    implementation: as in `geglu`.
    config: what is kept for the backward pass, and tile sizes; None keeps gate
      and up, and what a norm makes of x, under the names "feed_forward_gate",
      "feed_forward_up" and "feed_forward_normed" for remat policies.

  Returns:
    [..., D] of x's dtype.

  Raises:
    ValueError: as `geglu`, and on a w_down of another shape than [F, D].
  """
  op = "feed_forward"
  check(op, x, w_gate, w_up, activation, norm, implementation)
  check_float(op, w_down=w_down)
  check_shape(op, "w_down", w_down, w_gate.shape[::-1], "[F, D]")
  if implementation == "xla" or 0 in (x.size, w_gate.size):
    return feed_forward_reference(
      x,
      w_gate,
      w_up,
      w_down,
      activation=activation,
      norm=norm,
      residual=residual,
    )
  rows = (*leading_dims(x.ndim - 1), "D")
  scale = () if norm is None else (norm.scale,)
  args = (x, w_gate, w_up, w_down, *scale)
  dims = (
    rows,
    ("Dw", "F"),
    ("Dw", "F"),
    ("F", "Dw"),
    *[("Dw",) for _ in scale],
  )
  # Of a split F, each device would add x to its own part of the sum.
  adds_later = residual and bool(split_axes(op, args, dims)[1].get("F"))
  static = Static.of(
    activation, implementation, config, norm, residual and not adds_later
  )
  y = per_device(
    op,
    functools.partial(by_rows, functools.partial(_feed_forward, static)),
    args,
    dims,
    rows,
    splits="BTF",
    gathers=("Dw",),
    finish=_sum_over_f,
  )
  return x + y if adds_later else y


def _sum_over_f(y: jax.Array, axes) -> jax.Array:
  """Each device of a split F has the part of y that its own columns give."""
  return jax.lax.psum(y, axes["F"]) if axes.get("F") else y


# --- registration -------------------------------------------------------------


def _cost(x, w_gate, w_up, w_down, **_) -> tuple[Cost, Cost]:
  one = matmul_flops(x, w_gate)
  moved = nbytes(x, x, w_gate, w_up, w_down)
  return Cost(3 * one, moved), Cost(6 * one, 2 * moved)


OP = Op(
  name="feed_forward",
  function=feed_forward,
  reference=feed_forward_reference,
  cost=_cost,
  tests=small_cases(down=True),
  benches=model_cases(down=True),
  modes=MODES,
  baselines=("feed_forward",),
)
