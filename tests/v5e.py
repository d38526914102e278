"""Compiles for TPU v5e chips that are described, not attached."""

import importlib.util
import math
import re
from unittest import mock

import jax
import pytest
from jax._src.pallas.mosaic import lowering
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_gemma import bench

needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu, the TPU compiler, exists for x86-64 Linux alone",
)

# For a test that asks what XLA puts around the kernels: copies, collectives,
# temporaries.  It sees of a kernel only what goes in and out, so that none of
# this changes (`test_v5e.py`); most of the compiler's time went into bodies.
around_kernels = pytest.mark.usefixtures("kernels_without_bodies")


def kernels_without_bodies():
  """The context in which kernels are lowered as ones that touch nothing."""
  lower = lowering.lower_jaxpr_to_pipelined_module

  def lower_empty(context, grid, body, **options):
    return lower(context, grid, body.replace(eqns=[]), **options)

  return mock.patch.object(lowering, lower.__name__, lower_empty)


def devices(topology="1x1", per_host=(1, 1, 1)):
  """The chips of a v5e slice, such as "2x4"."""
  return topologies.get_topology_desc(
    platform="tpu",
    topology_name=f"v5e:{topology}",
    chips_per_host_bounds=per_host,
  ).devices


def compile(function, *specs, **options):
  """`function` compiled for one v5e chip, from shapes and dtypes.

  Args:
    function: to compile.
    *specs: of its arguments.
    **options: of `jax.jit`.
  """
  mesh = Mesh([devices()[0]], ("chip",))
  replicated = NamedSharding(mesh, PartitionSpec())
  placed = [
    jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated) for s in specs
  ]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(function, **options).lower(*placed).compile()


def compile_and_cut(folder, function, *specs):
  """The same, and how the compiler cuts the program into overlays.

  Args:
    folder: an empty one, for the compiler's log.
    function: to compile.
    *specs: of its arguments.
  """
  with bench.recorded(folder):
    compiled = compile(function, *specs)
  return compiled, bench.parse_log(bench.compiler_log(folder))


_COLLECTIVES = r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all)"
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}


def collective_bytes(text):
  """Bytes of the results of all collectives in a compiled program's text."""
  total = 0
  for result in re.findall(_COLLECTIVES + r"(?:-start)?\(", text):
    for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", result):
      sizes = [int(n) for n in dims.split(",")] if dims else []
      total += _BYTES[dtype] * math.prod(sizes)
  return total


def split_shapes(tree, specs, mesh, dtype=None):
  """The shapes of a tree, split over a mesh as specs say, in their own dtypes
  or in one."""
  return jax.tree.map(
    lambda x, spec: jax.ShapeDtypeStruct(
      x.shape, dtype or x.dtype, sharding=NamedSharding(mesh, spec)
    ),
    tree,
    specs,
  )


def assert_swapped(integration, around, gradient, *specs, kernels=4):
  """The kernels of an integration are in a program, and add no collective.

  Args:
    integration: of the library that the program is by.
    around: makes the context in which it is lowered.
    gradient: the program, of attention and feed-forward.
    *specs: of its arguments.
    kernels: the fewest that it has once classes are swapped.
  """

  def text():
    with around():
      return jax.jit(gradient).lower(*specs).compile().as_text() or ""

  before = collective_bytes(text())
  integration.apply()
  swapped = text()
  for op in ("flash_attention", "feed_forward"):
    assert op in swapped, op
  assert swapped.count("tpu_custom_call") >= kernels
  after = collective_bytes(swapped)
  assert after <= before, (before, after)
