"""One line of the table, as it is computed, cached and written as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..v5e import V5E, Code, StaticModel


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
    peak_bytes: HBM for arguments, results and temporaries at the peak.
    vmem_bytes: VMEM of the instruction that needs most.
    spill_bytes: of which holds registers.
    compile_seconds: that the compilation took.
    steps: HLO instructions, those that cost most first.
    collectives: communication that the time leaves out, each with its time on
      the links and how much of it nothing covers.
    code: what it takes to load the program, None where it was not seen.
    model_flops: of the model's formula for MFU, None where there is none.
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
  peak_bytes: int | None = None
  vmem_bytes: int | None = None
  spill_bytes: int | None = None
  compile_seconds: float = 0.0
  steps: Sequence[Mapping[str, Any]] = ()
  collectives: Sequence[Mapping[str, Any]] = ()
  code: Code | None = None
  model_flops: int | None = None
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

  @property
  def mfu(self) -> float | None:
    """Model-FLOPs utilisation: of the chip's 197 TFLOP/s, None where unknown.

    Collectives are no part of the time; `pallas-gemma-bench --train-step` tells
    what they add.
    """
    if not self.seconds or self.model_flops is None:
      return None
    return self.model_flops / self.seconds / V5E.peak_flops

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
    if code := values.get("code"):
      values["code"] = Code.from_json(code)
    return cls(**values)


@dataclasses.dataclass(frozen=True)
class Result:
  """What a job gives.

  Attributes:
    row: the time of its program, or why there is none.
    transient: whether another run may end otherwise, so that this result is not
      worth keeping.
    static: by the compiler's own model too, if the job asked for it.
  """

  row: Row
  transient: bool = False
  static: StaticModel | None = None

  def to_json(self) -> dict[str, Any]:
    """The fields, as JSON can hold them."""
    return dataclasses.asdict(self) | {"row": self.row.to_json()}

  @classmethod
  def from_json(cls, fields: Mapping[str, Any]) -> Result:
    """The inverse of `to_json`."""
    static = fields["static"]
    return cls(
      row=Row.from_json(fields["row"]),
      transient=fields["transient"],
      static=StaticModel(**static) if static else None,
    )
