"""What is done before the first step: data, tokenizer, directory."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import rich.console

from .._checkpoint import (
  TOKENIZER,
  check_identity,
  complete_steps,
  has_identity,
  read_identity,
  read_record,
  tokenizer_identity,
  write_identity,
)
from .._data.cache import open_cache
from .._data.copies import describe_copies
from .._data.mixture import Quotas, Weight
from .._data.prepare import Prepared, Summary, text_files
from .._data.rows import Rows
from .._data.watch import Shown
from .._errors import UserError
from .._tokenizer import Tokenizer
from .config import TrainConfig
from .evaluate import evaluation_rows
from .layout import Layout, layout_of
from .mix import parse as parse_mix
from .record import Change, changes, check_changes, settings, texts_of


@dataclasses.dataclass(frozen=True)
class Run:
  """All that the steps of a run depend on.

  Attributes:
    config: as the user gave it.
    directory: of checkpoints and metrics; it exists and can be written.
    layout: of its arrays, over several devices; None for one.
    done: steps that are done, of which the newest has a checkpoint.
    changes: what is not as it was at that step, and may be so.
    record: what the run is made with, to be kept with its checkpoints.
    corpus: what text there is.
    data: its tokens, and what was found in both parts of it.
    tokenizer: of the run.
    train_rows: to train on.
    held_out_rows: never trained on.
    evaluation_rows: those of them that every evaluation takes.
  """

  config: TrainConfig
  directory: pathlib.Path
  layout: Layout | None
  done: int
  changes: list[Change]
  record: dict[str, Any]
  corpus: Summary
  data: Prepared
  tokenizer: Tokenizer
  train_rows: Rows
  held_out_rows: Rows
  evaluation_rows: Rows

  def quotas(self) -> Quotas | None:
    """What each text gets of each step; None if they are one."""
    if not self.config.mix:
      return None
    weights = [Weight(*parse_mix(text)) for text in self.config.mix]
    return Quotas(weights, self.config.steps, self.config.batch_size)


def open_run(
  config: TrainConfig,
  directory: pathlib.Path,
  console: rich.console.Console | None = None,
) -> Run:
  """Reads the data, and makes the run in `directory`, or checks that it is it.

  Args:
    config: of the run.
    directory: exists, can be written, and is locked.
    console: shows how far it is, if the text is long.

  Raises:
    UserError: if the data cannot be read or are too few, or the directory
      belongs to a run with other settings.
  """
  layout = layout_of(config)
  done = max(complete_steps(directory), default=0)
  record = settings(config)
  _changes(config, directory, done, record)  # before data, which take long
  with (
    Shown(console) as watch,
    text_files(
      config.data,
      config.text_field,
      config.seed,
      open_cache(config.cache_dir, directory),
      watch,
      apart=bool(config.mix),
    ) as text,
  ):
    identity = _identity(config) | _data_identity(config, text.summary)
    if has_identity(directory):
      check_identity(directory, read_identity(directory), identity)
    record |= texts_of(config, text.summary.parts)
    found = _changes(config, directory, done, record)
    tokenizer = _tokenizer(config, directory)
    vocabulary = config.model.vocab_size
    data = text.prepare(tokenizer, vocabulary, config.held_out)
  train, held_out = _rows(config, data)
  write_identity(directory, identity, data.tokenizer)
  return Run(
    config=config,
    directory=directory,
    layout=layout,
    done=done,
    changes=found,
    record={
      **record,
      "data": identity["data"],
      "tokenizer": tokenizer_identity(data.tokenizer),
    },
    corpus=text.summary,
    data=data,
    tokenizer=data.tokenizer,
    train_rows=train,
    held_out_rows=held_out,
    evaluation_rows=evaluation_rows(held_out, config),
  )


def _changes(
  config: TrainConfig,
  directory: pathlib.Path,
  done: int,
  now: dict[str, Any],
) -> list[Change]:
  """What differs from the run that `directory` holds, if it may."""
  if has_identity(directory):
    check_identity(directory, read_identity(directory), _identity(config))
  if not done:
    return []
  found = changes(read_record(directory, done), now)
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


def _data_identity(config: TrainConfig, corpus: Summary) -> dict[str, Any]:
  """As `_identity`, with what tells the text from others."""
  return {
    "data": {
      "documents": corpus.documents,
      "characters": corpus.characters,
      "sha256": corpus.fingerprint,
      "held_out": config.held_out,
    }
  }


def _tokenizer(
  config: TrainConfig, directory: pathlib.Path
) -> Tokenizer | None:
  """The one the user named, else that of the run, else none yet."""
  if config.tokenizer is not None:
    tokenizer = Tokenizer.load(config.tokenizer)
  elif has_identity(directory):
    tokenizer = Tokenizer.load(directory / TOKENIZER)
  else:
    return None
  if tokenizer.vocab_size > config.model.vocab_size:
    raise UserError(
      f"tokenizer {config.tokenizer}: has {tokenizer.vocab_size} pieces, and "
      f"the model's vocab_size is {config.model.vocab_size}; give "
      f"--model.vocab-size {tokenizer.vocab_size}"
    )
  return tokenizer


def _rows(config: TrainConfig, data: Prepared) -> tuple[Rows, Rows]:
  """Packed rows of the training and of the held-out documents."""
  tokens, length = data.train.size, config.sequence_length
  if tokens < length:
    raise UserError(
      f"sequence_length {length}: longer than the training text, {tokens} "
      f"tokens; give --sequence-length {tokens} or less, or more text"
    )
  pad = data.tokenizer.pad_id
  train = Rows(data.train, length, pad)
  texts = train.parts() if config.mix else []
  for path, rows in zip(config.data, texts, strict=False):
    if not len(rows):
      raise UserError(
        f"mix: {path} has no row of training text; give more of it, a shorter "
        "--sequence-length, or leave it out"
      )
  return train, Rows(data.held_out, length, pad)


def describe_data(run: Run) -> Iterator[str]:
  """The lines about the text that are printed at the start."""
  for reason, names in run.corpus.skipped.items():
    more = ", ..." if len(names) > 3 else ""
    yield f"skipped   {len(names)}, {reason}: {', '.join(names[:3])}{more}"
  for name, tokens in (
    ("training", run.data.train),
    ("held out", run.data.held_out),
  ):
    labels = tokens.size - tokens.documents
    yield f"{name}  {labels:,} tokens of {tokens.documents:,} documents"
  yield (
    f"rows      {len(run.train_rows):,} of {run.config.sequence_length:,} "
    f"tokens, packed: {run.train_rows.use:.2%} of them are text"
  )
  quotas = run.quotas()
  if quotas is not None:
    taken = quotas.before(run.config.steps)
    for i, rows in enumerate(run.train_rows.parts()):
      yield (
        f"mix       {run.config.data[i]}: {quotas.shares(0)[i]:.1%} of the "
        f"first step, {quotas.shares(run.config.steps - 1)[i]:.1%} of the "
        f"last; {taken[i] / max(len(rows), 1):.1f} passes in all"
      )
  yield from describe_copies(run.data.report)
  yield f"tokens    {run.data.size / 1e6:,.1f} MB in {run.data.directory}"
