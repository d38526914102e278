"""Estimates ring attention on one of the eight chips of a v5e 2x4.

    python -P tools/ring.py FOLDER [LENGTH]

Gemma 2B's heads in bfloat16, causal, tokens in zig-zag order, forward and
backward; of every step the longer branch.  FOLDER takes what the compiler
prints, a few hundred megabytes.  Neighbours are one link apart, of 45 GB/s each
way.
"""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec
from pallas_gemma import kernels
from pallas_gemma.bench import v5e

_CHIPS, _HEADS, _HEAD_SIZE = 8, 8, 256
_PRODUCTS = 7  # of queries with keys or values, forward and backward


def _ring(devices: Sequence[Any]) -> Mesh:
  grid: np.ndarray = mesh_utils.create_device_mesh((_CHIPS,), list(devices))
  return Mesh(grid, ("context",), axis_types=(AxisType.Auto,))


def estimate(length: int) -> None:
  """Prints the cycles, the bound, and how long the core waits for hops."""
  split = PartitionSpec(None, "context")
  placement = v5e.Placement(
    "v5e:2x4", arguments=(split,) * 4, results=split, arrange=_ring
  )
  attention = functools.partial(
    kernels.flash_attention, is_causal=True, context_parts=_CHIPS
  )
  mesh: Any = placement.mesh().abstract_mesh

  def both(q: Any, k: Any, v: Any, d_out: Any) -> Any:
    with kernels.sharding(mesh, {"T": "context"}):
      out, back = jax.vjp(attention, q, k, v)
      return out, back(d_out)

  q, k = (
    jax.ShapeDtypeStruct((1, length, n, _HEAD_SIZE), jnp.bfloat16)
    for n in (_HEADS, 1)
  )
  result = v5e.estimate(both, (q, k, k, q), placement=placement)
  pairs = length * length // 2 // _CHIPS
  flops = _PRODUCTS * 2 * _HEADS * _HEAD_SIZE * pairs
  bound = flops / v5e.V5E.flops_per_cycle
  waits = sum(c.times * c.exposed for c in result.collectives)
  cycles = result.cycles + waits * v5e.V5E.clock_hz
  print(f"MXU bound {bound:,.0f} cycles")
  print(f"computing {result.cycles:,}, {bound / result.cycles:.1%}")
  print(
    f"with {waits * 1e3:.2f} ms of waits {cycles:,.0f}, {bound / cycles:.1%}"
  )


def main(folder: str, length: str = "65536") -> None:
  """Starts a process whose compiler prints, or is that process."""
  if os.environ.get("RING_FOLDER") == folder:
    estimate(int(length))
    return
  empty = pathlib.Path(folder)
  empty.mkdir(parents=True)
  env = {**os.environ, **v5e.environment(empty), "RING_FOLDER": folder}
  command = [sys.executable, "-P", __file__, folder, length]
  sys.exit(subprocess.run(command, env=env).returncode)


if __name__ == "__main__":
  main(*sys.argv[1:])
