"""How far the timing model is to be trusted: `pallas-gemma-bench --calibrate`.

Programs whose time is known from elsewhere: published measurements on a v5e,
and the compiler's own static model, which unrolls every loop.  The static model
assumes slower copies (1,133 cycles to the first byte, 90 % of the bandwidth,
but that for each of those under way), so programs that wait for copies differ;
the last column is our model with copies like that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
import rich.table
from jax.experimental import pallas as pl
from pallas_gemma.kernels import Cost

from ._chip import V5E
from ._job import Job
from ._program import Built, Program, passes

# Milliseconds by the wall clock, from JAX's guide to matmuls in Pallas.
_PUBLISHED = {
  "matmul/8192/fwd/pallas-512x1024x1024": 6.10,
  "matmul/8192/fwd/xla": 6.05,
  "matmul/4096/fwd/pallas-512x1024x1024": 0.889,
  "matmul/4096/fwd/xla": 0.827,
  "matmul/1024/fwd/pallas-128x128x128": 0.298,
}
_DISPATCH_MS = 0.1  # of which is the host's

# The unrolled program of the others takes the compiler minutes.
_STATIC = frozenset(
  {
    "matmul/4096/fwd/xla",
    "matmul/4096/fwd/pallas-512x1024x1024",
    "matmul/1024/fwd/xla",
    "matmul/1024/fwd/pallas-128x128x128",
    "matmul/1024/fwd/pallas-256x256x256",
    "feed_forward/2048/fwd/xla",
    "flash_attention/1024/fwd/jax-flash",
    "two_matmuls/128/fwd/pallas",
    "row_sum/128/fwd/pallas",
    "transpose/128/fwd/pallas",
    "transpose/512/fwd/pallas",
    "left_transposed/512/fwd/pallas",
    "right_transposed/512/fwd/pallas",
  }
)


def programs() -> Iterator[Program]:
  """The programs of the table."""
  for size, blocks in (
    (8192, (512, 1024, 1024)),
    (4096, (512, 1024, 1024)),
    (1024, (128, 128, 128)),
    (1024, (256, 256, 256)),
  ):
    name = "pallas-" + "x".join(map(str, blocks))
    yield from _program("matmul", size, name, _matmul(*blocks), 2 * size**3, 2)
  for size in (8192, 4096, 1024):
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


def jobs() -> list[Job]:
  """What has to be run for the table."""
  return [
    Job("calibration", program.key, static=program.key in _STATIC)
    for program in programs()
  ]


def table(results: Sequence[Mapping[str, Any]]) -> rich.table.Table:
  """The model beside what is known from elsewhere.

  Args:
    results: of `jobs()`, as the worker gives them.
  """
  shown = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  shown.add_column("program", no_wrap=True)
  for heading in (
    "model cycles",
    "model ms",
    "published ms",
    "less dispatch",
    "model / published",
    "compiler's static cycles",
    "model / static",
    "with the compiler's copies",
  ):
    shown.add_column(heading, justify="right")
  for result in results:
    shown.add_row(*_line(result))
  return shown


def _line(result: Mapping[str, Any]) -> list[str]:
  key = "/".join(
    result[name] for name in ("op", "case", "which", "implementation")
  )
  if result["error"]:
    return [key, result["error"], *[""] * 7]
  ms = V5E.seconds(result["cycles"]) * 1e3
  line = [key, f"{result['cycles']:,}", f"{ms:.3f}", *[""] * 6]
  if key in _PUBLISHED:
    published = _PUBLISHED[key]
    device = published - _DISPATCH_MS
    line[3:6] = [f"{published:.3f}", f"{device:.3f}", f"{ms / device:.3f}"]
  static = result.get("static")
  if static and static["compiler"]:
    compiler = static["compiler"]
    line[6:] = [
      f"{compiler:,}",
      f"{static['model'] / compiler:.3f}",
      f"{static['model_as_compiled'] / compiler:.3f}",
    ]
  return line


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
