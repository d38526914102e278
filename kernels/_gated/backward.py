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
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._frame import room, tpu
from .._frame.kernel import Saved
from .._row_norm import epsilon_operand
from . import stack
from .activation import ClampedSwiGLU, activate_and_derive
from .backward_blocks import (
  Inputs,
  Outputs,
  Scratch,
  out_shapes,
  scratch,
  specs,
)
from .prefetch import fetched
from .spec import Arrays, Kept, Outs, Problem, as_row
from .stack import Scalars
from .sums import accumulate, sums_of, write_sums
from .tiles import VMEM_BYTES, Plan, Sizes, backward_tiles, where_present
from .travel import Travel, slots
from .visits import Rows

# --- the kernel ---------------------------------------------------------------


def _kernel(scalars: Scalars, i: Inputs, o: Outputs, s: Scratch, *, plan: Plan):
  f_tile, rows = pl.program_id(0), Rows(scalars.visits, plan, axis=1)
  i, travel = fetched(scalars, i, s.weights, rows, plan), None
  if s.travel:
    travel = Travel(o.dx_hbm, s.dx_sum, s.travel, rows.tile, plan)
    rows.when_tile_begins(travel.begin)
    slot = travel.slot
  else:
    slot = rows.tile if slots(plan) > 1 else 0

  @pl.when(f_tile == 0)
  def _():
    rows.when_tile_begins(lambda: _clear_dx(s, slot))

  def compute(rows: Rows, part: Any):
    own = _part_of(i, part)
    _gate_gradients(own, o, s, rows, plan)
    _add_dx(own, s, part(s.dx_sum.at[slot]), plan)
    _add_weight_gradients(own, o, s, rows, plan)

  rows.clear_if_none(*sums_of(o, s.sums), o.db_gate, o.db_up)
  rows.each_part(compute)
  if travel is not None:
    rows.when_tile_ends(travel.end)

  @pl.when(f_tile == plan.f_tiles - 1)
  def _():
    rows.when_tile_ends(lambda: _finish_dx(i, o, s.dx_sum[slot], rows, plan))
    if o.db_down is not None:
      _add_rows(o.db_down, rows.inside(i.dy[...].astype(jnp.float32)), rows)

  @pl.when(rows.is_last)
  def _():
    write_sums(o, s.sums)


def _clear_dx(s: Scratch, slot: Any):
  s.dx_sum[slot] = jnp.zeros(s.dx_sum.shape[1:], jnp.float32)


def _part_of(i: Inputs, part: Any) -> Inputs:
  """The inputs with a part of each tile of rows."""
  return i._replace(
    x=part(i.x),
    dy=part(i.dy),
    dh=part(i.dh),
    gate=part(i.gate),
    up=part(i.up),
    normed=part(i.normed),
  )


def _factor(i: Inputs) -> Any:
  """The ref of what gate and up are products of: x, or its norm."""
  return i.x if i.normed is None else i.normed


def _gate_gradients(i: Inputs, o: Outputs, s: Scratch, rows: Rows, plan: Plan):
  """This tile's dgate and dup, and h for dWd, into VMEM."""
  dtype, layout = i.x.dtype, plan.problem.layout
  x = _factor(i)[...]
  if i.gate is not None:
    gate = i.gate[...].astype(jnp.float32)
    up = None if i.up is None else i.up[...].astype(jnp.float32)
  else:
    gate, up = layout.gate_and_up(x, i)
  if i.w_down is not None:
    dh = layout.back(i.dy[...], i.w_down[...].astype(dtype))
  else:
    dh = i.dh[...].astype(jnp.float32)
  dgate, dup, h = _through_the_gate(dh, gate, up, plan)
  for d, ref, db in ((dgate, s.dgate, o.db_gate), (dup, s.dup, o.db_up)):
    if d is not None:
      d = _inside_f(rows.inside(d), plan, axis=1)
      ref[...] = d.astype(dtype)
      _add_rows(db, d, rows)
  if s.h is not None:
    s.h[...] = _inside_f(rows.inside(h), plan, axis=1).astype(dtype)


def _through_the_gate(
  dh: jax.Array, gate: jax.Array, up: jax.Array | None, plan: Plan
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
  """dgate, dup and h, from float32 tiles."""
  activation = plan.problem.activation
  if isinstance(activation, ClampedSwiGLU):
    assert up is not None
    return activation.gradients(dh, gate, up)
  a, da = activate_and_derive(activation, gate)
  if up is None:
    return dh * da, None, a
  return dh * up * da, dh * a, a * up


def _add_rows(total: Any, tile: jax.Array, rows: Rows):
  """Adds the sum over this row tile, whose other rows are zero."""
  if total is not None:
    part = jnp.sum(tile, axis=0, keepdims=True)
    accumulate(total, part, rows.is_first)


def _inside_f(tile: jax.Array, plan: Plan, axis: int) -> jax.Array:
  f, cols = plan.sizes.f, plan.tiles.cols
  if f % cols == 0:
    return tile
  return tpu.zero_past(tile, f - pl.program_id(0) * cols, axis)


def _add_dx(i: Inputs, s: Scratch, dx_sum: Any, plan: Plan):
  """Adds this F tile's part of dx to its sum."""
  dx_sum[...] += _dx(i, s, plan)


def _dx(i: Inputs, s: Scratch, plan: Plan) -> jax.Array:
  layout = plan.problem.layout
  weights = [
    _inside_f(w[...].astype(i.x.dtype), plan, layout.f_axis)
    for w in layout.refs(i.w_gate, i.w_up)
    if w is not None
  ]
  dx = layout.back(s.dgate[...], weights[0])
  for w in weights[1:]:
    dx += layout.back(s.dup[...], w)
  return dx


def _add_weight_gradients(
  i: Inputs, o: Outputs, s: Scratch, rows: Rows, plan: Plan
):
  """Adds this row tile's part of each weight's gradient to its sum."""
  is_first, sums = rows.is_first, sums_of(o, s.sums)
  layout = plan.problem.layout
  x = rows.inside(_factor(i)[...])
  dw_gate, dw_up = layout.refs(sums.dw_gate, sums.dw_up)
  accumulate(dw_gate, layout.gradient(x, s.dgate[...]), is_first)
  if s.dup is not None:
    accumulate(dw_up, layout.gradient(x, s.dup[...]), is_first)
  if i.w_down is not None:
    dy = rows.inside(i.dy[...])
    accumulate(sums.dw_down, layout.gradient(s.h[...], dy), is_first)


def _finish_dx(i: Inputs, o: Outputs, dx: jax.Array, rows: Rows, plan: Plan):
  """Writes dx of a row tile from its sum."""
  dx = _through_the_norm(i, o, dx, rows, plan)
  o.dx[...] = _add_residual(i, dx, plan).astype(o.dx.dtype)


def _through_the_norm(
  i: Inputs, o: Outputs, dx: jax.Array, rows: Rows, plan: Plan
) -> jax.Array:
  """The gradient of x from that of its norm, if it has one; adds to dscale."""
  if plan.problem.norm is None:
    return dx
  x = i.x[...].astype(jnp.float32)
  norm = plan.problem.norm.at(i.epsilon)
  dx, dscale = norm.gradients(x, i.scale[...], dx)
  _add_dscale(o, dscale, rows)
  return dx


def _add_dscale(o: Outputs, dscale: jax.Array, rows: Rows):
  """Adds the sum over this row tile."""
  _add_rows(o.dscale, rows.inside(dscale), rows)


def _add_residual(i: Inputs, dx: jax.Array, plan: Plan) -> jax.Array:
  if plan.problem.residual:
    dx += i.dy[...].astype(jnp.float32)
  return dx


# --- the call -----------------------------------------------------------------


def backward(p: Problem, saved: Saved, d: Outs) -> Arrays:
  """The gradients of all arrays."""
  a: Arrays = saved.arrays
  stored = d.store_gate is not None
  sizes = Sizes.of(p, a, kept=p.keeps_products, stored=stored)
  plan = Plan(p, sizes, backward_tiles(sizes, p.config))
  ports, later = _by_kernel(plan, stack.ports_of(a, d))
  arrays = _inputs(plan, a, saved.kept, d)._replace(ports=ports)
  scalars = Scalars.of(a, plan.tiles.rows)
  blocks, shapes = specs(plan, arrays), out_shapes(plan, a)
  if saved.places is not None:
    x, of_x = saved.places.stacks["x"], room.block_of_layer(blocks[0].x)
    arrays, blocks = (
      arrays._replace(x=x),
      (blocks[0]._replace(x=of_x), blocks[1]),
    )
  (outs,) = pl.pallas_call(
    functools.partial(_kernel, plan=plan),
    name=f"{sizes.op}_bwd",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(plan.f_tiles, plan.row_steps),
      in_specs=[where_present(arrays, blocks[0])],
      out_specs=[where_present(shapes, blocks[1])],
      scratch_shapes=[scratch(plan, a)],
    ),
    out_shape=[shapes],
    # After dx come the weights' gradients, of these last what is in ports.
    input_output_aliases=stack.aliases(
      (scalars, arrays), ports, first=1 + _count(shapes[1:4]) - _count(ports)
    ),
    compiler_params=tpu.compiler_params(VMEM_BYTES),
  )(scalars, arrays)
  grads = _gradients(plan, a, outs)
  return stack.onward(stack.put_gradients(grads, a, later), d)


def _by_kernel(plan: Plan, ports: tuple[Any, ...]) -> tuple[Any, Any]:
  """The ports that the kernel writes into, and those that XLA does."""
  pairs = list(zip(ports, plan.sums_in_stack, strict=True))
  return (
    tuple(port if inside else None for port, inside in pairs),
    tuple(None if inside else port for port, inside in pairs),
  )


def _count(tree: Any) -> int:
  return len(jax.tree.leaves(tree))


def _gradients(plan: Plan, a: Arrays, outs: Outputs) -> Arrays:
  """The results, as gradients of the arrays."""

  def row(total: Any, array: Any) -> Any:
    return None if total is None else total[..., 0, :].astype(array.dtype)

  dw_gate, dw_up = outs.dw_gate, outs.dw_up
  if plan.problem.layout.form == "columns":
    dw_gate, dw_up = jnp.concatenate([dw_gate, dw_up], axis=-1), None
  return Arrays(
    outs.dx,
    dw_gate,
    dw_up,
    outs.dw_down,
    row(outs.dscale, a.scale),
    b_gate=row(outs.db_gate, a.b_gate),
    b_up=row(outs.db_up, a.b_up),
    b_down=row(outs.db_down, a.b_down),
  )


def _inputs(plan: Plan, a: Arrays, kept: Kept | None, d: Outs) -> Inputs:
  down, scale = a.w_down is not None, a.scale
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
    w_up=a.w_gate if plan.problem.layout.form == "columns" else a.w_up,
    w_down=a.w_down,
    b_gate=None if plan.sizes.kept else as_row(a.b_gate),
    b_up=None if plan.sizes.kept else as_row(a.b_up),
    dy=d.y if down else None,
    dh=None if down else d.y,
    gate=kept.gate,
    up=kept.up,
    normed=kept.normed,
    scale=as_row(scale),
    epsilon=epsilon_operand(a.epsilon)[0],
    ports=(None, None, None),
  )
