"""`Sampler`: prompts are put into rows, and completions come out."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import numpy as np

from .._arguments import several
from .._config import GemmaConfig
from .._errors import UserError
from .._model import Gemma
from .._tokenizer import END_OF_TURN, Tokenizer
from . import loop
from .settings import Request, Settings, check_whole, keys_of, wanted
from .text import Completion, Growing, Row, Stops

_SHORTEST = 16  # the smallest compiled length; every length is a multiple
_STREAMED = 4  # tokens of a row between two looks, if the host must look on
# Tokens that are read at once: enough to keep a TPU's matrix unit busy while a
# layer's weights are read.
_READ_OF_ROW = 512
_READ_OF_ALL = 2048


class Sampler:
  """Continues prompts with a model and its tokenizer.

  Each prompt is encoded with one BOS.  Rows do not see each other: what a
  prompt becomes does not depend on the others (but for rounding, if the number
  of rows or their length, and so the compiled program, is another).  Lengths
  are rounded up to powers of two, so that a new prompt seldom needs a new
  compilation.

  Args:
    model: its weights are read at each call, so training may go on between.
    tokenizer: of the model; ids that it does not have are never sampled.
    max_length: most tokens of BOS, prompt and completion together; None is the
      model's context length.
    batch_size: rows that are sampled at the same time, at most.  Of more
      prompts, the next begins when a row has ended.  The cache holds so many
      rows.
    weights: "int8" computes with matrices in int8, as `Gemma.quantize` makes
      them, at each call; None with the model's own.  (To quantise once, and
      free the others' memory, pass `model.quantize()`.)

  Raises:
    UserError: if the model has fewer rows than the tokenizer has ids, or fewer
      positions than max_length, batch_size is not positive, or weights are
      neither.
  """

  def __init__(
    self,
    model: Gemma,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    weights: Literal["int8"] | None = None,
  ):
    config = getattr(model, "config", None)
    if not isinstance(config, GemmaConfig):
      raise wanted("model", "a Gemma", f"a {type(model).__name__}")
    if not isinstance(tokenizer, Tokenizer):
      raise wanted("tokenizer", "a Tokenizer", f"a {type(tokenizer).__name__}")
    if tokenizer.vocab_size > config.vocab_size:
      raise UserError(
        f"Sampler: the tokenizer has {tokenizer.vocab_size} ids and the model "
        f"{config.vocab_size} embedding rows; they do not belong together"
      )
    if max_length is None:
      max_length = config.context_length
    check_whole("max_length", max_length)
    check_whole("batch_size", batch_size)
    if not 1 < max_length <= config.context_length:
      raise UserError(
        f"Sampler: max_length must be from 2 to the model's context length "
        f"{config.context_length}, got {max_length}"
      )
    if batch_size < 1:
      raise wanted("batch_size", "at least 1", batch_size)
    if weights not in (None, "int8"):
      raise wanted("weights", "'int8' or None", weights)
    self.model = model
    self.tokenizer = tokenizer
    self.max_length = max_length
    self.batch_size = batch_size
    self.weights = weights

  def __call__(
    self,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | Sequence[int] = 0,
    stop_tokens: Collection[int] | None = None,
    stop: str | Sequence[str] = (),
    speculate: int = 0,
    stream: Callable[[int, str], None] | None = None,
  ) -> list[Completion]:
    """One completion for each prompt, in order.

    The model's logits are changed in this order: repetition penalty, frequency
    and presence penalty, bias.  A token is drawn from softmax(logits /
    temperature), cut to its `top_k` likeliest tokens, renormalised, then cut to
    the fewest likeliest tokens that hold at least `top_p` of what is left, then
    to those at least `min_p` times as likely as the likeliest.

    Args:
      prompts: texts, possibly empty, of any lengths.
      max_new_tokens: most tokens to add to each.
      temperature: 0 takes the likeliest token.
      top_k: None keeps all.
      top_p: None keeps all.
      min_p: from 0 to 1; None keeps all.
      repetition_penalty: above 1 makes tokens less likely that stand in the
        prompt or have been drawn: divides their logits where positive, and
        multiplies them where negative.  1 does nothing.
      presence_penalty: is subtracted from the logits of tokens that have been
        drawn.
      frequency_penalty: is subtracted from a token's logit for each time that
        it has been drawn.
      logit_bias: numbers to add to the logits of some ids; -inf is never drawn.
      seed: of the draws, from 0 to 2^63 - 1.  With one number, a prompt's
        random numbers depend on it and on the prompt's index alone.  With a
        number for each prompt, they depend on that alone, and are those of the
        first prompt of a call with that seed.
      stop_tokens: ids that end a completion; None is the tokenizer's end of
        text and, if it has one, its end of turn.
      stop: texts that end a completion, which is cut before the first that is
        complete, wherever its tokens begin and end.  Those of the prompt do
        not count.  Like `stream` it makes the host look every 4 tokens.
      speculate: tokens that are guessed at each step, up to 31, from what
        followed where the row's last tokens stood before.  A step that guesses
        right adds that many tokens more.  Guesses change no result, also at
        temperatures above 0: each token is drawn as it would be without them,
        and a guess is kept if it is the one drawn.
      stream: called with a prompt's index and the new piece of its text, as it
        grows; the pieces of one prompt make up its text.  None ends inside a
        character, or has part of a stop string.  It makes the host look every
        4 tokens of a row; without it, every 32.

    Raises:
      UserError: naming the argument, or the prompt that is too long; before
        anything is computed, and before `stream` is called.
    """
    asked = self._asked(
      prompts,
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      min_p=min_p,
      repetition_penalty=repetition_penalty,
      presence_penalty=presence_penalty,
      frequency_penalty=frequency_penalty,
      logit_bias=logit_bias,
      seed=seed,
      stop_tokens=stop_tokens,
      stop=stop,
      speculate=speculate,
    )
    if not (stream is None or callable(stream)):
      raise wanted("stream", "a function, or None", repr(stream))
    return _Desk(self, asked, stream).serve()

  def check(self, prompts: Sequence[str], **arguments: Any) -> None:
    """Raises what a call with these arguments would, and computes nothing."""
    arguments.pop("stream", None)
    self._asked(prompts, **arguments)

  def _asked(
    self,
    prompts: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    stop_tokens: Collection[int] | None = None,
    stop: str | Sequence[str] = (),
    logit_bias: Mapping[int, float] | None = None,
    **others: Any,
  ) -> _Asked:
    request = Request(
      stop_tokens=self._stops() if stop_tokens is None else stop_tokens,
      stop=(stop,) if isinstance(stop, str) else cast(tuple, stop),
      logit_bias=logit_bias or {},
      **others,
    )
    vocab_size = self.tokenizer.vocab_size
    settings = request.settings(vocab_size, self.model.config.vocab_size)
    encoded = self._encode(prompts, request.max_new_tokens)
    return _Asked(request, settings, encoded, keys_of(seed, len(encoded)))

  def _stops(self) -> frozenset[int]:
    turn = self.tokenizer.piece_id(END_OF_TURN)
    known = [] if turn is None else [turn]
    return frozenset([*known, *[i for i in [self.tokenizer.eos_id] if i >= 0]])

  def _encode(
    self, prompts: Sequence[str], max_new_tokens: int
  ) -> list[list[int]]:
    if isinstance(prompts, str):
      raise UserError("Sampler: prompts must be a list of texts, got one text")
    prompts = several("Sampler: prompts", prompts, "texts")
    if not prompts:
      raise UserError("Sampler: prompts must hold at least one text, got none")
    for i, text in enumerate(prompts):
      if not isinstance(text, str):
        raise wanted(f"prompt {i}", "a text", f"a {type(text).__name__}")
    encoded = [self.tokenizer.encode(text, add_bos=True) for text in prompts]
    for i, ids in enumerate(encoded):
      if len(ids) + max_new_tokens > self.max_length:
        raise UserError(
          f"Sampler: prompt {i} has {len(ids)} tokens, with max_new_tokens = "
          f"{max_new_tokens} more than the {self.max_length} there is room "
          f"for; shorten the prompt or ask for fewer tokens"
        )
    return encoded


class _Asked(NamedTuple):
  """A call whose arguments have been checked.

  Attributes:
    request: what is asked for.
    settings: the same, for the device.
    prompts: their ids.
    keys: [prompts, n], the words of their random keys.
  """

  request: Request
  settings: Settings
  prompts: list[list[int]]
  keys: np.ndarray


class _Desk:
  """One call: which prompt is in which row.

  Args:
    sampler: which is called.
    asked: for what.
    stream: as for `Sampler.__call__`.
  """

  def __init__(
    self,
    sampler: Sampler,
    asked: _Asked,
    stream: Callable[[int, str], None] | None,
  ):
    request, settings, prompts, self._keys = asked
    model = sampler.model
    self._model = (model.quantize() if sampler.weights else model).cast()
    self._settings, self._prompts = settings, prompts
    self._new = request.max_new_tokens
    stops = Stops(frozenset(request.stop_tokens), request.stop)
    self._make_row = lambda index: Row(
      index, Growing(sampler.tokenizer, prompts[index]), stops, stream
    )
    self._batch = min(sampler.batch_size, len(prompts))
    # A step reads its guesses too, past the last token there is room for.
    beyond = settings.speculate
    longest = max(map(len, prompts)) + self._new + beyond
    most = sampler.max_length + beyond
    self._length = _bucket(longest, most + -most % _SHORTEST)
    # One more than the guesses is drawn at least.
    looks_on = stream is not None or request.stop
    self._most = max(_STREAMED, 1 + beyond) if looks_on else loop.CHUNK

  def serve(self) -> list[Completion]:
    """A completion for each prompt."""
    waiting = collections.deque(range(len(self._prompts)))
    rows: list[Row | None] = [None] * self._batch
    finished: dict[int, Completion] = {}
    state = loop.empty(
      self._model.config,
      self._settings,
      self._keys,
      batch=self._batch,
      length=self._length,
    )
    while len(finished) < len(self._prompts):
      free = [i for i, row in enumerate(rows) if row is None]
      new = {i: waiting.popleft() for i in free[: len(waiting)]}
      for i, index in new.items():
        rows[i] = self._make_row(index)
        state = self._admit(state, i, index)
      state = self._read(state, new, all_are_new=len(free) == self._batch)
      state, drawn = loop.run(
        self._model,
        state,
        self._settings,
        np.int32(self._most),
        np.bool_(bool(waiting)),
      )
      drawn = jax.device_get(drawn)
      ended = _grow(rows, drawn)
      for i, row in ended:
        finished[row.index] = row.completion()
        rows[i] = None
      if not all(drawn.done[i] for i, _ in ended):
        # The device knows of stop tokens, not of stop strings.
        state = loop.end(state, np.array([row is None for row in rows]))
    return [finished[i] for i in range(len(self._prompts))]

  def _admit(self, state: loop.State, row: int, index: int) -> loop.State:
    ids = self._prompts[index]
    prompt = np.zeros(self._length, np.int32)
    prompt[: len(ids)] = ids
    length = np.int32(len(ids))
    end, key = length + np.int32(self._new), self._keys[index]
    return loop.admit(state, np.int32(row), prompt, length, end, key)

  def _read(
    self, state: loop.State, new: dict[int, int], *, all_are_new: bool
  ) -> loop.State:
    """Reads the new rows' prompts, but for their last tokens, in chunks.

    All at once if no other row has begun.  Else one by one: to read them as
    part of all would take the time of all.
    """
    lengths = {i: len(self._prompts[index]) - 1 for i, index in new.items()}
    whole = all_are_new and len(new) > 1 or self._batch == 1
    if whole and lengths:
      each = _READ_OF_ALL // self._batch
      each = min(max(1 << each.bit_length() - 1, _SHORTEST), _READ_OF_ROW)
      return self._read_chunks(state, None, max(lengths.values()), each)
    for i, length in lengths.items():
      state = self._read_chunks(state, np.int32(i), length, _READ_OF_ROW)
    return state

  def _read_chunks(
    self, state: loop.State, row: np.int32 | None, length: int, most: int
  ) -> loop.State:
    for start in range(0, length, most):
      room = self._length - start
      size = min(_bucket(length - start, most), room)
      state = loop.read(self._model, state, row, size=size)
    return state


def _grow(
  rows: Sequence[Row | None], drawn: loop.Drawn
) -> list[tuple[int, Row]]:
  """Adds what has been drawn; which rows have ended."""
  ended = []
  for i, row in enumerate(rows):
    if row is None:
      continue
    count = drawn.counts[i]
    for token, logprob in zip(
      drawn.tokens[i, :count].tolist(),
      drawn.logprobs[i, :count].tolist(),
      strict=True,
    ):
      row.add(token, logprob)
    if drawn.done[i] or row.is_finished:
      ended.append((i, row))
  return ended


def _bucket(length: int, most: int) -> int:
  """The length to compile for: the next power of two, but at most `most`."""
  return min(max(1 << (length - 1).bit_length(), _SHORTEST), most)
