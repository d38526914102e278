"""Whose directory it is: config.json and tokenizer.model."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

from .._config import GemmaConfig
from .._errors import UserError
from .._files import json_of, local_path, write_atomically
from .._tokenizer import Tokenizer
from .steps import complete_steps

CONFIG = "config.json"
TOKENIZER = "tokenizer.model"

# The entry of config.json that is not of the identity: a digest of the rest.
_CHECKSUM = "checksum"


def open_directory(directory: str | os.PathLike[str]) -> pathlib.Path:
  """Makes the directory if it is missing, and tries that it can be written.

  Raises:
    UserError: if it cannot be made or written, saying why.
  """
  directory = local_path(directory, "work directory").absolute()
  probe = directory / f".writable-{os.getpid()}"
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(b"")
    probe.unlink(missing_ok=True)  # another host may have had our number
  except OSError as error:
    what = "is a file" if directory.is_file() else f"cannot write: {error}"
    raise UserError(
      f"work directory {directory}: {what}; give --work-dir another place"
    ) from error
  return directory


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, Any]:
  """What tells one tokenizer from another."""
  return {
    "vocab_size": tokenizer.vocab_size,
    "sha256": _digest(tokenizer.model),
  }


def has_identity(directory: pathlib.Path) -> bool:
  """Whether there is a config.json.

  Raises:
    UserError: if it is gone from a directory with steps: they may be those of
      another model, text or seed.
  """
  if (directory / CONFIG).exists():
    return True
  if steps := complete_steps(directory):
    raise without_config(directory, steps[-1])
  return False


def without_config(directory: Any, step: int) -> UserError:
  """For a directory that has a step, and does not say of which run."""
  return UserError(
    f"work directory {directory}: it has step {step}, and no {CONFIG} that "
    "says of which run; restore it from a copy, or give another --work-dir"
  )


def write_identity(
  directory: pathlib.Path, identity: dict[str, Any], tokenizer: Tokenizer
) -> None:
  """Writes config.json and tokenizer.model, or checks those that are there.

  A config.json of earlier versions gets its checksum then, and what may differ
  is as given afterwards.

  Raises:
    UserError: as `check_identity`.
  """
  identity = {**identity, "tokenizer": tokenizer_identity(tokenizer)}
  if has_identity(directory):
    there = read_identity(directory)
    check_identity(directory, there, identity)
    identity = {**there, **identity}
    has_checksum = _CHECKSUM in json_of((directory / CONFIG).read_text())
    if identity != there or not has_checksum:
      _write_config(directory, identity)
    return
  write_atomically(directory / TOKENIZER, tokenizer.model)
  _write_config(directory, identity)


def _write_config(directory: pathlib.Path, identity: dict[str, Any]) -> None:
  summed = {**identity, _CHECKSUM: _checksum(identity)}
  text = json.dumps(summed, indent=2) + "\n"
  write_atomically(directory / CONFIG, text.encode())


def read_identity(directory: pathlib.Path) -> dict[str, Any]:
  """The contents of config.json, once it and tokenizer.model are found whole.

  A config.json of earlier versions has no checksum, and is taken as it is.

  Raises:
    UserError: if one of the two files is missing or not what was written.
  """
  path = directory / CONFIG
  try:
    identity = json_of(path.read_text())
  except OSError as error:
    raise UserError(
      f"checkpoint {directory}: no {CONFIG} ({error.strerror}); give the "
      "directory that `train` or `save_checkpoint` wrote"
    ) from error
  except ValueError as error:
    identity = error
  if not isinstance(identity, dict):
    raise UserError(
      f"checkpoint {directory}: {CONFIG} is damaged; restore it from a copy, "
      "or train anew in another directory"
    )
  checksum = identity.pop(_CHECKSUM, None)
  if checksum is not None and checksum != _checksum(identity):
    raise UserError(
      f"checkpoint {directory}: {CONFIG} is damaged or was changed by hand, "
      "its checksum differs; restore it from a copy, or, if you changed it, "
      f'remove its entry "{_CHECKSUM}"'
    )
  _check_tokenizer(directory, identity)
  return identity


def _check_tokenizer(directory: pathlib.Path, identity: dict[str, Any]) -> None:
  fix = "restore both from a copy, or train anew in another directory"
  wanted = identity.get("tokenizer")
  try:
    there = _digest((directory / TOKENIZER).read_bytes())
  except OSError as error:
    raise UserError(
      f"checkpoint {directory}: no {TOKENIZER} ({error.strerror}); {fix}"
    ) from error
  if not isinstance(wanted, dict) or wanted.get("sha256") != there:
    raise UserError(
      f"checkpoint {directory}: {TOKENIZER} is not the file its {CONFIG} "
      f"describes; {fix}"
    )


def check_identity(
  directory: pathlib.Path, there: dict[str, Any], now: dict[str, Any]
) -> None:
  """Refuses a directory that was made with another model, data or settings.

  The model's `remat` may differ, and its `context_length` may grow.

  Args:
    directory: for the message.
    there: what its config.json records.
    now: what is about to be done in it; fields of `there` that are not in it
      are not compared.

  Raises:
    UserError: naming the first field that differs and both values.
  """
  for field, new in _flatten(now).items():
    old = _flatten(there).get(field)
    grows = (
      field == "model.context_length" and isinstance(old, int) and old <= new
    )
    if old != new and field != "model.remat" and not grows:
      raise UserError(
        f"work directory {directory}: it was made with {field} = {old}, and "
        f"now {field} = {new}; go back to the former, or give another "
        "--work-dir"
      )


def model_config(
  directory: pathlib.Path, identity: dict[str, Any]
) -> GemmaConfig:
  """The config of the model of which config.json speaks.

  Raises:
    UserError: if this version knows no such model.
  """
  try:
    return GemmaConfig.from_dict(identity["model"])
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(
      f"checkpoint {directory}: {CONFIG} describes no model this version knows "
      f"({error})"
    ) from error


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} as {"a.b": 1}."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def _checksum(identity: dict[str, Any]) -> str:
  """Of the values, however the file lays them out."""
  return _digest(json.dumps(identity, sort_keys=True).encode())


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]
