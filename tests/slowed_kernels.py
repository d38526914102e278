"""A suite of kernels that compute the same, one of each pair made slower."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.matmul import matmul
from pallas_gemma.bench import Built, passes
from pallas_gemma.kernels import Cost


def _double(x_ref, o_ref):
  o_ref[...] = x_ref[...] + x_ref[...]


def _add(x_ref, again_ref, o_ref):
  o_ref[...] = x_ref[...] + again_ref[...]


def _copied(kernel, inputs, x):
  tile = pl.BlockSpec((256, 1024), lambda i: (i, 0))
  return pl.pallas_call(
    kernel,
    grid=(x.shape[0] // 256,),
    in_specs=[tile] * inputs,
    out_specs=tile,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    name="copied",
  )(*[x] * inputs)


def _iterated(x_ref, o_ref, *, rows):
  """The same arithmetic on `rows` rows at a time: many do not fit registers."""

  @pl.loop(0, x_ref.shape[0] // rows)
  def _(i):
    part = pl.ds(pl.multiple_of(i * rows, rows), rows)
    x = x_ref[part, :]
    step = lambda _, y: y * x + 0.5  # noqa: E731
    o_ref[part, :] = jax.lax.fori_loop(0, 64, step, x)


def _in_registers(rows, x):
  return pl.pallas_call(
    functools.partial(_iterated, rows=rows),
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=64 << 20),
    name="iterated",
  )(x)


def _program(op, implementation, function, *specs):
  return passes(
    lambda: Built(function, specs, (None,) * len(specs)),
    (Cost(0, 0), None),
    op=op,
    case="slow",
    implementation=implementation,
  )


def programs():
  square = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
  wide = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
  tall = jax.ShapeDtypeStruct((1024, 128), jnp.float32)
  for block in (512, 256):
    blocked = functools.partial(
      matmul, block_shape=(block, block), block_k=block
    )
    yield from _program("blocks", str(block), blocked, square, square)
  for inputs, kernel in ((1, _double), (2, _add)):
    read = functools.partial(_copied, kernel, inputs)
    yield from _program("reads", str(inputs), read, wide)
  for rows in (128, 1024):
    spilled = functools.partial(_in_registers, rows)
    yield from _program("registers", str(rows), spilled, tall)
