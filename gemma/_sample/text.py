"""The text of a row, on the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from .._errors import UserError
from .._tokenizer import Tokenizer


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


class Row:
  """One completion as it grows.

  Args:
    index: its prompt's.
    tokenizer: makes the text.
    stops: ids that end it.
    stream: as for `Sampler.__call__`.
  """

  def __init__(
    self,
    index: int,
    tokenizer: Tokenizer,
    stops: frozenset[int],
    stream: Callable[[int, str], None] | None,
  ):
    self.index, self._tokenizer = index, tokenizer
    self._stops, self._stream = stops, stream
    self._tokens: list[int] = []
    self._logprobs: list[float] = []
    self._streamed = ""
    self._finished = False

  def add(self, token: int, logprob: float) -> None:
    """Takes the next token."""
    if math.isnan(logprob):
      raise UserError(
        "Sampler: the model's logits are not numbers: its weights have "
        "diverged; use an earlier checkpoint"
      )
    if token in self._stops:
      self._finished = True
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
      finish_reason="stop" if self._finished else "length",
    )

  def _text(self) -> str:
    return self._tokenizer.decode(self._tokens)

  def _emit(self, text: str) -> None:
    if self._stream and len(text) > len(self._streamed):
      self._stream(self.index, text[len(self._streamed) :])
      self._streamed = text
