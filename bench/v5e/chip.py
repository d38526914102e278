"""What a chip can do, in the units of the cycle model: cycles and bytes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TPU core and its memory.

  Attributes:
    name: as topologies and tuned tables spell it.
    clock_hz: bundles issued per second.
    mxus: matrix units.
    mxu_size: rows and columns of one matrix unit.
    hbm_bytes_per_second: bandwidth of the memory, from the specification.
    read_latency: cycles from the issue of a copy from HBM to its first byte.
    write_latency: the same of a copy to HBM, or within the core.
    shared_channel: whether copies under way together share HBM's bandwidth.
    bundle_bytes: of a bundle in memory.
    peak_flops: bfloat16 operations per second, from the specification.
  """

  name: str
  clock_hz: float
  mxus: int
  mxu_size: int
  hbm_bytes_per_second: float
  read_latency: int
  write_latency: int
  shared_channel: bool = True
  bundle_bytes: int = 64
  peak_flops: float = 197e12

  @property
  def flops_per_cycle(self) -> int:
    """bfloat16 operations of all matrix units; a multiply-add is 2."""
    return 2 * self.mxus * self.mxu_size**2

  @property
  def hbm_bytes_per_cycle(self) -> float:
    """Bytes per cycle between HBM and the core."""
    return self.hbm_bytes_per_second / self.clock_hz

  def seconds(self, cycles: float) -> float:
    """Time of so many cycles."""
    return cycles / self.clock_hz


# Bandwidths: cloud.google.com/tpu/docs/v5e.  The clock follows from 197 TFLOP/s
# and four 128 x 128 units.  The read latency is the one that brings a matmul in
# blocks of 128 to its published time (the compiler's own model has 1,133); the
# write latency is the compiler's.
V5E = Chip(
  name="v5e",
  clock_hz=1.5e9,
  mxus=4,
  mxu_size=128,
  hbm_bytes_per_second=819e9,
  read_latency=760,
  write_latency=450,
)

# The same chip as the compiler's static model has it, for comparison: there,
# each copy has the whole bandwidth.
V5E_AS_COMPILED = dataclasses.replace(
  V5E,
  hbm_bytes_per_second=0.9 * V5E.hbm_bytes_per_second,
  read_latency=1133,
  write_latency=440,
  shared_channel=False,
)
