"""Arrays to and from the files of a step, by Orbax."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from .._errors import UserError
from .._processes import count
from .identity import CONFIG

# What Orbax takes for a pattern, TensorStore for a slash, and both for another
# machine; and bytes that are no text.
_MISTAKEN = re.compile(r"[\[*?\\]|gs:|[\ud800-\udfff]")


@contextlib.contextmanager
def plainly_named(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A path of `folder`, for Orbax, which does not take every path as it is.

  Args:
    folder: whose parent there is.
  """
  if os.name != "posix" or not _MISTAKEN.search(str(folder)):
    yield folder
    return
  with tempfile.TemporaryDirectory() as directory:
    link = pathlib.Path(directory, "link")
    link.symlink_to(folder.parent.absolute(), target_is_directory=True)
    yield link / folder.name


def write_arrays(folder: pathlib.Path, tree: Any) -> None:
  """Writes a pytree of arrays, reads it back and compares it bit by bit.

  Of one process; see `parts` for several.

  Raises:
    UserError: if something else came back.
  """
  with plainly_named(folder) as named, _checkpointer() as checkpointer:
    checkpointer.save(named, args=ocp.args.StandardSave(tree))
    # In place of an array, what has its shape and dtype and takes no memory;
    # Orbax restores arrays of NumPy for those of NumPy, on no device.
    like = jax.tree.map(
      lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree
    )
    back = checkpointer.restore(named, args=ocp.args.StandardRestore(like))
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True)
  if not all(same_bits(wrote, read) for wrote, read in pairs):
    raise UserError(
      f"checkpoint {folder}: what was read back is not what was written; the "
      "disk or the memory is at fault; earlier checkpoints are intact"
    )


def read_arrays(
  directory: pathlib.Path, folder: pathlib.Path, abstract: Any
) -> Any:
  """Reads a pytree of arrays, to the first device if nothing else is said.

  Args:
    directory: of the checkpoint, for messages.
    folder: written by `write_arrays`.
    abstract: a pytree of shapes and dtypes, and shardings where they are to be
      split over devices; those that wrote them may have been others.

  Raises:
    UserError: if there is none, or its arrays have other shapes.
  """
  if not folder.is_dir():
    raise UserError(
      f"checkpoint {folder.parent}: it has no {folder.name}; `train` goes on "
      "from steps it saved itself, so delete this one or give another "
      "--work-dir"
    )
  # By the handler: the checkpointer would ask for a file that steps of earlier
  # versions do not have, and warn.
  handler: Any = ocp.StandardCheckpointHandler()
  with plainly_named(folder) as named:
    there = handler.metadata(named)
  _check_shapes(directory, there.tree, abstract)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  placed = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=getattr(x, "sharding", None) or device
    ),
    abstract,
  )
  with plainly_named(folder) as named, _checkpointer() as checkpointer:
    return checkpointer.restore(named, args=ocp.args.StandardRestore(placed))


def _checkpointer() -> Any:
  """Orbax's, that does not wait for other processes: each reads by itself."""
  if count() == 1:
    return ocp.Checkpointer(ocp.StandardCheckpointHandler())
  me = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}
  )
  return ocp.Checkpointer(
    ocp.StandardCheckpointHandler(multiprocessing_options=alone),
    multiprocessing_options=alone,
  )


def same_bits(x: Any, y: Any) -> bool:
  """Whether two are equal: NaN is as itself, and 0 is not as -0."""
  x, y = np.asarray(x), np.asarray(y)
  if (x.shape, x.dtype) != (y.shape, y.dtype):
    return False
  x, y = (np.ascontiguousarray(z).reshape(-1).view(np.uint8) for z in (x, y))
  return bool(np.array_equal(x, y))


def _check_shapes(directory: pathlib.Path, there: Any, wanted: Any) -> None:
  def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_path(path): tuple(leaf.shape) for path, leaf in leaves}

  found, expected = shapes(there), shapes(wanted)
  for name in found.keys() - expected.keys():
    raise UserError(
      f"checkpoint {directory}: of another config: it has {name}, which there "
      f"is not by {CONFIG}; restore {CONFIG} from a copy"
    )
  for name, shape in expected.items():
    if found.get(name) != shape:
      raise UserError(
        f"checkpoint {directory}: of another config: {name} is "
        f"{found.get(name, 'missing')} there, and {shape} by {CONFIG}; restore "
        f"{CONFIG} from a copy"
      )


def _path(path: tuple[Any, ...]) -> str:
  """a.b.0 for keys of dicts, fields of tuples and indices alike."""
  return ".".join(
    str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
    for k in path
  )
