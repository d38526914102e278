"""Compiles for TPU v5e chips that are described, not attached."""

import importlib.util

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu, the TPU compiler, exists for x86-64 Linux alone",
)


def devices(topology="1x1", per_host=(1, 1, 1)):
  """The chips of a v5e slice, such as "2x4"."""
  return topologies.get_topology_desc(
    platform="tpu",
    topology_name=f"v5e:{topology}",
    chips_per_host_bounds=per_host,
  ).devices


def compile(function, *specs):
  """`function` compiled for one v5e chip, from shapes and dtypes."""
  mesh = Mesh([devices()[0]], ("chip",))
  replicated = NamedSharding(mesh, PartitionSpec())
  placed = [
    jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated) for s in specs
  ]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(function).lower(*placed).compile()
