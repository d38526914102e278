"""Every op of the registry, on its own bench cases: the kernel and XLA."""

from __future__ import annotations

from collections.abc import Iterator

from pallas_gemma.kernels import OPS, Case, Op

from ._program import Program, of_case


def programs() -> Iterator[Program]:
  """The kernel's programs where there is one, and the reference's."""
  for op in OPS:
    for i, case in enumerate(op.benches):
      if op.pallas:
        yield from of_case(op, case, "pallas")
        yield from _other_ways(op, case, default=i == 0)
      # The reference of one case shows what XLA does; it compiles slowly.
      yield from of_case(op, case, "xla", default=i == 0 or not op.pallas)


def _other_ways(op: Op, case: Case, *, default: bool) -> Iterator[Program]:
  """The kernel with another config, or other layouts, than by default."""
  for mode, choose in op.modes.items():
    config = choose(*case.args, **case.kwargs)
    # The forward pass alone keeps nothing in any mode.
    label = f"pallas-{mode}"
    yield of_case(op, case, "pallas", config, label, default=default)[-1]
  if op.own_layout(*case.args, **case.kwargs):
    # All baselines get theirs.
    yield from of_case(
      op, case, "pallas", label="pallas-own-layout", free_layouts=True
    )
