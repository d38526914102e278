"""How the kernels get each expert's weights in time.

Pallas fetches the blocks of a grid step during the step before.  That is too
late for weights: at an expert's last visit there may be few rows to compute, in
less time than the next weights take.  So they are fetched during all visits of
the expert before, into the other one of two buffers:

    visit      |  0  |  1  |  2  |  3  |  4  |  5  |
    expert     |        0        |        1        |
    buffer 0   |     in use      |  fetches 2
    buffer 1   |  fetches 1      |     in use      |

Every expert has a visit, so that their order is known, also from the last one
of an F tile to the first one of the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .stack import Scalars
from .tiles import Plan
from .visits import Rows

_BUFFERS = 2


class WeightBuffers(NamedTuple):
  """Refs of the scratch, None for a weight that there is not."""

  w_gate: Any  # [2, D, cols], or as `Layout` has it; so are the others
  w_up: Any  # [2, D, cols]
  w_down: Any  # [2, cols, D]
  arrived: tuple[Any, Any, Any]  # [2] semaphores for each weight


def are_prefetched(plan: Plan) -> bool:
  """Whether weights come so: of experts, in whole tiles."""
  return plan.of_experts and not plan.hangs_over_f


def weight_buffers(plan: Plan, arrays: Any) -> WeightBuffers | None:
  """What to ask the compiler for; of a record with the weights."""
  if not are_prefetched(plan):
    return None
  layout, d, cols = plan.problem.layout, plan.sizes.d, plan.tiles.cols

  def two(weight: jax.Array | None, shape: tuple[int, ...]) -> Any:
    if weight is None:
      return None
    return pltpu.VMEM((_BUFFERS, *shape), weight.dtype)

  shape, halves = layout.gate_shape(d, cols), layout.form == "columns"
  arrived = pltpu.SemaphoreType.DMA((_BUFFERS,))
  return WeightBuffers(
    w_gate=two(arrays.w_gate, shape),
    w_up=two(arrays.w_gate if halves else arrays.w_up, shape),
    w_down=two(arrays.w_down, layout.down_shape(d, cols)),
    arrived=(arrived, arrived, arrived),
  )


def fetched(
  scalars: Scalars,
  inputs: Any,
  buffers: WeightBuffers | None,
  rows: Rows,
  plan: Plan,
) -> Any:
  """The kernel's inputs, with this step's weights in VMEM.

  Args:
    scalars: that are prefetched.
    inputs: its record of refs; if there are buffers, its weights are in HBM.
    buffers: the scratch.
    rows: of the step.
    plan: of the call.
  """
  if buffers is None:
    return inputs
  f_tile, experts = pl.program_id(0), plan.sizes.experts
  number = f_tile * experts + rows.expert
  is_end = rows.expert == experts - 1
  next_f_tile = jnp.where(is_end, f_tile + 1, f_tile)
  next_expert = jnp.where(is_end, 0, rows.expert + 1)
  slot = number & (_BUFFERS - 1)
  layer = () if scalars.layer is None else (scalars.layer[0],)
  now = f_tile, (*layer, rows.expert), slot

  @pl.when(rows.is_first)
  def _():
    @pl.when(number == 0)
    def _():
      for copy in _copies(inputs, buffers, *now, plan):
        copy.start()

    for copy in _copies(inputs, buffers, *now, plan):
      copy.wait()

    @pl.when(number < plan.f_tiles * experts - 1)
    def _():
      after = next_f_tile, (*layer, next_expert), 1 - slot
      for copy in _copies(inputs, buffers, *after, plan):
        copy.start()

  gate, up, down = (None if w is None else w.at[slot] for w in buffers[:3])
  return inputs._replace(w_gate=gate, w_up=up, w_down=down)


def _copies(
  inputs: Any,
  buffers: WeightBuffers,
  f_tile: Any,
  place: tuple[Any, ...],
  slot: Any,
  plan: Plan,
) -> Iterator[Any]:
  """Those that fetch a tile of each of the weights at a place in the stack."""
  layout = plan.problem.layout
  weights = inputs.w_gate, inputs.w_up, inputs.w_down
  indices = (
    layout.gate_index(f_tile),
    layout.up_index(plan.f_tiles)(f_tile),
    layout.down_index(f_tile),
  )
  for weight, buffer, arrived, index in zip(
    weights, buffers[:3], buffers.arrived, indices, strict=True
  ):
    if weight is not None:
      block = tuple(
        pl.ds(pl.multiple_of(i * size, size), size)
        for i, size in zip(index, buffer.shape[1:], strict=True)
      )
      yield pltpu.make_async_copy(
        weight.at[(*place, *block)], buffer.at[slot], arrived.at[slot]
      )
