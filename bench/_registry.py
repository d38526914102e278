"""Every op of the registry, on its own bench cases: the kernel and XLA."""

from __future__ import annotations

from collections.abc import Iterator

from pallas_gemma.kernels import OPS

from ._program import Program, of_case


def programs() -> Iterator[Program]:
  """The kernel's programs where there is one, and the reference's."""
  for op in OPS:
    for i, case in enumerate(op.benches):
      for implementation in ("pallas", "xla") if op.pallas else ("xla",):
        # The reference of one case shows what XLA does; it compiles slowly.
        default = i == 0 or implementation == "pallas"
        yield from of_case(op, case, implementation, default=default)
