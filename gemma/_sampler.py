"""Text continued by a Gemma.

Each prompt is encoded with one BOS.  The model reads all prompts at once and
then adds one token to every row at each step.  Rows do not see each other: a
prompt's greedy continuation is the same whatever other prompts are sampled with
it.  Lengths are rounded up to powers of two, so that a new prompt seldom needs
a new compilation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._draw import Cut
from ._draw import draw as draw_token
from ._errors import UserError
from ._model import Cache, Gemma
from ._tokenizer import END_OF_TURN, Tokenizer

_SHORTEST = 16  # the smallest compiled length


@dataclasses.dataclass(frozen=True)
class Completion:
  """What the model added to one prompt.

  Attributes:
    text: the new text, without the prompt and the stop token.
    tokens: its ids.
    logprobs: of each token, in nats, under the model's own distribution: at
      temperature 1 and before any cut.
    finish_reason: "stop" at a stop token, "length" at max_new_tokens.
  """

  text: str
  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]
  finish_reason: Literal["stop", "length"]

  def __str__(self) -> str:
    return self.text


class Sampler:
  """Continues prompts with a model and its tokenizer.

  Args:
    model: its weights are read at each call, so training may go on between.
    tokenizer: of the model; ids that it does not have are never sampled.
    max_length: most tokens of BOS, prompt and completion together; None is the
      model's context length.

  Raises:
    UserError: if the model has fewer rows than the tokenizer has ids, or fewer
      positions than max_length.
  """

  def __init__(
    self, model: Gemma, tokenizer: Tokenizer, *, max_length: int | None = None
  ):
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
      raise UserError(
        f"Sampler: the tokenizer has {tokenizer.vocab_size} ids and the model "
        f"{config.vocab_size} embedding rows; they do not belong together"
      )
    if max_length is None:
      max_length = config.context_length
    if not 1 < max_length <= config.context_length:
      raise UserError(
        f"Sampler: max_length must be from 2 to the model's context length "
        f"{config.context_length}, got {max_length}"
      )
    self.model = model
    self.tokenizer = tokenizer
    self.max_length = max_length

  def __call__(
    self,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop_tokens: Collection[int] | None = None,
    stream: Callable[[int, str], None] | None = None,
  ) -> list[Completion]:
    """One completion for each prompt, in order.

    A token is drawn from softmax(logits / temperature), cut to its `top_k`
    likeliest tokens, renormalised, then cut to the fewest likeliest tokens
    that hold at least `top_p` of what is left, then to those at least `min_p`
    times as likely as the likeliest.

    Args:
      prompts: texts, possibly empty, of any lengths.
      max_new_tokens: most tokens to add to each.
      temperature: 0 takes the likeliest token.
      top_k: None keeps all.
      top_p: None keeps all.
      min_p: from 0 to 1; None keeps all.
      seed: of the draws; row i draws the same random numbers whatever the other
        prompts are.
      stop_tokens: ids that end a completion; None is the tokenizer's end of
        text and, if it has one, its end of turn.
      stream: called with a prompt's index and the new piece of its text, as it
        grows; the pieces of one prompt make up its text.

    Raises:
      UserError: naming the argument, or the prompt that is too long.
    """
    static = _Static(
      vocab_size=self.tokenizer.vocab_size,
      greedy=temperature < float(np.finfo(np.float32).tiny),
      filtered=any(limit is not None for limit in (top_k, top_p, min_p)),
    )
    _check_settings(max_new_tokens, temperature, top_k, top_p, min_p)
    draw = _Dynamic(
      key=jax.random.key(seed),
      temperature=np.float32(temperature),
      cut=Cut(
        top_k=np.int32(min(top_k or static.vocab_size, static.vocab_size)),
        top_p=np.float32(math.inf if top_p is None else top_p),
        min_p=np.float32(min_p or 0.0),
      ),
    )
    stops = self._stops(stop_tokens)
    tokens, lengths = self._encode(prompts, max_new_tokens)
    longest = int(lengths.max()) + max_new_tokens
    rows = [_Row(i, self.tokenizer, stops, stream) for i in range(len(prompts))]

    model = self.model.cast()
    token, logprob, cache = _start(
      model,
      tokens,
      lengths,
      draw,
      cache_length=_bucket(longest, self.max_length),
      static=static,
    )
    for step in range(1, max_new_tokens + 1):
      for row, t, p in zip(
        rows, np.asarray(token), np.asarray(logprob), strict=True
      ):
        row.add(int(t), float(p))
      if all(row.finished for row in rows) or step == max_new_tokens:
        break
      token, logprob, cache = _advance(
        model, token, cache, draw, np.int32(step), static=static
      )
    return [row.completion() for row in rows]

  def _stops(self, stop_tokens: Collection[int] | None) -> frozenset[int]:
    tokenizer = self.tokenizer
    if stop_tokens is None:
      turn = tokenizer.encode(END_OF_TURN)
      known = len(turn) == 1 and turn[0] != tokenizer.unk_id
      return frozenset([tokenizer.eos_id, *(turn if known else [])])
    for token in stop_tokens:
      if not 0 <= token < tokenizer.vocab_size:
        raise UserError(
          f"Sampler: stop_tokens must be ids below {tokenizer.vocab_size}, "
          f"got {token}"
        )
    return frozenset(stop_tokens)

  def _encode(
    self, prompts: Sequence[str], max_new_tokens: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens [B, T] and lengths [B]."""
    if isinstance(prompts, str):
      raise UserError("Sampler: prompts must be a list of texts, got one text")
    if not prompts:
      raise UserError("Sampler: prompts must hold at least one text, got none")
    encoded = [self.tokenizer.encode(text, add_bos=True) for text in prompts]
    for i, ids in enumerate(encoded):
      if len(ids) + max_new_tokens > self.max_length:
        raise UserError(
          f"Sampler: prompt {i} has {len(ids)} tokens, with max_new_tokens = "
          f"{max_new_tokens} more than the {self.max_length} there is room "
          f"for; shorten the prompt or ask for fewer tokens"
        )
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    shape = len(encoded), _bucket(int(lengths.max()), self.max_length)
    tokens = np.full(shape, self.tokenizer.pad_id, np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
      row[: len(ids)] = ids
    return tokens, lengths


# --- on the device ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Static:
  """Settings that are compiled in: a new value needs a new compilation.

  Attributes:
    vocab_size: the tokenizer's; later rows of the embedding are never sampled.
    greedy: whether to take the likeliest token and draw nothing.
    filtered: whether some tokens may not be drawn.
  """

  vocab_size: int
  greedy: bool
  filtered: bool


class _Dynamic(NamedTuple):
  """Settings that are arguments of the compiled functions."""

  key: jax.Array
  temperature: np.float32
  cut: Cut


@functools.partial(jax.jit, static_argnames=("cache_length", "static"))
def _start(
  model: Gemma,
  tokens: jax.Array,
  lengths: jax.Array,
  draw: _Dynamic,
  *,
  cache_length: int,
  static: _Static,
) -> tuple[jax.Array, jax.Array, Cache]:
  """Reads the prompts; the first new tokens [B], their logprobs, the cache."""
  cache = model.init_cache(tokens.shape[0], cache_length)
  hidden, cache = model.prefill(tokens, lengths, cache)
  return *_next_token(model.logits(hidden), draw, 0, static), cache


@functools.partial(jax.jit, static_argnames="static", donate_argnames="cache")
def _advance(
  model: Gemma,
  tokens: jax.Array,
  cache: Cache,
  draw: _Dynamic,
  step: jax.Array,
  *,
  static: _Static,
) -> tuple[jax.Array, jax.Array, Cache]:
  """Reads tokens [B]; the next ones, their logprobs, and the cache."""
  hidden, cache = model.decode(tokens, cache)
  return *_next_token(model.logits(hidden), draw, step, static), cache


def _next_token(
  logits: jax.Array, draw: _Dynamic, step: jax.Array | int, static: _Static
) -> tuple[jax.Array, jax.Array]:
  """One token for each row of logits [B, V], and its log-probability."""
  batch, vocab = logits.shape
  logits = jnp.where(jnp.arange(vocab) < static.vocab_size, logits, -jnp.inf)
  if static.greedy:
    tokens = jnp.argmax(logits, axis=-1)
  else:
    key = jax.random.fold_in(draw.key, step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    # With a maximum of 0 no logit overflows to infinity, however small the
    # temperature: negative infinities are harmless, they have probability 0.
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled /= draw.temperature
    if static.filtered:
      tokens = draw_token(keys, scaled, draw.cut)
    else:
      tokens = jax.vmap(jax.random.categorical)(keys, scaled)
  logprobs = jnp.take_along_axis(
    jax.nn.log_softmax(logits), tokens[:, None], axis=-1
  )
  return tokens.astype(jnp.int32), logprobs[:, 0]


# --- on the host --------------------------------------------------------------


def _bucket(length: int, most: int) -> int:
  """The length to compile for: the next power of two, but at most `most`."""
  return min(max(1 << (length - 1).bit_length(), _SHORTEST), most)


def _check_settings(
  max_new_tokens: int,
  temperature: float,
  top_k: int | None,
  top_p: float | None,
  min_p: float | None,
) -> None:
  def wanted(name: str, what: str, got: object) -> UserError:
    return UserError(f"Sampler: {name} must be {what}, got {got}")

  if max_new_tokens < 1:
    raise wanted("max_new_tokens", "at least 1", max_new_tokens)
  if not 0 <= temperature < math.inf:
    raise wanted("temperature", "0 or more, and finite", temperature)
  if top_k is not None and top_k < 1:
    raise wanted("top_k", "at least 1, or None", top_k)
  if top_p is not None and not 0 < top_p <= 1:
    raise wanted("top_p", "above 0 and at most 1, or None", top_p)
  if min_p is not None and not 0 <= min_p <= 1:
    raise wanted("min_p", "from 0 to 1, or None", min_p)


class _Row:
  """One completion as it grows."""

  def __init__(
    self,
    index: int,
    tokenizer: Tokenizer,
    stops: frozenset[int],
    stream: Callable[[int, str], None] | None,
  ):
    self._index, self._tokenizer = index, tokenizer
    self._stops, self._stream = stops, stream
    self._tokens: list[int] = []
    self._logprobs: list[float] = []
    self._streamed = ""
    self.finished = False

  def add(self, token: int, logprob: float) -> None:
    """Takes the row's next token, unless it has stopped."""
    if self.finished:
      return
    if math.isnan(logprob):
      raise UserError(
        "Sampler: the model's logits are not numbers: its weights have "
        "diverged; use an earlier checkpoint"
      )
    if token in self._stops:
      self.finished = True
      self._emit(self._text())
      return
    self._tokens.append(token)
    self._logprobs.append(logprob)
    if self._stream:
      # A character whose bytes are not all there yet decodes to U+FFFD; it is
      # held back until they are.
      self._emit(self._text().rstrip("\ufffd"))

  def completion(self) -> Completion:
    """The result; what was held back of the stream is sent first."""
    text = self._text()
    self._emit(text)
    return Completion(
      text=text,
      tokens=tuple(self._tokens),
      logprobs=tuple(self._logprobs),
      finish_reason="stop" if self.finished else "length",
    )

  def _text(self) -> str:
    return self._tokenizer.decode(self._tokens)

  def _emit(self, text: str) -> None:
    if self._stream and len(text) > len(self._streamed):
      self._stream(self._index, text[len(self._streamed) :])
      self._streamed = text
