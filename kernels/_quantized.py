"""Weights in int8, to which activations of 16 bits are multiplied (W8A16).

    y = x W        is computed as        (x values) * scale

where values are int8, cast to x's dtype in which they are exact, and there is
one scale for each output channel.  With few rows a product takes the time in
which its weight is read, and this one has half the bytes.

It is the one product here that is not a Pallas kernel.  XLA reads int8, casts
it on the way to the matrix unit, and takes a layer out of a stack in the same
pass: by its compiled programs within 5 % of the bandwidth of HBM at 1 to 64
rows, so a kernel has nothing to win.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ._frame import switches
from ._frame.check import as_array, as_whole_number

_OP = "QuantizedWeight"

_MOST = 127.0  # of an int8, either way
_TILE = 32  # rows of an int8 array in a tile of memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
  """A weight in int8, with a scale per output channel.

  The number is value * scale.  `feed_forward`, `geglu` and `layer_einsum` take
  it in place of an array.  Their result can be differentiated by what the
  weight is multiplied to; the weight itself has no gradient.

  It is a pytree of both arrays.  A stack of layers [L, ...] is one too, and
  `jax.lax.scan` takes the layers out of it.

  Attributes:
    values: int8, of the weight's shape.
    scale: float32, of the same shape but 1 in the dimensions that a product
      sums over: [1, F] for a weight [D, F].
  """

  values: jax.Array
  scale: jax.Array

  @classmethod
  @switches.plain
  def quantize(
    cls, weight: jax.Array, contracted: int | tuple[int, ...] = -2
  ) -> QuantizedWeight:
    """The nearest numbers that 8 bits and the scales can hold.

    The largest magnitude of an output channel becomes 127, so the error of a
    weight is at most 1/254 of it.  Infinity and NaN have no such number: what
    becomes of a channel that has one is not defined.

    Args:
      weight: [..., D, F] of any float dtype, or any shape.
      contracted: the dimensions that a product with it sums over; by default
        that of D.

    Raises:
      ValueError: if the weight is no array of floats, or has no such dimension.
    """
    weight = as_array(_OP, "weight", weight)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
      raise ValueError(
        f"QuantizedWeight: weight must be floats, got {weight.dtype}"
      )
    given = contracted if isinstance(contracted, tuple | list) else [contracted]
    axes = tuple(as_whole_number(_OP, "contracted", axis) for axis in given)
    known = all(-weight.ndim <= axis < weight.ndim for axis in axes)
    if (
      not axes or not known or len({a % weight.ndim for a in axes}) < len(axes)
    ):
      raise ValueError(
        f"QuantizedWeight: contracted must be dimensions of the weight, which "
        f"has {weight.ndim}, got {contracted}"
      )
    return cls(*to_int8(weight, axes))

  @switches.plain
  def astype(self, dtype: Any) -> jax.Array:
    """The weight as an array of a float dtype, rounded to it once."""
    wide = self.values.astype(jnp.float32) * self.scale
    return wide.astype(dtype)

  @property
  def shape(self) -> tuple[int, ...]:
    """The weight's."""
    return self.values.shape

  @property
  def ndim(self) -> int:
    """How many dimensions the weight has."""
    return len(self.shape)

  def __getitem__(self, index: Any) -> QuantizedWeight:
    """Rows of the weight, if no sum is over its first dimension."""
    return QuantizedWeight(_rows(self.values, index), self.scale[index])

  def of_arrays(self) -> QuantizedWeight:
    """Of arrays, where `scan_layers` gave something in their place."""
    parts = dict(values=self.values, scale=self.scale)
    return QuantizedWeight(*(as_array(_OP, n, x) for n, x in parts.items()))


def to_int8(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """int8 values of x's shape, and float32 scales that are 1 along some axes.

  The number is value * scale.  The largest magnitude along these axes becomes
  127; the others are rounded to the nearest.
  """
  wide = x.astype(jnp.float32)
  top = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
  # Of zeros, zeros: there is nothing to divide by.
  inverse = jnp.where(top > 0, _MOST / jnp.where(top > 0, top, 1.0), 0.0)
  return jnp.round(wide * inverse).astype(jnp.int8), top * (1 / _MOST)


def _rows(values: jax.Array, index: Any) -> jax.Array:
  """values[index].

  int8 lies in memory in tiles of 32 rows, from which XLA does not take a single
  row: it copies the whole array into tiles of 8 first.  So one row, a token of
  a decoding step, is taken out of its tile here.
  """
  rows, *rest = values.shape
  is_one = isinstance(index, jax.Array) and index.size == 1
  if not is_one or not rest or rows % _TILE:
    return values[index]
  tiles = values.reshape(rows // _TILE, _TILE, *rest)
  tile = tiles[index // _TILE].reshape(_TILE, *rest)
  # Without it XLA would see through this.
  tile = jax.lax.optimization_barrier(tile)
  row = jax.lax.dynamic_index_in_dim(tile, (index % _TILE).reshape(()))
  return row.reshape(*index.shape, *rest)


def check_quantized(
  op: str, name: str, weight: QuantizedWeight, contracted: tuple[int, ...]
) -> None:
  """Refuses what is not int8, or has its scales along other dimensions."""
  axes = {axis % weight.ndim for axis in contracted}
  wanted = tuple(1 if i in axes else n for i, n in enumerate(weight.shape))
  if weight.values.dtype != jnp.int8 or weight.scale.shape != wanted:
    raise ValueError(
      f"{op}: {name} must have int8 values, and scales {wanted}, 1 where the "
      f"product sums, got {weight.values.dtype} and {weight.scale.shape}"
    )


def quantized_einsum(
  subscripts: str, x: jax.Array, weight: QuantizedWeight
) -> jax.Array:
  """`jnp.einsum(subscripts, x, weight)` in float32 at least, unrounded.

  An ellipsis of x comes first.

  Raises:
    ValueError: if a scale is along a dimension that the product sums over.
  """
  weight = weight.of_arrays()
  letters = subscripts.replace(" ", "").replace("...", "")
  of_x, of_weight, out = letters.replace("->", ",").split(",")
  summed = tuple(i for i, c in enumerate(of_weight) if c not in out)
  check_quantized("layer_einsum", "the weight", weight, summed)
  # In an order that XLA has for all dtypes on all platforms; `out` may be any.
  first = "".join(c for c in of_x if c in out)
  first += "".join(c for c in of_weight if c in out and c not in of_x)
  more = "..." if "..." in subscripts else ""
  y = jnp.einsum(
    f"{more}{of_x},{of_weight}->{more}{first}",
    x,
    weight.values.astype(x.dtype),
    preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
  )
  order = [of_weight.index(c) for c in first if c in of_weight]
  scale = weight.scale.transpose(*order, *summed)
  sizes = dict(zip(of_weight, weight.shape, strict=True))
  y *= scale.reshape([sizes.get(c, 1) for c in first])
  lead = range(y.ndim - len(first))
  return y.transpose(*lead, *(len(lead) + first.index(c) for c in out))
