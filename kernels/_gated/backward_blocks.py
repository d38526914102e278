"""What the backward kernel's call is of: its records, blocks and scratch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame.manual import varying_like
from . import stack
from .prefetch import WeightBuffers, are_prefetched, weight_buffers
from .spec import Arrays
from .stack import block_in_stack
from .sums import Sums, sums_scratch
from .tiles import Plan
from .travel import TravelScratch, dx_travels, slots, travel_scratch

# --- records ------------------------------------------------------------------


class Inputs(NamedTuple):
  """Refs of the kernel's inputs; or of the call, its arrays."""

  x: Any  # [rows, D]
  w_gate: Any  # [D, cols], or as `Layout` has it; so are the others
  w_up: Any  # [D, cols], None if w_gate has both, or there is no such branch
  w_down: Any  # [cols, D], None for geglu
  b_gate: Any  # [1, cols], as the other biases None if there is none
  b_up: Any  # [1, cols]
  dy: Any  # [rows, D], None for geglu
  dh: Any  # [rows, cols], of geglu alone
  gate: Any  # [rows, cols], None if it is computed again
  up: Any  # [rows, cols], None if it is computed again, or not there
  normed: Any  # [rows, D], None without a norm
  scale: Any  # [1, D], None without a norm
  epsilon: Any  # [1, 1] of the norm, None if it is static
  ports: tuple[Any, Any, Any]  # of a stack, in HBM: the same as its gradients


class Outputs(NamedTuple):
  """Refs of its outputs; of a stack's gradients, one layer's."""

  dx: Any  # [rows, D]
  dw_gate: Any  # [D, cols]
  dw_up: Any  # [D, cols]
  dw_down: Any  # [cols, D], None for geglu
  db_gate: Any  # [1, cols] float32, as the other biases' None if there is none
  db_up: Any  # [1, cols] float32
  db_down: Any  # [1, D] float32
  dscale: Any  # [1, D] float32, None without a norm
  dx_hbm: Any  # [N, D] float32 in HBM, None if dx stays in VMEM


class Scratch(NamedTuple):
  """Refs of its scratch."""

  dgate: Any  # [rows, cols]
  dup: Any  # [rows, cols], None without a gate
  h: Any  # [rows, cols], None for geglu
  dx_sum: Any  # [slots, rows, D] float32
  sums: Sums
  travel: TravelScratch | None  # None if dx stays in VMEM
  weights: WeightBuffers | None  # of experts


# --- blocks -------------------------------------------------------------------


def specs(plan: Plan, arrays: Inputs) -> tuple[Inputs, Outputs]:
  """Of all inputs and outputs that there may be."""
  rows, cols, d = plan.tiles.rows, plan.tiles.cols, plan.sizes.d
  by_row = pl.BlockSpec((rows, d), lambda j, i, s: (s.row_tile(i), 0))

  layout, of_experts = plan.problem.layout, plan.of_experts

  def weight(shape: tuple[int, ...], index: Any, layers: bool) -> pl.BlockSpec:
    return block_in_stack(
      shape, lambda j, i, _: index(j), layers=layers, experts=of_experts
    )

  def up(layers: bool, index: Any = layout.gate_index) -> pl.BlockSpec:
    return weight(layout.gate_shape(d, cols), index, layers)

  def down(layers: bool) -> pl.BlockSpec:
    return weight(layout.down_shape(d, cols), layout.down_index, layers)

  both = pl.BlockSpec((rows, cols), lambda j, i, s: (s.row_tile(i), j))
  stacked, stores = plan.sizes.stacked, dict(layers=plan.sizes.stored)
  kept = block_in_stack(
    (rows, cols), lambda j, i, s: (s.row_tile(i), j), **stores
  )
  kept_row = block_in_stack((rows, d), lambda j, i, _: (i, 0), **stores)
  gain = pl.BlockSpec((1, d), lambda j, i, _: (0, 0))
  of_f = block_in_stack((1, cols), lambda j, i, _: (0, j), experts=of_experts)

  def if_last(j: Any, i: Any, s: Any) -> tuple[Any, Any]:
    # Of the last F tile alone; until then the block stays the first.
    return jnp.where(j == plan.f_tiles - 1, s.row_tile(i), 0), 0

  def expert_if_last(j: Any, i: Any, s: Any) -> tuple[Any, Any, Any]:
    return jnp.where(j == plan.f_tiles - 1, s.expert(i), 0), 0, 0

  at_last = pl.BlockSpec((rows, d), if_last)
  of_d = pl.BlockSpec((None, 1, d), expert_if_last) if of_experts else gain
  in_hbm = pl.BlockSpec(memory_space=pl.ANY)
  by_hand = are_prefetched(plan)
  in_gate, in_up, in_down = plan.sums_in_stack
  inputs = Inputs(
    # With a norm, the products are of `normed`, and x is its gradient's.
    x=by_row if plan.problem.norm is None else at_last,
    w_gate=in_hbm if by_hand else up(stacked),
    w_up=in_hbm if by_hand else up(stacked, layout.up_index(plan.f_tiles)),
    w_down=in_hbm if by_hand else down(stacked),
    b_gate=of_f,
    b_up=of_f,
    dy=by_row,
    dh=both,
    gate=kept,
    up=kept,
    normed=kept_row,
    scale=gain,
    epsilon=pl.BlockSpec((1, 1), lambda *_: (0, 0)),
    ports=stack.in_place(arrays.ports),
  )
  outputs = Outputs(
    dx=at_last,
    dw_gate=up(in_gate),
    dw_up=up(in_up),
    dw_down=down(in_down),
    db_gate=of_f,
    db_up=of_f,
    db_down=of_d,
    dscale=gain,
    dx_hbm=in_hbm,
  )
  return inputs, outputs


def out_shapes(plan: Plan, a: Arrays) -> Outputs:
  """Of all outputs that there are."""
  d, f, rows = plan.sizes.d, plan.sizes.f, plan.row_tiles * plan.tiles.rows
  halves = plan.problem.layout.form == "columns"

  def gradient(weight: jax.Array | None, in_stack: bool) -> Any:
    if weight is None:
      return None
    is_own = plan.sizes.stacked and not in_stack
    shape = weight.shape[1:] if is_own else weight.shape
    return varying_like(a.x, shape, weight.dtype)

  experts = () if a.group_sizes is None else (plan.sizes.experts,)

  def float32(*shape: int, of: Any = a.x) -> Any:
    return None if of is None else varying_like(a.x, shape, jnp.float32)

  in_gate, in_up, in_down = plan.sums_in_stack
  half = None
  if halves:
    half = varying_like(a.x, (*experts, d, f), a.w_gate.dtype)
  return Outputs(
    dx=varying_like(a.x, a.x.shape, a.x.dtype),
    dw_gate=half if halves else gradient(a.w_gate, in_gate),
    dw_up=half if halves else gradient(a.w_up, in_up),
    dw_down=gradient(a.w_down, in_down),
    db_gate=float32(*experts, 1, f, of=a.b_gate),
    db_up=float32(*experts, 1, f, of=a.b_up),
    db_down=float32(*experts, 1, d, of=a.b_down),
    dscale=float32(1, d, of=a.scale),
    dx_hbm=float32(rows, d) if dx_travels(plan) else None,
  )


def scratch(plan: Plan, a: Arrays) -> Scratch:
  """What to ask the compiler for."""
  sizes, rows, cols = plan.sizes, plan.tiles.rows, plan.tiles.cols
  tile = pltpu.VMEM((sizes.rows_at_once(rows), cols), sizes.dtype)
  return Scratch(
    dgate=tile,
    dup=tile if sizes.branches == 2 else None,
    h=tile if sizes.down else None,
    dx_sum=pltpu.VMEM((slots(plan), rows, sizes.d), jnp.float32),
    sums=sums_scratch(plan, a),
    travel=travel_scratch() if dx_travels(plan) else None,
    weights=weight_buffers(plan, a),
  )
