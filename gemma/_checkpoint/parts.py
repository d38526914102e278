"""What one of several processes has of the arrays of a step, to files and back.

Each process writes as if it were alone, to a folder of its own, the parts that
its devices have: in the format Zarr, whose files are one part each.  Together
these folders are what one process would have written; so that it needs no
barriers inside, and not even a folder that all of them see.

An array of which several devices have copies is written once: those that are
chosen have one copy of the whole, and one of them is of the first process,
which describes all arrays.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from .._errors import UserError
from .._processes import is_first
from .arrays import plainly_named, same_bits

_HOST = "pinned_host"  # a kind of memory that every device has


def host_copies(tree: Any) -> Any:
  """A copy of this process's parts, in the memory of the host.

  Arrays that are on devices of several processes stay such arrays; of others
  the first process has a copy, as NumPy's.  None where it has no part.
  """
  return jax.block_until_ready(jax.tree.map(_host_copy, tree))


def _host_copy(x: Any) -> Any:
  if not isinstance(x, jax.Array) or x.is_fully_addressable:
    return np.array(x, copy=True) if is_first() else None
  sharding = _one_copy(x)
  devices = sharding.addressable_devices
  if not devices:
    return None
  parts = [
    jax.device_put(
      shard.data,
      SingleDeviceSharding(shard.device, memory_kind=_HOST),
      may_alias=False,  # the caller may give the array away
    )
    for shard in x.addressable_shards
    if shard.device in devices
  ]
  copy = jax.make_array_from_single_device_arrays(x.shape, sharding, parts)
  # Orbax does not take arrays of one process where there are several.
  return np.array(copy, copy=True) if copy.is_fully_addressable else copy


def _one_copy(x: jax.Array) -> NamedSharding:
  """How the devices that are to write an array have it, each a part."""
  sharding = x.sharding
  if not isinstance(sharding, NamedSharding):
    raise UserError(
      f"checkpoint: an array of several processes is split by {sharding}; "
      "wanted a NamedSharding"
    )
  mesh = sharding.mesh
  used: set[Any] = set()
  for entry in sharding.spec:
    used |= set(entry) if isinstance(entry, tuple) else {entry}
  devices = np.asarray(mesh.devices)
  owners = np.vectorize(lambda device: device.process_index)(devices)
  first = np.argwhere(owners == 0)[0]
  chosen = tuple(
    slice(None) if axis in used else slice(at, at + 1)
    for axis, at in zip(mesh.axis_names, first, strict=True)
  )
  some = Mesh(devices[chosen], mesh.axis_names)
  return NamedSharding(some, sharding.spec, memory_kind=_HOST)


def write_parts(folder: pathlib.Path, items: Mapping[str, Any]) -> None:
  """Writes `host_copies` of pytrees, and compares what is read back.

  Args:
    folder: of this process, an empty one or none.
    items: the pytrees by name.

  Raises:
    UserError: if something else came back.
  """
  for name, tree in items.items():
    here = folder / name
    here.mkdir(parents=True)
    if not jax.tree.leaves(tree):
      continue
    handler = _handler()
    with plainly_named(here) as named:
      handler.save(named, args=ocp.args.PyTreeSave(tree))
      like = jax.tree.map(_like, tree)
      wanted = ocp.checkpoint_utils.construct_restore_args(like)
      back = handler.restore(
        named, args=ocp.args.PyTreeRestore(item=like, restore_args=wanted)
      )
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True)
    if not all(_same_parts(wrote, read) for wrote, read in pairs):
      raise UserError(
        f"checkpoint {here}: what was read back is not what was written; the "
        "disk or the memory is at fault; earlier checkpoints are intact"
      )


def join_parts(
  mine: pathlib.Path, folder: pathlib.Path, others: Mapping[str, Any]
) -> None:
  """Moves the files of a process to where they are together.

  Args:
    mine: written by `write_parts`.
    folder: where they go.
    others: files that the first process has there.
  """
  for path in sorted(mine.rglob("*")):
    name = path.relative_to(mine)
    if path.is_file() and name.as_posix() not in others:
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      os.rename(path, folder / name)


def _handler() -> Any:
  """Orbax's, that does not know of other processes."""
  me = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}
  )
  arrays = ocp.type_handlers.ArrayHandler(
    primary_host=me,
    use_replica_parallel=False,
    enable_write_sharding_file=False,
  )
  return ocp.PyTreeCheckpointHandler(
    use_ocdbt=False,
    multiprocessing_options=options,
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    ),
  )


def _like(x: Any) -> Any:
  """What stands for an array that is to be read, and takes no memory."""
  if isinstance(x, jax.Array):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return np.broadcast_to(np.zeros((), x.dtype), x.shape)


def _same_parts(wrote: Any, read: Any) -> bool:
  if not isinstance(wrote, jax.Array):
    return same_bits(wrote, read)
  pairs = zip(wrote.addressable_shards, read.addressable_shards, strict=True)
  return all(same_bits(x.data, y.data) for x, y in pairs)
