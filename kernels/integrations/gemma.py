"""DeepMind's `gemma`: Gemma 1, 2 and 3, for training and for scoring.

    from pallas_gemma.kernels.integrations import gemma

    gemma.apply()
    model = gm.nn.Gemma3_4B(tokens="batch.tokens")   # as ever

What is swapped: `RMSNorm`, `Attention` (with its RoPE, soft cap, window and
norms of q and k) and `FeedForward` of `gemma.gm.nn`, and the mask that
`Transformer` makes, which says that it is causal.  Parameters are read where
they are; LoRA of the projections around attention goes on as it is.

What stays the library's own code, layer by layer, and is in the report: a KV
cache (the sampler); a mask of the caller's own, as with images; attention
weights that are captured; a feed-forward whose weights an interceptor changes
(LoRA, quantisation); a window where positions are the caller's own.

A window counts tokens.  The library counts positions, which is the same unless
padding stands between tokens of a sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._cross_entropy import linear_cross_entropy
from .._frame.check import Implementation
from .._gated import feed_forward
from .._rope import Rope, RopeFrequencies
from . import _log, _parts
from ._library import Choice, Library, Swap, module
from ._mask import CausalMask, dense

_NAME = "gemma"
_EPSILON = 1e-06  # a number in the library's code


def apply(
  *,
  implementation: Implementation = None,
  parts: Sequence[str] | None = None,
) -> None:
  """Swaps the classes of the installed `gemma`, for models yet to be traced.

  What was traced before is forgotten (`jax.clear_caches()`), so that models in
  use are swapped too.

  Args:
    implementation: of all ops: "pallas", "xla", or None for the kernel where
      the computation is lowered for TPU and the reference elsewhere; norms are
      then plain `jax.numpy`, which XLA fuses into the products that follow.
    parts: some of "norm", "attention", "feed_forward"; None is all.

  Raises:
    ValueError: if `gemma` is not installed, or in a version whose classes are
      not known here.
  """
  _library.apply(implementation, parts)


def undo() -> None:
  """Puts the library's own code back, and forgets what was traced."""
  _library.undo()


def cross_entropy(
  output: Any,
  params: Any,
  labels: jax.Array,
  *,
  logits_soft_cap: float | None = None,
  **kwargs: Any,
) -> jax.Array:
  """The loss of each token, without logits in memory.

  The library's models return logits [B, T, V]; under `jit` they are computed
  only if somebody reads them.  So call the model with
  `return_hidden_states=True`, read the loss from here, and leave the logits.

  Args:
    output: what the model returned.
    params: its parameters, the dictionary with "embedder".
    labels: [B, T] integers, the token that each position is to predict.
    logits_soft_cap: `model.config.final_logit_softcap`, 30.0 for Gemma 2.
    **kwargs: as `linear_cross_entropy` takes them, such as weights.

  Returns:
    [B, T] float32.

  Raises:
    ValueError: if the model returned no hidden states; as
      `linear_cross_entropy`.
  """
  x = output.hidden_states
  if x is None:
    raise ValueError(
      "integrations.gemma.cross_entropy: wants the output of a model that was "
      "called with return_hidden_states=True, got hidden_states None"
    )
  table = params["embedder"]["input_embedding"]
  return linear_cross_entropy(
    x, table, labels, logits_soft_cap=logits_soft_cap, **kwargs
  )


# --- the swaps ----------------------------------------------------------------


def _swaps(choice: Choice) -> Iterator[Swap]:
  layers = module("gemma.gm.nn._layers")
  modules = module("gemma.gm.nn._modules")
  transformer = module("gemma.gm.nn._transformer").Transformer
  wrap = module("flax.linen.module").wrap_method_once
  compact = module("flax.linen").compact

  def swap(owner: Any, name: str, make: Any, *, is_compact: bool) -> Swap:
    """Of a method as flax wrapped it, one that it wraps in the same way."""
    # Without flax's wrapping: else interceptors would see two calls.
    original = vars(owner)[name].__wrapped__
    method = functools.wraps(original)(make(choice, original))
    return Swap(owner, name, wrap(compact(method) if is_compact else method))

  if "norm" in choice.parts:
    yield swap(layers.RMSNorm, "__call__", _norm, is_compact=True)
  if "feed_forward" in choice.parts:
    owner = modules.FeedForward
    yield swap(owner, "__call__", _feed_forward, is_compact=True)
  if "attention" in choice.parts:
    owner = modules.Attention
    yield swap(owner, "__call__", _attention, is_compact=False)
    name = "_encode_and_get_inputs"
    yield swap(transformer, name, _inputs, is_compact=False)


_library = Library(
  name=_NAME,
  distribution="gemma",
  versions=("4.0.1",),
  parts=("norm", "attention", "feed_forward"),
  swaps=_swaps,
  beyond="Gemma 3n, Gemma 4, T5Gemma and the vision encoder are as they were; "
  "the loss, which is given logits, is yours to replace: "
  "integrations.gemma.cross_entropy",
)


def _norm(choice: Choice, original: Callable[..., Any]) -> Any:
  def __call__(self: Any, x: jax.Array) -> jax.Array:
    if self.is_initializing():
      return original(self, x)
    scale = self.param("scale", jax.nn.initializers.zeros, (x.shape[-1],))
    words = _parts.norm_in_words(choice.implementation)
    _log.note(_NAME, self.path, "norm", "rms_norm", words)
    return _parts.norm(
      x,
      scale,
      epsilon=_EPSILON,
      scale_offset=1.0,
      implementation=choice.implementation,
    )

  return __call__


# --- feed-forward -------------------------------------------------------------


def _feed_forward(choice: Choice, original: Callable[..., Any]) -> Any:
  def __call__(self: Any, x: jax.Array) -> jax.Array:
    if self.is_initializing():
      return original(self, x)
    if _is_intercepted():
      why = "an interceptor, as of LoRA or quantisation, changes its products"
      _log.note(_NAME, self.path, "feed_forward", _log.OWN, why)
      return original(self, x)
    d, f = self.features, self.hidden_dim
    shape = (2, f, d) if self.transpose_gating_einsum else (2, d, f)
    init = jax.nn.initializers.normal()
    gating = self.param("gating_einsum", init, shape)
    down = self.param("linear", init, (f, d))
    if self.transpose_gating_einsum:
      gating = gating.swapaxes(1, 2)
    words = _parts.in_words(choice.implementation)
    _log.note(_NAME, self.path, "feed_forward", "feed_forward", words)
    dtype = jnp.result_type(x, gating, down)
    return feed_forward(
      x.astype(dtype),
      gating[0],
      gating[1],
      down,
      activation="gelu_tanh",
      implementation=choice.implementation,
    )

  return __call__


def _is_intercepted() -> bool:
  """Whether calls of modules go through somebody else's function."""
  return bool(module("flax.linen.module")._global_interceptor_stack)


# --- attention ----------------------------------------------------------------


def _inputs(choice: Choice, original: Callable[..., Any]) -> Any:
  del choice

  def _encode_and_get_inputs(self: Any, **kwargs: Any) -> Any:
    inputs = original(self, **kwargs)
    if kwargs.get("attention_mask") is not None or self.is_initializing():
      return inputs
    if kwargs.get("images") is not None:
      return inputs
    counts = kwargs.get("positions") is None
    mask = CausalMask(inputs.inputs_mask, positions_count_tokens=counts)
    return inputs.replace(attention_mask=mask)

  return _encode_and_get_inputs


def _attention(choice: Choice, original: Callable[..., Any]) -> Any:
  def __call__(
    self: Any,
    x: jax.Array,
    segment_pos: jax.Array,
    cache: Any,
    attn_mask: Any,
  ) -> tuple[Any, jax.Array]:
    why = _why_not(self, x, cache, attn_mask)
    if why is not None:
      if not self.is_initializing():
        _log.note(_NAME, self.path, "attention", _log.OWN, why)
      return original(self, x, segment_pos, cache, dense(attn_mask))
    words = _parts.in_words(choice.implementation)
    _log.note(_NAME, self.path, "attention", "flash_attention", words)
    q, k, v = _projected(self, x)
    encoded = _parts.attend(
      q,
      k,
      v,
      is_causal=True,
      segment_ids=attn_mask.segment_ids(),
      local_window_size=_window(self, x.shape[1]),
      scale=self.query_pre_attn_scalar,
      logits_soft_cap=self.attn_logits_soft_cap,
      rope=_rope(self, segment_pos),
      implementation=choice.implementation,
    )
    return None, self.attn_vec_einsum("BTNH,NHD->BTD", encoded)

  return __call__


def _why_not(layer: Any, x: jax.Array, cache: Any, mask: Any) -> str | None:
  """Why attention stays the library's own; None if it does not."""
  if layer.is_initializing():
    return "parameters are made"
  if cache is not None:
    return "a KV cache is the library's"
  if not isinstance(mask, CausalMask):
    return "attention_mask is an array of the caller's own"
  if _captures_weights(layer):
    return "attention weights are captured, which the kernel does not make"
  if _window(layer, x.shape[1]) and not mask.positions_count_tokens:
    return "its window goes by positions of the caller's own"
  return None


def _captures_weights(layer: Any) -> bool:
  """Whether a filter of `capture_intermediates` asks for attention weights.

  One that asks for all there is, as trainers do, does not ask for them.
  """
  linen = module("flax.linen.module")
  for asks in linen._context.capture_stack[-1:]:
    if asks and asks is not linen.capture_call_intermediates:
      return bool(asks(layer.attention_weights, "__call__"))
  return False


def _window(layer: Any, length: int) -> tuple[int, int] | None:
  """(left, right) of a local layer, if it hides anything."""
  if layer.attn_type.name != "LOCAL_SLIDING":
    return None
  size = layer.sliding_window_size
  return None if size >= length else (size - 1, 0)


def _rope(layer: Any, positions: jax.Array) -> Rope:
  """The layer's rotation; a scale factor divides all frequencies."""
  if layer.rope_scale_factor == 1.0:
    return Rope(positions, layer.rope_base_frequency)
  half = layer.head_dim // 2
  exponents = np.arange(half, dtype=np.float32) / half
  plain = np.float32(layer.rope_base_frequency) ** -exponents
  frequencies = RopeFrequencies(plain / np.float32(layer.rope_scale_factor))
  return Rope(positions, frequencies=frequencies)


def _projected(
  layer: Any, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """q [B, T, N, H], and k and v [B, T, K, H], by the layer's own modules."""
  if layer.use_qkv_einsum:
    q, k, v = layer.qkv_einsum("BTD,SNDH->SBTNH", x)
  else:
    q = layer.q_einsum("BTD,NDH->BTNH", x)
    k, v = layer.kv_einsum("BSD,CKDH->CBSKH", x)
  if layer.use_qk_norm:
    q, k = layer._query_norm(q), layer._key_norm(k)
  return q, k, v
