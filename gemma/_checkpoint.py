"""Checkpoints: a model, its tokenizer and, while training, the optimizer.

    DIR/config.json          the model's config and what else was recorded
    DIR/tokenizer.model
    DIR/checkpoints/STEP/    params/ and optimizer/, by Orbax
    DIR/checkpoints/STEP/record.json    what the run was made with
    DIR/checkpoints/STEP/checksums.json

Orbax writes a step under another name and renames it when all is on disk.
Then `checksums.json` is written, with size and CRC-32 of every file: a step
without it is unfinished and ignored, and a file that differs from it is
named.  (Orbax itself restores an array with a flipped bit without complaint.)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from . import ops as _ops
from ._checksums import CHECKSUMS, verify, write_checksums
from ._config import GemmaConfig
from ._errors import UserError
from ._files import write_atomically
from ._lock import locked
from ._model import Gemma, abstract_gemma, model_params, with_params
from ._tokenizer import Tokenizer

CONFIG = "config.json"
TOKENIZER = "tokenizer.model"
_RECORD = "record.json"
_TRIES = 10  # to read a step before the run that made it deletes it


# --- a whole model, in and out ---


def save_checkpoint(
  directory: str | pathlib.Path,
  model: Gemma,
  tokenizer: Tokenizer,
  *,
  step: int = 0,
) -> None:
  """Writes what `load_checkpoint` reads; an older `step` there stays.

  Raises:
    UserError: if the directory cannot be written, is in use by a run, or
      belongs to another model or tokenizer.
  """
  directory = open_directory(directory)
  with locked(directory):
    write_identity(directory, {"model": model.config.to_dict()}, tokenizer)
    with Checkpoints(directory, keep=None) as checkpoints:
      checkpoints.save(step, params=model_params(model))


def load_checkpoint(
  directory: str | pathlib.Path,
  *,
  step: int | None = None,
  ops: _ops.Ops = _ops.KERNELS,
) -> tuple[Gemma, Tokenizer]:
  """Reads a model and its tokenizer.

  Args:
    directory: written by `save_checkpoint`, or the work directory of `train`.
    step: which of its steps; the newest by default.
    ops: the array functions the model will call.

  Raises:
    UserError: if there is none, or it is damaged, or of another config.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise UserError(f"checkpoint {directory}: no such directory")
  identity = read_identity(directory)
  config = _model_config(directory, identity)
  tokenizer = Tokenizer.load(directory / TOKENIZER)
  if tokenizer_identity(tokenizer) != identity.get("tokenizer"):
    raise UserError(
      f"checkpoint {directory}: {TOKENIZER} is not the file its {CONFIG} "
      "describes; restore both from a copy, or train anew in another directory"
    )
  model = abstract_gemma(config, ops)
  for _ in range(_TRIES):
    wanted = _choose(directory, step)
    try:
      restored = _restore(directory, wanted, params=model_params(model))
    except Exception:
      # A run that goes on deletes old steps: perhaps this one, while it was
      # read.
      if step is None and wanted not in complete_steps(directory):
        continue
      raise
    return with_params(model, restored["params"]), tokenizer
  raise UserError(
    f"checkpoint {directory}: its run deletes steps faster than they are read; "
    "give the run a larger --keep"
  )


def _choose(directory: pathlib.Path, step: int | None) -> int:
  """`step`, or the newest."""
  steps = complete_steps(directory)
  wanted = max(steps, default=None) if step is None else step
  if wanted is None or wanted not in steps:
    raise UserError(
      f"checkpoint {directory}: no complete step"
      f"{'' if step is None else f' {step}'}; it has "
      f"{', '.join(map(str, steps)) or 'none'}"
    )
  return wanted


# --- the directory and its identity ---


def open_directory(directory: str | pathlib.Path) -> pathlib.Path:
  """Makes the directory if it is missing, and tries that it can be written.

  Raises:
    UserError: if it cannot be made or written, saying why.
  """
  directory = pathlib.Path(directory).absolute()
  probe = directory / f".writable-{os.getpid()}"
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(b"")
    probe.unlink()
  except OSError as error:
    what = "is a file" if directory.is_file() else f"cannot write: {error}"
    raise UserError(
      f"work directory {directory}: {what}; give --work-dir another place"
    ) from error
  return directory


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, Any]:
  """What tells one tokenizer from another."""
  digest = hashlib.sha256(tokenizer.model).hexdigest()[:16]
  return {"vocab_size": tokenizer.vocab_size, "sha256": digest}


def write_identity(
  directory: pathlib.Path, identity: dict[str, Any], tokenizer: Tokenizer
) -> None:
  """Writes config.json and tokenizer.model, or checks those that are there.

  What may differ in config.json is as given afterwards.

  Raises:
    UserError: as `check_identity`.
  """
  identity = {**identity, "tokenizer": tokenizer_identity(tokenizer)}
  if (directory / CONFIG).exists():
    there = read_identity(directory)
    check_identity(directory, there, identity)
    identity = {**there, **identity}
    if identity == there:
      return
  write_atomically(directory / TOKENIZER, tokenizer.model)
  text = json.dumps(identity, indent=2) + "\n"
  write_atomically(directory / CONFIG, text.encode())


def read_identity(directory: pathlib.Path) -> dict[str, Any]:
  """The contents of config.json."""
  path = directory / CONFIG
  try:
    identity = json.loads(path.read_text())
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
  return identity


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


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} as {"a.b": 1}."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def _model_config(
  directory: pathlib.Path, identity: dict[str, Any]
) -> GemmaConfig:
  try:
    return GemmaConfig.from_dict(identity["model"])
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(
      f"checkpoint {directory}: {CONFIG} describes no model this version knows "
      f"({error})"
    ) from error


# --- steps ---


class Checkpoints(contextlib.AbstractContextManager):
  """Saves and restores training steps in one directory.

  Args:
    directory: holds `checkpoints/`.
    keep: how many of the newest to keep; None for all.
  """

  def __init__(self, directory: pathlib.Path, *, keep: int | None):
    self._directory = directory
    self._root = directory / "checkpoints"
    # If a save was killed after Orbax had finished and before the checksums
    # were written, Orbax takes the step for a good one: remove it first.
    for unfinished in set(_step_directories(directory)) - set(
      complete_steps(directory)
    ):
      shutil.rmtree(self._root / str(unfinished))
    self._manager = ocp.CheckpointManager(
      self._root,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
      ),
    )

  def __exit__(self, *_) -> None:
    """Frees Orbax's threads."""
    self._manager.close()

  def save(
    self, step: int, *, record: dict[str, Any] | None = None, **items: Any
  ) -> None:
    """Writes `items`, pytrees of arrays, as `step`: wholly or not at all.

    With `record`, of what JSON has, which `read_record` reads.

    Raises:
      UserError: if the disk is full.
    """
    if step in self._manager.all_steps():
      return
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
    free = shutil.disk_usage(self._directory).free
    if size > free:
      raise _no_space(self._directory, f"{size:,} bytes wanted, {free:,} free")
    args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    try:
      self._manager.save(step, args=ocp.args.Composite(**args))
      path = self._root / str(step)
      if record is not None:
        write_atomically(path / _RECORD, json.dumps(record, indent=2).encode())
      write_checksums(path)
    except (OSError, ValueError) as error:
      # Orbax passes on TensorStore's errors: a ValueError whose message holds
      # the error number, where Python's own OSError has an attribute.
      if f"os_error_code='{errno.ENOSPC}'" not in str(error) and (
        getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT)
      ):
        raise
      raise _no_space(self._directory, "") from error

  def restore(self, step: int, **abstract: Any) -> dict[str, Any]:
    """Reads the named items of `step` in the shapes and dtypes of `abstract`.

    Raises:
      UserError: if a file is damaged or an array has another shape.
    """
    return _restore(self._directory, step, **abstract)


def read_record(directory: pathlib.Path, step: int) -> dict[str, Any]:
  """The record with which `step` was saved; {} if there was none."""
  path = directory / "checkpoints" / str(step) / _RECORD
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise UserError(f"checkpoint {path}: damaged") from error


def complete_steps(directory: pathlib.Path) -> list[int]:
  """The steps that were written to the end, in order."""
  root = directory / "checkpoints"
  return [
    step
    for step in _step_directories(directory)
    if (root / str(step) / CHECKSUMS).exists()
  ]


def _step_directories(directory: pathlib.Path) -> list[int]:
  root = directory / "checkpoints"
  names = [p.name for p in root.iterdir()] if root.is_dir() else []
  return sorted(int(name) for name in names if name.isdecimal())


def _restore(
  directory: pathlib.Path, step: int, **abstract: Any
) -> dict[str, Any]:
  root = directory / "checkpoints" / str(step)
  earlier = [s for s in complete_steps(directory) if s < step]
  use = f"go back to step {earlier[-1]}" if earlier else "train from the start"
  verify(root, f"delete {root} to {use}")
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  restored = {}
  with ocp.StandardCheckpointer() as checkpointer:
    for name, tree in abstract.items():
      path = directory.absolute() / "checkpoints" / str(step) / name
      _check_shapes(directory, checkpointer.metadata(path), tree)
      placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree
      )
      restored[name] = checkpointer.restore(path, placed)
  return restored


def _check_shapes(directory: pathlib.Path, metadata: Any, wanted: Any) -> None:
  def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_path(path): tuple(leaf.shape) for path, leaf in leaves}

  there = shapes(metadata.item_metadata.tree)
  for name, shape in shapes(wanted).items():
    if there.get(name) != shape:
      raise UserError(
        f"checkpoint {directory}: of another config: {name} is "
        f"{there.get(name, 'missing')} there, and {shape} by {CONFIG}; restore "
        f"{CONFIG} from a copy"
      )


def _path(path: tuple[Any, ...]) -> str:
  """a.b.0 for keys of dicts, fields of tuples and indices alike."""
  return ".".join(
    str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
    for k in path
  )


def _no_space(directory: pathlib.Path, detail: str) -> UserError:
  return UserError(
    f"work directory {directory}: no space left on its disk"
    f"{f' ({detail})' if detail else ''}; make room and start again, earlier "
    "checkpoints are intact"
  )
