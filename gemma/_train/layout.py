"""What of a run lies where on its mesh.

The table of a model's parameters is `_SPLIT`; `Layout` makes `NamedSharding`s
of it.  The model itself knows of none: `jax.jit` is told where its arguments
and results lie, and the kernels how they are split (`kernels.sharding`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from .._errors import UserError
from .._parts import compiler_options, stored_in_parts
from .._processes import count as count_processes
from .._weights import name_of
from ..ops import sharding
from .config import TrainConfig
from .mesh import AXES, ROWS, MeshConfig, chosen, parse

_AUTO = (AxisType.Auto,) * len(AXES)


def layout_of(config: TrainConfig) -> Layout | None:
  """Where a run's arrays lie; None if all are on one device.

  "auto" takes every device there is, but of CPUs, which share their cores, one.

  Raises:
    UserError: if the mesh does not fit the devices, the rows or the model.
  """
  devices, asked = jax.devices(), parse(config.mesh)
  is_cpu = devices[0].platform == "cpu"
  several = jax.process_count() > 1
  if several and count_processes() == 1:
    raise UserError(
      f"JAX runs in {jax.process_count()} processes: give --distributed"
    )
  count = 1 if asked is None and is_cpu and not several else len(devices)
  rows = config.batch_size // config.accumulation
  mesh = chosen(asked, count, rows, config.model, config.sequence_length)
  if several and mesh.devices != len(devices):
    raise UserError(
      f"mesh {mesh}: has {mesh.devices} of {len(devices)} devices; the "
      f"{jax.process_count()} processes need all of theirs"
    )
  if mesh.devices == 1:
    return None
  return Layout(make_mesh(mesh, devices[: mesh.devices]), mesh)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The devices in the order of a config's axes.

  Neighbours along the last axes are neighbours on the slice.  Axes are Auto:
  the compiler splits what is between the kernels.

  Args:
    config: how many along each axis.
    devices: all that there are by default.
  """
  devices = jax.devices() if devices is None else devices
  if config.pods > 1 and len({_pod(d) for d in devices}) == config.pods:
    grid = mesh_utils.create_hybrid_device_mesh(
      (1, *config.shape[1:]), (config.pods, *(1,) * (len(AXES) - 1)), devices
    )
  elif devices[0].platform == "tpu":
    grid = mesh_utils.create_device_mesh(config.shape, devices)
  else:
    grid = np.array(devices).reshape(config.shape)
  return Mesh(grid, AXES, axis_types=_AUTO)


def abstract_mesh(config: MeshConfig) -> Any:
  """The same of devices of no matter which name, to ask what lies where."""
  return AbstractMesh(config.shape, AXES, axis_types=_AUTO)


def _pod(device: Any) -> Any:
  return getattr(device, "slice_index", 0)


# --- what lies where ----------------------------------------------------------

# For each parameter, the dimension that the model axis splits, None if it has
# none.  Keys and values of one head are copied: every device needs them.
_SPLIT: dict[str, int | None] = {
  "embedding": 0,  # [V, D]
  "attention_norm": None,  # [L, D]
  "q": 1,  # [L, N, D, H]
  "kv": 2,  # [L, 2, K, D, H]
  "out": 1,  # [L, N, H, D]
  "feed_forward_norm": None,  # [L, D]
  "gate": 2,  # [L, D, F]
  "up": 2,  # [L, D, F]
  "down": 1,  # [L, F, D]
  "final_norm": None,  # [D]
}
# Dimensions that the fsdp axis leaves alone.  A table that is split over D is
# read and updated by each device for its part of every row, where one that is
# split over V would be read by all for all tokens.  Scales of norms are a few
# kilobytes a layer: to gather them would keep the links from a matrix.
_WHOLE = {
  "embedding": (0,),
  "attention_norm": (0, 1),
  "feed_forward_norm": (0, 1),
  "final_norm": (0,),
  # Parts of rows lie together in memory.
  "gate": (2,),
  "up": (2,),
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the arrays of a run lie.

  Attributes:
    mesh: the devices.
    config: of the mesh.
  """

  mesh: Mesh
  config: MeshConfig

  @property
  def rules(self) -> dict[str, tuple[str, ...] | str]:
    """For `kernels.sharding`: the axes by which each letter is split."""
    rules: dict[str, tuple[str, ...] | str] = {"B": ROWS}
    if self.config.model > 1:
      rules |= dict.fromkeys("NFV", "model")
    if self.config.context > 1:
      rules |= {"T": "context"}
    return rules

  def splits(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose kernels are split so."""

    def run(*args: Any) -> Any:
      with sharding(self.mesh, self.rules), self._parts():
        return function(*args)

    return run

  def _parts(self) -> contextlib.AbstractContextManager[None]:
    stored = self.config.stored
    if not stored:
      return contextlib.nullcontext()
    return stored_in_parts(
      self.mesh,
      rows=ROWS,
      length=("context",) if self.config.context > 1 else (),
      stored=stored,
      vocabulary="model" if self.config.model > 1 else None,
    )

  @property
  def compiler_options(self) -> dict[str, str]:
    """What a TPU's compiler is told of programs over this mesh."""
    return compiler_options(self.mesh if self.config.stored else None)

  @property
  def batch(self) -> NamedSharding:
    """Of arrays [B, T], of which the devices of a context have whole rows."""
    return NamedSharding(self.mesh, PartitionSpec(ROWS))

  @property
  def everywhere(self) -> NamedSharding:
    """Of what all devices have."""
    return NamedSharding(self.mesh, PartitionSpec())

  def state(self, state: Any) -> Any:
    """The shardings of parameters, or of an optimizer's state, by its names.

    Args:
      state: a pytree of arrays or of `jax.ShapeDtypeStruct`.
    """

    def of(path: Any, x: Any) -> NamedSharding:
      names = [name_of(key) for key in path]
      name = next((n for n in reversed(names) if n in _SPLIT), "")
      return NamedSharding(self.mesh, self.spec(name, x.shape))

    return jax.tree_util.tree_map_with_path(of, state)

  def part_bytes(self, state: Any) -> int:
    """Bytes of a device's part of parameters, or of an optimizer's state.

    Args:
      state: as of `state`.
    """
    shardings = jax.tree.leaves(self.state(state))
    return sum(
      math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize
      for where, x in zip(shardings, jax.tree.leaves(state), strict=True)
    )

  def spec(self, name: str, shape: Sequence[int]) -> PartitionSpec:
    """How a parameter of a name and a shape is split.

    The model axis by the table; fsdp and context over the longest dimension
    that is left and that they divide.
    """
    axes: list[str | tuple[str, ...] | None] = [None] * len(shape)
    split = _SPLIT.get(name)
    if self.config.model > 1 and split is not None:
      if shape[split] % self.config.model == 0:
        axes[split] = "model"
    stored = self.config.stored
    parts = math.prod(getattr(self.config, axis) for axis in stored)
    left = [
      i
      for i, size in enumerate(shape)
      if axes[i] is None
      and i not in _WHOLE.get(name, ())
      and size
      and size % parts == 0
    ]
    if stored and left:
      longest = max(left, key=lambda i: shape[i])
      axes[longest] = stored[0] if len(stored) == 1 else stored
    return PartitionSpec(*axes)


def describe(layout: Layout, params: Any) -> Iterator[str]:
  """A line for each parameter: its shape, how it is split, and each part."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  shardings = jax.tree.leaves(layout.state(params))
  for (path, x), where in zip(leaves, shardings, strict=True):
    name = ".".join(n for n in map(name_of, path) if n != "value")
    spec = where.spec
    axes = [*spec, *(None,) * (len(x.shape) - len(spec))]
    split = ", ".join(map(_axes_name, axes))
    part = where.shard_shape(x.shape)
    yield f"{name:28} {list(x.shape)!s:26} [{split}]  {list(part)} each"


def _axes_name(axes: str | tuple[str, ...] | None) -> str:
  if axes is None:
    return "-"
  return axes if isinstance(axes, str) else " x ".join(axes)
