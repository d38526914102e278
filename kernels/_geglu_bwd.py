"""The backward pass of geglu and feed_forward, in one kernel.

Maths, with gate = x Wg and up = x Wu saved or computed again:

    dh    = dy Wd^T                 feed_forward; geglu is given dh
    dgate = dh * up * a'(gate)
    dup   = dh * a(gate)
    h     = a(gate) * up

    dx    = dgate Wg^T + dup Wu^T
    dWg   = x^T dgate,   dWu = x^T dup,   dWd = h^T dy

With a norm, x in these is norm(x), saved or computed again before, and its
gradient is taken of a row tile's dx when the last F tile has added to it; a
residual adds dy to it then.

Of everything [rows, F], only one tile exists at a time, in VMEM, and all six
products of the lower half (eight with gate and up) are taken while it is there.

Tiling: F tiles outside, row tiles inside.

             Wg Wu Wd, dWg dWu dWd             stay for all row tiles,
                +----+----+----+               the sums in float32
                | j=0| j=1| j=2|
                +----+----+----+
    x dy  +---+ +----+----+----+
     i=0  |   | | 0  | 3  | 6  |               dx is a sum over F tiles: it
          +---+ +----+----+----+               goes to HBM and comes back,
     i=1  |   | | 1  | 4  | 7  |               float32, behind the products
          +---+ +----+----+----+               of the tiles before and after;
     i=2  |   | | 2  | 5  | 8  |               three row tiles or fewer stay
          +---+ +----+----+----+

Traffic: the weights and their gradients once; x, dy and twice dx for every F
tile, 6.9 GiB for Gemma 2B's 8192 rows at 512 columns.  That is half of what HBM
moves while the MXU is busy with it, and what it buys is that nothing of size
[rows, F] is ever written.  The order of all sums is fixed.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._activation import Activation, activate_and_derive
from ._geglu_tiles import (
  COMPILER_PARAMS,
  NT,
  TN,
  Problem,
  Tiles,
  dot,
  zero_past,
)
from ._norm import RowNorm
from ._sharding import like

_SLOTS = 3  # of dx in VMEM: one leaving, one in work, one arriving


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Everything that is not an array, in one hashable piece."""

  problem: Problem
  tiles: Tiles
  activation: Activation
  norm: RowNorm | None
  residual: bool

  @property
  def grid(self) -> tuple[int, int]:
    """F tiles, row tiles."""
    p, tiles = self.problem, self.tiles
    return pl.cdiv(p.f, tiles.cols), pl.cdiv(p.n, tiles.rows)

  @property
  def gradients(self) -> tuple[str, ...]:
    """The weights' gradients."""
    return ("dw_gate", "dw_up", "dw_down")[: self.problem.weights]

  @property
  def dx_travels(self) -> bool:
    """Whether dx has more row tiles than slots, and is summed in HBM."""
    f_tiles, row_tiles = self.grid
    return f_tiles > 1 and row_tiles > _SLOTS

  @property
  def slots(self) -> int:
    f_tiles, row_tiles = self.grid
    return 1 if f_tiles == 1 else min(row_tiles, _SLOTS)


# --- dx on its way between VMEM and HBM ---------------------------------------


class _Travel:
  """The copies of dx's row tiles of one grid step.

  Step s works on the slot after that of step s - 1.  When it starts, the copy
  out of step s - 2 must be over, for its slot is the next to be filled; so a
  row tile that is fetched has always arrived in HBM before, if there are more
  row tiles than slots.
  """

  def __init__(self, refs, plan: _Plan):
    self.refs, self.rows = refs, plan.tiles.rows
    self.f_tiles, self.row_tiles = plan.grid
    self.j, self.i = pl.program_id(0), pl.program_id(1)
    is_first = (self.j == 0) & (self.i == 0)

    @pl.when(is_first)
    def _():
      refs.turn[0] = 0

    self.slot = refs.turn[0]
    self.next = jnp.where(self.slot == _SLOTS - 1, 0, self.slot + 1)
    self.last = jnp.where(self.slot == 0, _SLOTS - 1, self.slot - 1)

  def _hbm(self, i):
    start = pl.multiple_of(i * self.rows, self.rows)
    return self.refs.dx_hbm.at[pl.ds(start, self.rows), :]

  def _copy_in(self, i, slot):
    return pltpu.make_async_copy(
      self._hbm(i), self.refs.dx_sum.at[slot], self.refs.arrived.at[slot]
    )

  def _copy_out(self, i, slot):
    return pltpu.make_async_copy(
      self.refs.dx_sum.at[slot], self._hbm(i), self.refs.left.at[slot]
    )

  def begin(self):
    """Frees the next slot, starts to fill it, waits for this step's."""
    i, j, n = self.i, self.j, self.row_tiles
    two_before = jnp.where(i >= 2, i - 2, i - 2 + n)
    after = jnp.where(i == n - 1, 0, i + 1)

    @pl.when((j > 0) | (i >= 2))
    def _():
      self._copy_out(two_before, self.next).wait()

    has_past = jnp.where(i == n - 1, j + 1, j) > 0
    is_last = (j == self.f_tiles - 1) & (i == n - 1)

    @pl.when(has_past & jnp.logical_not(is_last))
    def _():
      self._copy_in(after, self.next).start()

    @pl.when(j > 0)
    def _():
      self._copy_in(i, self.slot).wait()

  def end(self):
    """Sends this step's sum off; after the last step, waits for the rest."""
    self._copy_out(self.i, self.slot).start()
    self.refs.turn[0] = self.next

    @pl.when((self.j == self.f_tiles - 1) & (self.i == self.row_tiles - 1))
    def _():
      self._copy_out(self.i - 1, self.last).wait()
      self._copy_out(self.i, self.slot).wait()


# --- the kernel ---------------------------------------------------------------


def _bwd_kernel(*refs, names: tuple[str, ...], plan: _Plan):
  r = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
  # A float32 gradient is its own sum, and has no scratch for it.
  r.sums = {n: getattr(r, f"{n}_sum", getattr(r, n)) for n in plan.gradients}
  j, i = pl.program_id(0), pl.program_id(1)
  f_tiles, row_tiles = plan.grid
  travel = _Travel(r, plan) if plan.dx_travels else None
  if travel:
    travel.begin()
    slot = travel.slot
  else:
    slot = i if plan.slots > 1 else 0

  @pl.when(j == 0)
  def _():
    r.dx_sum[slot] = jnp.zeros(r.dx_sum.shape[1:], jnp.float32)

  r.factor = r.x if plan.norm is None else r.normed  # of the products
  _gate_gradients(r, plan)
  r.dx_sum[slot] += _dx(r, plan)
  _add_weight_gradients(r, plan)
  if travel:
    travel.end()

  @pl.when(j == f_tiles - 1)
  def _():
    r.dx[...] = _through_the_norm(r, r.dx_sum[slot], plan).astype(r.dx.dtype)

  @pl.when(i == row_tiles - 1)
  def _():
    for name, total in r.sums.items():
      out = getattr(r, name)
      if out is not total:
        out[...] = total[...].astype(out.dtype)


def _gate_gradients(r, plan: _Plan):
  """This tile's dgate and dup, and h for dWd, into VMEM."""
  p, dtype = plan.problem, r.x.dtype
  x = r.factor[...]
  if p.saved:
    gate, up = r.gate[...].astype(jnp.float32), r.up[...].astype(jnp.float32)
  else:
    gate, up = (dot(x, w[...].astype(dtype)) for w in (r.w_gate, r.w_up))
  if p.down:
    dh = dot(r.dy[...], r.w_down[...].astype(dtype), NT)
  else:
    dh = r.dh[...].astype(jnp.float32)
  a, da = activate_and_derive(plan.activation, gate)
  r.dgate[...] = _inside(dh * up * da, plan).astype(dtype)
  r.dup[...] = _inside(dh * a, plan).astype(dtype)
  if p.down:
    r.h[...] = _inside(a * up, plan).astype(dtype)


def _inside(tile: jax.Array, plan: _Plan) -> jax.Array:
  """A [rows, cols] tile with zeros where it hangs over the end of N or F."""
  return _inside_f(_inside_rows(tile, plan), plan, axis=1)


def _inside_rows(tile: jax.Array, plan: _Plan) -> jax.Array:
  n, rows = plan.problem.n, plan.tiles.rows
  past = n - pl.program_id(1) * rows
  return zero_past(tile, past, axis=0) if n % rows else tile


def _inside_f(tile: jax.Array, plan: _Plan, axis: int) -> jax.Array:
  f, cols = plan.problem.f, plan.tiles.cols
  return (
    zero_past(tile, f - pl.program_id(0) * cols, axis) if f % cols else tile
  )


def _dx(r, plan: _Plan) -> jax.Array:
  """This F tile's part of dx."""
  dtype = r.x.dtype
  w_gate, w_up = (
    _inside_f(w[...].astype(dtype), plan, axis=1) for w in (r.w_gate, r.w_up)
  )
  return dot(r.dgate[...], w_gate, NT) + dot(r.dup[...], w_up, NT)


def _add_weight_gradients(r, plan: _Plan):
  """Adds this row tile's part of each weight's gradient to its sum."""
  is_first = pl.program_id(1) == 0

  def add(name, part):
    # A selection costs nothing beside the product; to clear the sum would.
    total = r.sums[name]
    total[...] = jnp.where(is_first, 0.0, total[...]) + part

  x = _inside_rows(r.factor[...], plan)
  add("dw_gate", dot(x, r.dgate[...], TN))
  add("dw_up", dot(x, r.dup[...], TN))
  if plan.problem.down:
    add("dw_down", dot(r.h[...], _inside_rows(r.dy[...], plan), TN))


def _through_the_norm(r, dx: jax.Array, plan: _Plan) -> jax.Array:
  """The gradient of x from that of its norm, if it has one."""
  if plan.norm is not None:
    x = r.x[...].astype(jnp.float32)
    dx, dscale = plan.norm.gradients(x, r.scale[...], dx)
    part = jnp.sum(_inside_rows(dscale, plan), axis=0, keepdims=True)
    is_first = pl.program_id(1) == 0
    r.dscale[...] = jnp.where(is_first, 0.0, r.dscale[...]) + part
  if plan.residual:
    dx += r.dy[...].astype(jnp.float32)
  return dx


# --- the call -----------------------------------------------------------------


def backward(
  op: str,
  problem: Problem,
  tiles: Tiles,
  arrays: dict[str, jax.Array],
  *,
  activation: Activation,
  norm: RowNorm | None,
  residual: bool,
) -> tuple[jax.Array, ...]:
  """(dx, dWg, dWu), dWd where the op has it, dscale where it has a norm.

  Args:
    op: prefix of the kernel's name in a trace.
    problem: sizes and types.
    tiles: sizes of the tiles.
    arrays: x, w_gate and w_up; w_down and dy, or dh; scale and normed x of a
      norm; gate and up if saved.
    activation: the activation.
    norm: of x.
    residual: whether dy is a part of dx.
  """
  plan = _Plan(problem, tiles, activation, norm, residual)
  x = arrays["x"]
  specs = _specs(plan)
  outputs = {"dx": like(x.shape, x.dtype, x)}
  for name in plan.gradients:
    weight = arrays[name.removeprefix("d")]
    outputs[name] = like(weight.shape, weight.dtype, x)
  if norm is not None:
    outputs["dscale"] = like((1, problem.d), jnp.float32, x)
  if plan.dx_travels:
    rows = plan.grid[1] * tiles.rows
    outputs["dx_hbm"] = like((rows, problem.d), jnp.float32, x)
  scratch = _scratch(plan, outputs)
  names = (*arrays, *outputs, *scratch)
  call = pl.pallas_call(
    functools.partial(_bwd_kernel, names=names, plan=plan),
    name=f"{op}_bwd",
    grid=plan.grid,
    in_specs=[specs[name] for name in arrays],
    out_specs=[specs[name] for name in outputs],
    out_shape=list(outputs.values()),
    scratch_shapes=list(scratch.values()),
    compiler_params=COMPILER_PARAMS,
  )
  if plan.dx_travels:
    # A batch of kernels that copy by hand has to run one after the other.
    call = jax.custom_batching.sequential_vmap(call)
  results = call(
    *(a[None, :] if name == "scale" else a for name, a in arrays.items())
  )
  gradients = dict(zip(outputs, results, strict=True))
  gradients.pop("dx_hbm", None)
  if norm is not None:
    dscale = gradients["dscale"][0]
    gradients["dscale"] = dscale.astype(arrays["scale"].dtype)
  return tuple(gradients.values())


def _specs(plan: _Plan) -> dict[str, pl.BlockSpec]:
  rows, cols, d = plan.tiles.rows, plan.tiles.cols, plan.problem.d
  f_tiles = plan.grid[0]
  by_row = pl.BlockSpec((rows, d), lambda j, i: (i, 0))
  up = pl.BlockSpec((d, cols), lambda j, i: (0, j))
  down = pl.BlockSpec((cols, d), lambda j, i: (j, 0))
  both = pl.BlockSpec((rows, cols), lambda j, i: (i, j))
  gain = pl.BlockSpec((1, d), lambda j, i: (0, 0))
  # Of the last F tile alone; until then the block stays the first.
  at_last = pl.BlockSpec(
    (rows, d), lambda j, i: (jnp.where(j == f_tiles - 1, i, 0), 0)
  )
  return {
    "x": by_row if plan.norm is None else at_last,
    **dict.fromkeys(("normed", "dy"), by_row),
    **dict.fromkeys(("w_gate", "w_up", "dw_gate", "dw_up"), up),
    **dict.fromkeys(("w_down", "dw_down"), down),
    **dict.fromkeys(("gate", "up", "dh"), both),
    **dict.fromkeys(("scale", "dscale"), gain),
    "dx": at_last,
    "dx_hbm": pl.BlockSpec(memory_space=pl.ANY),
  }


def _scratch(plan: _Plan, outputs) -> dict[str, Any]:
  p, rows, cols = plan.problem, plan.tiles.rows, plan.tiles.cols
  tile = pltpu.VMEM((rows, cols), p.dtype)
  scratch: dict[str, Any] = dict.fromkeys(
    ("dgate", "dup", "h")[: p.weights], tile
  )
  scratch["dx_sum"] = pltpu.VMEM((plan.slots, rows, p.d), jnp.float32)
  for name in plan.gradients:
    if outputs[name].dtype != jnp.float32:
      shape = (cols, p.d) if name == "dw_down" else (p.d, cols)
      scratch[f"{name}_sum"] = pltpu.VMEM(shape, jnp.float32)
  if plan.dx_travels:
    scratch |= {
      "turn": pltpu.SMEM((1,), jnp.int32),
      "arrived": pltpu.SemaphoreType.DMA((_SLOTS,)),
      "left": pltpu.SemaphoreType.DMA((_SLOTS,)),
    }
  return scratch
