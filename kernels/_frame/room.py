"""Room for what ops keep in a scan over layers.

A scan copies what a layer keeps for its backward pass into stacks, and there
slices it out of them, for nothing where XLA's own products write and read it;
but what a kernel reads is an array that lies in memory, so that XLA makes one.
In a `scan_layers` an op finds room: stacks of all layers, the stores, to which
it adds its own part, and of which its backward kernel gets the whole, and the
layer's index.

Every op also saves what it saves without a room, which its reference reads, and
`jax.jvp`.  Where the kernel reads the stores instead, nothing reads that, and
XLA drops it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.extend.core
from jax.experimental import pallas as pl

# In `jax.core` up to JAX 0.10, deprecated there since.
_trace_state: Any = getattr(
  jax.extend.core, "get_opaque_trace_state", None
) or getattr(jax.core, "get_opaque_trace_state")  # noqa: B009


class Form(NamedTuple):
  """How an array lies in a store.

  Attributes:
    make: of the array, a layer's part of the store.
    back: the inverse.
  """

  make: Callable[[Any], Any]
  back: Callable[[Any], Any]


class Places(NamedTuple):
  """Where an op's arrays go, or lie, by the names of fields of its records."""

  layer: Any  # [] int32, which of the stacks' parts
  stacks: Mapping[str, Any]  # [L, ...]

  def put(
    self, forms: Mapping[str, Form], arrays: Any, outs: Any
  ) -> Mapping[str, Any]:
    """The stacks with a layer's arrays in their places."""
    fields, at = arrays._asdict() | outs._asdict(), self.layer
    return {
      name: jax.lax.dynamic_update_index_in_dim(
        stack, forms[name].make(fields[name]), at, 0
      )
      for name, stack in self.stacks.items()
    }


class Lying(NamedTuple):
  """An array that lies in a store too.

  Attributes:
    place: of the store among all.
    store: the store.
    back: makes it of the layer's part of the store.
  """

  place: int
  store: Any
  back: Callable[[Any], Any]


class Room:
  """The room of one layer, while its ops are traced.

  Attributes:
    layer: [] int32, its index.
    stores: the stacks, in the order in which ops asked for them; none while it
      is found out what they ask for.
    asked: types of what ops put in.
  """

  def __init__(self, layer: Any, stores: list[Any]):
    self.layer, self.stores = layer, stores
    self.asked: list[jax.ShapeDtypeStruct] = []
    self._lying: list[tuple[Any, int, Callable[[Any], Any]]] = []
    self._trace = _trace_state()

  def is_here(self) -> bool:
    """Whether its stores can be used: not inside of another trace."""
    return self._trace == _trace_state()

  def places(
    self, types: Mapping[str, jax.ShapeDtypeStruct]
  ) -> tuple[int, Places | None]:
    """Where an op's stores begin among all, and these; None if there are none.

    Args:
      types: of a layer's part of each.
    """
    start, names = len(self.asked), sorted(types)
    self.asked += [types[name] for name in names]
    stores = self.stores[start : len(self.asked)]
    if not stores:
      return start, None
    return start, Places(self.layer, dict(zip(names, stores, strict=True)))

  def fill(self, start: int, stacks: Mapping[str, Any]) -> None:
    """Sets stores to what an op made of them."""
    filled = [stacks[name] for name in sorted(stacks)]
    self.stores[start : start + len(filled)] = filled

  def note(self, array: Any, place: int, back: Callable[[Any], Any]) -> None:
    """Remembers that `array` is back(a layer's part of the store there)."""
    if place < len(self.stores):
      self._lying.append((array, place, back))

  def renamed(self, new: Any, old: Any, move: Callable[[Any], Any]) -> None:
    """Remembers that `new` is move(old), if it is known where `old` lies."""
    found = self.find(old)
    if found is not None and new is not old:
      back = found.back
      self.note(new, found.place, lambda part: move(back(part)))

  def find(self, array: Any) -> Lying | None:
    """Where an array lies, None if in no store."""
    for known, place, back in self._lying:
      if known is array:
        return Lying(place, self.stores[place], back)
    return None


_ROOM: contextvars.ContextVar[Room | None] = contextvars.ContextVar(
  "room", default=None
)


@contextlib.contextmanager
def room_of(layer: Any, stores: list[Any]) -> Iterator[Room]:
  """The room that ops find meanwhile."""
  room = Room(layer, stores)
  token = _ROOM.set(room)
  try:
    yield room
  finally:
    _ROOM.reset(token)


def current() -> Room | None:
  """The room, if there is one here."""
  room = _ROOM.get()
  return room if room is not None and room.is_here() else None


def block_of_layer(spec: pl.BlockSpec) -> pl.BlockSpec:
  """A block of a layer's array, in the stack.

  The call's last prefetched scalars have the field `layer`, [1] int32.
  """

  shape, index_map = spec.block_shape, spec.index_map
  assert shape is not None and index_map is not None

  def index(*grid_and_scalars: Any) -> tuple[Any, ...]:
    own = index_map(*grid_and_scalars)
    return grid_and_scalars[-1].layer[0], *own

  return pl.BlockSpec((None, *shape), index, pipeline_mode=spec.pipeline_mode)
