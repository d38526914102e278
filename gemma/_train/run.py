"""What is done before the first step: data, tokenizer, directory."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from .._checkpoint import (
  CONFIG,
  TOKENIZER,
  check_identity,
  open_directory,
  read_identity,
  write_identity,
)
from .._errors import UserError
from .._tokenizer import Tokenizer
from .config import TrainConfig
from .data import (
  Corpus,
  Rows,
  Split,
  pack,
  read_corpus,
  split_documents,
  tokenize,
)


@dataclasses.dataclass(frozen=True)
class Run:
  """All that the steps of a run depend on.

  Attributes:
    config: as the user gave it.
    directory: of checkpoints and metrics; it exists and can be written.
    corpus: the text that was read.
    split: the same, in training and held-out documents.
    tokenizer: of the run.
    train_rows: to train on.
    held_out_rows: to evaluate on.
  """

  config: TrainConfig
  directory: pathlib.Path
  corpus: Corpus
  split: Split
  tokenizer: Tokenizer
  train_rows: Rows
  held_out_rows: Rows


def open_run(config: TrainConfig) -> Run:
  """Reads the data, and makes or checks the directory.

  Raises:
    UserError: if the data cannot be read or are too few, or the directory
      belongs to a run with other settings.
  """
  corpus = read_corpus(config.data)
  directory = open_directory(config.directory)
  identity = _identity(config, corpus)
  if (directory / CONFIG).exists():
    check_identity(directory, read_identity(directory), identity)
  split = split_documents(corpus.documents, config.held_out, config.seed)
  tokenizer = _tokenizer(config, directory, split)
  train, held_out = _rows(config, split, tokenizer)
  write_identity(directory, identity, tokenizer)
  return Run(config, directory, corpus, split, tokenizer, train, held_out)


def _identity(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
  """What must be the same for a run to be resumed: config.json holds it."""
  return {
    "model": config.model.to_dict(),
    "data": {
      "documents": len(corpus.documents),
      "characters": sum(len(d.text) for d in corpus.documents),
      "sha256": corpus.fingerprint,
      "held_out": config.held_out,
    },
    "training": {
      "seed": config.seed,
      "batch_size": config.batch_size,
      "sequence_length": config.sequence_length,
    },
  }


def _tokenizer(
  config: TrainConfig, directory: pathlib.Path, split: Split
) -> Tokenizer:
  """The one the user named, else that of the run, else a newly trained one."""
  if config.tokenizer is not None:
    tokenizer = Tokenizer.load(config.tokenizer)
  elif (directory / CONFIG).exists():
    tokenizer = Tokenizer.load(directory / TOKENIZER)
  else:
    texts = (d.text for d in split.train)
    tokenizer = Tokenizer.train(texts, config.model.vocab_size)
  if tokenizer.vocab_size > config.model.vocab_size:
    raise UserError(
      f"tokenizer {config.tokenizer}: has {tokenizer.vocab_size} pieces, and "
      f"the model's vocab_size is {config.model.vocab_size}; give "
      f"--model.vocab-size {tokenizer.vocab_size}"
    )
  return tokenizer


def _rows(
  config: TrainConfig, split: Split, tokenizer: Tokenizer
) -> tuple[Rows, Rows]:
  """Packed rows of the training and of the held-out documents."""
  train = tokenize(split.train, tokenizer)
  tokens = sum(map(len, train))
  if tokens < config.sequence_length:
    raise UserError(
      f"sequence_length {config.sequence_length}: longer than the training "
      f"text, {tokens} tokens; give --sequence-length {tokens} or less, or "
      "more text"
    )
  held_out = tokenize(split.held_out, tokenizer)
  length, pad = config.sequence_length, tokenizer.pad_id
  return pack(train, length, pad), pack(held_out, length, pad)
