"""tunix's losses of labels, without logits.

The library's loss for fine-tuning and its log-probabilities for preferences
call the model and read, of each token, one log-probability.  Here the model is
called without its head, in the library's own code but for the head's product,
and `linear_cross_entropy` takes the head's weight.

Whether the head is left out is part of `jit`'s key, as the rules of a mesh are:
a model that somebody jitted gives logits to all others.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._cross_entropy import linear_cross_entropy
from . import _log, _nnx, _parts
from ._library import Choice, Swap, module

_NAME = "tunix"
_OF_HEAD = "BTD,DV->BTV"
_HEADLESS = jax.make_user_context(False)
# How the loss of a model is split over devices: of its config and of x.
Split = Callable[[Any, jax.Array], contextlib.AbstractContextManager[None]]


class _Head(NamedTuple):
  """The layer that makes logits, and how its weight lies."""

  layer: Any
  variable: Any
  transposed: bool  # [D, V], not [V, D]

  def why_not(self) -> str | None:
    """Why its product is the library's own; None if it is not."""
    name = "w" if self.transposed else "input_embedding"
    weight = self.variable[...]
    if _nnx.variables(self.layer) != {name} or not isinstance(
      weight, jax.Array
    ):
      return "the head has adapters or weights of their own kind"
    if not jnp.issubdtype(weight.dtype, jnp.floating):
      return "the head's weight is quantised"
    if _nnx.is_quantised():
      return "qwix changes the head's product"
    if weight.shape[0] == weight.shape[1]:
      return "logits are as many as features"
    return None


def _head_of(layer: Any) -> _Head:
  if hasattr(layer, "input_embedding"):
    return _Head(layer, layer.input_embedding, False)
  return _Head(layer, layer.w, True)


def _head(model: Any) -> _Head:
  return _head_of(getattr(model, "lm_head", model.embedder))


# --- the model without its head -----------------------------------------------


def swaps(
  choice: Choice, models: Sequence[Any], split: Split
) -> Iterator[Swap]:
  """Of the heads, which may be left out, and of the losses."""
  for model in models:
    for owner, method in (model.Embedder, "decode"), (model.Einsum, "__call__"):
      yield Swap(owner, method, _left_out(vars(owner)[method]))
  losses = _Losses(choice, tuple(whole(model) for model in models), split)
  for name, attribute, make in (
    ("tunix.sft.peft_trainer", "_default_loss_fn", losses.of_trainer),
    ("tunix.rl.common", "get_per_token_logps", losses.of_preferences),
  ):
    owner = module(name)
    yield Swap(owner, attribute, make(vars(owner)[attribute]))


def whole(model: Any) -> Any:
  """The class of the whole model, of a module of the library."""
  return model.Llama3 if hasattr(model, "Llama3") else model.Qwen3


def _left_out(original: Callable[..., Any]) -> Any:
  """A head that gives its input, if that is what the caller wants."""

  @functools.wraps(original)
  def product(self: Any, x: jax.Array) -> jax.Array:
    is_head = getattr(self, "einsum_str", _OF_HEAD) == _OF_HEAD
    if is_head and _HEADLESS.value and _head_of(self).why_not() is None:
      return x
    return original(self, x)

  return product


# --- the losses ---------------------------------------------------------------


class _Losses(NamedTuple):
  """The library's losses for models whose heads may be left out."""

  choice: Choice
  models: tuple[Any, ...]
  split: Split

  def of_trainer(self, original: Callable[..., Any]) -> Callable[..., Any]:
    """Fine-tuning's: the mean over the tokens that count."""

    @functools.wraps(original)
    def _default_loss_fn(
      model: Any,
      input_tokens: jax.Array,
      input_mask: jax.Array,
      positions: jax.Array,
      attention_mask: Any,
      images: jax.Array | None = None,
    ) -> Any:
      rest = input_tokens, input_mask, positions, attention_mask
      if images is not None or not isinstance(model, self.models):
        return original(model, *rest, images)
      x = self.features(model, input_tokens, positions, attention_mask)
      if x.shape[-1] == model.config.vocab_size:
        return original(lambda *_, **__: (x, None), *rest)
      counts = input_mask[:, 1:]
      loss = self.of_tokens(
        model,
        x[:, :-1],
        input_tokens[:, 1:],
        weights=counts.astype(jnp.float32),
      )
      return jnp.sum(loss) / (jnp.sum(counts) + 1e-8)

    return _default_loss_fn

  def of_preferences(self, original: Callable[..., Any]) -> Any:
    """The log-probability of each of the last tokens, for DPO and ORPO."""
    nnx = module("flax.nnx")

    @nnx.jit(static_argnames=("logits_to_keep",))
    def headless(
      model: Any,
      input_tokens: jax.Array,
      positions: jax.Array,
      attn_mask: Any,
      logits_to_keep: int,
    ) -> jax.Array:
      x = self.features(model, input_tokens, positions, attn_mask)
      labels = input_tokens[:, -logits_to_keep:]
      x = x[:, -logits_to_keep - 1 : -1]
      if x.shape[-1] == model.config.vocab_size:
        return module("tunix.rl.common").selective_log_softmax(x, labels)
      return -self.of_tokens(model, x, labels)

    @functools.wraps(original)
    def get_per_token_logps(
      model: Any,
      input_tokens: jax.Array,
      positions: jax.Array,
      attn_mask: Any,
      logits_to_keep: int,
      images: jax.Array | None = None,
    ) -> Any:
      rest = input_tokens, positions, attn_mask
      if images is not None or not isinstance(model, self.models):
        return original(
          model, *rest, logits_to_keep=logits_to_keep, images=images
        )
      return headless(model, *rest, logits_to_keep=logits_to_keep)

    return get_per_token_logps

  def features(
    self, model: Any, tokens: jax.Array, positions: jax.Array, mask: Any
  ) -> jax.Array:
    """[B, T, D] before the head; or logits [B, T, V], if it is not left out."""
    with _HEADLESS(True):
      x, _ = model(tokens, positions, None, mask)
    if x.shape[-1] == model.config.vocab_size:
      why = _head(model).why_not() or "qwix changes the head's product"
      _log.note(_NAME, "loss", "loss", _log.OWN, why)
    return x

  def of_tokens(
    self, model: Any, x: jax.Array, labels: jax.Array, **kwargs: Any
  ) -> jax.Array:
    """The loss of each token."""
    words = _parts.in_words(self.choice.implementation)
    _log.note(_NAME, "loss", "loss", "linear_cross_entropy", words)
    head = _head(model)
    table = head.variable[...]
    # Qwen's says in which dtype it computes.
    dtype = getattr(head.layer, "dtype", None)
    dtype = dtype or jnp.result_type(x.dtype, table.dtype)
    with self.split(model.config, x):
      return linear_cross_entropy(
        x.astype(dtype),
        table.astype(dtype),
        labels,
        transposed=head.transposed,
        implementation=self.choice.implementation,
        **kwargs,
      )
