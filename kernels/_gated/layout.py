"""How the weights lie in memory, and what products they make there.

                 w_gate, w_up    w_down    both branches in one array
    as is        [D, F]          [F, D]    [2, D, F]    [D, 2F]
    transposed   [F, D]          [D, F]    [2, F, D]    [2F, D]

The kernels read each where it lies.  A tile of [2, D, F] has both branches, and
so has that of its gradient.  [D, 2F] is read twice, in tiles of either half,
which lie F / cols tiles apart; of its gradient a kernel writes the halves, and
XLA puts them together.  [2F, D] is [2, F, D] in the same memory.

A transposed weight changes which dimension a product sums over, and the matrix
unit takes either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._frame import tpu

Form = Literal["apart", "fused", "columns", "ungated"]


@dataclasses.dataclass(frozen=True)
class Layout:
  """How they lie.

  Attributes:
    form: "apart", gate and up are two arrays; "fused", one, [2, D, F];
      "columns", one, [D, 2F], which is never transposed; "ungated", there is
      but one branch, the activated one.
    transposed: whether F comes before D.
  """

  form: Form = "apart"
  transposed: bool = False

  @property
  def branches(self) -> int:
    """How many there are."""
    return 1 if self.form == "ungated" else 2

  def width(self, w_gate: Any) -> int:
    """F."""
    f = w_gate.shape[-2 if self.transposed else -1]
    return f // 2 if self.form == "columns" else f

  def describe(self) -> str:
    """The dimensions of w_gate, for errors."""
    one = "F, D" if self.transposed else "D, F"
    return {"fused": f"2, {one}", "columns": "D, 2F"}.get(self.form, one)

  def letters(self) -> tuple[str | None, str | None, str]:
    """Of the dimensions of w_gate, w_up and w_down.

    Of [D, 2F] there are none for the columns, which cannot be split.
    """
    up, down = ("Fd", "dF") if self.transposed else ("dF", "Fd")
    by_form = {"fused": f"-{up}", "columns": "d-"}
    is_apart = self.form == "apart"
    return by_form.get(self.form, up), up if is_apart else None, down

  def take(self, w_gate: Any, w_up: Any) -> tuple[Any, Any]:
    """Both branches' weights, of arrays or quantised; None for no branch."""
    if self.form == "fused":
      return w_gate[0], w_gate[1]
    if self.form == "columns":
      f = self.width(w_gate)
      return w_gate[..., :f], w_gate[..., f:]
    return w_gate, w_up

  # --- in a kernel ------------------------------------------------------------

  def refs(self, w_gate: Any, w_up: Any) -> tuple[Any, Any]:
    """Both branches' weights, of refs of tiles."""
    if self.form == "fused":
      return w_gate.at[0], w_gate.at[1]
    return w_gate, w_up

  @property
  def f_axis(self) -> int:
    """Of F in a tile of a weight of gate or up; that of down has the other."""
    return 0 if self.transposed else 1

  def times(self, a: jax.Array, w: jax.Array) -> jax.Array:
    """A product with a weight: x Wg, or h Wd."""
    return tpu.dot(a, w, tpu.NT if self.transposed else tpu.NN)

  def back(self, a: jax.Array, w: jax.Array) -> jax.Array:
    """One with its transpose: dgate Wg^T, or dy Wd^T."""
    return tpu.dot(a, w, tpu.NN if self.transposed else tpu.NT)

  def gradient(self, a: jax.Array, d: jax.Array) -> jax.Array:
    """A weight's gradient: x^T dgate, or h^T dy."""
    return tpu.dot(d, a, tpu.TN) if self.transposed else tpu.dot(a, d, tpu.TN)

  def gate_and_up(self, x: jax.Array, i: Any) -> tuple[jax.Array, Any]:
    """Both branches of a tile, float32; None for no branch.

    Args:
      x: the rows.
      i: a record of refs with w_gate, w_up, b_gate and b_up.
    """
    w_gate, w_up = self.refs(i.w_gate, i.w_up)
    gate = _plus(self.times(x, w_gate[...].astype(x.dtype)), i.b_gate)
    if w_up is None:
      return gate, None
    return gate, _plus(self.times(x, w_up[...].astype(x.dtype)), i.b_up)

  # --- blocks -----------------------------------------------------------------

  def gate_shape(self, d: int, cols: int) -> tuple[int, ...]:
    """Of a tile of w_gate."""
    shape = (cols, d) if self.transposed else (d, cols)
    return (2, *shape) if self.form == "fused" else shape

  def down_shape(self, d: int, cols: int) -> tuple[int, int]:
    """Of a tile of w_down."""
    return (d, cols) if self.transposed else (cols, d)

  def gate_index(self, j: Any) -> tuple[Any, ...]:
    """Of the j-th tile of w_gate, or of w_up where it is an array."""
    index = (j, 0) if self.transposed else (0, j)
    return (0, *index) if self.form == "fused" else index

  def up_index(self, f_tiles: int) -> Callable[[Any], tuple[Any, ...]]:
    """Of the j-th tile of w_up, as it is read."""
    start = f_tiles if self.form == "columns" else 0
    return lambda j: self.gate_index(j + start if start else j)

  def down_index(self, j: Any) -> tuple[Any, Any]:
    """Of the j-th tile of w_down."""
    return (0, j) if self.transposed else (j, 0)


def _plus(product: jax.Array, bias: Any) -> jax.Array:
  return product if bias is None else product + bias[...].astype(jnp.float32)
