"""The parts of Gemma: the embedding table and the transformer block.

`_model` stacks them; its docstring has the formulas and the shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ._config import GemmaConfig
from ._parts import on_gathered
from ._remat import AROUND_ATTENTION, Policy, keeps_all
from ._table import embedding_rows, rows_and_copies
from .ops import FeedForwardConfig, Norm, Ops, QuantizedWeight, layer_einsum

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""What a block is given to attend with: maps q [B, T, N, H] and k, v
[B, T, K, H], to which RoPE has not been applied, to the attention's result,
heads first, [B, N, T, H], and to anything that the block's caller wants back,
such as a cache."""


IN_PLACE = ("q", "kv", "out", "gate", "up", "down")
"""Weights that a scan over the blocks leaves in their stacks.  The kernels of
the feed-forward read theirs there; for them XLA would copy each layer's."""


class Embedder(nnx.Module):
  """The token table, used at both ends of the model."""

  embedding: nnx.Param[jax.Array]

  def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
    d = config.width
    self.dtype = jnp.dtype(config.dtype)
    self.embedding = _normal(
      rngs, config.vocab_size, d, deviation=0.5 * d**-0.5
    )

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Tokens [...] to rows [..., D] of the compute dtype."""
    table = self.embedding[...]
    if not jax.sharding.get_abstract_mesh().empty:
      # On a mesh XLA would add the gradient of the rows to that of the logits
      # before this is summed over the devices: a pass over the whole table, of
      # which each device then keeps its part.
      table = jax.lax.optimization_barrier(table)
    return self._scaled(embedding_rows(table, tokens, self.dtype))

  def embed_with_copies(
    self, tokens: jax.Array
  ) -> tuple[jax.Array, jax.Array] | None:
    """`embed`, and the table for the loss, of a model that is in parts.

    Returns:
      [B, T, D] and `_table`'s copies; None of a model that has none.
    """
    both = rows_and_copies(self.embedding[...], tokens, self.dtype)
    return both and (self._scaled(both[0]), both[1])

  def _scaled(self, x: jax.Array) -> jax.Array:
    # The released model rounds the root to its dtype before it multiplies: in
    # bfloat16 the root is 45.25 for 2B and 55.5 for 7B, where the exact ones
    # are 45.2548 and 55.4256.
    return x * jnp.sqrt(x.shape[-1]).astype(self.dtype)

  def logits(self, x: jax.Array) -> jax.Array:
    """Rows [..., D] to logits [..., V] in float32."""
    table: Any = self.embedding[...]
    quantized = isinstance(table, QuantizedWeight)
    matrix = table.values if quantized else table
    logits = jnp.einsum(
      "...D,VD->...V",
      x,
      matrix.astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    return logits * table.scale[:, 0] if quantized else logits


class Block(nnx.Module):
  """One transformer block: attention, then the feed-forward.

  The module holds the parameters of all L blocks, stacked.  `jax.lax.scan`
  over the module hands its body one block at a time, and that is what
  `__call__` expects.
  """

  def __init__(self, config: GemmaConfig, ops: Ops, *, rngs: nnx.Rngs):
    layers, d, f = config.num_layers, config.width, config.hidden_size
    n, k, h = config.num_heads, config.num_kv_heads, config.head_size

    def fan_in(size: int, *shape: int) -> nnx.Param[jax.Array]:
      return _normal(rngs, layers, *shape, deviation=size**-0.5)

    self.config, self.ops = config, ops
    self.attention_norm = nnx.Param(jnp.zeros((layers, d)))
    self.q = fan_in(d, n, d, h)
    self.kv = fan_in(d, 2, k, d, h)
    self.out = fan_in(n * h, n, h, d)
    self.feed_forward_norm = nnx.Param(jnp.zeros((layers, d)))
    self.gate = fan_in(d, d, f)
    self.up = fan_in(d, d, f)
    self.down = fan_in(f, f, d)

  def __call__(
    self, x: jax.Array, attend: Attend, remat: Policy = "none"
  ) -> tuple[jax.Array, Any]:
    """The residual stream after this block.

    Args:
      x: [B, T, D], the residual stream before it.
      attend: the attention; see `Attend`.
      remat: what this block keeps for its backward pass.

    Returns:
      [B, T, D], and the second result of `attend`.
    """
    norm = dict(epsilon=self.config.norm_epsilon, scale_offset=1.0)

    with jax.named_scope("attention"):
      y = self.ops.rms_norm(x, self.attention_norm[...], **norm)
      q = layer_einsum("BTD,NDH->BTNH", y, self.q[...])
      k, v = layer_einsum("BTD,CKDH->CBTKH", y, self.kv[...])
      of_q, of_k, of_v, of_y = AROUND_ATTENTION
      q, k, v = map(checkpoint_name, (q, k, v), (of_q, of_k, of_v))
      y, extra = attend(q, k, v)
      x += layer_einsum("BNTH,NHD->BTD", y, self.out[...])
      x = checkpoint_name(x, of_y)

    with jax.named_scope("feed_forward"):
      # On one device the weights are not cast here.  The op casts one tile at a
      # time; a cast here XLA would move out of the scan, and then hold a second
      # copy of all layers' weights in memory.
      def feed_forward(
        x: jax.Array, scale: jax.Array, *weights: Any
      ) -> jax.Array:
        return self.ops.feed_forward(
          x,
          *weights,
          norm=Norm(scale, **norm),
          residual=True,
          config=_feed_forward_config(remat),
        )

      scale = self.feed_forward_norm[...]
      weights = self.gate[...], self.up[...], self.down[...]
      x = on_gathered(feed_forward, x, scale, weights)
    return x, extra


def _feed_forward_config(remat: Policy) -> FeedForwardConfig:
  """What the feed-forward keeps for its backward pass.

  Without remat, the products with gate and up, so that they are not computed
  again.  With remat, nothing: to keep them, the whole op would run a second
  time before its backward pass, three matmuls, where the backward pass by
  itself recomputes only the two products.
  """
  return FeedForwardConfig(residuals="gate_up" if keeps_all(remat) else "none")


def _normal(rngs: nnx.Rngs, *shape: int, deviation: float) -> nnx.Param:
  return nnx.Param(deviation * jax.random.normal(rngs.params(), shape))
