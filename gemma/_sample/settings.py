"""What a call of the sampler asks for: checked, then as the device takes it."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .._arguments import make_fields
from .._errors import UserError
from .._seeds import A_SEED, is_seed, key_of_words, words_of
from .._tokenizer import check_text
from .cut import Cut

MOST_DRAFTED = 31  # tokens in a step of speculation

_STOPS = 8  # their number is rounded up to a multiple, as it is compiled in


# Numbers of the device are float32.
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


def wanted(name: str, what: str, got: object) -> UserError:
  """The error about an argument."""
  return UserError(f"Sampler: {name} must be {what}, got {got}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """The arguments of a call; `Sampler.__call__` says what they mean.

  Raises:
    UserError: naming the argument that is wrong.
  """

  max_new_tokens: int
  temperature: float = 0.0
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  logit_bias: Mapping[int, float]
  stop_tokens: Collection[int]
  stop: tuple[str, ...] = ()
  speculate: int = 0

  def __post_init__(self):
    make_fields(self, lambda name, what, got: wanted(name, what, repr(got)))
    if self.max_new_tokens < 1:
      raise wanted("max_new_tokens", "at least 1", self.max_new_tokens)
    if not 0 <= self.temperature <= _LARGEST:
      raise wanted("temperature", "0 or more, and finite", self.temperature)
    if self.top_k is not None and self.top_k < 1:
      raise wanted("top_k", "at least 1, or None", self.top_k)
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise wanted("top_p", "above 0 and at most 1, or None", self.top_p)
    if self.min_p is not None and not 0 <= self.min_p <= 1:
      raise wanted("min_p", "from 0 to 1, or None", self.min_p)
    if not _SMALLEST <= self.repetition_penalty <= _LARGEST:
      raise wanted(
        "repetition_penalty", "above 0, and finite", self.repetition_penalty
      )
    for name in ("presence_penalty", "frequency_penalty"):
      if not abs(getattr(self, name)) <= _LARGEST:
        raise wanted(name, "a finite number", getattr(self, name))
    if not 0 <= self.speculate <= MOST_DRAFTED:
      raise wanted("speculate", f"from 0 to {MOST_DRAFTED}", self.speculate)
    for text in self.stop:
      if not (isinstance(text, str) and text):
        raise wanted("stop", "texts that are not empty", repr(text))
      check_text(text, "Sampler: stop")

  def settings(self, vocab_size: int, embeddings: int) -> Settings:
    """For the device.

    Args:
      vocab_size: the tokenizer's.
      embeddings: rows of the model's table, V.

    Raises:
      UserError: on ids that the tokenizer does not have.
    """
    return Settings(
      vocab_size=vocab_size,
      greedy=self.temperature < _SMALLEST,
      speculate=self.speculate,
      uses_seen=self.repetition_penalty != 1,
      uses_counts=(self.presence_penalty, self.frequency_penalty) != (0, 0),
      temperature=np.float32(self.temperature),
      cut=self._cut(vocab_size),
      repetition=np.float32(self.repetition_penalty),
      presence=np.float32(self.presence_penalty),
      frequency=np.float32(self.frequency_penalty),
      bias=self._bias(vocab_size, embeddings),
      stops=self._stops(vocab_size),
    )

  def _cut(self, vocab_size: int) -> Cut:
    """What would keep all is left out, as it would round what it keeps."""
    k, p = self.top_k, np.float32(1 if self.top_p is None else self.top_p)
    least = np.float32(0 if self.min_p is None else self.min_p)
    return Cut(
      top_k=None if k is None or k >= vocab_size else np.int32(k),
      top_p=p if p < 1 else None,
      min_p=least if least > 0 else None,
    )

  def _bias(self, vocab_size: int, embeddings: int) -> np.ndarray | None:
    if not self.logit_bias:
      return None
    bias = np.zeros(embeddings, np.float32)
    for token, value in self.logit_bias.items():
      check_whole("an id of logit_bias", token)
      if not 0 <= token < vocab_size:
        raise wanted("logit_bias", f"of ids below {vocab_size}", token)
      if not isinstance(value, numbers.Real):
        raise wanted("logit_bias", "of numbers", repr(value))
      if not (abs(value) <= _LARGEST or value == -math.inf):
        raise wanted("logit_bias", "finite, or -inf for never", value)
      bias[token] = value
    if np.isneginf(bias[:vocab_size]).all():
      raise UserError("Sampler: logit_bias must leave a token to draw")
    return bias

  def _stops(self, vocab_size: int) -> np.ndarray:
    for token in self.stop_tokens:
      check_whole("an id of stop_tokens", token)
      if not 0 <= token < vocab_size:
        raise wanted("stop_tokens", f"ids below {vocab_size}", token)
    stops = sorted(self.stop_tokens)
    return np.array(stops + [-1] * (-len(stops) % _STOPS), np.int32)


@dataclasses.dataclass(frozen=True)
class Settings:
  """An argument of the compiled functions.

  What follows is compiled in, a new value needs a new compilation:

  Attributes:
    vocab_size: the tokenizer's; later rows of the embedding are never drawn.
    greedy: whether to take the likeliest token and draw nothing.
    speculate: tokens that a step guesses.
    uses_seen: whether there is a repetition penalty.
    uses_counts: whether there is a presence or frequency penalty.

  And numbers:

  Attributes:
    temperature: divides the logits.
    cut: which tokens may be drawn.
    repetition: divides a positive logit of a token that the row has, prompt
      included, and multiplies a negative one.
    presence: is subtracted from the logit of a token that has been drawn.
    frequency: is subtracted for each time that it has been drawn.
    bias: [V], is added; None if there is none.
    stops: [n] ids that end a row, and -1.
  """

  vocab_size: int
  greedy: bool
  speculate: int
  uses_seen: bool
  uses_counts: bool
  temperature: np.float32 | jax.Array
  cut: Cut
  repetition: np.float32 | jax.Array
  presence: np.float32 | jax.Array
  frequency: np.float32 | jax.Array
  bias: np.ndarray | jax.Array | None
  stops: np.ndarray | jax.Array


_COMPILED_IN = [
  *("vocab_size", "greedy", "speculate"),
  *("uses_seen", "uses_counts"),
]
jax.tree_util.register_dataclass(
  Settings,
  data_fields=[
    field.name
    for field in dataclasses.fields(Settings)
    if field.name not in _COMPILED_IN
  ],
  meta_fields=_COMPILED_IN,
)


def keys_of(seed: int | Sequence[int], count: int) -> np.ndarray:
  """The words of a random key for each prompt, uint32 [count, n].

  Of one seed, prompt i has the i-th key.  Of several, each prompt has the
  first key of its own.

  Raises:
    UserError: if there are not `count` seeds, or one is no seed.
  """
  index = np.zeros(count, np.uint32)
  seeds: list[Any]
  if np.ndim(seed):
    seeds = list(np.asarray(seed, object))
  else:
    seeds, index = [seed] * count, np.arange(count, dtype=np.uint32)
  if len(seeds) != count:
    what = f"one number, or one for each of {count} prompts"
    raise wanted("seed", what, f"{len(seeds)} numbers")
  for each in seeds:
    if not is_seed(each):
      raise wanted("seed", A_SEED, repr(each))
  words = np.array([words_of(int(each)) for each in seeds], np.uint32)
  return np.asarray(_keys(words, index))


def check_whole(name: str, value: object) -> None:
  """Raises a `UserError` if an argument is no whole number."""
  whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
  if not whole:
    raise wanted(name, "a whole number", repr(value))


@jax.jit
def _keys(words: jax.Array, index: jax.Array) -> jax.Array:
  keys = jax.vmap(key_of_words)(words)
  return jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, index))
