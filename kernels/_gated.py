"""What geglu and feed_forward share around their kernels.

The specification's parts, the custom VJP, the checks and the problems.  An op
is two functions: `forward`, its kernel, and `finish`, what plain jnp makes of
the two products.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ._activation import ACTIVATIONS, Activation
from ._geglu_bwd import backward
from ._geglu_tiles import FeedForwardConfig, Problem, backward_tiles
from ._norm import Norm, RowNorm, check_norm
from ._op import (
  Case,
  Implementation,
  check_float,
  check_implementation,
  check_shape,
  dispatch,
)
from ._rms_norm import rms_norm_reference

# --- specification ------------------------------------------------------------


def normed(x: jax.Array, norm: Norm | None) -> jax.Array:
  """The reference's x."""
  if norm is None:
    return x
  return rms_norm_reference(
    x, norm.scale, epsilon=norm.epsilon, scale_offset=norm.scale_offset
  )


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


# What the forward pass saves; the last of a norm alone.
SAVED = ("gate", "up", "normed")

# --- differentiation ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Static:
  """Everything of a call that is not an array, in one hashable piece.

  Attributes:
    activation: the activation.
    implementation: as the caller gave it.
    config: the caller's, or the default.
    norm: of x, None for none; its scale is the last operand.
    residual: whether x is added to the result.
  """

  activation: Activation
  implementation: Implementation
  config: FeedForwardConfig
  norm: RowNorm | None = None
  residual: bool = False

  @classmethod
  def of(
    cls,
    activation: Activation,
    implementation: Implementation,
    config: FeedForwardConfig | None,
    norm: Norm | None,
    residual: bool = False,
  ) -> Static:
    """From an op's keywords."""
    rows = None if norm is None else RowNorm(norm.epsilon, norm.scale_offset)
    config = config or FeedForwardConfig()
    return cls(activation, implementation, config, rows, residual)

  @property
  def saved(self) -> bool:
    """Whether `SAVED` goes from the forward to the backward pass."""
    return self.config.residuals == "gate_up"

  def split(self, operands: Sequence[jax.Array]):
    """The weights, and the scale in a list of one or none."""
    count = len(operands) - (self.norm is not None)
    return operands[:count], operands[count:]

  def normed(self, x: jax.Array, *scale: jax.Array) -> jax.Array:
    """The reference's norm of x, x itself if there is none."""
    if self.norm is None:
      return x
    (array,) = scale
    return normed(x, Norm(array, self.norm.epsilon, self.norm.scale_offset))

  def problem(self, x: jax.Array, *operands: jax.Array, saved: bool) -> Problem:
    """What tiles are chosen by."""
    weights, scale = self.split(operands)
    return Problem.of(x, *weights, saved=saved, normed=bool(scale))


def with_vjp(
  op: str, forward: Callable[..., tuple[jax.Array, ...]], finish: Callable
) -> Callable[..., jax.Array]:
  """The function of (static, x, *operands), which has its own gradients.

  Args:
    op: its name.
    forward: the kernel's call: maps (static, x, *operands, save=...) to the
      result, and with `save` gate, up and, of a norm, the normed x.
    finish: maps (static, gate, up, dtype, *weights after those two) to the
      result in plain jnp, without the residual.
  """

  def products(static: Static, x, w_gate, w_up, *scale):
    return gate_and_up(static.normed(x, *scale), w_gate, w_up)

  def reference(static: Static, x, *operands):
    (w_gate, w_up, *rest), scale = static.split(operands)
    saved = products(static, x, w_gate, w_up, *scale)
    y = finish(static, *saved, x.dtype, *rest)
    saved = [product.astype(x.dtype) for product in saved]
    if scale:
      saved.append(static.normed(x, *scale))
    return (x + y if static.residual else y), *saved

  def primal(static: Static, *args: jax.Array) -> jax.Array:
    return dispatch(
      static.implementation,
      lambda *args: forward(static, *args, save=False)[0],
      lambda *args: reference(static, *args)[0],
      *args,
    )

  def save(static: Static, *args: jax.Array):
    """The result, and what the backward pass needs."""
    if not static.saved:
      return primal(static, *args), (args, ())
    y, *saved = dispatch(
      static.implementation,
      functools.partial(forward, static, save=True),
      functools.partial(reference, static),
      *args,
    )
    # Under names by which a remat policy finds them.
    names = (f"{op}_{name}" for name in SAVED)
    return y, (args, tuple(map(checkpoint_name, saved, names)))

  def gradients(static: Static, residuals, dy: jax.Array):
    args, saved = residuals

    def pallas(dy, args, saved):
      x, *operands = args
      weights, scale = static.split(operands)
      problem = static.problem(*args, saved=static.saved)
      arrays = {"x": x}
      arrays |= dict(zip(("w_gate", "w_up", "w_down"), weights, strict=False))
      arrays["dy" if problem.down else "dh"] = dy
      arrays |= dict(zip(SAVED, saved, strict=False))
      if scale:
        arrays["scale"] = scale[0]
      if scale and not saved:
        # One pass of XLA's is cheaper than a norm of every tile of x for every
        # F tile.
        arrays["normed"] = static.normed(x, *scale)
      tiles = backward_tiles(op, problem, static.config)
      return backward(
        op,
        problem,
        tiles,
        arrays,
        activation=static.activation,
        norm=static.norm,
        residual=static.residual,
      )

    def plain(dy, args, saved):
      x, *operands = args
      (w_gate, w_up, *rest), scale = static.split(operands)
      both, first = jax.vjp(
        functools.partial(products, static), x, w_gate, w_up, *scale
      )
      # Saved products serve if they are the reference's own numbers; rounded
      # to bfloat16 they are not, and are computed again.
      if saved and saved[0].dtype == both[0].dtype:
        both = saved[:2]
      _, second = jax.vjp(
        lambda gate, up, *rest: finish(static, gate, up, x.dtype, *rest),
        *both,
        *rest,
      )
      dgate, dup, *drest = second(dy)
      dx, dw_gate, dw_up, *dscale = first((dgate, dup))
      dx = dx + dy if static.residual else dx
      return dx, dw_gate, dw_up, *drest, *dscale

    return dispatch(static.implementation, pallas, plain, dy, args, saved)

  function = jax.custom_vjp(primal, nondiff_argnums=(0,))
  function.defvjp(save, gradients)
  return function


# --- public -------------------------------------------------------------------


def check(op, x, w_gate, w_up, activation, norm, implementation) -> None:
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
  if norm is not None:
    check_norm(op, x, norm, "norm.")


def by_rows(function, x: jax.Array, *operands: jax.Array) -> jax.Array:
  """Applies `function` to x [..., D] seen as [N, D]."""
  y = function(x.reshape(-1, x.shape[-1]), *operands)
  return y.reshape(*x.shape[:-1], y.shape[-1])


# --- registration -------------------------------------------------------------


def matmul_flops(x, w) -> int:
  """Of x [..., D] with a [D, F] matrix, or with its transpose."""
  return 2 * x.size // x.shape[-1] * w.shape[0] * w.shape[1]


def _case(
  name: str,
  rows: tuple[int, ...],
  d: int,
  f: int,
  dtype,
  down: bool,
  weight_dtype=None,
  *,
  is_normed: bool = False,
  **kwargs,
) -> Case:
  x = jax.ShapeDtypeStruct((*rows, d), dtype)
  up = jax.ShapeDtypeStruct((d, f), weight_dtype or dtype)
  weights = (up, up, jax.ShapeDtypeStruct((f, d), up.dtype))[: 2 + down]
  if is_normed:
    scale: Any = jax.ShapeDtypeStruct((d,), jnp.float32)
    kwargs["norm"] = Norm(scale, scale_offset=1.0)
    kwargs |= {"residual": True} if down else {}
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
    _case("normed", (3, 37), 100, 200, f32, down, is_normed=True),
    _case("normed_bf16", (5, 23), 100, 200, bf16, down, is_normed=True),
  )


def model_cases(*, down: bool) -> tuple[Case, ...]:
  """Gemma's own problems of either gated op.

  With weights in float32 it is the trainer's, with the norm the model's.
  """
  f32, bf16 = jnp.float32, jnp.bfloat16
  gemma_2b = ((8192,), 2048, 16384, bf16, down)
  return (
    _case("gemma_2b_8k", *gemma_2b),
    _case("gemma_7b_4k", (4096,), 3072, 24576, bf16, down),
    _case("gemma_2b_8k_f32_weights", *gemma_2b, f32),
    _case("gemma_2b_8k_normed", *gemma_2b, is_normed=True),
  )


MODES = {"residuals-none": lambda *_, **__: FeedForwardConfig(residuals="none")}
