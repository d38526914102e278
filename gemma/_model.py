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
`_layers` (one block), then `extend` here with `_cache`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from . import _remat
from ._cache import Cache
from ._config import GemmaConfig
from ._explicit import automatic
from ._inputs import check_room, check_shape, checked_range
from ._layers import IN_PLACE, Block, Embedder
from ._weights import cast_weights, is_quantized, quantize_weights
from .ops import KERNELS, Ops, Rope, ScanPart, scan_layers

_CHUNK = 512  # tokens of a row that `prefill` reads at a time


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
    embedded: jax.Array | None = None,
  ) -> jax.Array:
    """The last layer's rows after the final norm; `logits` reads them.

    Args:
      tokens: [B, T] integers from 0 to below V.
      positions: [B, T] integers for RoPE; None counts within each segment.
      segment_ids: [B, T] integers: documents 1, 2, ... that do not see each
        other, and 0 for padding; None is one document.
      embedded: [B, T, D], what `embedder.embed` makes of tokens; None for
        that.

    Returns:
      [B, T, D] of the compute dtype.

    Raises:
      ValueError: on a wrong shape or dtype, or more tokens than the context;
        outside `jit` also on ids that are none, but for padding's.
    """
    check_shape("hidden_states", tokens, self.config)
    if segment_ids is not None and segment_ids.shape != tokens.shape:
      raise ValueError(
        f"hidden_states: segment_ids must be {tokens.shape}, the shape of "
        f"tokens, got {segment_ids.shape}"
      )
    is_token = None if segment_ids is None else segment_ids != 0
    tokens = self._checked_ids("hidden_states", tokens, is_token)
    arrays = tokens, positions, segment_ids, embedded
    return automatic(Gemma._hidden_states, "BTD", self, *arrays)

  def _hidden_states(
    self,
    tokens: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    embedded: jax.Array | None,
  ) -> jax.Array:
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
    x = embedded
    if x is None:
      with jax.named_scope("embed"):
        x = self.embedder.embed(tokens)
    parts = [part(policy, layers) for policy, layers in remat]
    x, _ = scan_layers(parts, x, self.blocks, in_place=self._in_place())
    return self._final_norm(x)

  def cast(self) -> Gemma:
    """This model with its weights in the compute dtype.

    Every use of a weight casts it so, hence the results are the same; but in
    bfloat16 decoding reads half the bytes.  The scales of norms are used in
    float32 and kept.
    """
    return cast_weights(self, jnp.dtype(self.config.dtype))

  def quantize(self) -> Gemma:
    """This model with its matrices in int8, a scale per output channel.

    To sample from: with few rows a step takes little more than half the time of
    bfloat16, and the weights half the memory.  Logits differ a little.  It can
    be called as any model, but not trained or saved.  Of a model that is
    quantised already, the same.
    """
    return quantize_weights(self)

  @property
  def is_quantized(self) -> bool:
    """Whether its matrices are in int8."""
    return is_quantized(self.blocks.gate[...])

  def _in_place(self) -> tuple[str, ...]:
    """Weights that stay in the stack of the layers.

    In int8 none: XLA reads them, and takes a layer out as it does so.
    """
    return () if self.is_quantized else IN_PLACE

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Next-token logits [..., V] in float32 of hidden states [..., D]."""
    with jax.named_scope("logits"):
      letters = "BTV" if hidden.ndim == 3 else f"{'B' * (hidden.ndim == 2)}V"
      return automatic(_logits, letters, self.embedder, hidden)

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

    They are read 512 tokens at a time, so that memory grows with T alone.

    Args:
      tokens: [B, T] prompts, right-padded with anything; T is at most the
        cache's S.
      prompt_lengths: [B] integers from 1 to T.
      cache: from `init_cache`.

    Returns:
      The hidden state [B, D] of each prompt's last token, and the cache.

    Raises:
      ValueError: if tokens are not [B, T] integers that fit the cache; outside
        `jit` also if a length, or an id of a prompt, is out of range.
    """
    check_shape("prefill", tokens, self.config, cache)
    length = tokens.shape[1]
    prompt_lengths = checked_range(
      "prefill: prompt_lengths", jnp.asarray(prompt_lengths), 1, length
    )
    tokens = self._checked_ids(
      "prefill", tokens, _is_before(prompt_lengths, length)
    )
    out = "BD", cache.letters
    return automatic(Gemma._prefill, out, self, tokens, prompt_lengths, cache)

  def _prefill(
    self, tokens: jax.Array, prompt_lengths: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    batch, length = tokens.shape

    def read(start, size, carry):
      last, cache = carry
      new = jnp.clip(prompt_lengths.astype(jnp.int32) - start, 0, size)
      chunk = jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
      x, cache = self.extend(chunk, cache, new)
      end = jnp.maximum(new - 1, 0)[:, None, None]
      x = jnp.take_along_axis(x, end, axis=1)[:, 0]
      return jnp.where(new[:, None] > 0, x, last), cache

    dtype = jnp.dtype(self.config.dtype)
    carry = (
      jnp.zeros((batch, self.config.width), dtype),
      dataclasses.replace(cache, lengths=jnp.zeros_like(cache.lengths)),
    )
    whole, rest = divmod(length, _CHUNK)
    if whole:
      carry = jax.lax.fori_loop(
        0, whole, lambda i, carry: read(i * _CHUNK, _CHUNK, carry), carry
      )
    if rest:
      carry = read(whole * _CHUNK, rest, carry)
    return carry

  def decode(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads one more token of every row: `extend` with T = 1.

    Args:
      tokens: [B] integers.
      cache: from `prefill`, `extend` or `decode`, with room for one more token.

    Returns:
      The hidden state [B, D] of these tokens, and the cache with them in it.

    Raises:
      ValueError: if tokens are not [B] integers; outside `jit` also if an id is
        out of range, or a row is full.  (In a compiled program the key of a
        full row is dropped, and attention misses it.)
    """
    check_shape("decode", tokens, self.config, cache)
    check_room("decode", cache, 1)
    tokens = self._checked_ids("decode", tokens)
    x, cache = self.extend(tokens[:, None], cache)
    return x[:, 0], cache

  def extend(
    self, tokens: jax.Array, cache: Cache, counts: jax.Array | None = None
  ) -> tuple[jax.Array, Cache]:
    """Reads T more tokens of every row, or the first few of them.

    The one way to read with a cache: a prompt is read by it in chunks, drafts
    are verified by it, and to decode is to read one token.

    The whole cache is carried from layer to layer, so that XLA writes it in
    place; as an input and output of the scan it would be copied at every token.

    Args:
      tokens: [B, T] integers.
      cache: with room for T more tokens in every row, whatever the counts.
      counts: [B] integers from 0 to T: how many of a row's tokens there are;
        the others may be anything.  None is T for every row.

    Returns:
      The hidden states [B, T, D] after the final norm, of which those past a
      row's count mean nothing, and the cache with the tokens that there are.

    Raises:
      ValueError: if tokens are not [B, T] integers that fit the cache; outside
        `jit` also if an id or a count is out of range, or there is no room.
    """
    check_shape("extend", tokens, self.config, cache)
    new = tokens.shape[1]
    check_room("extend", cache, new)
    is_token = None
    if counts is not None:
      counts = checked_range("extend: counts", jnp.asarray(counts), 0, new)
      is_token = _is_before(counts, new)
    tokens = self._checked_ids("extend", tokens, is_token)
    out = "BTD", cache.letters
    return automatic(Gemma._extend, out, self, tokens, cache, counts)

  def _extend(
    self, tokens: jax.Array, cache: Cache, counts: jax.Array | None
  ) -> tuple[jax.Array, Cache]:
    new = tokens.shape[1]
    positions = cache.lengths[:, None] + jnp.arange(new, dtype=jnp.int32)
    rope = Rope(positions, self.config.rope_base_frequency)
    rope = rope.precomputed(self.config.head_size)  # once for all layers
    # All T keys are written.  Those past a row's count are later than all its
    # tokens, so none of these sees them, and the next call overwrites them.
    written = cache.lengths + new

    def layer(carry, xs):
      x, cache = carry
      index, block = xs

      def attend(q, k, v):
        y, *longer = self.ops.decode_attention(
          q, cache.k, cache.v, written, new=(k, v), layer=index, rope=rope
        )
        cached = dataclasses.replace(cache, k=longer[0], v=longer[1])
        return y.swapaxes(1, 2), cached

      return block(x, attend), None

    with jax.named_scope("embed"):
      x = self.embedder.embed(tokens)
    layers = jnp.arange(self.config.num_layers), self.blocks
    (x, cache), _ = scan_layers(
      layer, (x, cache), layers, in_place=self._in_place()
    )
    lengths = written if counts is None else cache.lengths + counts
    cache = dataclasses.replace(cache, lengths=lengths.astype(jnp.int32))
    rows = self._final_norm(x.reshape(-1, self.config.width))
    return rows.reshape(x.shape), cache

  def _final_norm(self, x: jax.Array) -> jax.Array:
    with jax.named_scope("final_norm"):
      return self.ops.rms_norm(
        x,
        self.final_norm[...],
        epsilon=self.config.norm_epsilon,
        scale_offset=1.0,
      )

  def _checked_ids(
    self, name: str, tokens: jax.Array, where: jax.Array | None = None
  ) -> jax.Array:
    most = self.config.vocab_size - 1
    return checked_range(f"{name}: tokens", tokens, 0, most, where)


def _logits(embedder: Embedder, hidden: jax.Array) -> jax.Array:
  return embedder.logits(hidden)


def _is_before(counts: jax.Array, length: int) -> jax.Array:
  """Whether each of T places is one of a row's first: [B, T]."""
  return jnp.arange(length) < counts[:, None]


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
