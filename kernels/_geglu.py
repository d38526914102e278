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
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from ._activation import ACTIVATIONS, Activation, activate
from ._geglu_bwd import backward
from ._geglu_tiles import (
  COMPILER_PARAMS,
  FeedForwardConfig,
  Problem,
  backward_tiles,
  dot,
  forward_tiles,
)
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


def geglu_reference(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  *,
  activation: Activation = "gelu_tanh",
) -> jax.Array:
  """Two matmuls, the activation of one times the other.  The specification."""
  return gated(*gate_and_up(x, w_gate, w_up), activation, x.dtype)


def gate_and_up(
  x: jax.Array, w_gate: jax.Array, w_up: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The reference's two products, at least float32."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  matmul = functools.partial(jnp.matmul, preferred_element_type=wide)
  return matmul(x, w_gate.astype(x.dtype)), matmul(x, w_up.astype(x.dtype))


def gated(gate: jax.Array, up: jax.Array, activation: Activation, dtype):
  """The reference's rest."""
  return (ACTIVATIONS[activation](gate) * up).astype(dtype)


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
  h_ref,  # [rows, cols]
  *saved_refs,  # gate and up [rows, cols], if they are saved
  activation: Activation,
):
  x = x_ref[...]
  products = [dot(x, w[...].astype(x.dtype)) for w in (w_gate_ref, w_up_ref)]
  for ref, product in zip(saved_refs, products, strict=False):
    ref[...] = product.astype(ref.dtype)
  gate, up = products
  h_ref[...] = (activate(activation, gate) * up).astype(h_ref.dtype)


def _fwd(
  static: _Static, x: jax.Array, w_gate: jax.Array, w_up: jax.Array, *, save
) -> tuple[jax.Array, ...]:
  """h, and gate and up if they are to be saved."""
  n, d = x.shape
  f = w_gate.shape[1]
  problem = Problem.of(x, w_gate, w_up, saved=save)
  tiles = forward_tiles("geglu", problem, static.config)
  weights = pl.BlockSpec((d, tiles.cols), lambda j, i: (0, j))
  outputs = 3 if save else 1
  results = pl.pallas_call(
    functools.partial(_fwd_kernel, activation=static.activation),
    name="geglu_fwd",
    grid=(pl.cdiv(f, tiles.cols), pl.cdiv(n, tiles.rows)),
    in_specs=[
      pl.BlockSpec((tiles.rows, d), lambda j, i: (i, 0)),
      weights,
      weights,
    ],
    out_specs=[pl.BlockSpec((tiles.rows, tiles.cols), lambda j, i: (i, j))]
    * outputs,
    out_shape=[like((n, f), x.dtype, x)] * outputs,
    compiler_params=COMPILER_PARAMS,
  )(x, w_gate, w_up)
  return tuple(results)


# --- differentiation ----------------------------------------------------------


def _reference(static: _Static, *args: jax.Array) -> jax.Array:
  return geglu_reference(*args, activation=static.activation)


def _primal(static: _Static, *args: jax.Array) -> jax.Array:
  return dispatch(
    static.implementation,
    lambda *args: _fwd(static, *args, save=False)[0],
    functools.partial(_reference, static),
    *args,
  )


def _save(static: _Static, *args: jax.Array):
  """h, and what the backward pass needs."""
  if not static.saved:
    return _primal(static, *args), (args, ())

  def reference(x, w_gate, w_up):
    gate, up = gate_and_up(x, w_gate, w_up)
    h = gated(gate, up, static.activation, x.dtype)
    return h, gate.astype(x.dtype), up.astype(x.dtype)

  h, *saved = dispatch(
    static.implementation,
    functools.partial(_fwd, static, save=True),
    reference,
    *args,
  )
  names = ("geglu_gate", "geglu_up")
  return h, (args, named(names, saved))


def named(names: tuple[str, ...], arrays: Sequence[jax.Array]):
  """Residuals under the names by which a remat policy finds them."""
  return tuple(
    checkpoint_name(a, name) for a, name in zip(arrays, names, strict=True)
  )


def _backward(static: _Static, residuals, dh: jax.Array):
  args, saved = residuals

  def pallas(dh, args, saved):
    problem = Problem.of(*args, saved=static.saved)
    arrays = dict(zip(("x", "w_gate", "w_up"), args, strict=True))
    arrays |= {"dh": dh} | dict(zip(("gate", "up"), saved, strict=False))
    tiles = backward_tiles("geglu", problem, static.config)
    return backward("geglu", problem, tiles, static.activation, arrays)

  def reference(dh, args, saved):
    return reference_gradients(
      functools.partial(
        gated, activation=static.activation, dtype=args[0].dtype
      ),
      args,
      saved,
      dh,
    )

  return dispatch(static.implementation, pallas, reference, dh, args, saved)


def reference_gradients(finish, args, saved, cotangent, *more: jax.Array):
  """Gradients of finish(gate, up, *more), by (x, w_gate, w_up) and `more`.

  Saved products serve if they are the reference's own numbers; rounded to
  bfloat16 they are not, and are computed again.
  """
  products, first = jax.vjp(gate_and_up, *args)
  if saved and saved[0].dtype == products[0].dtype:
    products = saved
  _, second = jax.vjp(finish, *products, *more)
  dgate, dup, *rest = second(cotangent)
  return (*first((dgate, dup)), *rest)


_geglu = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_geglu.defvjp(_save, _backward)

# --- public -------------------------------------------------------------------


def check(op, x, w_gate, w_up, activation, implementation) -> None:
  """Refuses what neither gated op takes."""
  check_implementation(op, implementation)
  if x.ndim == 0:
    raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
  check_float(op, x=x, w_gate=w_gate, w_up=w_up)
  if w_gate.ndim != 2 or w_gate.shape[0] != x.shape[-1]:
    raise ValueError(
      f"{op}: w_gate must be [D, F] with D = {x.shape[-1]}, the last dimension "
      f"of x, got {w_gate.shape}"
    )
  check_shape(op, "w_up", w_up, w_gate.shape, "the shape of w_gate")
  if activation not in ACTIVATIONS:
    raise ValueError(
      f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, "
      f"got {activation!r}"
    )


def by_rows(function, x: jax.Array, *weights: jax.Array) -> jax.Array:
  """Applies `function` to x [..., D] seen as [N, D]."""
  y = function(x.reshape(-1, x.shape[-1]), *weights)
  return y.reshape(*x.shape[:-1], y.shape[-1])


def geglu(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  *,
  activation: Activation = "gelu_tanh",
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
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: what is kept for the backward pass, and tile sizes; None keeps gate
      and up, under the names "geglu_gate" and "geglu_up" for remat policies.

  Returns:
    [..., F] of x's dtype; sums and activation in float32.

  Raises:
    ValueError: on a wrong shape or dtype, an unknown activation, or an x whose
      last dimension is split over a mesh.
  """
  check("geglu", x, w_gate, w_up, activation, implementation)
  if implementation == "xla" or 0 in (x.size, w_gate.size):
    return geglu_reference(x, w_gate, w_up, activation=activation)
  static = _Static(activation, implementation, config or FeedForwardConfig())
  rows = leading_dims(x.ndim - 1)
  return per_device(
    "geglu",
    functools.partial(by_rows, functools.partial(_geglu, static)),
    (x, w_gate, w_up),
    ((*rows, "D"), ("Dw", "F"), ("Dw", "F")),
    (*rows, "F"),
    splits="BTF",
    gathers=("Dw",),
  )


# --- registration -------------------------------------------------------------


def matmul_flops(x, w) -> int:
  """Of x [..., D] with a [D, F] matrix, or with its transpose."""
  return 2 * x.size // x.shape[-1] * w.shape[0] * w.shape[1]


def _cost(x, w_gate, w_up, **_) -> tuple[Cost, Cost]:
  one = matmul_flops(x, w_gate)
  h_bytes = nbytes(x) // x.shape[-1] * w_gate.shape[1]
  moved = nbytes(x, w_gate, w_up) + h_bytes
  return Cost(2 * one, moved), Cost(4 * one, 2 * moved)


def _case(
  name: str,
  rows: tuple[int, ...],
  d: int,
  f: int,
  dtype,
  down: bool,
  weight_dtype=None,
  **kwargs,
) -> Case:
  x = jax.ShapeDtypeStruct((*rows, d), dtype)
  up = jax.ShapeDtypeStruct((d, f), weight_dtype or dtype)
  weights = (up, up, jax.ShapeDtypeStruct((f, d), up.dtype))[: 2 + down]
  return Case(name, (x, *weights), kwargs)


def small_cases(*, down: bool) -> tuple[Case, ...]:
  """Small problems of either gated op."""
  f32, bf16 = jnp.float32, jnp.bfloat16
  return (
    _case("one_tile", (128,), 128, 128, f32, down),
    _case("ragged", (3, 37), 100, 200, f32, down),
    _case("silu", (64,), 128, 256, f32, down, activation="silu"),
    _case("gelu", (64,), 128, 128, f32, down, activation="gelu"),
    _case("relu", (64,), 128, 128, f32, down, activation="relu"),
    _case("bf16", (2, 64), 128, 256, bf16, down),
  )


def model_cases(*, down: bool) -> tuple[Case, ...]:
  """Gemma's own problems of either gated op; the last is the trainer's."""
  f32, bf16 = jnp.float32, jnp.bfloat16
  return (
    _case("gemma_2b_8k", (8192,), 2048, 16384, bf16, down),
    _case("gemma_7b_4k", (4096,), 3072, 24576, bf16, down),
    _case("gemma_2b_8k_f32_weights", (8192,), 2048, 16384, bf16, down, f32),
  )


MODES = {"residuals-none": lambda *_, **__: FeedForwardConfig(residuals="none")}


OP = Op(
  name="geglu",
  function=geglu,
  reference=geglu_reference,
  cost=_cost,
  tests=small_cases(down=False),
  benches=model_cases(down=False),
  modes=MODES,
)
