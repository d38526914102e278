"""The text of a row, on the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from .._errors import UserError
from .._tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
  """What the model added to one prompt.

  Attributes:
    text: the new text, without the prompt, the stop token and the stop string.
    tokens: its ids: the fewest that hold the text.  Where a stop string begins
      inside a token, that token is the last.
    logprobs: of each token, in nats, under the model's own distribution: at
      temperature 1 and before any cut.
    finish_reason: "stop" at a stop token or a stop string, "length" at
      max_new_tokens.
    stop: the stop string that ended it, None if none did.
  """

  text: str
  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]
  finish_reason: Literal["stop", "length"]
  stop: str | None = None

  def __str__(self) -> str:
    return self.text


class Growing:
  """Text that grows token by token behind a prompt.

  Each token is decoded with the few before it that its text depends on, so that
  a long text takes no longer per token than a short one.

  Args:
    tokenizer: makes the text.
    prompt: ids that stand before.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
    self._tokenizer = tokenizer
    self._before = list(prompt)
    self._open: list[int] = []  # behind those, of `_text` not yet a part
    self._text = ""

  def add(self, token: int) -> tuple[str, str]:
    """Takes a token.

    Returns:
      The text that no later token changes, and what more there is if none
      comes: U+FFFD for each byte of a character that is not whole.
    """
    self._open.append(token)
    new = self._tokenizer.decode(self._open, after=self._before)
    whole = new.rstrip("\ufffd")
    if whole != new:
      return self._text + whole, new[len(whole) :]
    self._text += new
    # What follows depends on whether it is the beginning of a text, where some
    # models drop a space: not after any other character.
    alone = self._tokenizer.decode(self._open).strip(" ")
    self._before = self._open if alone else self._before + self._open
    self._open = []
    return self._text, ""


@dataclasses.dataclass(frozen=True)
class Stops:
  """What ends a completion: ids, and texts that are not empty."""

  tokens: frozenset[int] = frozenset()
  texts: tuple[str, ...] = ()

  def find(self, text: str, start: int) -> tuple[int, str] | None:
    """The stop string that is complete first, and where it begins.

    Args:
      text: to search.
      start: the part before was searched already.
    """
    found = []
    for stop in self.texts:
      at = text.find(stop, max(start - len(stop) + 1, 0))
      if at >= 0:
        found.append((at + len(stop), at, stop))
    return min(found)[1:] if found else None

  def safe(self, text: str) -> int:
    """How much of the text cannot be the beginning of a stop string."""
    longest = max(map(len, self.texts), default=1)
    for at in range(max(len(text) - longest + 1, 0), len(text)):
      if any(stop.startswith(text[at:]) for stop in self.texts):
        return at
    return len(text)


class Row:
  """One completion as it grows.

  Args:
    index: its prompt's.
    text: behind its prompt.
    stops: what ends it.
    stream: as for `Sampler.__call__`.

  Attributes:
    is_finished: whether a stop token or string has come.
  """

  def __init__(
    self,
    index: int,
    text: Growing,
    stops: Stops,
    stream: Callable[[int, str], None] | None,
  ):
    self.index, self._growing = index, text
    self._stops, self._stream = stops, stream
    self._tokens: list[int] = []
    self._logprobs: list[float] = []
    self._ends: list[int] = []  # of each token: the length of the text so far
    self._text, self._rest = "", ""
    self._streamed = 0
    self._stop: str | None = None
    self.is_finished = False

  def add(self, token: int, logprob: float) -> None:
    """Takes the next token, unless the row is finished."""
    if self.is_finished:
      return
    if math.isnan(logprob):
      raise UserError(
        "Sampler: the model's logits are not numbers: its weights have "
        "diverged; use an earlier checkpoint"
      )
    if token in self._stops.tokens:
      self.is_finished = True
      return
    searched = len(self._text)
    self._text, self._rest = self._growing.add(token)
    self._tokens.append(token)
    self._logprobs.append(logprob)
    self._ends.append(len(self._text))
    self._search(searched)
    if self._stream and not self.is_finished:
      # Neither part of a character nor of a stop string.
      self._emit(self._stops.safe(self._text))

  def completion(self) -> Completion:
    """The result; what was held back of the stream is sent first."""
    if not self._stop:
      searched = len(self._text)
      self._text, self._rest = self._text + self._rest, ""
      self._search(searched)
    self._emit(len(self._text))
    return Completion(
      text=self._text,
      tokens=tuple(self._tokens),
      logprobs=tuple(self._logprobs),
      finish_reason="stop" if self.is_finished else "length",
      stop=self._stop,
    )

  def _search(self, start: int) -> None:
    """Cuts text and tokens before a stop string."""
    found = self._stops.find(self._text, start)
    if found is None:
      return
    end, self._stop = found
    self.is_finished = True
    self._text, self._rest = self._text[:end], ""
    # The fewest tokens that hold the text.
    count = sum(reached < end for reached in self._ends) + (end > 0)
    del self._tokens[count:], self._logprobs[count:]

  def _emit(self, end: int) -> None:
    if self._stream and end > self._streamed:
      new = self._text[self._streamed : end]
      self._streamed = end
      self._stream(self.index, new)
