"""Every op of the registry, on its own bench cases: the kernel and XLA."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
from pallas_gemma.kernels import OPS, Case, Op

from .program import Program, bound, of_case

_LONG = 20_000_000  # cycles of a forward pass: its gradients take minutes
_RECOMPUTING = "residuals-none"  # the mode that takes most products twice


def programs() -> Iterator[Program]:
  """The kernel's programs where there is one, and the reference's."""
  for op in OPS:
    for i, case in enumerate(op.benches):
      first = i == 0
      if op.pallas:
        brief = not _takes_minutes(op, case)
        yield from of_case(op, case, "pallas", default=brief)
        yield from _other_ways(op, case, first=first)
      # The reference of one case shows what XLA does; it compiles slowly.
      forward, *gradients = of_case(
        op, case, "xla", default=first or not op.pallas
      )
      yield forward
      for program in gradients:
        # A baseline is XLA's own feed-forward, only faster.
        redundant = "feed_forward" in op.baselines
        yield dataclasses.replace(
          program, default=program.default and not redundant
        )


def _other_ways(op: Op, case: Case, *, first: bool) -> Iterator[Program]:
  """The kernel with another config than by default."""
  for mode, choose in op.modes.items():
    config = choose(*case.args, **case.kwargs)
    # The forward pass alone keeps nothing in any mode.
    yield of_case(
      op,
      case,
      "pallas",
      config,
      f"pallas-{mode}",
      default=first and mode != _RECOMPUTING,
    )[-1]


def _takes_minutes(op: Op, case: Case) -> bool:
  """Whether a case is for those who ask for it."""
  forward, _ = op.cost(*case.args, **case.kwargs)
  matrices = {
    spec.dtype
    for spec in case.specs
    if min(spec.shape[-2:], default=1) > 1
    and jnp.issubdtype(spec.dtype, jnp.floating)
  }
  return (
    bound([forward])[0] > _LONG
    # Weights that the kernel casts.
    or len(matrices) > 1
    # A norm inside is timed where a baseline has it too.
    or ("norm" in case.kwargs and not op.baselines)
  )
