"""The form that weights are computed with: the compute dtype, or int8."""

from __future__ import annotations

from typing import Any

import jax

from .ops import QuantizedWeight

_CONTRACTED: dict[str, tuple[int, ...]] = {
  "embedding": (-1,),  # [V, D], in the product with it
  "q": (-2,),  # [L, N, D, H]
  "kv": (-2,),  # [L, 2, K, D, H]
  "out": (-3, -2),  # [L, N, H, D]
  "gate": (-2,),  # [L, D, F]
  "up": (-2,),
  "down": (-2,),  # [L, F, D]
}
"""The matrices, by their names, and the dimensions that products with them sum
over: in int8 they have a scale for each place in the others."""


def cast_weights(model: Any, dtype: Any) -> Any:
  """A model whose matrices are of a dtype, but for those in int8."""

  def cast(path: Any, x: Any) -> Any:
    return x if is_norm_scale(path) or is_quantized(x) else x.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, model, is_leaf=is_quantized)


def quantize_weights(model: Any) -> Any:
  """A model whose matrices are in int8."""

  def quantize(path: Any, x: Any) -> Any:
    names = [name_of(key) for key in path if name_of(key) != "value"]
    if names[-1] not in _CONTRACTED or is_quantized(x):
      return x
    return QuantizedWeight.quantize(x, _CONTRACTED[names[-1]])

  return jax.tree_util.tree_map_with_path(quantize, model, is_leaf=is_quantized)


def is_quantized(x: Any) -> bool:
  """Whether a weight is in int8."""
  return isinstance(x, QuantizedWeight)


def is_norm_scale(path: tuple[Any, ...]) -> bool:
  """Whether the parameter at a pytree path is the scale of a norm.

  Known by its name, since its shape does not tell: stacked over the layers,
  the scales of norms have two dimensions, as matrices have.
  """
  return any(name_of(key).endswith("norm") for key in path)


def name_of(key: Any) -> str:
  """Of a step of a pytree path."""
  return str(getattr(key, "key", getattr(key, "name", key)))
