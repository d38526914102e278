"""The public functions, how they are split over a mesh, and what is registered.

The maths, the traffic and the tiling are in the docstring of the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._frame import switches
from .._frame.check import Implementation
from .._frame.kernel import kernel_op
from .._frame.op import Case, Cost, Op, nbytes
from .._frame.sharding import Axes, Split, leading_dims
from .._layers import LayerOf
from .._quantized import QuantizedWeight
from .._row_norm import Norm
from .activation import Activation
from .backward import backward
from .config import FeedForwardConfig
from .door import Given, problem_of, run
from .forward import forward
from .spec import (
  Arrays,
  Outs,
  Problem,
  feed_forward_reference,
  geglu_reference,
  plain_backward,
  plain_forward,
  plain_linear,
  reference,
)
from .stack import PORTS, apart, kept_in_room, whose_gradients_leave_by_ports
from .tiles import where_present

# --- the ops ------------------------------------------------------------------


def _split(p: Problem, a: Arrays) -> Split:
  """Rows and F may be split.

  D is whole for the products: x may come split over it, and d is D where
  weights may be stored split over it.  Each device of a split F has the part of
  y that its own columns give.
  """
  rows = leading_dims(a.x.ndim - 1)
  down = a.w_down is not None
  # Weights of a stack come here only where nothing is split.
  stack = "" if a.layer is None else "L"
  gate, up, back = (
    None if w is None else stack + w for w in p.layout.letters()
  )
  letters = Arrays(
    x=rows + "D",
    w_gate=gate,
    w_up=up,
    w_down=back,
    scale="d",
    epsilon="",
    b_gate="F",
    b_up="F",
    b_down="d",
    layer="",
    port_gate=gate,
    port_up=up,
    port_down=back,
    store_gate="L-F",
    store_up="L-F",
    store_normed="L-D",
  )
  letters = where_present(a, letters)
  y = rows + ("D" if down else "F")
  outs = Outs(y, *letters[-6:])
  return Split(letters, outs, over="BTF", gathers="Dd")


def _by_rows(op: Any, p: Problem, a: Arrays, axes: Mapping[str, Axes]) -> Outs:
  """The op on x [..., D] seen as [N, D]."""
  del axes
  outs = op(p, a._replace(x=a.x.reshape(-1, a.x.shape[-1])))
  return outs._replace(y=outs.y.reshape(*a.x.shape[:-1], outs.y.shape[-1]))


def _summed_over_f(
  op: Any, p: Problem, a: Arrays, axes: Mapping[str, Axes]
) -> Outs:
  """The sum of what the devices of a split F have, then bias and residual.

  If each device added x to its own part, x would be summed too.
  """
  if not axes.get("F"):
    return _by_rows(op, p, a, axes)
  own = dataclasses.replace(p, residual=False)
  part = _by_rows(op, own, a._replace(b_down=None), axes).y
  y = jax.lax.psum(part, axes["F"])
  if a.b_down is not None:
    y += a.b_down.astype(y.dtype)
  return Outs(a.x + y if p.residual else y)


_geglu = kernel_op(
  "geglu",
  reference=reference,
  forward=forward,
  backward=backward,
  saves=(
    *("x", "w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down"),
    *("scale", "epsilon", "layer"),
  ),
  names=("gate", "up", "normed", "y"),
  keeps=True,
  split=_split,
  # Where the backward kernel copies dx by hand, a batch of them has to run one
  # after the other.
  vmap=("grid", "loop"),
  around=_by_rows,
  plain_forward=plain_forward,
  plain_backward=plain_backward,
  plain_linear=plain_linear,
  constants=whose_gradients_leave_by_ports,
  passes=PORTS,
  apart=apart,
  stores=kept_in_room,
)
_feed_forward = dataclasses.replace(
  _geglu, name="feed_forward", around=_summed_over_f
)

# --- public -------------------------------------------------------------------


@switches.plain
def geglu(
  x: jax.Array,
  w_gate: jax.Array | LayerOf | QuantizedWeight | None,
  w_up: jax.Array | LayerOf | QuantizedWeight | None = None,
  *,
  b_gate: jax.Array | None = None,
  b_up: jax.Array | None = None,
  transposed: bool = False,
  layer: jax.Array | int | None = None,
  activation: Activation = "gelu_tanh",
  norm: Norm | None = None,
  implementation: Implementation = None,
  config: FeedForwardConfig | None = None,
) -> jax.Array:
  """Gated linear unit, activation(x w_gate) * (x w_up).

  Shazeer, arXiv 2002.05202; Gemma, arXiv 2403.08295 §2, takes the tanh
  approximation of GELU.

  Args:
    x: [..., D] float32, bfloat16 or float16, the dtype of the products.  The
      kernel multiplies float32 as float32, in six passes of the matrix unit,
      and bfloat16 in one: bfloat16 is the fast dtype.
    w_gate: [D, F] float32 or bfloat16, the activated branch; computed with in
      x's dtype, to which the kernel casts its tiles.  Or all weights are
      `QuantizedWeight`, int8: for few rows, as in decoding.  XLA computes with
      these, and they have no gradient.
      With w_up None it has both branches, gate first, and is read where it
      lies: [2, D, F], whose gradient is written in that form; or [D, 2F], whose
      gradient is put together of its halves by XLA, a copy of it.  (Where F is
      no multiple of 128, or split over a mesh, [D, 2F] is cut in two first.)
      None for a layer without a gate, activation(x w_up + b_up).
    w_up: [D, F], the linear branch.
    b_gate: [F] of any float dtype, added in float32; None for none.  Where
      w_gate has both branches it may have too, [2, F] or [2F].
    b_up: [F], likewise.
    transposed: whether weights are stored [F, D], as PyTorch's `nn.Linear` has
      them: also [2, F, D], and [2F, D], which is the same in memory.  Nothing
      is copied, and gradients come in that form.
    layer: None, or an integer, traced or not: then the weights are [L, D, F],
      stacked over the layers of a model, and this is the layer to use; biases
      are [L, F].  The kernel reads it where it lies, where a slice would be a
      copy; of a stack of [D, 2F] or [2F, D] it is one.  (A traced index out of
      range is clamped, as `jax.lax.dynamic_index_in_dim` does.)
      The gradient is that of the stack.  In a scan use `scan_layers`, whose
      `LayerOf` takes the place of a weight and of `layer`: there the gradient
      is written once.  Over a mesh that splits them, the layer is taken first.
    activation: "gelu_tanh", "gelu" (exact), "silu" (SwiGLU), "relu", "relu2",
      "quick_gelu" or "sigmoid", by any of their usual names, such as "swish" or
      "gelu_pytorch_tanh"; an elementwise function, such as `jax.nn.softplus`,
      which the kernel computes and JAX differentiates in it; or a
      `ClampedSwiGLU`.  (Define a function once: a new one is a new program.
      Pallas refuses what it cannot lower, as the expm1 of `jax.nn.elu`.)
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
    ValueError: on a wrong shape or dtype, an unknown activation, or a function
      that is not elementwise or depends on another array; an x whose last
      dimension is split over a mesh; or "pallas" with int8 weights.
  """
  given = Given(w_gate, w_up, None, layer, b_gate, b_up)
  problem = problem_of(activation, False, transposed, implementation, config)
  return run(_geglu, problem, x, given, norm)


@switches.plain
def feed_forward(
  x: jax.Array,
  w_gate: jax.Array | LayerOf | QuantizedWeight | None,
  w_up: jax.Array | LayerOf | QuantizedWeight | None,
  w_down: jax.Array | LayerOf | QuantizedWeight,
  *,
  b_gate: jax.Array | None = None,
  b_up: jax.Array | None = None,
  b_down: jax.Array | None = None,
  transposed: bool = False,
  layer: jax.Array | int | None = None,
  activation: Activation = "gelu_tanh",
  norm: Norm | None = None,
  residual: bool = False,
  implementation: Implementation = None,
  config: FeedForwardConfig | None = None,
) -> jax.Array:
  """The gated feed-forward block, geglu(x, w_gate, w_up) w_down.

  Args:
    x: [..., D] float32, bfloat16 or float16, the dtype of the products.  As in
      `geglu`, float32 takes six passes of the matrix unit and bfloat16 one.
    w_gate: [D, F], as in `geglu`; with w_up None both branches, [2, D, F] or
      [D, 2F]; None for a layer without a gate.
    w_up: [D, F], as in `geglu`.
    w_down: [F, D] float32 or bfloat16.
    b_gate: [F], as in `geglu`.
    b_up: [F], as in `geglu`.
    b_down: [D], likewise.
    transposed: as in `geglu`; then w_down is [D, F].
    layer: as in `geglu`; then w_down is [L, F, D].
    activation: as in `geglu`.
    norm: as in `geglu`.
    residual: whether x itself, before the norm, is added to the result.  Where
      F is split by a `shard_map` of your own, whose sum over F is yours too,
      leave it and b_down out and add them after that sum.
    implementation: as in `geglu`.
    config: what is kept for the backward pass, and tile sizes; None keeps gate
      and up, and what a norm makes of x, under the names "feed_forward_gate",
      "feed_forward_up" and "feed_forward_normed" for remat policies.

  Returns:
    [..., D] of x's dtype.

  Raises:
    ValueError: as `geglu`, and on a w_down of another shape than [F, D].
  """
  given = Given(w_gate, w_up, w_down, layer, b_gate, b_up, b_down)
  problem = problem_of(activation, residual, transposed, implementation, config)
  return run(_feed_forward, problem, x, given, norm)


# --- registration -------------------------------------------------------------


def _matmul_flops(x: Any, w: Any) -> int:
  """Of x [..., D] with a [D, F] matrix, or with its transpose."""
  return 2 * x.size // x.shape[-1] * w.shape[0] * w.shape[1]


def _geglu_cost(x, w_gate, w_up, **_) -> tuple[Cost, Cost]:
  one = _matmul_flops(x, w_gate)
  h_bytes = nbytes(x) // x.shape[-1] * w_gate.shape[1]
  moved = nbytes(x, w_gate, w_up) + h_bytes
  return Cost(2 * one, moved), Cost(4 * one, 2 * moved)


def _feed_forward_cost(x, w_gate, w_up, w_down, **_) -> tuple[Cost, Cost]:
  one = _matmul_flops(x, w_gate)
  moved = nbytes(x, x, w_gate, w_up, w_down)
  return Cost(3 * one, moved), Cost(6 * one, 2 * moved)


def _case(
  name: str,
  x: tuple[tuple[int, ...], Any],
  f: int,
  weight_dtype: Any = None,
  *,
  down: bool,
  normed: bool = False,
  activation: Activation | None = None,
) -> Case:
  """A problem of x's shape and dtype, and F."""
  shape, dtype = x
  d, weight_dtype = shape[-1], weight_dtype or dtype
  up = jax.ShapeDtypeStruct((d, f), weight_dtype)
  args = [jax.ShapeDtypeStruct(shape, dtype), up, up]
  kwargs: dict[str, Any] = {}
  if activation is not None:
    kwargs["activation"] = activation
  if down:
    args.append(jax.ShapeDtypeStruct((f, d), weight_dtype))
  if normed:
    scale: Any = jax.ShapeDtypeStruct((d,), jnp.float32)
    kwargs["norm"] = Norm(scale, scale_offset=1.0)
    if down:
      kwargs["residual"] = True
  return Case(name, tuple(args), kwargs)


def _small_cases(*, down: bool) -> tuple[Case, ...]:
  f32, bf16 = jnp.float32, jnp.bfloat16
  ragged = ((3, 37, 100), f32)
  return (
    _case("one_tile", ((128, 128), f32), 128, down=down),
    _case("ragged", ragged, 200, down=down),
    _case("silu", ((64, 128), f32), 256, down=down, activation="silu"),
    _case("gelu", ((64, 128), f32), 128, down=down, activation="gelu"),
    _case("relu", ((64, 128), f32), 128, down=down, activation="relu"),
    _case("bf16", ((2, 64, 128), bf16), 256, down=down),
    _case("normed", ragged, 200, down=down, normed=True),
    _case("normed_bf16", ((5, 23, 100), bf16), 200, down=down, normed=True),
  )


def _model_cases(*, down: bool) -> tuple[Case, ...]:
  """Gemma's own problems, and Llama 3 8B's feed-forward.

  With weights in float32 it is the trainer's, with the norm the model's.
  """
  gemma_2b = ((8192, 2048), jnp.bfloat16), 16384
  gemma_7b = ((4096, 3072), jnp.bfloat16), 24576
  return (
    _case("gemma_2b_8k", *gemma_2b, down=down),
    _case("gemma_7b_4k", *gemma_7b, down=down),
    _case("gemma_2b_8k_f32_weights", *gemma_2b, jnp.float32, down=down),
    _case("gemma_2b_8k_normed", *gemma_2b, down=down, normed=True),
    *(_llama_case() if down else ()),
  )


def _llama_case() -> tuple[Case, ...]:
  llama_8b = ((4096, 4096), jnp.bfloat16), 14336
  how: dict[str, Any] = dict(down=True, normed=True, activation="silu")
  return (_case("llama3_8b_4k_normed", *llama_8b, **how),)


_MODES = {
  "residuals-none": lambda *_, **__: FeedForwardConfig(residuals="none")
}

GEGLU = Op(
  name="geglu",
  function=geglu,
  reference=geglu_reference,
  cost=_geglu_cost,
  tests=_small_cases(down=False),
  benches=_model_cases(down=False),
  modes=_MODES,
)
FEED_FORWARD = Op(
  name="feed_forward",
  function=feed_forward,
  reference=feed_forward_reference,
  cost=_feed_forward_cost,
  tests=_small_cases(down=True),
  benches=_model_cases(down=True),
  modes=_MODES,
  baselines=("feed_forward",),
)
