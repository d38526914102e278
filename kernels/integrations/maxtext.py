"""Google's `maxtext`, for training: its dense models, of which Llama and Qwen.

    from pallas_gemma.kernels.integrations import maxtext

    maxtext.apply()      # before the train step is traced

What is swapped: `RMSNorm`, `AttentionOp` (causal, full or with a window,
segments, soft cap) and `MlpBlock` of `maxtext.layers`, which all its decoder
layers are made of.  RoPE, with all of its scalings, and the norms of queries
and keys stay layers of the library between the projections and the kernel.

What stays the library's own code, layer by layer, and is in the report: all but
training (prefill and decoding have caches); attention sinks, masks of the
caller's own, MLA's sparse and compressed kinds, MoBA, context parallelism;
quantisation, and whatever qwix changes; a feed-forward with biases, dropout,
fused weights or an activation without a gate; `shard_mode: explicit`.

On a mesh of several devices trace the step inside `kernels.sharding`.  A remat
policy that keeps the feed-forward's products by name (`mlpwi`, `mlpwo`) finds
none where the kernel runs; attention's names are where they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._frame.check import Implementation
from .._gated import feed_forward
from . import _log, _nnx, _parts
from ._library import Choice, Library, Swap, module

_NAME = "maxtext"
# By their names in jax.nn, where GELU is the one with tanh.
_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu_tanh",
  "relu": "relu",
}


def apply(
  *,
  implementation: Implementation = None,
  parts: Sequence[str] | None = None,
) -> None:
  """Swaps the classes of the installed `maxtext`, for models yet to be traced.

  What was traced before is forgotten (`jax.clear_caches()`), so that models in
  use are swapped too.

  Args:
    implementation: as in `integrations.gemma.apply`.
    parts: some of "norm", "attention", "feed_forward"; None is all.

  Raises:
    ValueError: if `maxtext` is not installed, or in a version whose classes are
      not known here.
  """
  _library.apply(implementation, parts)


def undo() -> None:
  """Puts the library's own code back, and forgets what was traced."""
  _library.undo()


# --- the swaps ----------------------------------------------------------------


def _swaps(choice: Choice) -> Iterator[Swap]:
  at = "maxtext.layers"
  for part, owner, make in (
    ("norm", module(f"{at}.normalizations").RMSNorm, _norm),
    ("attention", module(f"{at}.attention_op").AttentionOp, _attention),
    ("feed_forward", module(f"{at}.linears").MlpBlock, _feed_forward),
  ):
    if part in choice.parts:
      original = vars(owner)["__call__"]
      new = functools.wraps(original)(make(choice, original))
      yield Swap(owner, "__call__", new)


_library = Library(
  name=_NAME,
  distribution="maxtext",
  versions=("0.2.5",),
  parts=("norm", "attention", "feed_forward"),
  swaps=_swaps,
  beyond="RoPE, mixtures of experts, MLA's projections and the loss, which is "
  "given logits, are as they were",
)


def _note(layer: Any, part: str, runs: str, why: str) -> None:
  _log.note(_NAME, type(layer).__name__, part, runs, why)


def _why_not_mode(layer: Any) -> str | None:
  """What no layer serves."""
  mode = getattr(layer, "shard_mode", None)
  mode = layer.config.shard_mode if mode is None else mode
  if mode.value == "explicit":
    return "shard_mode is explicit"
  return "qwix changes its products" if _nnx.is_intercepted() else None


def _norm(choice: Choice, original: Callable[..., Any]) -> Any:
  def __call__(self: Any, x: jax.Array, out_sharding: Any = None) -> jax.Array:
    why = _why_not_mode(self)
    if self.scale is None:
      why = "it has no scale"
    elif self.parameter_memory_host_offload:
      why = "its scale is in the host's memory"
    if why is not None:
      _note(self, "norm", _log.OWN, why)
      return original(self, x, out_sharding)
    words = _parts.norm_in_words(choice.implementation)
    _note(self, "norm", "rms_norm", words)
    y = _parts.norm(
      x,
      _nnx.value(self.scale),
      epsilon=self.epsilon,
      scale_offset=self.scale_offset,
      implementation=choice.implementation,
    )
    return y.astype(self.dtype)

  return __call__


# --- attention ----------------------------------------------------------------


def _attention(choice: Choice, original: Callable[..., Any]) -> Any:
  def __call__(
    self: Any,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    decoder_segment_ids: jax.Array | None,
    inputs_positions: jax.Array | None,
    model_mode: str,
    *args: Any,
    **kwargs: Any,
  ) -> jax.Array:
    why = _why_not_attention(self, model_mode, args, kwargs)
    if why is not None:
      _note(self, "attention", _log.OWN, why)
      given = query, key, value, decoder_segment_ids, inputs_positions
      return original(self, *given, model_mode, *args, **kwargs)
    words = _parts.in_words(choice.implementation)
    _note(self, "attention", "flash_attention", words)
    window, kind = None, self.attention_type.name
    if kind == "LOCAL_SLIDING":
      window = (self.sliding_window_size - 1, 0)
    ids = decoder_segment_ids
    if ids is not None:  # theirs begin with 0, and hide those below
      ids = jnp.maximum(jnp.asarray(ids, jnp.int32) + 1, 0)
    return _parts.attend(
      query,
      key,
      value,
      scale=1.0,  # it is in the query already
      is_causal=kind != "FULL",
      segment_ids=ids,
      local_window_size=window,
      logits_soft_cap=self.attn_logits_soft_cap or None,
      implementation=choice.implementation,
    )

  return __call__


def _why_not_attention(
  layer: Any, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
  """Why attention stays the library's own; None if it does not.

  `args` and `kwargs` are what the library gives beyond the mode: caches, masks,
  sinks, compressed keys, none of which is served.
  """
  if mode != "train":
    return "prefill and decoding have caches"
  for extra in (*args, *kwargs.values()):
    is_pair = isinstance(extra, list | tuple)
    if any(x is not None for x in extra) if is_pair else _asks(extra):
      return "it has sinks, a mask or keys of its own kind"
  kind = layer.attention_type.name
  if kind not in ("GLOBAL", "LOCAL_SLIDING", "FULL"):
    return f"its attention is {kind}"
  if layer.config.moba:
    return "MoBA is the library's"
  if layer._context_parallel_size() > 1:
    return "the sequence is split over devices"
  if layer.quant is not None or layer.kv_quant is not None:
    return "its products are quantised"
  return _why_not_mode(layer)


def _asks(extra: Any) -> bool:
  """Whether an argument is other than None, False or 0."""
  if isinstance(extra, bool | int):
    return bool(extra)
  return extra is not None


# --- feed-forward -------------------------------------------------------------


def _feed_forward(choice: Choice, original: Callable[..., Any]) -> Any:
  def __call__(
    self: Any,
    inputs: jax.Array,
    decode: bool = False,
    deterministic: bool = False,
    intermediate_sharding: Any = None,
    out_sharding: Any = None,
  ) -> jax.Array:
    why = _why_not_mlp(self, deterministic)
    if why is not None:
      _note(self, "feed_forward", _log.OWN, why)
      return original(
        self, inputs, decode, deterministic, intermediate_sharding, out_sharding
      )
    words = _parts.in_words(choice.implementation)
    _note(self, "feed_forward", "feed_forward", words)
    if self.mlp_layer_norm is not None:
      inputs = self.mlp_layer_norm(inputs)
    layers = self.wi_0, self.wi_1, self.wo
    weights = [_nnx.value(x.kernel).astype(self.dtype) for x in layers]
    return feed_forward(
      inputs.astype(self.dtype),
      *weights,
      activation=_ACTIVATIONS[self.activations[0]],
      implementation=choice.implementation,
    )

  return __call__


def _why_not_mlp(layer: Any, deterministic: bool) -> str | None:
  activations = tuple(layer.activations)
  if layer.config.fused_mlp:
    return "its weights are fused"
  gate = activations[0] if len(activations) == 2 else None
  if activations[1:] != ("linear",) or gate not in _ACTIVATIONS:
    return f"its activations are {activations}"
  if layer.intermediate_dropout_rate and not deterministic:
    return "it has dropout"
  if layer.quant is not None:
    return "its products are quantised"
  for one in (layer.wi_0, layer.wi_1, layer.wo):
    if _nnx.variables(one) != {"kernel"}:
      return "its products have biases, adapters or weights of their own kind"
  return _why_not_mode(layer)
