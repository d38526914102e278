"""The forward kernel of geglu and feed_forward.

One grid step has a row tile of x and an F tile of the weights:

  1. normalise  x, at the first F tile of a row tile, if there is a norm
  2. multiply   gate = x Wg,  up = x Wu
  3. keep       gate and up, if the backward pass wants them
  4. gate       h = a(gate) * up, the result of geglu
  5. project    y += h Wd, of feed_forward
  6. finish     y of the sum over F tiles, plus the residual, at the last F tile

feed_forward sums over F tiles, and a norm is taken once for all of them: there
the F tiles are the inner dimension of the grid.  Otherwise the row tiles are,
so that the weights are read once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import tpu
from .._frame.manual import varying_like
from .._row_norm import epsilon_operand
from . import stack
from .activation import ClampedSwiGLU, activate
from .prefetch import WeightBuffers, are_prefetched, fetched, weight_buffers
from .spec import Arrays, Kept, Outs, Problem, as_row
from .stack import Scalars, block_in_stack
from .tiles import VMEM_BYTES, Plan, Sizes, forward_tiles, where_present
from .visits import Rows


class Inputs(NamedTuple):
  """Refs of the kernel's inputs."""

  x: Any  # [rows, D]
  w_gate: Any  # [D, cols], or as `Layout` has it; so are the others
  w_up: Any  # [D, cols], None if w_gate has both, or there is no such branch
  w_down: Any  # [cols, D], None for geglu
  b_gate: Any  # [1, cols], as the other biases None if there is none
  b_up: Any  # [1, cols]
  b_down: Any  # [1, D]
  scale: Any  # [1, D], None without a norm
  epsilon: Any  # [1, 1] of the norm, None if it is static
  stores: tuple[Any, Any, Any]  # of a stack, in HBM: what is kept goes there


class Outputs(NamedTuple):
  """Refs of its outputs; of stores, one layer's."""

  y: Any  # [rows, D]; of geglu h, [rows, cols]
  gate: Any  # [rows, cols], None if not kept
  up: Any  # [rows, cols], None if not kept, or not there
  normed: Any  # [rows, D], None if not kept or without a norm


class Scratch(NamedTuple):
  """Refs of its scratch."""

  normed: Any  # [rows, D], the norm of x where it is not an output
  y_sum: Any  # [rows, D] float32; a float32 y is its own sum
  weights: WeightBuffers | None  # of experts


# --- the kernel ---------------------------------------------------------------


def _kernel(scalars: Scalars, i: Inputs, o: Outputs, s: Scratch, *, plan: Plan):
  rows = Rows(scalars.visits, plan, axis=0 if _f_inside(plan) else 1)
  i = fetched(scalars, i, s.weights, rows, plan)
  rows.open(o.y, o.gate, o.up)

  def compute(rows: Rows, part: Any):
    own = o._replace(y=part(o.y), gate=part(o.gate), up=part(o.up))
    _compute(i._replace(x=part(i.x)), own, s, rows, plan)

  rows.each_part(compute)


def _compute(i: Inputs, o: Outputs, s: Scratch, rows: Rows, plan: Plan):
  x = _normalise(i, o, s, plan)
  gate, up = _multiply(i, x, plan)
  if o.gate is not None:
    _keep(o, gate, up, rows)
  h = _gate(gate, up, plan).astype(x.dtype)
  if i.w_down is None:
    rows.write(o.y, h)
  else:
    _project(i, o, s, h, plan)
    if s.y_sum is not None or plan.problem.residual or i.b_down is not None:
      _finish(i, o, s, plan)


def _normalise(i: Inputs, o: Outputs, s: Scratch, plan: Plan) -> jax.Array:
  """x, or its norm, which is taken once for all F tiles of a row tile."""
  norm = plan.problem.norm
  if norm is None:
    return i.x[...]
  normed = s.normed if o.normed is None else o.normed

  @pl.when(pl.program_id(1) == 0)
  def _():
    x = i.x[...].astype(jnp.float32)
    y = norm.at(i.epsilon).of(x, i.scale[...])
    normed[...] = y.astype(normed.dtype)

  return normed[...]


def _multiply(
  i: Inputs, x: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array | None]:
  """gate and up, float32."""
  return plan.problem.layout.gate_and_up(x, i)


def _keep(o: Outputs, gate: jax.Array, up: jax.Array | None, rows: Rows):
  rows.write(o.gate, gate)
  if up is not None:
    rows.write(o.up, up)


def _gate(gate: jax.Array, up: jax.Array | None, plan: Plan) -> jax.Array:
  """h, float32."""
  activation = plan.problem.activation
  if isinstance(activation, ClampedSwiGLU):
    assert up is not None
    return activation.of(gate, up)
  a = activate(activation, gate)
  return a if up is None else a * up


def _y_sum(o: Outputs, s: Scratch) -> Any:
  """Where y is summed over F tiles."""
  return o.y if s.y_sum is None else s.y_sum


def _project(i: Inputs, o: Outputs, s: Scratch, h: jax.Array, plan: Plan):
  """Adds this F tile's part of y to the sum."""
  is_first, y_sum = pl.program_id(1) == 0, _y_sum(o, s)
  h, w_down = _inside_f(h, i.w_down[...].astype(h.dtype), plan)
  # A selection costs nothing beside the product; to clear the sum would.
  part = plan.problem.layout.times(h, w_down)
  y_sum[...] = jnp.where(is_first, 0.0, y_sum[...]) + part


def _inside_f(
  h: jax.Array, w_down: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array]:
  """Both factors of a sum over F, with zeros past the end of F."""
  f, cols = plan.sizes.f, plan.tiles.cols
  if f % cols == 0:
    return h, w_down
  inside = f - pl.program_id(1) * cols
  axis = 1 - plan.problem.layout.f_axis
  return tpu.zero_past(h, inside, axis=1), tpu.zero_past(w_down, inside, axis)


def _finish(i: Inputs, o: Outputs, s: Scratch, plan: Plan):
  """Writes y from its sum, with what is added once, after the last F tile."""
  residual, y_sum = plan.problem.residual, _y_sum(o, s)

  @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
  def _():
    y = y_sum[...]
    if i.b_down is not None:
      y += i.b_down[...].astype(jnp.float32)
    if residual:
      y += i.x[...].astype(jnp.float32)
    o.y[...] = y.astype(o.y.dtype)


# --- the call -----------------------------------------------------------------


def forward(
  p: Problem, a: Arrays, *, keep: bool, suffix: str = ""
) -> tuple[Outs, Kept | None]:
  """The result, and with `keep` what the config keeps for the backward pass.

  Args:
    p: the problem.
    a: its arrays.
    keep: whether there will be a backward pass.
    suffix: of the kernel's name, where an op calls this more than once.
  """
  kept = keep and p.keeps_products
  sizes = Sizes.of(p, a, kept=kept, stored=kept and a.store_gate is not None)
  plan = Plan(p, sizes, forward_tiles(sizes, p.config))
  scalars, arrays = Scalars.of(a, plan.tiles.rows), _inputs(plan, a)
  specs, shapes = _specs(plan, arrays), _out_shapes(plan, a)
  grid = plan.row_steps, plan.f_tiles
  (outs,) = pl.pallas_call(
    functools.partial(_kernel, plan=plan),
    name=f"{sizes.op}{suffix}_fwd",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid if _f_inside(plan) else grid[::-1],
      in_specs=[where_present(arrays, specs[0])],
      out_specs=[where_present(shapes, specs[1])],
      scratch_shapes=[_scratch(plan, arrays)],
    ),
    out_shape=[shapes],
    # y is the first result, then what is kept.
    input_output_aliases=stack.aliases(
      (scalars, arrays), arrays.stores, first=1
    ),
    compiler_params=tpu.compiler_params(VMEM_BYTES),
  )(scalars, arrays)
  if not kept:
    return Outs.of(outs.y, a), None
  products = Kept(outs.gate, outs.up, outs.normed)
  if not sizes.stored:
    return Outs.of(outs.y, a), products
  if not plan.keeps_in_stack:
    stores = stack.stores_of(a)
    products = Kept(*stack.put_all(a.layer, stores, products))
  return Outs.of(outs.y, a, products), None


def _inputs(plan: Plan, a: Arrays) -> Inputs:
  epsilon, _ = epsilon_operand(a.epsilon)
  return Inputs(
    x=a.x,
    w_gate=a.w_gate,
    w_up=a.w_gate if plan.problem.layout.form == "columns" else a.w_up,
    w_down=a.w_down,
    b_gate=as_row(a.b_gate),
    b_up=as_row(a.b_up),
    b_down=as_row(a.b_down),
    scale=as_row(a.scale),
    epsilon=epsilon,
    stores=stack.stores_of(a) if plan.keeps_in_stack else (None, None, None),
  )


def _f_inside(plan: Plan) -> bool:
  """Whether the F tiles are the inner dimension of the grid."""
  return plan.sizes.down or plan.sizes.normed


def _specs(plan: Plan, arrays: Inputs) -> tuple[Inputs, Outputs]:
  """Of all inputs and outputs that there may be."""
  sizes = plan.sizes
  rows, cols, d = plan.tiles.rows, plan.tiles.cols, sizes.d

  def block(
    shape: tuple[int, ...], index: Callable[..., Any], **stacks: bool
  ) -> pl.BlockSpec:
    """`index` is of the row tile, the F tile and the scalars."""
    if not _f_inside(plan):
      return block_in_stack(shape, lambda j, i, s: index(i, j, s), **stacks)
    return block_in_stack(shape, index, **stacks)

  by_row = block((rows, d), lambda i, j, s: (s.row_tile(i), 0))

  def weight(shape: tuple[int, ...], index: Callable[..., Any]) -> pl.BlockSpec:
    if are_prefetched(plan):
      return pl.BlockSpec(memory_space=pl.ANY)
    stacks = dict(layers=sizes.stacked, experts=plan.of_experts)
    return block(shape, lambda i, j, _: index(j), **stacks)

  layout = plan.problem.layout
  up_index = layout.up_index(plan.f_tiles)
  of_f = block((1, cols), lambda i, j, _: (0, j), experts=plan.of_experts)
  of_d = block((1, d), lambda i, j, _: (0, 0))
  both = block((rows, cols), lambda i, j, s: (s.row_tile(i), j))
  in_stores = dict(layers=plan.keeps_in_stack)
  kept = block((rows, cols), lambda i, j, s: (s.row_tile(i), j), **in_stores)
  kept_row = block((rows, d), lambda i, j, _: (i, 0), **in_stores)
  y = by_row if sizes.down else both
  return (
    Inputs(
      x=by_row,
      w_gate=weight(layout.gate_shape(d, cols), layout.gate_index),
      w_up=weight(layout.gate_shape(d, cols), up_index),
      w_down=weight(layout.down_shape(d, cols), layout.down_index),
      b_gate=of_f,
      b_up=of_f,
      b_down=of_d,
      scale=of_d,
      epsilon=block((1, 1), lambda i, j, _: (0, 0)),
      stores=stack.in_place(arrays.stores),
    ),
    Outputs(y=y, gate=kept, up=kept, normed=kept_row),
  )


def _out_shapes(plan: Plan, a: Arrays) -> Outputs:
  sizes = plan.sizes
  stack_of = a.store_gate.shape[:1] if plan.keeps_in_stack else ()

  def shape(width: int, *stack: int) -> Any:
    return varying_like(a.x, (*stack, sizes.n, width), a.x.dtype)

  wide = shape(sizes.f, *stack_of) if sizes.kept else None
  return Outputs(
    y=shape(sizes.d if sizes.down else sizes.f),
    gate=wide,
    up=wide if sizes.branches == 2 else None,
    normed=shape(sizes.d, *stack_of) if sizes.kept and sizes.normed else None,
  )


def _scratch(plan: Plan, arrays: Inputs) -> Scratch:
  sizes, shape = plan.sizes, (plan.tiles.rows, plan.sizes.d)
  has_normed = sizes.normed and not sizes.kept
  has_sum = sizes.down and sizes.dtype != jnp.float32
  return Scratch(
    normed=pltpu.VMEM(shape, sizes.dtype) if has_normed else None,
    y_sum=pltpu.VMEM(shape, jnp.float32) if has_sum else None,
    weights=weight_buffers(plan, arrays),
  )
