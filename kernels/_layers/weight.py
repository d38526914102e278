"""What the body of a scan over layers gets in place of a weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .turns import skip, take


class LayerOf:
  """One layer's weight, in the stack of all layers'.

  `geglu`, `feed_forward` and `expert_feed_forward` take it in place of an array
  and read the stack.  To anything else it is the array [...] of the layer: a
  slice of the stack, as a scan would have made it.  It can be used once by a
  kernel or as an array, and only by the body that it is given to, not in a
  `jax.checkpoint` or `jax.jit` inside of it.

  Attributes:
    stack: [L, ...], the weights of all layers; its gradient is the port's.
    index: [] int32, the layer.
    shape: of the layer's weight.
    dtype: of the weight.
    asked: what of a layer the op that uses it would keep in stores.
  """

  def __init__(
    self,
    stack: jax.Array,
    port: jax.Array,
    index: jax.Array,
    stores: list[jax.Array],
  ):
    self.stack, self.index = stack, index
    self.shape, self.dtype = stack.shape[1:], stack.dtype
    self.asked: list[jax.ShapeDtypeStruct] = []
    self._port, self._is_used = port, False
    self._stores = stores
    self._own: jax.Array | None = None

  @property
  def ndim(self) -> int:
    """How many dimensions the layer's weight has."""
    return len(self.shape)

  def use_port(self) -> jax.Array:
    """The port, for an op whose result it becomes; `return_port` ends it.

    Raises:
      ValueError: if the weight has been used before.
    """
    if self._is_used:
      raise ValueError(
        "scan_layers: a layer's weight that stays in its stack must be used "
        "once, got a second use; leave it out of in_place"
      )
    self._is_used = True
    return self._port

  def return_port(self, port: jax.Array) -> None:
    """Sets the port to what the op made of it."""
    self._port = port

  def stores(self, kept: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """Stacks for what an op keeps of a layer; empty if there are to be none."""
    self.asked = kept
    return self._stores

  def return_stores(self, stores: list[Any]) -> None:
    """Sets the stores to what the op made of them, None for none."""
    self._stores = [store for store in stores if store is not None]

  def take(self) -> jax.Array:
    """The layer's weight as an array of its own, which XLA copies or fuses."""
    if self._own is not None:
      return self._own
    own, port = take(self.stack, self.use_port(), self.index)
    self._own = own
    self.return_port(port)
    return own

  def closed(self) -> tuple[jax.Array, list[jax.Array]]:
    """The port and the stores, past this layer."""
    port = self._port if self._is_used else skip(self._port, self.index)
    return port, self._stores

  def astype(self, dtype: Any) -> jax.Array:
    """As an array of its own, of another dtype."""
    return self.take().astype(dtype)

  def __jax_array__(self) -> jax.Array:
    return self.take()

  def __getitem__(self, key: Any) -> Any:
    return self if key is Ellipsis else self.take()[key]


def cast_here(weight: jax.Array, dtype: Any) -> jax.Array:
  """weight.astype(dtype), where it stands, also in a loop over layers.

  XLA takes a conversion out of the loop, through the slice that a layer is of
  the weights of all.  These it casts before the loop, and holds the second copy
  until the backward pass has ended.  A rounding it leaves where it is, and what
  is rounded already, the conversion does not change.
  """
  if (weight.dtype, jnp.dtype(dtype)) == (jnp.float32, jnp.bfloat16):
    bits = jnp.finfo(dtype)
    weight = jax.lax.reduce_precision(weight, bits.nexp, bits.nmant)
  return weight.astype(dtype)
