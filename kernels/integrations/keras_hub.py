"""`keras_hub` with the JAX backend: Gemma 1 and 2, Llama 3, Qwen 3.

    from pallas_gemma.kernels.integrations import keras_hub

    keras_hub.apply()
    model = keras_hub_library.models.GemmaCausalLM.from_preset(...)  # as ever

What is swapped: the attention and the feed-forward of the decoder layers, and
the masks that these layers make, which say that they are causal.  Norms stay
Keras's, which XLA fuses, and so does RoPE, with all of its scalings: both are
layers between the kernels.

What stays the library's own code, layer by layer, and is in the report: a KV
cache; dropout; a mask that is an array; a feed-forward whose layers have LoRA
or quantised weights, or another activation; vLLM's paged attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._frame.check import Implementation
from .._gated import feed_forward
from . import _log, _parts
from ._library import Choice, Library, Swap, module
from ._mask import CausalMask

_NAME = "keras_hub"


def apply(
  *,
  implementation: Implementation = None,
  parts: Sequence[str] | None = None,
) -> None:
  """Swaps the layers of the installed `keras_hub`, of models old and new.

  What was traced before is forgotten (`jax.clear_caches()`).  A function that
  Keras compiled, as `fit` does, is made anew by `model.compile()`.

  Args:
    implementation: as in `integrations.gemma.apply`.
    parts: some of "attention", "feed_forward"; None is both.

  Raises:
    ValueError: if `keras_hub` is not installed, or in a version whose layers
      are not known here, or if Keras's backend is not JAX.
  """
  _library.apply(implementation, parts)


def undo() -> None:
  """Puts the library's own code back, and forgets what was traced."""
  _library.undo()


# --- the swaps ----------------------------------------------------------------


def _swaps(choice: Choice) -> Iterator[Swap]:
  backend = module("keras").config.backend()
  if backend != "jax":
    raise ValueError(
      f"integrations.keras_hub: Keras's backend must be jax, got {backend}; "
      "set KERAS_BACKEND=jax"
    )
  at = "keras_hub.src.models"
  gemma = module(f"{at}.gemma.gemma_attention").CachedGemmaAttention
  gemma_block = module(f"{at}.gemma.gemma_decoder_block").GemmaDecoderBlock
  llama = module(f"{at}.llama.llama_attention").LlamaAttention
  llama_block = module(f"{at}.llama.llama_decoder").LlamaTransformerDecoder
  qwen = module(f"{at}.qwen3.qwen3_attention").Qwen3Attention
  qwen_block = module(f"{at}.qwen3.qwen3_decoder").Qwen3TransformerDecoder

  def swap(owner: Any, name: str, make: Any) -> Swap:
    original = vars(owner)[name]
    return Swap(owner, name, functools.wraps(original)(make(choice, original)))

  if "attention" in choice.parts:
    yield swap(gemma, "call", _gemma_attention)
    yield swap(gemma_block, "_compute_attention_mask", _gemma_mask)
    for attention, block in ((llama, llama_block), (qwen, qwen_block)):
      yield swap(attention, "call", _llama_attention)
      yield swap(block, "_compute_self_attention_mask", _llama_mask)
  if "feed_forward" in choice.parts:
    yield swap(gemma_block, "call", _gemma_block)
    for block in (llama_block, qwen_block):
      yield swap(block, "call", _llama_block)


_library = Library(
  name=_NAME,
  distribution="keras-hub",
  versions=("0.32.0",),
  parts=("attention", "feed_forward"),
  swaps=_swaps,
  beyond="norms, RoPE and the loss, which is given logits, are Keras's; other "
  "models are as they were",
)


# --- masks --------------------------------------------------------------------


class _Known:
  """A mask that goes through the call of a Keras layer as it is.

  Keras would make an array of whatever can be one.
  """

  def __init__(self, mask: CausalMask):
    self.mask = mask


def _causal(x: Any, padding_mask: Any) -> _Known:
  if padding_mask is None:
    padding_mask = jnp.ones(x.shape[:2], bool)
  return _Known(CausalMask(jnp.asarray(padding_mask) != 0))


def _dense(mask: Any) -> Any:
  return mask.mask.dense() if isinstance(mask, _Known) else mask


def _gemma_mask(choice: Choice, original: Callable[..., Any]) -> Any:
  del choice

  def mask(self: Any, x: Any, padding_mask: Any, cache: Any, index: Any) -> Any:
    if cache is not None or getattr(x, "_keras_mask", None) is not None:
      return original(self, x, padding_mask, cache, index)
    return _causal(x, padding_mask)

  return mask


def _llama_mask(choice: Choice, original: Callable[..., Any]) -> Any:
  del choice

  def mask(
    self: Any,
    decoder_sequence: Any,
    decoder_padding_mask: Any,
    decoder_attention_mask: Any,
    self_attention_cache: Any,
    self_attention_cache_update_index: Any,
  ) -> Any:
    x = decoder_sequence
    others = decoder_attention_mask, self_attention_cache
    if any(o is not None for o in (*others, getattr(x, "_keras_mask", None))):
      return original(
        self,
        x,
        decoder_padding_mask,
        *others,
        self_attention_cache_update_index,
      )
    return _causal(x, decoder_padding_mask)

  return mask


# --- attention ----------------------------------------------------------------


def _why_not_attention(layer: Any, mask: Any, cache: Any) -> str | None:
  if cache is not None:
    return "a KV cache is the library's"
  if layer.dropout:
    return "it has dropout"
  if not isinstance(mask, _Known):
    return "its mask is an array"
  context = module("keras_hub.src.vllm.context").get_vllm_context()
  if context is not None and context.paged_attention_func is not None:
    return "vLLM serves it"
  return None


def _gemma_attention(choice: Choice, original: Callable[..., Any]) -> Any:
  def call(
    self: Any,
    x: Any,
    attention_mask: Any = None,
    cache: Any = None,
    cache_update_index: Any = 0,
    training: Any = False,
  ) -> Any:
    why = _why_not_attention(self, attention_mask, cache)
    if why is not None:
      _log.note(_NAME, self.path, "attention", _log.OWN, why)
      mask = _dense(attention_mask)
      return original(self, x, mask, cache, cache_update_index, training)
    words = _parts.in_words(choice.implementation)
    _log.note(_NAME, self.path, "attention", "flash_attention", words)
    q = self._apply_rope(self.query_dense(x), 0)
    k = self._apply_rope(self.key_dense(x), 0)
    size = self.head_dim
    if not self.query_head_dim_normalize:
      size = self.hidden_dim // self.num_query_heads
    window = None
    if self.use_sliding_window_attention:
      window = (self.sliding_window_size - 1, 0)
    out = _parts.attend(
      q,
      k,
      self.value_dense(x),
      scale=size**-0.5,
      is_causal=True,
      segment_ids=attention_mask.mask.segment_ids(),
      local_window_size=window,
      logits_soft_cap=self.logit_soft_cap,
      implementation=choice.implementation,
    )
    return self.output_dense(out)

  return call


def _llama_attention(choice: Choice, original: Callable[..., Any]) -> Any:
  def call(
    self: Any,
    hidden_states: Any,
    attention_mask: Any = None,
    cache: Any = None,
    cache_update_index: Any = None,
    training: Any = None,
  ) -> Any:
    why = _why_not_attention(self, attention_mask, cache)
    window = getattr(self, "sliding_window_size", None)
    if window and window < hidden_states.shape[1]:
      why = why or "it has a window"
    if why is not None or cache_update_index is not None:
      _log.note(
        _NAME, self.path, "attention", _log.OWN, why or "it has a cache"
      )
      mask = _dense(attention_mask)
      return original(
        self, hidden_states, mask, cache, cache_update_index, training
      )
    words = _parts.in_words(choice.implementation)
    _log.note(_NAME, self.path, "attention", "flash_attention", words)
    q, k = self._query_dense(hidden_states), self._key_dense(hidden_states)
    if _has_norms(self):
      q = self._query_dense_layer_norm(q)
      k = self._key_dense_layer_norm(k)
    out = _parts.attend(
      self.rotary_embedding_layer(q, start_index=0),
      self.rotary_embedding_layer(k, start_index=0),
      self._value_dense(hidden_states),
      scale=self._inv_norm_factor,
      is_causal=True,
      segment_ids=attention_mask.mask.segment_ids(),
      implementation=choice.implementation,
    )
    return self._output_dense(out)

  return call


def _has_norms(layer: Any) -> bool:
  """Whether attention has norms of q and of k, as Qwen 3's."""
  return hasattr(layer, "_query_dense_layer_norm")


# --- feed-forward -------------------------------------------------------------


def _why_not_dense(*layers: Any) -> str | None:
  for layer in layers:
    if getattr(layer, "lora_enabled", False):
      return "its layers have LoRA"
    if getattr(layer, "quantization_mode", None) is not None:
      return "its weights are quantised"
    if layer.bias is not None:
      return "its layers have a bias"
  return None


def _array(variable: Any, dtype: Any) -> jax.Array:
  return jnp.asarray(variable.value).astype(dtype)


def _gemma_block(choice: Choice, original: Callable[..., Any]) -> Any:
  def call(
    self: Any,
    x: Any,
    padding_mask: Any = None,
    cache: Any = None,
    cache_update_index: Any = 0,
  ) -> Any:
    layers = self.gating_ffw, self.gating_ffw_2, self.ffw_linear
    why = "a KV cache is the library's" if cache is not None else None
    why = why or ("it has dropout" if self.dropout else _why_not_dense(*layers))
    if why is not None:
      _log.note(_NAME, self.path, "feed_forward", _log.OWN, why)
      return original(self, x, padding_mask, cache, cache_update_index)
    normed = self.pre_attention_norm(x)
    mask = self._compute_attention_mask(normed, padding_mask, None, 0)
    out = self.attention(normed, attention_mask=mask)
    if self.use_post_attention_norm:
      out = self.post_attention_norm(out)
    x = x + out
    normed = self.pre_ffw_norm(x)
    y = _feed_forward(choice, self, normed, layers, activation="gelu_tanh")
    return x + (self.post_ffw_norm(y) if self.use_post_ffw_norm else y)

  return call


def _llama_block(choice: Choice, original: Callable[..., Any]) -> Any:
  def call(
    self: Any,
    decoder_sequence: Any,
    decoder_padding_mask: Any = None,
    decoder_attention_mask: Any = None,
    self_attention_cache: Any = None,
    self_attention_cache_update_index: Any = None,
    training: Any = None,
  ) -> Any:
    layers = (
      self._feedforward_gate_dense,
      self._feedforward_intermediate_dense,
      self._feedforward_output_dense,
    )
    why = _why_not_dense(*layers)
    if self_attention_cache is not None:
      why = "a KV cache is the library's"
    elif self.dropout:
      why = "it has dropout"
    elif getattr(self.activation, "__name__", "") not in ("silu", "swish"):
      why = "its activation is not silu"
    others = (
      decoder_attention_mask,
      self_attention_cache,
      self_attention_cache_update_index,
    )
    x = decoder_sequence
    if why is not None:
      _log.note(_NAME, self.path, "feed_forward", _log.OWN, why)
      return original(self, x, decoder_padding_mask, *others, training)
    mask = self._compute_self_attention_mask(x, decoder_padding_mask, *others)
    normed = self._self_attention_layernorm(x)
    x = x + self._self_attention_layer(
      hidden_states=normed, attention_mask=mask
    )
    normed = self._feedforward_layernorm(x)
    return x + _feed_forward(choice, self, normed, layers, activation="silu")

  return call


def _feed_forward(
  choice: Choice, layer: Any, x: Any, layers: Sequence[Any], **kwargs: Any
) -> jax.Array:
  words = _parts.in_words(choice.implementation)
  _log.note(_NAME, layer.path, "feed_forward", "feed_forward", words)
  dtype = jnp.dtype(layer.compute_dtype)
  return feed_forward(
    x.astype(dtype),
    *(_array(one.kernel, dtype) for one in layers),
    implementation=choice.implementation,
    **kwargs,
  )
