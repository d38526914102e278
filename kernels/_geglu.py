"""Gated linear units (GeGLU, SwiGLU) and the feed-forward block on them.

Maths, for rows x in R^D, weights Wg, Wu [D, F] and Wd [F, D], activation a:

    h = a(x Wg) * (x Wu)            geglu, Shazeer, arXiv 2002.05202
    y = h Wd                        feed_forward

    dh    = dy Wd^T                 backward
    dgate = dh * up * a'(gate)
    dup   = dh * a(gate)
    dx    = dgate Wg^T + dup Wu^T
    dWg   = x^T dgate,   dWu = x^T dup,   dWd = h^T dy

Traffic: compulsory traffic is x, y and the weights; at 8192 rows the block does
thousands of flops per byte and is bound by the MXU: 3 matmuls forward, 6
backward from saved gate and up, 8 when they are recomputed.

Tiling: none yet; there is no Pallas kernel for these ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from ._op import (
  Case,
  Cost,
  Implementation,
  Op,
  check_float,
  check_implementation,
  check_shape,
  nbytes,
)

Activation = Literal["gelu_tanh", "gelu", "silu", "relu"]

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
}

# --- specification ------------------------------------------------------------


def geglu_reference(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  *,
  activation: Activation = "gelu_tanh",
) -> jax.Array:
  """Two matmuls, the activation of one times the other.  The specification."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  matmul = functools.partial(jnp.matmul, preferred_element_type=wide)
  gate, up = matmul(x, w_gate.astype(x.dtype)), matmul(x, w_up.astype(x.dtype))
  return (ACTIVATIONS[activation](gate) * up).astype(x.dtype)


def feed_forward_reference(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  w_down: jax.Array,
  *,
  activation: Activation = "gelu_tanh",
) -> jax.Array:
  """The gated unit and the projection back to D.  The specification."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  h = geglu_reference(x, w_gate, w_up, activation=activation)
  y = jnp.matmul(h, w_down.astype(x.dtype), preferred_element_type=wide)
  return y.astype(x.dtype)


# --- public -------------------------------------------------------------------


def _check(op, x, w_gate, w_up, activation, implementation) -> None:
  check_implementation(op, implementation, pallas=OP.pallas)
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


def geglu(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  *,
  activation: Activation = "gelu_tanh",
  implementation: Implementation = None,
  config: None = None,
) -> jax.Array:
  """Gated linear unit, activation(x w_gate) * (x w_up).

  Shazeer, arXiv 2002.05202; Gemma, arXiv 2403.08295 §2, takes the tanh
  approximation of GELU.

  Args:
    x: [..., D] float32 or bfloat16.
    w_gate: [D, F] float32 or bfloat16, the activated branch; computed with in
      x's dtype.
    w_up: [D, F], the linear branch.
    activation: "gelu_tanh", "gelu" (exact), "silu" (SwiGLU) or "relu".
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: reserved for the kernel's tile sizes.

  Returns:
    [..., F] of x's dtype; sums and activation in float32.

  Raises:
    ValueError: on a wrong shape or dtype or an unknown activation.
    NotImplementedError: for implementation="pallas".
  """
  _check("geglu", x, w_gate, w_up, activation, implementation)
  return geglu_reference(x, w_gate, w_up, activation=activation)


def feed_forward(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  w_down: jax.Array,
  *,
  activation: Activation = "gelu_tanh",
  implementation: Implementation = None,
  config: None = None,
) -> jax.Array:
  """The gated feed-forward block, geglu(x, w_gate, w_up) w_down.

  Args:
    x: [..., D] float32 or bfloat16.
    w_gate: [D, F], as in `geglu`.
    w_up: [D, F], as in `geglu`.
    w_down: [F, D] float32 or bfloat16.
    activation: as in `geglu`.
    implementation: as in `geglu`.
    config: reserved for the kernel's tile sizes.

  Returns:
    [..., D] of x's dtype.

  Raises:
    ValueError: as `geglu`, and on a w_down of another shape than [F, D].
    NotImplementedError: for implementation="pallas".
  """
  op = "feed_forward"
  _check(op, x, w_gate, w_up, activation, implementation)
  check_float(op, w_down=w_down)
  check_shape(op, "w_down", w_down, w_gate.shape[::-1], "[F, D]")
  return feed_forward_reference(x, w_gate, w_up, w_down, activation=activation)


# --- registration -------------------------------------------------------------


def _matmul_flops(x, w) -> int:
  return 2 * x.size // x.shape[-1] * w.shape[0] * w.shape[1]


def _cost(x, w_gate, w_up, **_) -> tuple[Cost, Cost]:
  one = _matmul_flops(x, w_gate)
  h_bytes = nbytes(x) // x.shape[-1] * w_gate.shape[1]
  moved = nbytes(x, w_gate, w_up) + h_bytes
  return Cost(2 * one, moved), Cost(4 * one, 2 * moved)


def _feed_forward_cost(x, w_gate, w_up, w_down, **_) -> tuple[Cost, Cost]:
  one = _matmul_flops(x, w_gate)
  moved = nbytes(x, x, w_gate, w_up, w_down)
  return Cost(3 * one, moved), Cost(6 * one, 2 * moved)


def _case(
  name: str, rows: tuple[int, ...], d: int, f: int, dtype, down: bool, **kwargs
) -> Case:
  x = jax.ShapeDtypeStruct((*rows, d), dtype)
  up = jax.ShapeDtypeStruct((d, f), dtype)
  weights = (up, up, jax.ShapeDtypeStruct((f, d), dtype)) if down else (up, up)
  return Case(name, (x, *weights), kwargs)


def _tests(down: bool) -> tuple[Case, ...]:
  f32, bf16 = jnp.float32, jnp.bfloat16
  return (
    _case("one_tile", (128,), 128, 128, f32, down),
    _case("ragged", (3, 37), 100, 200, f32, down),
    _case("silu", (64,), 128, 256, f32, down, activation="silu"),
    _case("gelu", (64,), 128, 128, f32, down, activation="gelu"),
    _case("relu", (64,), 128, 128, f32, down, activation="relu"),
    _case("bf16", (2, 64), 128, 256, bf16, down),
  )


def _benches(down: bool) -> tuple[Case, ...]:
  return (
    _case("gemma_2b_8k", (8192,), 2048, 16384, jnp.bfloat16, down),
    _case("gemma_7b_4k", (4096,), 3072, 24576, jnp.bfloat16, down),
  )


OP = Op(
  name="geglu",
  function=geglu,
  reference=geglu_reference,
  cost=_cost,
  tests=_tests(down=False),
  benches=_benches(down=False),
  pallas=False,
)
FEED_FORWARD_OP = Op(
  name="feed_forward",
  function=feed_forward,
  reference=feed_forward_reference,
  cost=_feed_forward_cost,
  tests=_tests(down=True),
  benches=_benches(down=True),
  pallas=False,
)
