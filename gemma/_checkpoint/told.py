"""What was said of steps, on this machine or another."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from .._remote import place_of
from .checksums import verify
from .remote import fetched, remote_losses
from .steps import RECORD, local_losses, lowest, step_folder, way_out
from .store import step_number


def best_step(directory: str | os.PathLike[str]) -> int | None:
  """The complete step of the lowest held-out loss; None if none is known.

  Of those that were evaluated on as many rows as the newest one: another
  `eval_batches` is other text.

  Args:
    directory: of `train` or `save_checkpoint`, or where `train` worked on
      another machine, such as gs://bucket/run.

  Raises:
    UserError: if the file that holds a loss is damaged.
  """
  return lowest(read_losses(directory))


def read_losses(directory: str | os.PathLike[str]) -> dict[int, float]:
  """The held-out loss, in nats per token, of each step that has one.

  Raises:
    UserError: if the file that holds it is damaged.
  """
  place = place_of(directory, "checkpoint")
  if place is not None:
    return remote_losses(place)
  return local_losses(pathlib.Path(directory))


def read_record(directory: str | os.PathLike[str], step: int) -> dict[str, Any]:
  """What the trainer recorded with a step; {} if it recorded nothing.

  Raises:
    UserError: if there is no such step, or its record is damaged.
  """
  step = step_number(step)
  place = place_of(directory, "checkpoint")
  if place is not None:
    with fetched(place, step, (RECORD,)) as (here, _):
      return read_record(here, step)
  directory = pathlib.Path(directory)
  folder = step_folder(directory, step)
  verify(folder, way_out(directory, step), only=RECORD)
  path = folder / RECORD
  return json.loads(path.read_text()) if path.exists() else {}
