"""The forms in which weights and biases may come, brought to a `Layout`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._frame.check import as_floats, check_shape
from .._layers import LayerOf
from .._quantized import QuantizedWeight
from .layout import Layout
from .spec import Arrays, of_layer


def formed(op: str, given: Any, transposed: bool) -> tuple[Any, Layout]:
  """The weights by their places in `Arrays`, and how they lie.

  Both branches in one array without a dimension for them, [D, 2F] or [2F, D],
  are one layer's: of a stack it is taken out.
  """
  gate, up, stacked = given.w_gate, given.w_up, given.layer is not None
  if gate is None:
    if up is None:
      raise ValueError(f"{op}: w_gate or w_up must be given, got None for both")
    return given._replace(w_gate=up, w_up=None), Layout("ungated", transposed)
  if up is not None:
    return given, Layout("apart", transposed)
  ndim = gate.ndim if isinstance(gate, LayerOf) else _ndim(gate) - stacked
  if ndim != 2:
    return given, Layout("fused", transposed)
  given = _taken(op, given)
  if not transposed:
    return given, Layout("columns")
  return given._replace(w_gate=_by_branch(given.w_gate)), Layout("fused", True)


def _ndim(weight: Any) -> int:
  known = getattr(weight, "ndim", None)
  return jnp.ndim(weight) if known is None else known


def _taken(op: str, given: Any) -> Any:
  """One layer's own weights and biases, of what may be stacks."""
  if given.layer is None and not given.in_place():
    return given

  def take(name: str, w: Any) -> Any:
    if w is None or isinstance(w, LayerOf):
      return None if w is None else w.take()
    if not isinstance(w, QuantizedWeight):
      (w,) = as_floats(op, **{name: w})
    return of_layer(w, given.layer)

  own = {
    name: take(name, w)
    for name, w in given._asdict().items()
    if name != "layer"
  }
  return given._replace(layer=None, **own)


def _by_branch(weight: Any) -> Any:
  """[2F, D] as [2, F, D], which is the same in memory."""
  if not isinstance(weight, QuantizedWeight):
    weight = jnp.asarray(weight)
  if weight.shape[0] % 2:
    return weight  # whose shape is refused
  return jax.tree.map(lambda w: w.reshape(2, -1, w.shape[-1]), weight)


def biases(
  op: str, layout: Layout, arrays: Arrays, given: Any
) -> Mapping[str, Any]:
  """The biases by their fields in `Arrays`: one layer's, and checked.

  Beside a `LayerOf` they are a layer's own, as the scan gives them.
  """
  names = "b_gate", "b_up", "b_down"
  found = {n: b for n in names if (b := getattr(given, n)) is not None}
  taken = {
    n: b.take() if isinstance(b, LayerOf) else b for n, b in found.items()
  }
  own = dict(zip(taken, as_floats(op, **taken), strict=True))
  if arrays.layer is not None and not given.in_place():
    for name, bias in own.items():
      _check_stack(op, name, bias, arrays.w_gate.shape[0])
      own[name] = of_layer(bias, arrays.layer)
  f, both = layout.width(arrays.w_gate), "b_gate" in own and "b_up" not in own
  if layout.form in ("fused", "columns") and both and own["b_gate"].size != f:
    if own["b_gate"].shape not in ((2, f), (2 * f,)):
      raise ValueError(
        f"{op}: b_gate must be {(2, f)} or {(2 * f,)}, as w_gate has both "
        f"branches, got {own['b_gate'].shape}"
      )
    own["b_gate"], own["b_up"] = own["b_gate"].reshape(2, f)
  if layout.form == "ungated":
    if "b_gate" in own:
      raise ValueError(
        f"{op}: b_gate must be None where w_gate is, got an array"
      )
    if "b_up" in own:
      own["b_gate"] = own.pop("b_up")
      check_shape(op, "b_up", own["b_gate"], (f,), "F")
  for name, bias in own.items():
    is_down = name == "b_down"
    length = arrays.x.shape[-1] if is_down else f
    check_shape(op, name, bias, (length,), "D" if is_down else "F")
  return own


def _check_stack(op: str, name: str, bias: jax.Array, layers: int) -> None:
  if bias.ndim == 0 or bias.shape[0] != layers:
    raise ValueError(
      f"{op}: {name} must be stacked over {layers} layers, as the weights are, "
      f"got {bias.shape}"
    )
