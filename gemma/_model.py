"""Gemma 1: a decoder-only transformer (arXiv 2403.08295 §2).

    x = embedding[token] * sqrt(D)                  sqrt rounded to the dtype
    L times:
      x = x + attention(norm(x))                    RoPE, causal, K kv heads
      x = x + feed_forward(norm(x))                 GeGLU
    logits = norm(x) embedding^T                    the same table, float32

where norm(x) = x / rms(x) * (1 + scale).  There is no bias anywhere.

Parameters are float32 and cast to `config.dtype` where they are used.  Letters
as in `kernels`; L blocks are stacked in front, and scanned, so that 28 blocks
compile as fast as one:

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

Weights start as normals of variance 1 / fan-in, so that every projection of a
normalised row has unit variance.  The embedding starts with deviation
0.5 / sqrt(D), 0.011 for 2B: the residual stream then begins at 0.5, below what
the blocks add to it, and the logits of random rows have deviation 0.5, so that
the first loss is close to log V.  At 1 / sqrt(D) a token would predict itself:
its own logit is sqrt(D) over the rms of the stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._config import GemmaConfig, Remat
from .ops import KERNELS, FeedForwardConfig, Norm, Ops, Rope

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of the tokens so far, right-padded.

  Attributes:
    k: [L, B, S, K, H] keys as attention reads them: rotated by RoPE.
    v: [L, B, S, K, H] values.
    lengths: [B] int32 tokens of each row.  Entries from there on are rubbish,
      never read and later overwritten.
  """

  k: jax.Array
  v: jax.Array
  lengths: jax.Array


jax.tree_util.register_dataclass(
  Cache, data_fields=["k", "v", "lengths"], meta_fields=[]
)


def _normal(rngs: nnx.Rngs, *shape: int, deviation: float) -> nnx.Param:
  return nnx.Param(deviation * jax.random.normal(rngs.params(), shape))


class Embedder(nnx.Module):
  """The token table, used at both ends of the model."""

  embedding: nnx.Param[jax.Array]

  def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
    d = config.width
    self.dtype = jnp.dtype(config.dtype)
    self.embedding = _normal(
      rngs, config.vocab_size, d, deviation=0.5 * d**-0.5
    )

  def encode(self, tokens: jax.Array) -> jax.Array:
    """Tokens [...] to rows [..., D] of the compute dtype."""
    x = self.embedding[tokens].astype(self.dtype)
    # The released model multiplies by the rounded root: in bfloat16 45.25 for
    # 2B and 55.5 for 7B, where the exact roots are 45.2548 and 55.4256.
    return x * jnp.sqrt(x.shape[-1]).astype(self.dtype)

  def decode(self, x: jax.Array) -> jax.Array:
    """Rows [..., D] to logits [..., V] in float32."""
    table = self.embedding[...].astype(self.dtype)
    return jnp.einsum(
      "...D,VD->...V", x, table, preferred_element_type=jnp.float32
    )


class Block(nnx.Module):
  """All layers, stacked; inside a scan over it, one of them."""

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

  def __call__(self, x: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
    """The residual stream past this layer.

    Args:
      x: [B, T, D].
      attend: maps q [B, T, N, H] and k, v [B, T, K, H], not yet rotated, to
        [B, T, N, H] and whatever it wants returned.

    Returns:
      [B, T, D], and what attend returned beside its result.
    """
    norm = dict(epsilon=self.config.norm_epsilon, scale_offset=1.0)

    def weight(param: nnx.Param[jax.Array]) -> jax.Array:
      return param[...].astype(x.dtype)

    with jax.named_scope("attention"):
      y = self.ops.rms_norm(x, self.attention_norm[...], **norm)
      q = jnp.einsum("BTD,NDH->BTNH", y, weight(self.q))
      k, v = jnp.einsum("BTD,CKDH->CBTKH", y, weight(self.kv))
      y, extra = attend(q, k, v)
      x += jnp.einsum("BTNH,NHD->BTD", y, weight(self.out))

    with jax.named_scope("feed_forward"):
      # Not cast here: the op casts tiles, and XLA would move the cast of all
      # layers' weights out of the scan and hold the copy.
      x = self.ops.feed_forward(
        x,
        self.gate[...],
        self.up[...],
        self.down[...],
        norm=Norm(self.feed_forward_norm[...], **norm),
        residual=True,
        config=_feed_forward_config(self.config.remat),
      )
    return x, extra


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
      y = self.ops.flash_attention(
        q, k, v, is_causal=True, segment_ids=segment_ids, rope=rope
      )
      return y, None

    def layer(x: jax.Array, block: Block):
      return block(x, attend)

    layer = _rematerialised(layer, self.config.remat)
    with jax.named_scope("embed"):
      x = self.embedder.encode(tokens)
    x, _ = jax.lax.scan(layer, x, self.blocks)
    return self._final_norm(x)

  def cast(self) -> Gemma:
    """This model with its weights in the compute dtype, as each use casts them.

    Its results are the same; decoding reads half the bytes.  Norm scales, which
    are used in float32, are kept.
    """
    dtype = jnp.dtype(self.config.dtype)

    def cast(path: Any, x: jax.Array) -> jax.Array:
      return x if "norm" in jax.tree_util.keystr(path) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, self)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Next-token logits [..., V] in float32 of hidden states [..., D]."""
    with jax.named_scope("logits"):
      return self.embedder.decode(hidden)

  def init_cache(self, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens.

    Raises:
      ValueError: if the length exceeds the context.
    """
    config = self.config
    if not 0 < length <= config.context_length:
      raise ValueError(
        f"init_cache: length must be from 1 to the context length "
        f"{config.context_length}, got {length}"
      )
    shape = (
      config.num_layers,
      batch,
      length,
      config.num_kv_heads,
      config.head_size,
    )
    dtype = jnp.dtype(config.dtype)
    return Cache(
      jnp.zeros(shape, dtype),
      jnp.zeros(shape, dtype),
      jnp.zeros(batch, jnp.int32),
    )

  def prefill(
    self, tokens: jax.Array, prompt_lengths: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Reads whole prompts; what the cache held before is forgotten.

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

    def write(stacked: jax.Array, layer: jax.Array, new: jax.Array):
      return jax.lax.dynamic_update_slice(
        stacked, new[None], (layer, 0, 0, 0, 0)
      )

    # The padding comes last, where no prompt's token sees it.
    def attend(q, k, v, k_cache, v_cache):
      del k_cache, v_cache
      return self.ops.flash_attention(q, k, v, is_causal=True)

    x, cache = self._cached(
      tokens, positions_of(tokens, None), cache, write, attend
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
    rows = jnp.arange(tokens.shape[0])
    lengths = cache.lengths + 1

    def write(stacked: jax.Array, layer: jax.Array, new: jax.Array):
      return stacked.at[layer, rows, cache.lengths].set(new[:, 0])

    def attend(q, k, v, k_cache, v_cache):
      del k, v
      return self.ops.decode_attention(q, k_cache, v_cache, lengths)

    x, cache = self._cached(
      tokens[:, None], cache.lengths[:, None], cache, write, attend
    )
    cache = dataclasses.replace(cache, lengths=lengths)
    return self._final_norm(x[:, 0]), cache

  def _cached(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
    write: Callable[..., jax.Array],
    attend: Callable[..., jax.Array],
  ) -> tuple[jax.Array, Cache]:
    """All layers over tokens [B, T], each writing the cache, then attending.

    The whole cache is carried from layer to layer and written in place; as a
    scanned input and output it would be copied at every step.
    """
    base = self.config.rope_base_frequency

    def layer(carry, xs):
      x, k_cache, v_cache = carry
      index, block = xs

      def cached_attend(q, k, v):
        q = self.ops.apply_rope(q, positions, base_frequency=base)
        k = self.ops.apply_rope(k, positions, base_frequency=base)
        ks, vs = write(k_cache, index, k), write(v_cache, index, v)
        return attend(q, k, v, ks[index], vs[index]), (ks, vs)

      x, caches = block(x, cached_attend)
      return (x, *caches), None

    with jax.named_scope("embed"):
      x = self.embedder.encode(tokens)
    layers = jnp.arange(self.config.num_layers), self.blocks
    (x, k, v), _ = jax.lax.scan(layer, (x, cache.k, cache.v), layers)
    return x, Cache(k, v, cache.lengths)

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


def _feed_forward_config(remat: Remat) -> FeedForwardConfig:
  """Keeps gate and up where no remat would have them computed twice.

  Under remat the block's own recomputation, two matmuls, is cheaper than that
  of its whole forward pass.
  """
  return FeedForwardConfig(residuals="gate_up" if remat == "none" else "none")


def _rematerialised(layer: Callable[..., Any], remat: Remat):
  """`layer`, keeping less for its backward pass and computing it again."""
  policies = jax.checkpoint_policies
  match remat:
    case "none":
      return layer
    case "full":
      policy = policies.nothing_saveable
    case "dots":  # of rows with weights, not those of attention: they are T^2
      policy = policies.dots_with_no_batch_dims_saveable
    case "names":  # what attention's backward would run its forward again for
      policy = policies.save_only_these_names(
        "flash_attention_out", "flash_attention_lse"
      )
  # The scan keeps XLA from merging the two computations: no barrier needed.
  return jax.checkpoint(layer, policy=policy, prevent_cse=False)


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
