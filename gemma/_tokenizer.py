"""Text to token ids and back: SentencePiece byte-pair encoding.

Reads any SentencePiece `.model`, Gemma's own among them, and trains small
ones with Gemma's settings: the same special ids, bytes for what the vocabulary
lacks, digits one by one, and no change whatever to the text, so that
`decode(encode(text)) == text` for every text.
"""

from __future__ import annotations

import io
import operator
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece

from ._arguments import instance, wanted, whole
from ._errors import UserError
from ._files import local_path
from ._remote import place_of

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"

# In SentencePiece's pieces this character stands for a space, so one in the
# text would come back as a space.  Those in the text are encoded as bytes.
_SPACE_MARK = "\u2581"

# SentencePiece's trainer skips a text that holds one of these characters.
_UNTRAINABLE = re.compile("[\0\u2585]")

_GEMMA_SETTINGS: dict[str, Any] = dict(
  model_type="bpe",
  pad_id=0,
  eos_id=1,
  bos_id=2,
  unk_id=3,
  pad_piece="<pad>",
  eos_piece="<eos>",
  bos_piece="<bos>",
  unk_piece="<unk>",
  user_defined_symbols=[START_OF_TURN, END_OF_TURN],
  byte_fallback=True,
  split_digits=True,
  normalization_rule_name="identity",
  add_dummy_prefix=False,
  remove_extra_whitespaces=False,
  max_sentencepiece_length=16,
  # Gemma's vocabulary lists runs of spaces; ours learns them from the text.
  allow_whitespace_only_pieces=True,
  # In bytes.  By default longer texts are skipped without a message.
  max_sentence_length=1 << 30,
  minloglevel=2,
)


class Tokenizer:
  """A SentencePiece model.

  Args:
    model: the bytes of a `.model` file; see `load` and `train`.
    source: what to call it in an error message.

  Raises:
    UserError: if the bytes are no SentencePiece model.
  """

  def __init__(self, model: bytes, *, source: str = "tokenizer"):
    if not isinstance(model, bytes):
      what = "the bytes of a model (Tokenizer.load takes a path)"
      raise wanted(source, what, model)
    self.model = model
    self._processor = sentencepiece.SentencePieceProcessor()
    # SentencePiece accepts an empty string as a model without pieces, and then
    # crashes when it is used.
    if not model or not _parses(self._processor, model):
      raise UserError(
        f"{source}: not a SentencePiece model; give a tokenizer.model file"
      )
    self.vocab_size: int = self._processor.get_piece_size()
    self.eos_id: int = self._processor.eos_id()
    self.bos_id: int = self._processor.bos_id()
    self.unk_id: int = self._processor.unk_id()
    # -1 if the model has no padding piece.  Any id will do then, since padding
    # is masked wherever it could matter.
    self.pad_id: int = max(self._processor.pad_id(), 0)
    self._space_mark_ids = [
      self._processor.piece_to_id(f"<0x{byte:02X}>")
      for byte in _SPACE_MARK.encode()
    ]
    # A model may have no bytes, or begin every text with a space that is not
    # there, as Llama's does.  Then a text is encoded in one part, since each
    # part would begin so; a space mark in it becomes a space.
    pieces = self._processor.id_to_piece(self._processor.encode("a"))
    adds_space = any(_SPACE_MARK in piece for piece in pieces)
    self._splits = not adds_space and self.unk_id not in self._space_mark_ids

  @classmethod
  def load(cls, path: str | pathlib.Path) -> Tokenizer:
    """Reads a `.model` file, for example Gemma's tokenizer.model.

    From this machine or another, as in gs://bucket/tokenizer.model.
    """
    if place := place_of(path, "tokenizer"):
      return cls(place.content(), source=f"tokenizer {place}")
    try:
      model = pathlib.Path(path).read_bytes()
    except OSError as error:
      raise UserError(
        f"tokenizer {path}: {error.strerror}; give a tokenizer.model file"
      ) from error
    return cls(model, source=f"tokenizer {path}")

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns a vocabulary of `vocab_size` pieces from `texts`.

    The pieces include 4 special ids, 2 turn marks and 256 bytes.

    Raises:
      UserError: if there is no text, or `vocab_size` is too small or too
        large for it; the message names the nearest size that works.
    """
    model = io.BytesIO()
    vocab_size = whole("vocab_size", vocab_size, 1, (1 << 31) - 1)
    sentences = _Trainable(texts)
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=vocab_size,
        **_GEMMA_SETTINGS,
      )
    except RuntimeError as error:  # SentencePiece has no other
      if sentences.error is not None:
        raise sentences.error from None
      if explained := _training_error(str(error), vocab_size):
        raise explained from error
      raise
    return cls(model.getvalue())

  def save(self, path: str | pathlib.Path) -> None:
    """Writes a `.model` file that `load` and any SentencePiece reads."""
    local_path(path, "tokenizer").write_bytes(self.model)

  def encode(
    self, text: str, *, add_bos: bool = False, add_eos: bool = False
  ) -> list[int]:
    """The ids of `text`.

    Turn marks in the text become their ids.  `<bos>`, `<eos>` and `<pad>` in
    the text remain text: the ids of BOS and EOS are there only if asked for,
    and then once.

    Raises:
      UserError: if the text is none: a byte that is not UTF-8 comes from the
        command line or a file name as half of a surrogate pair.
    """
    check_text(text)
    ids: list[int] = []
    parts = text.split(_SPACE_MARK) if self._splits else [text]
    for i, part in enumerate(parts):
      ids += self._space_mark_ids if i else []
      ids += self._processor.encode(part)
    ids = self.with_bos(ids) if add_bos else ids
    return ids + [self.eos_id] if add_eos else ids

  def with_bos(self, ids: Sequence[int]) -> list[int]:
    """`ids` with one BOS in front, also if it was there already."""
    if self.bos_id < 0:
      raise UserError("tokenizer: has no BOS piece, which Gemma needs")
    return [self.bos_id, *ids[1 if ids and ids[0] == self.bos_id else 0 :]]

  def pairs(self) -> frozenset[str]:
    """All that stand beside each other within a piece, two characters each.

    Where a text has none of them, it can be cut: its parts have the same ids.
    """
    pieces = map(self._processor.id_to_piece, range(self.vocab_size))
    texts = (piece.replace(_SPACE_MARK, " ") for piece in pieces)
    return frozenset(t[i : i + 2] for t in texts for i in range(len(t) - 1))

  def piece_id(self, piece: str) -> int | None:
    """The id of a piece such as "<end_of_turn>"; None if there is none."""
    found = self._processor.piece_to_id(instance("piece", piece, str))
    return None if found == self.unk_id else found

  def decode(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
    """The text of `ids`, or what they add to the text of the ids `after`.

    Special ids have no text, and bytes that are no UTF-8 give U+FFFD.

    Args:
      ids: to decode.
      after: ids that stand before them, whose characters are whole.  A model
        that begins every text with a space (Llama's) takes it away when it
        decodes: the ids of "value" alone are "value", after those of "The" they
        are " value".

    Raises:
      ValueError: for what is no id of the vocabulary.
    """
    before, ids = _whole_numbers(after), _whole_numbers(ids)
    wrong = [i for i in (*before, *ids) if not 0 <= i < self.vocab_size]
    if wrong:
      raise ValueError(
        f"decode: wanted ids in [0, {self.vocab_size}), got {wrong[0]}"
      )
    text = self._processor.decode(before + ids)
    return text[len(self._processor.decode(before)) :] if before else text


def _whole_numbers(ids: Sequence[int]) -> list[int]:
  try:
    return [operator.index(i) for i in ids]
  except TypeError:
    raise wanted("decode", "a list of ids, whole numbers", ids) from None


def check_text(text: str, what: str = "text") -> None:
  """Refuses what is no text, or has half of a surrogate pair.

  Raises:
    UserError: naming `what` it is.
  """
  try:
    instance(what, text, str).encode()
  except UnicodeEncodeError as error:
    code = ord(text[error.start])
    byte = f" (byte 0x{code - 0xDC00:02x})" if 0xDC80 <= code <= 0xDCFF else ""
    raise UserError(
      f"{what}: its character {error.start}, U+{code:04X}{byte}, is no "
      "character; give valid UTF-8"
    ) from None


def _parses(
  processor: sentencepiece.SentencePieceProcessor, model: bytes
) -> bool:
  try:
    processor.LoadFromSerializedProto(model)
  except RuntimeError:
    return False
  return processor.get_piece_size() > 0


class _Trainable:
  """Texts as SentencePiece's trainer takes them.

  Attributes:
    error: that ended the texts; the trainer makes one of its own of it.
  """

  def __init__(self, texts: Iterable[str]):
    if isinstance(texts, str) or not isinstance(texts, Iterable):
      raise wanted("texts", "several texts", texts)
    self._texts = texts
    self.error: BaseException | None = None

  def __iter__(self) -> Iterator[str]:
    try:
      for text in self._texts:
        check_text(text)
        yield from filter(None, _UNTRAINABLE.split(text))
    except GeneratorExit:  # the trainer has enough
      raise
    except BaseException as error:
      self.error = error
      raise


def _training_error(message: str, vocab_size: int) -> UserError | None:
  """SentencePiece's error in words a user can act on; None for any other."""
  if "!sentences_.empty()" in message:
    return UserError("tokenizer: no text to learn from; give more text")
  if most := re.search(r"too high .* a value <= (\d+)", message):
    return UserError(
      f"vocab_size {vocab_size}: too large for this text, which supports at "
      f"most {most[1]}; give {most[1]} or less, or more text"
    )
  if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
    return UserError(
      f"vocab_size {vocab_size}: too small for this text; give {least[1]} or "
      "more (its characters, 256 bytes and 6 special pieces)"
    )
  return None
