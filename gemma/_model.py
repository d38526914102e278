"""Gemma 1: a decoder-only transformer (arXiv 2403.08295 §2).

    x = embedding[token] * sqrt(D)                  sqrt rounded to the dtype
    L times:
      x = x + attention(norm(x))                    RoPE, causal, K kv heads
      x = x + feed_forward(norm(x))                 GeGLU
    logits = norm(x) embedding^T                    the same table, float32

where norm(x) = x / rms(x) * (1 + scale).  There is no bias anywhere.

Parameters are float32 and cast to `config.dtype` where they are used.  The
letters are those of `kernels`.  The parameters of all L blocks are stacked
along a first axis, and a scan runs over it, so that 28 blocks compile as fast
as one:

    embedder.embedding             [V, D]
    blocks.attention_norm          [L, D]           zero: an identity scale
    blocks.q                       [L, N, D, H]
    blocks.kv                      [L, 2, K, D, H]  keys, then values
    blocks.out                     [L, N, H, D]
    blocks.feed_forward_norm       [L, D]
    blocks.gate, blocks.up         [L, D, F]
    blocks.down                    [L, F, D]
    final_norm                     [D]

The released checkpoints hold the same arrays, one layer at a time: 2B's
`q_einsum` and `kv_einsum` are q and kv, 7B's `qkv_einsum` [3, N, D, H] is q
followed by kv, and `gating_einsum` [2, D, F] is gate followed by up.

Weights are drawn from a normal distribution of variance 1 / fan-in, so that
every projection of a normalised row has unit variance.  The embedding is drawn
with standard deviation 0.5 / sqrt(D), 0.011 for 2B.  The residual stream then
begins with an rms of 0.5, less than what the blocks add to it, and the logits
have standard deviation 0.5, so that the first loss is close to log V.  With
1 / sqrt(D) each token would predict itself, because the logit of the input
token would be sqrt(D) over the rms of the stream.

Read in this order: `_config` (the sizes), this page down to `hidden_states`,
`_layers` (one block), then `prefill` and `decode` here with `_cache`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from . import _remat
from ._cache import Cache
from ._config import GemmaConfig
from ._layers import IN_PLACE, Block, Embedder
from .ops import KERNELS, Ops, Rope, ScanPart, scan_layers

Params = dict[str, Any]
"""A model's parameters: nested dicts of arrays, by the names above."""


class Gemma(nnx.Module):
  """Gemma 1 with any sizes.

  A pytree like any flax.nnx module: pass it to `jax.jit`, or split it.

  Args:
    config: its sizes; `GemmaConfig.gemma_2b()` and so on.
    rngs: seeds the parameters, stream "params".
    ops: the array functions to call.
  """

  def __init__(
    self, config: GemmaConfig, *, rngs: nnx.Rngs, ops: Ops = KERNELS
  ):
    self.config, self.ops = config, ops
    self.embedder = Embedder(config, rngs=rngs)
    self.blocks = Block(config, ops, rngs=rngs)
    self.final_norm = nnx.Param(jnp.zeros(config.width))

  def __call__(
    self,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
  ) -> jax.Array:
    """Logits [B, T, V] in float32; arguments as for `hidden_states`."""
    return self.logits(
      self.hidden_states(tokens, positions=positions, segment_ids=segment_ids)
    )

  def hidden_states(
    self,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
  ) -> jax.Array:
    """The last layer's rows after the final norm; `logits` reads them.

    Args:
      tokens: [B, T] integers below V.
      positions: [B, T] integers for RoPE; None counts within each segment.
      segment_ids: [B, T] integers: documents 1, 2, ... that do not see each
        other, and 0 for padding; None is one document.

    Returns:
      [B, T, D] of the compute dtype.

    Raises:
      ValueError: on a wrong shape or dtype, or more tokens than the context.
    """
    self._check_tokens("hidden_states", tokens, ndim=2)
    if segment_ids is not None and segment_ids.shape != tokens.shape:
      raise ValueError(
        f"hidden_states: segment_ids must be {tokens.shape}, the shape of "
        f"tokens, got {segment_ids.shape}"
      )
    if positions is None:
      positions = positions_of(tokens, segment_ids)
    rope = Rope(positions, self.config.rope_base_frequency)

    def attend(q, k, v):
      y = self.ops.attend(
        q, k, v, is_causal=True, segment_ids=segment_ids, rope=rope
      )
      return y, None

    def part(policy: _remat.Policy, layers: int) -> ScanPart:
      def layer(x: jax.Array, block: Block):
        return block(x, attend, policy)

      return ScanPart(layer, layers, _remat.checkpoint(policy))

    remat = _remat.parts(self.config.remat, self.config.num_layers)
    with jax.named_scope("embed"):
      x = self.embedder.embed(tokens)
    parts = [part(policy, layers) for policy, layers in remat]
    x, _ = scan_layers(parts, x, self.blocks, in_place=IN_PLACE)
    return self._final_norm(x)

  def cast(self) -> Gemma:
    """This model with its weights in the compute dtype.

    Every use of a weight casts it so, hence the results are the same; but in
    bfloat16 decoding reads half the bytes.  The scales of norms are used in
    float32 and kept.
    """
    dtype = jnp.dtype(self.config.dtype)

    def cast(path: Any, x: jax.Array) -> jax.Array:
      return x if is_norm_scale(path) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, self)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Next-token logits [..., V] in float32 of hidden states [..., D]."""
    with jax.named_scope("logits"):
      return self.embedder.logits(hidden)

  def init_cache(self, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens.

    Raises:
      ValueError: if the length exceeds the context.
    """
    if not 0 < length <= self.config.context_length:
      raise ValueError(
        f"init_cache: length must be from 1 to the context length "
        f"{self.config.context_length}, got {length}"
      )
    return Cache.empty(self.config, batch, length)

  def prefill(
    self, tokens: jax.Array, prompt_lengths: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Reads whole prompts into a cache; what it held before is overwritten.

    Args:
      tokens: [B, T] prompts, right-padded with anything; T is at most the
        cache's S.
      prompt_lengths: [B] integers from 1 to T.
      cache: from `init_cache`.

    Returns:
      The hidden state [B, D] of each prompt's last token, and the cache.

    Raises:
      ValueError: if tokens are not [B, T] integers that fit the cache.
    """
    self._check_tokens("prefill", tokens, ndim=2)
    if tokens.shape[1] > cache.k.shape[2]:
      raise ValueError(
        f"prefill: tokens must fit the cache's {cache.k.shape[2]} places, "
        f"got {tokens.shape[1]}"
      )

    def attend(layer, q, k, v, cache):
      # The padding comes after a prompt's tokens, and no token sees later ones.
      y = self.ops.attend(q, k, v, is_causal=True)
      return y, cache.write_prompts(layer, k, v)

    x, cache = self._with_cache(
      tokens, positions_of(tokens, None), cache, attend
    )
    last = prompt_lengths.astype(jnp.int32) - 1
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return self._final_norm(x), dataclasses.replace(cache, lengths=last + 1)

  def decode(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads one more token of every row.

    Args:
      tokens: [B] integers.
      cache: from `prefill` or `decode`, with room for one more token.

    Returns:
      The hidden state [B, D] of these tokens, and the cache with them in it.

    Raises:
      ValueError: if tokens are not [B] integers.
    """
    self._check_tokens("decode", tokens, ndim=1)
    lengths = cache.lengths + 1

    def attend(layer, q, k, v, cache):
      cache = cache.append(layer, k, v)
      y = self.ops.decode_attention(q, cache.k[layer], cache.v[layer], lengths)
      return y.swapaxes(1, 2), cache

    x, cache = self._with_cache(
      tokens[:, None], cache.lengths[:, None], cache, attend
    )
    cache = dataclasses.replace(cache, lengths=lengths)
    return self._final_norm(x[:, 0]), cache

  def _with_cache(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
    attend: Callable[..., tuple[jax.Array, Cache]],
  ) -> tuple[jax.Array, Cache]:
    """All layers over tokens that extend a cache.

    The whole cache is carried from layer to layer, so that XLA writes it in
    place; as an input and output of the scan it would be copied at every token.

    Args:
      tokens: [B, T].
      positions: [B, T], for RoPE.
      cache: of all layers.
      attend: maps a layer's index, its rotated q and k, its v and the cache to
        the attention's result [B, N, T, H] and the cache with k and v in it.

    Returns:
      The residual stream [B, T, D] after the last layer, and the cache, with
      its former lengths.
    """
    base = self.config.rope_base_frequency

    def layer(carry, xs):
      x, cache = carry
      index, block = xs

      def rotate_and_attend(q, k, v):
        q = self.ops.apply_rope(q, positions, base_frequency=base)
        k = self.ops.apply_rope(k, positions, base_frequency=base)
        return attend(index, q, k, v, cache)

      return block(x, rotate_and_attend), None

    with jax.named_scope("embed"):
      x = self.embedder.embed(tokens)
    layers = jnp.arange(self.config.num_layers), self.blocks
    (x, cache), _ = scan_layers(layer, (x, cache), layers, in_place=IN_PLACE)
    return x, cache

  def _final_norm(self, x: jax.Array) -> jax.Array:
    with jax.named_scope("final_norm"):
      return self.ops.rms_norm(
        x,
        self.final_norm[...],
        epsilon=self.config.norm_epsilon,
        scale_offset=1.0,
      )

  def _check_tokens(self, name: str, tokens: jax.Array, ndim: int) -> None:
    if tokens.ndim != ndim or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ValueError(
        f"{name}: tokens must be {'[B, T]' if ndim == 2 else '[B]'} integers, "
        f"got {tokens.dtype}{list(tokens.shape)}"
      )
    if ndim == 2 and tokens.shape[1] > self.config.context_length:
      raise ValueError(
        f"{name}: tokens must be at most the context length "
        f"{self.config.context_length}, got {tokens.shape[1]}"
      )


def positions_of(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """Each token's place in its own segment: [B, T] int32, from 0."""
  index = jnp.broadcast_to(
    jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape
  )
  if segment_ids is None:
    return index
  is_first = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
  starts = jax.lax.cummax(jnp.where(is_first, index, 0), axis=1)
  return index - starts


# --- parameters ---


def model_params(model: Gemma) -> Params:
  """The parameters of a model, real or abstract."""
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def with_params(model: Gemma, params: Params) -> Gemma:
  """A model of the same config and ops with other parameters."""
  return nnx.merge(nnx.graphdef(model), nnx.State(params))


def abstract_gemma(config: GemmaConfig, ops: Ops) -> Gemma:
  """A model with `jax.ShapeDtypeStruct`s in place of its parameters."""
  return nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0), ops=ops))


def num_parameters(model: Gemma) -> int:
  """How many numbers the parameters of a model are, real or abstract."""
  return sum(math.prod(p.shape) for p in jax.tree.leaves(model))


def is_norm_scale(path: tuple[Any, ...]) -> bool:
  """Whether the parameter at a pytree path is the scale of a norm.

  Known by its name, since its shape does not tell: stacked over the layers,
  the scales of norms have two dimensions, as matrices have.
  """
  names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
  return any(name.endswith("norm") for name in names)
