"""The backward kernel of geglu and feed_forward.

One grid step has an F tile of the weights and a row tile of x, and the rows are
the inner dimension of the grid:

  1. begin    has this row tile's sum of dx in VMEM, see travel.py
  2. clear    that sum, at the first F tile
  3. gate     dgate, dup and h of this tile, from gate and up, which are kept or
              computed again, and from dh = dy Wd^T, or as geglu is given it
  4. dx       adds dgate Wg^T + dup Wu^T
  5. weights  adds x^T dgate, x^T dup and h^T dy to their sums
  6. end      sends the sum of dx off to HBM
  7. finish   dx, through the norm and with the residual, at the last F tile
  8. write    the weights' gradients, at the last row tile

                                               dWg dWu dWd stay for all row
             Wg Wu Wd                          tiles, their sums in float32
                +----+----+----+
                | j=0| j=1| j=2|
                +----+----+----+
    x dy  +---+ +----+----+----+
     i=0  |   | | 0  | 3  | 6  |               dx is a sum over F tiles: it
          +---+ +----+----+----+               goes to HBM and comes back,
     i=1  |   | | 1  | 4  | 7  |               float32, behind the products
          +---+ +----+----+----+               of the tiles before and after;
     i=2  |   | | 2  | 5  | 8  |               three row tiles or fewer stay
          +---+ +----+----+----+               in VMEM instead

Everything [rows, F] exists one tile at a time, in VMEM, and all six products of
the steps 3 to 5 (eight with gate and up) are taken while it is there.  The
order of all sums is fixed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import room, tpu
from .._frame.kernel import Saved
from .._frame.manual import varying_like
from .._row_norm import epsilon_operand
from . import stack
from .activation import activate_and_derive
from .spec import Arrays, Kept, Outs, Problem
from .stack import Scalars, block_of_layer
from .sums import Sums, accumulate, sums_of, sums_scratch, write_sums
from .tiles import VMEM_BYTES, Plan, Sizes, backward_tiles, where_present
from .travel import Travel, TravelScratch, dx_travels, slots, travel_scratch


class Inputs(NamedTuple):
  """Refs of the kernel's inputs; or of the call, its arrays."""

  x: Any  # [rows, D]
  w_gate: Any  # [D, cols]
  w_up: Any  # [D, cols]
  w_down: Any  # [cols, D], None for geglu
  dy: Any  # [rows, D], None for geglu
  dh: Any  # [rows, cols], of geglu alone
  gate: Any  # [rows, cols], None if it is computed again
  up: Any  # [rows, cols], None if it is computed again
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
  dscale: Any  # [1, D] float32, None without a norm
  dx_hbm: Any  # [N, D] float32 in HBM, None if dx stays in VMEM


class Scratch(NamedTuple):
  """Refs of its scratch."""

  dgate: Any  # [rows, cols]
  dup: Any  # [rows, cols]
  h: Any  # [rows, cols], None for geglu
  dx_sum: Any  # [slots, rows, D] float32
  sums: Sums
  travel: TravelScratch | None  # None if dx stays in VMEM


# --- the kernel ---------------------------------------------------------------


def _kernel(scalars: Scalars, i: Inputs, o: Outputs, s: Scratch, *, plan: Plan):
  del scalars  # which blocks there are, not what is in them
  f_tile, row_tile = pl.program_id(0), pl.program_id(1)
  travel = Travel(o.dx_hbm, s.dx_sum, s.travel, plan) if s.travel else None
  if travel is not None:
    travel.begin()
    slot = travel.slot
  else:
    slot = row_tile if slots(plan) > 1 else 0

  @pl.when(f_tile == 0)
  def _():
    _clear_dx(s, slot)

  _gate_gradients(i, s, plan)
  _add_dx(i, s, slot, plan)
  _add_weight_gradients(i, o, s, plan)
  if travel is not None:
    travel.end()

  @pl.when(f_tile == plan.f_tiles - 1)
  def _():
    _finish_dx(i, o, s.dx_sum[slot], plan)

  @pl.when(row_tile == plan.row_tiles - 1)
  def _():
    write_sums(o, s.sums)


def _clear_dx(s: Scratch, slot: Any):
  s.dx_sum[slot] = jnp.zeros(s.dx_sum.shape[1:], jnp.float32)


def _factor(i: Inputs) -> Any:
  """The ref of what gate and up are products of: x, or its norm."""
  return i.x if i.normed is None else i.normed


def _gate_gradients(i: Inputs, s: Scratch, plan: Plan):
  """This tile's dgate and dup, and h for dWd, into VMEM."""
  dtype = i.x.dtype
  x = _factor(i)[...]
  if i.gate is not None:
    gate, up = i.gate[...].astype(jnp.float32), i.up[...].astype(jnp.float32)
  else:
    gate, up = (tpu.dot(x, w[...].astype(dtype)) for w in (i.w_gate, i.w_up))
  if i.w_down is not None:
    dh = tpu.dot(i.dy[...], i.w_down[...].astype(dtype), tpu.NT)
  else:
    dh = i.dh[...].astype(jnp.float32)
  dgate, dup, h = _through_the_gate(dh, gate, up, plan)
  s.dgate[...] = _inside(dgate, plan).astype(dtype)
  s.dup[...] = _inside(dup, plan).astype(dtype)
  if s.h is not None:
    s.h[...] = _inside(h, plan).astype(dtype)


def _through_the_gate(
  dh: jax.Array, gate: jax.Array, up: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dgate, dup and h, from float32 tiles."""
  a, da = activate_and_derive(plan.problem.activation, gate)
  return dh * up * da, dh * a, a * up


def _inside(tile: jax.Array, plan: Plan) -> jax.Array:
  """A [rows, cols] tile with zeros where it hangs over the end of N or F."""
  return _inside_f(_inside_rows(tile, plan), plan, axis=1)


def _inside_rows(tile: jax.Array, plan: Plan) -> jax.Array:
  n, rows = plan.sizes.n, plan.tiles.rows
  if n % rows == 0:
    return tile
  return tpu.zero_past(tile, n - pl.program_id(1) * rows, axis=0)


def _inside_f(tile: jax.Array, plan: Plan, axis: int) -> jax.Array:
  f, cols = plan.sizes.f, plan.tiles.cols
  if f % cols == 0:
    return tile
  return tpu.zero_past(tile, f - pl.program_id(0) * cols, axis)


def _add_dx(i: Inputs, s: Scratch, slot: Any, plan: Plan):
  """Adds this F tile's part of dx to its sum."""
  s.dx_sum[slot] += _dx(i, s, plan)


def _dx(i: Inputs, s: Scratch, plan: Plan) -> jax.Array:
  w_gate, w_up = (
    _inside_f(w[...].astype(i.x.dtype), plan, axis=1)
    for w in (i.w_gate, i.w_up)
  )
  from_gate = tpu.dot(s.dgate[...], w_gate, tpu.NT)
  from_up = tpu.dot(s.dup[...], w_up, tpu.NT)
  return from_gate + from_up


def _add_weight_gradients(i: Inputs, o: Outputs, s: Scratch, plan: Plan):
  """Adds this row tile's part of each weight's gradient to its sum."""
  is_first, sums = pl.program_id(1) == 0, sums_of(o, s.sums)
  x = _inside_rows(_factor(i)[...], plan)
  accumulate(sums.dw_gate, tpu.dot(x, s.dgate[...], tpu.TN), is_first)
  accumulate(sums.dw_up, tpu.dot(x, s.dup[...], tpu.TN), is_first)
  if i.w_down is not None:
    dy = _inside_rows(i.dy[...], plan)
    accumulate(sums.dw_down, tpu.dot(s.h[...], dy, tpu.TN), is_first)


def _finish_dx(i: Inputs, o: Outputs, dx: jax.Array, plan: Plan):
  """Writes dx of a row tile from its sum."""
  dx = _through_the_norm(i, o, dx, plan)
  o.dx[...] = _add_residual(i, dx, plan).astype(o.dx.dtype)


def _through_the_norm(
  i: Inputs, o: Outputs, dx: jax.Array, plan: Plan
) -> jax.Array:
  """The gradient of x from that of its norm, if it has one; adds to dscale."""
  if plan.problem.norm is None:
    return dx
  x = i.x[...].astype(jnp.float32)
  norm = plan.problem.norm.at(i.epsilon)
  dx, dscale = norm.gradients(x, i.scale[...], dx)
  _add_dscale(o, dscale, plan)
  return dx


def _add_dscale(o: Outputs, dscale: jax.Array, plan: Plan):
  """Adds the sum over this row tile."""
  part = jnp.sum(_inside_rows(dscale, plan), axis=0, keepdims=True)
  accumulate(o.dscale, part, pl.program_id(1) == 0)


def _add_residual(i: Inputs, dx: jax.Array, plan: Plan) -> jax.Array:
  if plan.problem.residual:
    dx += i.dy[...].astype(jnp.float32)
  return dx


# --- the call -----------------------------------------------------------------


def backward(p: Problem, saved: Saved, d: Outs) -> Arrays:
  """The gradients of all arrays."""
  a: Arrays = saved.arrays
  stored = d.store_gate is not None
  sizes = Sizes.of(a, kept=p.keeps_products, stored=stored)
  plan = Plan(p, sizes, backward_tiles(sizes, p.config))
  arrays, scalars = _inputs(plan, a, saved.kept, d), Scalars.of(a)
  specs, shapes = _specs(plan, arrays), _out_shapes(plan, a)
  if saved.places is not None:
    x, of_x = saved.places.stacks["x"], room.block_of_layer(specs[0].x)
    arrays, specs = arrays._replace(x=x), (specs[0]._replace(x=of_x), specs[1])
  (outs,) = pl.pallas_call(
    functools.partial(_kernel, plan=plan),
    name=f"{sizes.op}_bwd",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(plan.f_tiles, plan.row_tiles),
      in_specs=[where_present(arrays, specs[0])],
      out_specs=[where_present(shapes, specs[1])],
      scratch_shapes=[_scratch(plan, a)],
    ),
    out_shape=[shapes],
    # dx is the first result, then the weights' gradients.
    input_output_aliases=stack.aliases(
      (scalars, arrays), arrays.ports, first=1
    ),
    compiler_params=tpu.compiler_params(VMEM_BYTES),
  )(scalars, arrays)
  dscale = outs.dscale
  if dscale is not None:
    dscale = dscale[0].astype(a.scale.dtype)
  weights = outs.dw_gate, outs.dw_up, outs.dw_down
  grads = Arrays(outs.dx, *weights, dscale)
  if sizes.stacked and not plan.sums_in_stack:
    grads = stack.put_gradients(grads, a, stack.ports_of(a, d))
  return stack.onward(grads, d)


def _inputs(plan: Plan, a: Arrays, kept: Kept | None, d: Outs) -> Inputs:
  down, scale = a.w_down is not None, a.scale
  ports = stack.ports_of(a, d) if plan.sums_in_stack else (None, None, None)
  if d.store_gate is not None:
    kept = Kept(*stack.stores_of(d))
  elif kept is None:
    # One pass of XLA's is cheaper than a norm of every tile of x for every F
    # tile.
    normed = (
      None if scale is None else plan.problem.norm_of(a.x, scale, a.epsilon)
    )
    kept = Kept(gate=None, up=None, normed=normed)
  return Inputs(
    x=a.x,
    w_gate=a.w_gate,
    w_up=a.w_up,
    w_down=a.w_down,
    dy=d.y if down else None,
    dh=None if down else d.y,
    gate=kept.gate,
    up=kept.up,
    normed=kept.normed,
    scale=None if scale is None else scale[None, :],
    epsilon=epsilon_operand(a.epsilon)[0],
    ports=ports,
  )


def _specs(plan: Plan, arrays: Inputs) -> tuple[Inputs, Outputs]:
  """Of all inputs and outputs that there may be."""
  rows, cols, d = plan.tiles.rows, plan.tiles.cols, plan.sizes.d
  by_row = pl.BlockSpec((rows, d), lambda j, i, _: (i, 0))

  def up(stacked: bool) -> pl.BlockSpec:
    return block_of_layer(stacked, (d, cols), lambda j, i, _: (0, j))

  def down(stacked: bool) -> pl.BlockSpec:
    return block_of_layer(stacked, (cols, d), lambda j, i, _: (j, 0))

  both = pl.BlockSpec((rows, cols), lambda j, i, _: (i, j))
  stored = plan.sizes.stored
  kept = block_of_layer(stored, (rows, cols), lambda j, i, _: (i, j))
  kept_row = block_of_layer(stored, (rows, d), lambda j, i, _: (i, 0))
  gain = pl.BlockSpec((1, d), lambda j, i, _: (0, 0))
  # Of the last F tile alone; until then the block stays the first.
  at_last = pl.BlockSpec(
    (rows, d), lambda j, i, _: (jnp.where(j == plan.f_tiles - 1, i, 0), 0)
  )
  inputs = Inputs(
    # With a norm, the products are of `normed`, and x is its gradient's.
    x=by_row if plan.problem.norm is None else at_last,
    w_gate=up(plan.sizes.stacked),
    w_up=up(plan.sizes.stacked),
    w_down=down(plan.sizes.stacked),
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
    dw_gate=up(plan.sums_in_stack),
    dw_up=up(plan.sums_in_stack),
    dw_down=down(plan.sums_in_stack),
    dscale=gain,
    dx_hbm=pl.BlockSpec(memory_space=pl.ANY),
  )
  return inputs, outputs


def _out_shapes(plan: Plan, a: Arrays) -> Outputs:
  d, rows = plan.sizes.d, plan.row_tiles * plan.tiles.rows
  ndim = 3 if plan.sums_in_stack else 2

  def gradient(array: jax.Array | None, ndim: int = 2) -> Any:
    if array is None:
      return None
    shape = array.shape[array.ndim - ndim :]
    return varying_like(a.x, shape, array.dtype)

  def float32(shape: tuple[int, int]) -> Any:
    return varying_like(a.x, shape, jnp.float32)

  return Outputs(
    dx=gradient(a.x),
    dw_gate=gradient(a.w_gate, ndim),
    dw_up=gradient(a.w_up, ndim),
    dw_down=gradient(a.w_down, ndim),
    dscale=None if a.scale is None else float32((1, d)),
    dx_hbm=float32((rows, d)) if dx_travels(plan) else None,
  )


def _scratch(plan: Plan, a: Arrays) -> Scratch:
  sizes, rows, cols = plan.sizes, plan.tiles.rows, plan.tiles.cols
  tile = pltpu.VMEM((rows, cols), sizes.dtype)

  return Scratch(
    dgate=tile,
    dup=tile,
    h=tile if sizes.down else None,
    dx_sum=pltpu.VMEM((slots(plan), rows, sizes.d), jnp.float32),
    sums=sums_scratch(plan, a),
    travel=travel_scratch() if dx_travels(plan) else None,
  )
