"""A whole model, in and out."""

from __future__ import annotations

import os
import pathlib
from typing import Literal

from .. import ops as _ops
from .._arguments import instance
from .._config import GemmaConfig
from .._errors import UserError
from .._lock import locked
from .._model import Gemma
from .._params import abstract_gemma, model_params, with_params
from .._remote import place_of
from .._tokenizer import Tokenizer
from .checksums import CHECKSUMS
from .identity import (
  TOKENIZER,
  model_config,
  open_directory,
  read_identity,
  write_identity,
)
from .remote import fetched
from .steps import RECORD, choose_step, complete_folders
from .store import Checkpoints, restore, step_number


def save_checkpoint(
  directory: str | os.PathLike[str],
  model: Gemma,
  tokenizer: Tokenizer,
  *,
  step: int = 0,
) -> None:
  """Writes what `load_checkpoint` reads.

  A step of this number that is there already is replaced, once the new one is
  on disk and was read back: a process that is killed leaves the one or the
  other.  Other steps stay, whatever their numbers; `load_checkpoint` takes the
  highest unless it is told which.  A step that `train` saved has an optimizer
  too, which is not written here: in its place, training cannot go on from it.

  Args:
    directory: made if it is missing.
    model: its parameters are written, in their dtype.
    tokenizer: of the model.
    step: a number for this state of the model, 0 or more.

  Raises:
    UserError: if the directory cannot be written, is in use by a run, or
      belongs to another model or tokenizer, or the model is in int8.
  """
  step = step_number(step)
  instance("tokenizer", tokenizer, Tokenizer)
  if instance("model", model, Gemma).is_quantized:
    raise UserError(
      f"checkpoint {directory}: a model in int8 cannot be saved; save the one "
      "that it was made of, and quantize() what is loaded"
    )
  directory = open_directory(directory)
  with locked(directory) as check:
    write_identity(directory, {"model": model.config.to_dict()}, tokenizer)
    with Checkpoints(directory, keep=None, check=check) as checkpoints:
      checkpoints.save(step, params=model_params(model))


def load_checkpoint(
  directory: str | os.PathLike[str],
  *,
  step: int | Literal["best"] | None = None,
  ops: _ops.Ops = _ops.KERNELS,
) -> tuple[Gemma, Tokenizer]:
  """Reads a model and its tokenizer.

  Args:
    directory: written by `save_checkpoint`, or the work directory of `train`,
      on this machine or another, such as gs://bucket/run.
    step: which of its steps: a number, "best" for the one of the lowest
      held-out loss, or None for the newest, that of the highest number.
    ops: the array functions the model will call.

  Raises:
    UserError: if there is none, or it is damaged, unfinished or of another
      config.
  """
  if not isinstance(step, str | None):
    step = step_number(step)
  instance("ops", ops, _ops.Ops)
  place = place_of(directory, "checkpoint")
  if place is not None:
    with fetched(place, step, ("params/",)) as (here, found):
      return load_checkpoint(here, step=found, ops=ops)
  directory = pathlib.Path(directory)
  config = _config_in(directory)
  tokenizer = Tokenizer.load(directory / TOKENIZER)
  model = abstract_gemma(config, ops)
  params = model_params(model)
  while True:
    wanted = choose_step(directory, step)
    folder = complete_folders(directory).get(wanted)
    mark = _mark(folder)
    try:
      restored = restore(directory, wanted, params=params)
    except Exception:
      # Of a file that goes while it is read Orbax raises errors of several
      # classes.  Whichever it is goes on, unless a trainer that runs has
      # removed or replaced the step meanwhile: then it is chosen anew.
      if mark is None or _mark(folder) == mark:
        raise
    else:
      # Of what was removed all was read, of what was replaced a part, perhaps.
      if _mark(folder) in (mark, None):
        return with_params(model, restored["params"]), tokenizer


def _mark(folder: pathlib.Path | None) -> bytes | None:
  """What tells a step from another of its number; None if it is gone."""
  try:
    return None if folder is None else (folder / CHECKSUMS).read_bytes()
  except FileNotFoundError:
    return None


def load_config(directory: str | os.PathLike[str]) -> GemmaConfig:
  """The sizes of a checkpoint's model, of which no array is read.

  Args:
    directory: as `load_checkpoint` takes it.

  Raises:
    UserError: if there is none, or its config is damaged.
  """
  place = place_of(directory, "checkpoint")
  if place is not None:
    with fetched(place, None, (RECORD,)) as (here, _):
      return _config_in(here)
  return _config_in(pathlib.Path(directory))


def _config_in(directory: pathlib.Path) -> GemmaConfig:
  if not directory.is_dir():
    raise UserError(f"checkpoint {directory}: no such directory")
  return model_config(directory, read_identity(directory))
