"""A suite of two programs: every op that multiplies matrices, in either dtype.

A plain kernel stands beside them, of which the precision is asked for by name.
All problems are one tile, whatever the dtype.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from pallas_gemma import bench
from pallas_gemma.kernels import (
  OPS,
  Cost,
  FlashAttentionConfig,
  LinearCrossEntropyConfig,
)

SIZE = 128
SQUARE = (SIZE, SIZE)
HEADS = (1, SIZE, 1, SIZE)
ARGUMENTS = {
  "geglu": [SQUARE, SQUARE, SQUARE],
  "feed_forward": [SQUARE, SQUARE, SQUARE, SQUARE],
  "expert_feed_forward": [SQUARE, *[(1, *SQUARE)] * 3],
  "flash_attention": [HEADS, HEADS, HEADS],
  "linear_cross_entropy": [SQUARE, SQUARE],
}
CONFIGS = {
  "flash_attention": FlashAttentionConfig(block_kv=128, block_kv_bwd=128),
  "linear_cross_entropy": LinearCrossEntropyConfig(
    forward_words=128, backward_words=128, rows=128, chunk=128
  ),
}
MULTIPLY = [op for op in OPS if op.name in ARGUMENTS]


def plain_product(a, b):
  """With the precision that `kernels` states: six passes, or one."""
  exact = a.dtype == jnp.float32
  precision = jax.lax.Precision.HIGHEST if exact else None

  def kernel(a_ref, b_ref, c_ref):
    c_ref[...] = jnp.dot(
      a_ref[...],
      b_ref[...],
      precision=precision,
      preferred_element_type=jnp.float32,
    )

  out = jax.ShapeDtypeStruct(SQUARE, jnp.float32)
  return pl.pallas_call(kernel, out_shape=out, name="plain_product")(a, b)


def results_and_gradients(*arrays):
  supply, results = iter(arrays), []
  results.append(plain_product(next(supply), next(supply)))
  for op in MULTIPLY:
    args = [next(supply) for _ in ARGUMENTS[op.name]]
    function = functools.partial(op.function, implementation="pallas")
    if op.name in CONFIGS:
      function = functools.partial(function, config=CONFIGS[op.name])
    if op.name == "linear_cross_entropy":
      labels = jnp.arange(SIZE, dtype=jnp.int32)
      function = functools.partial(function, labels=labels)
    if op.name == "expert_feed_forward":
      all_rows = jnp.full(1, SIZE, jnp.int32)
      function = functools.partial(function, group_sizes=all_rows)
    out, vjp = jax.vjp(function, *args)
    results.append((out, vjp(out)))
  return results


def programs():
  for dtype in ("float32", "bfloat16"):
    shapes = [SQUARE, SQUARE]
    for op in MULTIPLY:
      shapes += ARGUMENTS[op.name]
    specs = tuple(
      jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes
    )
    built = bench.Built(results_and_gradients, specs, (None,) * len(specs))
    yield bench.Program(
      op="products",
      case=dtype,
      implementation="pallas",
      which="fwd",
      build=lambda built=built: built,
      costs=(Cost(0, 1),),
    )
