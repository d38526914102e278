"""One block of Gemma, from the model's own code.

An op's time says what it costs alone; a block's, what XLA no longer fuses into
its neighbours because it is a kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from pallas_gemma.gemma import KERNELS, REFERENCE, Gemma, GemmaConfig
from pallas_gemma.kernels import OPS, Cost, Rope

from .baselines import feed_forward_with_barrier, splash_attention
from .program import Built, Program, passes

_CASES = (  # the first is in the table, the others take minutes more
  ("gemma_2b_1x8k", GemmaConfig.gemma_2b(), 1, 8192),
  ("gemma_2b_4x2k", GemmaConfig.gemma_2b(), 4, 2048),
  ("gemma_7b_1x4k", GemmaConfig.gemma_7b(), 1, 4096),
)
_KERNELS = {op.name: op.function for op in OPS}
_IMPLEMENTATIONS = {
  "pallas": KERNELS,
  # With the norms as kernels too, which `KERNELS` leaves to XLA.
  "pallas-norms": dataclasses.replace(
    KERNELS,
    rms_norm=_KERNELS["rms_norm"],
    add_rms_norm=_KERNELS["add_rms_norm"],
  ),
  "xla-splash": dataclasses.replace(
    REFERENCE,
    flash_attention=splash_attention,
    feed_forward=feed_forward_with_barrier,
  ),
}


def programs() -> Iterator[Program]:
  """The block with our kernels, also with norms, and with XLA and splash."""
  for i, (name, config, batch, length) in enumerate(_CASES):
    for implementation in _IMPLEMENTATIONS:
      yield from passes(
        functools.partial(_block, config, batch, length, implementation),
        block_costs(config, batch, length),
        op="gemma_block",
        case=name,
        implementation=implementation,
        default=i == 0 and implementation != "pallas-norms",
      )


def _block(
  config: GemmaConfig, batch: int, length: int, implementation: str
) -> Built:
  """The residual stream past one layer, of its parameters and its input."""
  one = dataclasses.replace(config, num_layers=1, vocab_size=8)
  ops = _IMPLEMENTATIONS[implementation]
  model = nnx.eval_shape(lambda: Gemma(one, rngs=nnx.Rngs(0), ops=ops))
  graph, parameters = nnx.split(model.blocks)
  # As `Gemma.cast` leaves them: matrices in the compute dtype.
  leaves, treedef = jax.tree_util.tree_flatten_with_path(parameters)
  specs = tuple(
    jax.ShapeDtypeStruct(
      leaf.shape[1:],
      leaf.dtype if "norm" in jax.tree_util.keystr(path) else config.dtype,
    )
    for path, leaf in leaves
  )
  x = jax.ShapeDtypeStruct((batch, length, config.width), config.dtype)

  def block(x: jax.Array, *arrays: jax.Array) -> jax.Array:
    layer = nnx.merge(graph, jax.tree.unflatten(treedef, arrays))
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    rope = Rope(positions, config.rope_base_frequency)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, None]:
      return ops.attend(q, k, v, is_causal=True, rope=rope), None

    return layer(x, attend)[0]

  return Built(block, (x, *specs), (None,) * (1 + len(specs)))


def block_costs(
  config: GemmaConfig, batch: int, length: int
) -> tuple[Cost, Cost]:
  """Matmuls and attention, each pass bound by the MXU; norms hide behind it."""
  heads = config.num_heads + 2 * config.num_kv_heads
  weights = config.width * (
    config.head_size * (heads + config.num_heads) + 3 * config.hidden_size
  )
  tokens = batch * length
  attention_op = next(op for op in OPS if op.name == "flash_attention")
  q = jax.ShapeDtypeStruct(
    (batch, length, config.num_heads, config.head_size), config.dtype
  )
  kv = jax.ShapeDtypeStruct(
    (batch, length, config.num_kv_heads, config.head_size), config.dtype
  )
  forward, backward = attention_op.cost(q, kv, kv, is_causal=True)
  assert backward is not None
  stream = 2 * tokens * config.width  # bytes of bfloat16
  return (
    Cost(2 * weights * tokens + forward.flops, 2 * weights + 2 * stream),
    Cost(4 * weights * tokens + backward.flops, 4 * weights + 3 * stream),
  )
