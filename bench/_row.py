"""One line of the table, as it is computed, cached and written as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_gemma.kernels import Cost

from ._chip import V5E, Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """The time of one program.

  Attributes:
    op: what it computes.
    case: the problem.
    which: `fwd` or `fwd+bwd`.
    implementation: whose it is.
    method: "estimated from the compiled program", or "measured".
    seconds: of one run.
    cycles: the same in cycles of the chip.
    lower_bound: whether the truth may be more; `notes` say why.
    bound_cycles: the least that the chip allows.
    bound_by: what allows no less, "MXU" or "HBM".
    flops: of the matrix unit, at least.
    least_bytes: compulsory traffic.
    shapes: of the arguments.
    hbm_bytes: traffic of one run, None where it was not seen.
    temp_bytes: HBM for temporaries at the peak.
    vmem_bytes: VMEM of the instruction that needs most.
    spill_bytes: of which holds registers.
    compile_seconds: that the compilation took.
    steps: HLO instructions, those that cost most first.
    collectives: communication that the time leaves out.
    notes: what could not be decided.
    samples: seconds of each run, where it was measured.
    error: why there are no numbers, None if there are.
    versions: of jax, libtpu and python, and the device.
    config: of the kernel, None for its own choice.
  """

  op: str
  case: str
  which: str
  implementation: str
  method: str = ""
  seconds: float = 0.0
  cycles: int = 0
  lower_bound: bool = False
  bound_cycles: int = 0
  bound_by: str = ""
  flops: int = 0
  least_bytes: int = 0
  shapes: Sequence[Sequence[int]] = ()
  hbm_bytes: int | None = None
  temp_bytes: int | None = None
  vmem_bytes: int | None = None
  spill_bytes: int | None = None
  compile_seconds: float = 0.0
  steps: Sequence[Mapping[str, Any]] = ()
  collectives: Sequence[Mapping[str, Any]] = ()
  notes: Sequence[str] = ()
  samples: Sequence[float] = ()
  error: str | None = None
  versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  config: Mapping[str, Any] | None = None

  @property
  def key(self) -> str:
    """As the program's."""
    return f"{self.op}/{self.case}/{self.which}/{self.implementation}"

  @property
  def of_bound(self) -> float | None:
    """Fraction of the chip's best that it reaches, None where unknown."""
    if not self.cycles or not self.bound_cycles:
      return None
    return self.bound_cycles / self.cycles

  def to_json(self) -> dict[str, Any]:
    """The fields, as JSON can hold them."""
    return {
      name: list(value) if isinstance(value, tuple) else value
      for name, value in dataclasses.asdict(self).items()
    }

  @classmethod
  def from_json(cls, fields: Mapping[str, Any]) -> Row:
    """The inverse of `to_json`."""
    values: dict[str, Any] = {
      name: tuple(value) if isinstance(value, list) else value
      for name, value in fields.items()
    }
    return cls(**values)


def bound(costs: Sequence[Cost], chip: Chip = V5E) -> tuple[int, str]:
  """The fewest cycles for passes that run one after the other.

  Returns:
    The cycles, and which of MXU and HBM sets them, for the most part.
  """
  shares = {"MXU": 0, "HBM": 0}
  for cost in costs:
    mxu = -(-cost.flops // chip.flops_per_cycle)
    hbm = round(cost.hbm_bytes / chip.hbm_bytes_per_cycle)
    shares["MXU" if mxu >= hbm else "HBM"] += max(mxu, hbm)
  return sum(shares.values()), max(shares, key=lambda unit: shares[unit])
