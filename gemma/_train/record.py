"""What a run was made with, kept with every checkpoint, and what is now else.

A checkpoint's record holds the whole `TrainConfig`, what tells the data and the
tokenizer from others, the versions of what computes, and the newest step's
metrics.  When a run is resumed, its newest record is compared with the present.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from .._errors import UserError
from .._files import remote_url
from .config import TrainConfig

_PACKAGES = "pallas-gemma jax jaxlib flax optax orbax-checkpoint".split()

# What may change without a word, or may not, as it is judged with the identity
# of the directory ...
_UNSAID = {"work_dir", "cache_dir", "allow_change", "profile"}
_UNSAID |= {"distributed", "save_in_background"}
_UNSAID |= {"held_out", "seed", "batch_size", "sequence_length"}
# ... and with a line that says so, as it changes no step's result but by
# rounding.  (Most settings of the model, too, are judged with the identity.)
# Other settings alter what is learnt, and when.
_FREE = {"data", "text_field", "tokenizer", "accumulation", "head", "keep"}
_FREE |= {"evaluate_every", "eval_batches", "save_every", "mesh", "max_skipped"}
_FREE_ROOMS = ("model.", "versions.", "device.")


class Change(NamedTuple):
  """A setting that is not what it was."""

  name: str
  old: Any
  new: Any

  def __str__(self) -> str:
    """As in "steps 320 -> 640"."""
    return f"{self.name} {self._shown(self.old)} -> {self._shown(self.new)}"

  def _shown(self, value: Any) -> str:
    if value == [] and self.name == "data":
      return "Python's documentation"
    if isinstance(value, list):
      return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)

  @property
  def is_free(self) -> bool:
    """Whether it alters nothing that is learnt."""
    return self.name in _FREE or self.name.startswith(_FREE_ROOMS)


def settings(config: TrainConfig) -> dict[str, Any]:
  """What is recorded of a run before its data are read, as JSON can hold it."""
  return {
    "config": _plain(dataclasses.asdict(config)),
    "versions": {"python": platform.python_version()}
    | {package: _version(package) for package in _PACKAGES},
    "device": {
      "kind": jax.devices()[0].device_kind,
      "count": jax.device_count(),
    },
  }


def texts_of(config: TrainConfig, ends: Sequence[int]) -> dict[str, Any]:
  """What is recorded of the texts of a mixture; nothing where there is none.

  A file that goes from one of --data to the next leaves the text as it is, and
  is drawn another number of times.

  Args:
    config: of the run.
    ends: where in the text each of --data ends, in bytes.
  """
  if not config.mix:
    return {}
  sizes = [end - begin for begin, end in itertools.pairwise([0, *ends])]
  return {"texts": {"bytes": sizes}}


def changes(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
  """What differs between two `settings`, of what both have recorded."""

  def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    names = ("versions", "device", "texts")
    rooms = {name: record.get(name, {}) for name in names}
    return dict(_flat({**record.get("config", {}), **rooms}))

  old, new = flat(there), flat(now)
  return [
    Change(name, old[name], value)
    for name, value in new.items()
    if name in old and old[name] != value and name not in _UNSAID
  ]


def check_changes(
  directory: pathlib.Path, step: int, found: list[Change]
) -> None:
  """Refuses changes that alter what is learnt.

  Fewer steps than are done do not: there is nothing left to learn.

  Args:
    directory: for the message.
    step: that is done.
    found: what differs since then.

  Raises:
    UserError: naming each of them.
  """
  refused = [change for change in found if not change.is_free]
  if all(c.name == "steps" and c.new <= step for c in refused):
    return
  why = ""
  if any(change.name == "steps" for change in refused):
    why = " (the learning rate falls over all steps, so their number alters it)"
  raise UserError(
    f"work directory {directory}: its run has other settings at step {step}: "
    f"{', '.join(map(str, refused))}{why}; give --allow-change to go on with "
    "the new ones, the former ones to go on as before, or another --work-dir "
    "to start anew"
  )


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "unknown"


def _plain(value: Any) -> Any:
  """`value` in what JSON has; paths as absolute ones, whatever the folder."""
  if isinstance(value, dict):
    return {name: _plain(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, pathlib.Path):
    return remote_url(value) or os.path.abspath(value)
  return value


def _flat(
  tree: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
  """("a.b", 1) for {"a": {"b": 1}}."""
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value
