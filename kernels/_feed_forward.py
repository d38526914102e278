"""The gated feed-forward block, in one kernel forward and one backward.

Maths, for rows x in R^D, weights Wg, Wu [D, F] and Wd [F, D], activation a:

    h = a(x Wg) * (x Wu)            Shazeer, arXiv 2002.05202
    y = h Wd

`_geglu_bwd.py` has the backward pass.

Traffic: bound by the MXU at thousands of rows: 3 matmuls forward, 6 backward
from saved gate and up, 8 when they are computed again.  h exists one tile at a
time, in VMEM.  The kernel reads x and writes y once; it reads the weights once
for every row tile, 1.6 GiB for 8192 rows of Gemma 2B in tiles of 1024, a
quarter of what HBM moves in the time of the products.

Tiling: row tiles outside, F tiles inside; y is summed over F tiles in VMEM.

                 F                          grid = (row tiles, F tiles)
        Wg Wu +----+----+----+
              | j=0| j=1| j=2|   D
     x        +----+----+----+     y
    +---+     +----+----+----+   +---+
    | i | ->  | h0 | h1 | h2 | ->| i |      y += h_j Wd_j
    +---+     +----+----+----+   +---+
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._activation import Activation, activate
from ._geglu import (
  MODES,
  by_rows,
  check,
  gate_and_up,
  gated,
  geglu_reference,
  matmul_flops,
  model_cases,
  named,
  reference_gradients,
  small_cases,
)
from ._geglu_bwd import backward
from ._geglu_tiles import (
  COMPILER_PARAMS,
  FeedForwardConfig,
  Problem,
  backward_tiles,
  dot,
  forward_tiles,
  zero_past,
)
from ._op import (
  Cost,
  Implementation,
  Op,
  check_float,
  check_shape,
  dispatch,
  nbytes,
)
from ._sharding import leading_dims, like, per_device

# --- specification ------------------------------------------------------------


def feed_forward_reference(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  w_down: jax.Array,
  *,
  activation: Activation = "gelu_tanh",
) -> jax.Array:
  """The gated unit and the projection back to D.  The specification."""
  return _down(geglu_reference(x, w_gate, w_up, activation=activation), w_down)


def _down(h: jax.Array, w_down: jax.Array) -> jax.Array:
  wide = jnp.promote_types(h.dtype, jnp.float32)
  y = jnp.matmul(h, w_down.astype(h.dtype), preferred_element_type=wide)
  return y.astype(h.dtype)


# --- forward ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Static:
  """Everything that is not an array, in one hashable piece."""

  activation: Activation
  implementation: Implementation
  config: FeedForwardConfig

  @property
  def saved(self) -> bool:
    """Whether gate and up go from the forward to the backward pass."""
    return self.config.residuals == "gate_up"


def _fwd_kernel(
  x_ref,  # [rows, D]
  w_gate_ref,  # [D, cols]
  w_up_ref,  # [D, cols]
  w_down_ref,  # [cols, D]
  y_ref,  # [rows, D]
  *refs,  # gate and up [rows, cols] if they are saved; then scratch:
  # sum_ref [rows, D] float32, unless y is float32
  activation: Activation,
  f: int,
  saved: bool,
):
  saved_refs, (sum_ref,) = refs[: 2 * saved], refs[2 * saved :] or (y_ref,)
  j, cols = pl.program_id(1), w_gate_ref.shape[1]
  x = x_ref[...]
  products = [dot(x, w[...].astype(x.dtype)) for w in (w_gate_ref, w_up_ref)]
  for ref, product in zip(saved_refs, products, strict=False):
    ref[...] = product.astype(ref.dtype)
  gate, up = products
  h = (activate(activation, gate) * up).astype(x.dtype)
  w_down = w_down_ref[...].astype(x.dtype)
  if f % cols:
    h = zero_past(h, f - j * cols, axis=1)
    w_down = zero_past(w_down, f - j * cols, axis=0)
  # A selection costs nothing beside the product; to clear the sum would.
  sum_ref[...] = jnp.where(j == 0, 0.0, sum_ref[...]) + dot(h, w_down)

  if sum_ref is not y_ref:

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
      y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _fwd(
  static: _Static, x: jax.Array, *weights: jax.Array, save: bool
) -> tuple[jax.Array, ...]:
  """y, and gate and up if they are to be saved."""
  n, d = x.shape
  f = weights[0].shape[1]
  problem = Problem.of(x, *weights, saved=save)
  tiles = forward_tiles("feed_forward", problem, static.config)
  row = pl.BlockSpec((tiles.rows, d), lambda i, j: (i, 0))
  up = pl.BlockSpec((d, tiles.cols), lambda i, j: (0, j))
  down = pl.BlockSpec((tiles.cols, d), lambda i, j: (j, 0))
  both = pl.BlockSpec((tiles.rows, tiles.cols), lambda i, j: (i, j))
  is_wide = x.dtype == jnp.float32
  results = pl.pallas_call(
    functools.partial(
      _fwd_kernel, activation=static.activation, f=f, saved=save
    ),
    name="feed_forward_fwd",
    grid=(pl.cdiv(n, tiles.rows), pl.cdiv(f, tiles.cols)),
    in_specs=[row, up, up, down],
    out_specs=[row, *[both] * (2 * save)],
    out_shape=[
      like((n, d), x.dtype, x),
      *[like((n, f), x.dtype, x)] * (2 * save),
    ],
    scratch_shapes=[]
    if is_wide
    else [pltpu.VMEM((tiles.rows, d), jnp.float32)],
    compiler_params=COMPILER_PARAMS,
  )(x, *weights)
  return tuple(results)


# --- differentiation ----------------------------------------------------------


def _reference(static: _Static, *args: jax.Array) -> jax.Array:
  return feed_forward_reference(*args, activation=static.activation)


def _primal(static: _Static, *args: jax.Array) -> jax.Array:
  return dispatch(
    static.implementation,
    lambda *args: _fwd(static, *args, save=False)[0],
    functools.partial(_reference, static),
    *args,
  )


def _save(static: _Static, *args: jax.Array):
  """y, and what the backward pass needs."""
  if not static.saved:
    return _primal(static, *args), (args, ())

  def reference(x, w_gate, w_up, w_down):
    gate, up = gate_and_up(x, w_gate, w_up)
    y = _down(gated(gate, up, static.activation, x.dtype), w_down)
    return y, gate.astype(x.dtype), up.astype(x.dtype)

  y, *saved = dispatch(
    static.implementation,
    functools.partial(_fwd, static, save=True),
    reference,
    *args,
  )
  names = ("feed_forward_gate", "feed_forward_up")
  return y, (args, named(names, saved))


def _backward(static: _Static, residuals, dy: jax.Array):
  args, saved = residuals

  def pallas(dy, args, saved):
    problem = Problem.of(*args, saved=static.saved)
    arrays = dict(zip(("x", "w_gate", "w_up", "w_down"), args, strict=True))
    arrays |= {"dy": dy} | dict(zip(("gate", "up"), saved, strict=False))
    tiles = backward_tiles("feed_forward", problem, static.config)
    return backward("feed_forward", problem, tiles, static.activation, arrays)

  def reference(dy, args, saved):
    def finish(gate, up, w_down):
      return _down(gated(gate, up, static.activation, args[0].dtype), w_down)

    *gated_args, w_down = args
    return reference_gradients(finish, gated_args, saved, dy, w_down)

  return dispatch(static.implementation, pallas, reference, dy, args, saved)


_feed_forward = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_feed_forward.defvjp(_save, _backward)

# --- public -------------------------------------------------------------------


def feed_forward(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  w_down: jax.Array,
  *,
  activation: Activation = "gelu_tanh",
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
    implementation: as in `geglu`.
    config: what is kept for the backward pass, and tile sizes; None keeps gate
      and up, under the names "feed_forward_gate" and "feed_forward_up" for
      remat policies.

  Returns:
    [..., D] of x's dtype.

  Raises:
    ValueError: as `geglu`, and on a w_down of another shape than [F, D].
  """
  op = "feed_forward"
  check(op, x, w_gate, w_up, activation, implementation)
  check_float(op, w_down=w_down)
  check_shape(op, "w_down", w_down, w_gate.shape[::-1], "[F, D]")
  if implementation == "xla" or 0 in (x.size, w_gate.size):
    return feed_forward_reference(
      x, w_gate, w_up, w_down, activation=activation
    )
  static = _Static(activation, implementation, config or FeedForwardConfig())
  dims = (*leading_dims(x.ndim - 1), "D")
  return per_device(
    op,
    functools.partial(by_rows, functools.partial(_feed_forward, static)),
    (x, w_gate, w_up, w_down),
    (dims, ("Dw", "F"), ("Dw", "F"), ("F", "Dw")),
    dims,
    splits="BTF",
    gathers=("Dw",),
    finish=_sum_over_f,
  )


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
)
