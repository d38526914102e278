"""What is done before the first step: data, tokenizer, directory."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from .._checkpoint import (
  CONFIG,
  TOKENIZER,
  check_identity,
  complete_steps,
  read_identity,
  read_record,
  tokenizer_identity,
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
from .evaluate import evaluation_rows
from .record import Change, changes, check_changes, settings


@dataclasses.dataclass(frozen=True)
class Run:
  """All that the steps of a run depend on.

  Attributes:
    config: as the user gave it.
    directory: of checkpoints and metrics; it exists and can be written.
    done: steps that are done, of which the newest has a checkpoint.
    changes: what is not as it was at that step, and may be so.
    record: what the run is made with, to be kept with its checkpoints.
    corpus: the text that was read.
    split: the same, in training and held-out documents.
    tokenizer: of the run.
    train_rows: to train on.
    held_out_rows: never trained on.
    evaluation_rows: those of them that every evaluation takes.
  """

  config: TrainConfig
  directory: pathlib.Path
  done: int
  changes: list[Change]
  record: dict[str, Any]
  corpus: Corpus
  split: Split
  tokenizer: Tokenizer
  train_rows: Rows
  held_out_rows: Rows
  evaluation_rows: Rows


def open_run(config: TrainConfig, directory: pathlib.Path) -> Run:
  """Reads the data, and makes the run in `directory`, or checks that it is it.

  Args:
    config: of the run.
    directory: exists, can be written, and is locked.

  Raises:
    UserError: if the data cannot be read or are too few, or the directory
      belongs to a run with other settings.
  """
  done = max(complete_steps(directory), default=0)
  found = _changes(config, directory, done)  # before data, which take long
  corpus = read_corpus(config.data)
  identity = _identity(config) | _data_identity(config, corpus)
  if (directory / CONFIG).exists():
    check_identity(directory, read_identity(directory), identity)
  split = split_documents(corpus.documents, config.held_out, config.seed)
  tokenizer = _tokenizer(config, directory, split)
  train, held_out = _rows(config, split, tokenizer)
  write_identity(directory, identity, tokenizer)
  return Run(
    config=config,
    directory=directory,
    done=done,
    changes=found,
    record={
      **settings(config),
      "data": identity["data"],
      "tokenizer": tokenizer_identity(tokenizer),
    },
    corpus=corpus,
    split=split,
    tokenizer=tokenizer,
    train_rows=train,
    held_out_rows=held_out,
    evaluation_rows=evaluation_rows(held_out, config),
  )


def _changes(
  config: TrainConfig, directory: pathlib.Path, done: int
) -> list[Change]:
  """What differs from the run that `directory` holds, if it may."""
  if (directory / CONFIG).exists():
    check_identity(directory, read_identity(directory), _identity(config))
  if not done:
    return []
  found = changes(read_record(directory, done), settings(config))
  if not config.allow_change:
    check_changes(directory, done, found)
  return found


def _identity(config: TrainConfig) -> dict[str, Any]:
  """What must be the same for a run to be resumed: config.json holds it."""
  return {
    "model": config.model.to_dict(),
    "data": {"held_out": config.held_out},
    "training": {
      "seed": config.seed,
      "batch_size": config.batch_size,
      "sequence_length": config.sequence_length,
    },
  }


def _data_identity(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
  """As `_identity`, with what tells the text from others."""
  return {
    "data": {
      "documents": len(corpus.documents),
      "characters": sum(len(d.text) for d in corpus.documents),
      "sha256": corpus.fingerprint,
      "held_out": config.held_out,
    }
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
