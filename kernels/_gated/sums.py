"""How the backward kernel sums the weights' gradients over the row tiles.

In float32, in VMEM: a gradient that is float32 is its own sum, another has one
beside it, and is written from that at the last row tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from .spec import Arrays
from .tiles import Plan


class Sums(NamedTuple):
  """Refs of the weights' gradients while they are summed, float32.

  In the scratch, None for a gradient that is float32: it is its own sum.
  """

  dw_gate: Any  # [D, cols]
  dw_up: Any  # [D, cols], None if dw_gate has both
  dw_down: Any  # [cols, D], None for geglu


def sums_scratch(plan: Plan, a: Arrays) -> Sums:
  """What to ask the compiler for."""
  d, cols = plan.sizes.d, plan.tiles.cols
  layout = plan.problem.layout

  def total(weight: jax.Array | None, shape: tuple[int, ...]) -> Any:
    if weight is None or weight.dtype == jnp.float32:
      return None
    return pltpu.VMEM(shape, jnp.float32)

  up, halves = layout.gate_shape(d, cols), layout.form == "columns"
  return Sums(
    total(a.w_gate, up),
    total(a.w_gate if halves else a.w_up, up),
    total(a.w_down, layout.down_shape(d, cols)),
  )


def sums_of(o: Any, sums: Sums) -> Sums:
  """Where the weights' gradients are summed; `o` has those that are written."""
  outs = Sums(o.dw_gate, o.dw_up, o.dw_down)
  pairs = zip(outs, sums, strict=True)
  return Sums(*(out if total is None else total for out, total in pairs))


def accumulate(total: Any, part: jax.Array, is_first: jax.Array) -> None:
  """Adds to the sum in a ref, or starts it."""
  # A selection costs nothing beside the product; to clear the sum would.
  total[...] = jnp.where(is_first, 0.0, total[...]) + part


def write_sums(o: Any, sums: Sums) -> None:
  """Writes the gradients that are not their own sums."""
  outs = Sums(o.dw_gate, o.dw_up, o.dw_down)
  for out, total in zip(outs, sums, strict=True):
    if total is not None:
      out[...] = total[...].astype(out.dtype)
