"""Programs whose time is known from elsewhere.

From measurements that were published for a v5e, or from the compiler's own
static model, which unrolls every loop.  `show.calibration` puts them side by
side with the cycle model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from pallas_gemma.kernels import Cost

from .program import Built, Program, passes

_TOO_LARGE = 8192  # its unrolled program takes the compiler minutes


def is_unrolled(program: Program) -> bool:
  """Whether to ask the compiler for its own estimate of a program too."""
  return program.case != str(_TOO_LARGE)


def programs() -> Iterator[Program]:
  """The programs of the table."""
  for size, blocks in (
    (_TOO_LARGE, (512, 1024, 1024)),
    (4096, (512, 1024, 1024)),
    (1024, (128, 128, 128)),
    (1024, (256, 256, 256)),
  ):
    name = "pallas-" + "x".join(map(str, blocks))
    yield from _program("matmul", size, name, _matmul(*blocks), 2 * size**3, 2)
  for size in (_TOO_LARGE, 4096, 1024):
    yield from _program("matmul", size, "xla", jnp.matmul, 2 * size**3, 2)
  yield from _feed_forward()
  yield from _flash()
  for name, size, kernel, inputs in (
    ("two_matmuls", 128, _two_matmuls_kernel, 1),
    ("row_sum", 128, _row_sum_kernel, 1),
    ("transpose", 128, _transpose_kernel, 1),
    ("transpose", 512, _transpose_kernel, 1),
    ("left_transposed", 512, functools.partial(_product_kernel, (0, 0)), 2),
    ("right_transposed", 512, functools.partial(_product_kernel, (1, 1)), 2),
  ):
    yield from _program(name, size, "pallas", _whole(kernel), 0, inputs)


# --- programs -----------------------------------------------------------------


def _program(
  op: str,
  size: int,
  implementation: str,
  function: Any,
  flops: int,
  inputs: int,
) -> list[Program]:
  spec = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
  moved = 2 * size * size * (inputs + 1)
  return passes(
    lambda: Built(function, (spec,) * inputs, (None,) * inputs),
    (Cost(flops, moved), None),
    op=op,
    case=str(size),
    implementation=implementation,
  )


def _matmul(rows: int, inner: int, columns: int) -> Any:
  from jax.experimental.pallas.ops.tpu.matmul import matmul

  return functools.partial(matmul, block_shape=(rows, columns), block_k=inner)


def _feed_forward() -> list[Program]:
  rows, d, f = 2048, 1024, 4096

  def feed_forward(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ up, approximate=True) @ down

  specs = tuple(
    jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    for shape in ((rows, d), (d, f), (f, d))
  )
  return passes(
    lambda: Built(feed_forward, specs, (None,) * 3),
    (Cost(4 * rows * d * f, 2 * (2 * rows * d + 2 * d * f)), None),
    op="feed_forward",
    case=str(rows),
    implementation="xla",
  )


def _flash() -> list[Program]:
  heads, t, h = 8, 1024, 128

  def build() -> Built:
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    spec = jax.ShapeDtypeStruct((1, heads, t, h), jnp.bfloat16)
    function = functools.partial(flash_attention, causal=True)
    return Built(function, (spec,) * 3, (None,) * 3)

  return passes(
    build,
    (Cost(2 * heads * t * t * h, 8 * heads * t * h), None),
    op="flash_attention",
    case=str(t),
    implementation="jax-flash",
  )


def _two_matmuls_kernel(x_ref, o_ref):
  x = x_ref[...]
  square = jnp.dot(x, x, preferred_element_type=jnp.float32).astype(x.dtype)
  cube = jnp.dot(square, x, preferred_element_type=jnp.float32)
  o_ref[...] = cube.astype(o_ref.dtype)


def _row_sum_kernel(x_ref, o_ref):
  total = jnp.sum(x_ref[...].astype(jnp.float32), axis=1, keepdims=True)
  o_ref[...] = jnp.broadcast_to(total, o_ref.shape).astype(o_ref.dtype)


def _transpose_kernel(x_ref, o_ref):
  o_ref[...] = x_ref[...].T


def _product_kernel(contracted, x_ref, y_ref, o_ref):
  i, j = contracted
  o_ref[...] = jax.lax.dot_general(
    x_ref[...],
    y_ref[...],
    (((i,), (j,)), ((), ())),
    preferred_element_type=jnp.float32,
  ).astype(o_ref.dtype)


def _whole(kernel: Any) -> Any:
  """A kernel on square arrays, in one piece."""

  def function(*arrays: jax.Array) -> jax.Array:
    x = arrays[0]
    return pl.pallas_call(
      kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="kernel"
    )(*arrays)

  return function
