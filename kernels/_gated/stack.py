"""Weights of all layers in one array, of which an op uses one layer's.

A model that scans over its layers has them stacked: [L, D, F], [L, F, D].  To
hand a kernel one layer as an array of its own, XLA would copy it, at every step
of the scan.  So the kernel is given the stack, and the layer's index, which is
prefetched: the blocks of its weights, and of their gradients, are blocks of the
stack.  Of a gradient it writes one layer, in memory that it is given for the
whole of it, and so it does with what it keeps for the backward pass.

Experts' weights are in a stack as well, [E, D, F], of which the step's visit
says the place; with a layer's index they are in both, [L, E, D, F].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._frame.room import Form
from .._layers.turns import take
from .visits import visits_of

if TYPE_CHECKING:  # the records are of another page
  from .spec import Arrays, Outs, Problem

# --- in a kernel's call -------------------------------------------------------


class Scalars(NamedTuple):
  """What the index of a block may depend on, prefetched; or its refs."""

  layer: Any  # [1] int32, of weights in the layers' stack; None if in none
  visits: Any  # `Visits` of experts' weights; None if they are of all rows

  @classmethod
  def of(cls, a: Arrays, row_tile: int) -> Scalars:
    """Of an op's arrays, and how many rows a tile has."""
    layer = None if a.layer is None else a.layer.reshape(1)
    if a.group_sizes is None:
      return cls(layer, None)
    return cls(layer, visits_of(a.group_sizes, a.x.shape[0], row_tile))

  def expert(self, step: Any) -> Any:
    """Whose rows, at a step along them."""
    return self.visits.expert[step]

  def row_tile(self, step: Any) -> Any:
    """Which tile of the rows."""
    return step if self.visits is None else self.visits.tile[step]


def block_in_stack(
  shape: tuple[int, ...],
  index: Callable[..., Any],
  *,
  layers: bool = False,
  experts: bool = False,
) -> pl.BlockSpec:
  """A block of an array that is a layer's or an expert's, in their stack.

  Args:
    shape: of the block in the array.
    index: of the block there, from the grid's indices, the one along the rows
      last, and the `Scalars`.
    layers: whether there is a stack of all layers'.
    experts: whether there is one of all experts', in a layer's.
  """
  if not (layers or experts):
    return pl.BlockSpec(shape, index)

  def in_stack(*grid_and_scalars: Any) -> tuple[Any, ...]:
    _, step, scalars = grid_and_scalars  # only experts look at the step
    layer = (scalars.layer[0],) if layers else ()
    expert = (scalars.expert(step),) if experts else ()
    return *layer, *expert, *index(*grid_and_scalars)

  return pl.BlockSpec((*[None] * (layers + experts), *shape), in_stack)


def in_place(stacks: tuple[Any, ...]) -> tuple[Any, ...]:
  """The specs of stacks that a kernel writes to, as operands: none, in HBM."""
  stays = pl.BlockSpec(memory_space=pl.ANY)
  return tuple(None if stack is None else stays for stack in stacks)


def aliases(operands: Any, stacks: Any, first: int) -> dict[int, int]:
  """Of each stack, the last of the operands, its place among the results.

  It is the same memory, of which the kernel writes one layer.

  Args:
    operands: of the call.
    stacks: of these, the last.
    first: place of the first one among the results, which the others follow.
  """
  count = len(jax.tree.leaves(stacks))
  start = len(jax.tree.leaves(operands)) - count
  return {start + k: first + k for k in range(count)}


# --- gradients ----------------------------------------------------------------


PORTS = "port_gate", "port_up", "port_down"


def whose_gradients_leave_by_ports(a: Arrays) -> tuple[str, ...]:
  """The arrays that have no gradient of their own."""
  return tuple(
    port.replace("port", "w") for port in PORTS if getattr(a, port) is not None
  )


def apart(a: Arrays) -> tuple[Arrays, Mapping[str, Any]]:
  """The arrays with a layer's own weights, and what goes past it."""
  own, passing = a.of_one_layer(), {}
  for port in PORTS:
    if getattr(a, port) is None:
      continue
    name = port.replace("port", "w")
    weight, on = take(getattr(a, name), getattr(a, port), a.layer)
    own, passing[port] = own._replace(**{name: weight}), on
  gate, up, normed = stores_of(a)
  stores = dict(store_gate=gate, store_up=up, store_normed=normed)
  return own, passing | stores


def ports_of(a: Arrays, d: Outs) -> tuple[Any, Any, Any]:
  """What the gradients of a stack are written into, for each weight.

  The cotangents of its ports, else zeros; None for weights of no stack.
  """
  ports = d.port_gate, d.port_up, d.port_down
  if a.layer is None or d.port_gate is not None:
    return ports
  gate, up, down = (
    None if w is None else jnp.zeros_like(w)
    for w in (a.w_gate, a.w_up, a.w_down)
  )
  return gate, up, down


def put_gradients(grads: Arrays, a: Arrays, ports: Any) -> Arrays:
  """The gradients, with those of the weights in their places in the stack's.

  They stay as they are where there is None for a port.
  """
  own = grads.w_gate, grads.w_up, grads.w_down
  gate, up, down = (
    d if port is None else _put(a.layer, port, d)
    for port, d in zip(ports, own, strict=True)
  )
  return grads._replace(w_gate=gate, w_up=up, w_down=down)


def through_ports(grads: Arrays, d: Outs) -> Arrays:
  """The gradients, those of weights as those of their ports, if it has any."""
  if d.port_gate is None:
    return grads
  return grads._replace(
    w_gate=None,
    w_up=None,
    w_down=None,
    port_gate=grads.w_gate,
    port_up=grads.w_up,
    port_down=grads.w_down,
  )


def onward(grads: Arrays, d: Outs) -> Arrays:
  """The gradients as those of what goes from layer to layer, if anything does.

  To the layer before, the stores go on as they are.
  """
  return with_stores(through_ports(grads, d), d)


def _put(layer: jax.Array, stack: Any, own: Any) -> Any:
  """The stack with a layer's own array in its place; None if there is none."""
  if stack is None or own is None:
    return None
  return jax.lax.dynamic_update_index_in_dim(stack, own, layer, 0)


# --- what is kept -------------------------------------------------------------


def stores_of(record: Any) -> tuple[Any, Any, Any]:
  """The stores of arrays or results."""
  return record.store_gate, record.store_up, record.store_normed


def kept_in_room(p: Problem, a: Arrays) -> dict[str, Form]:
  """Beside what the kernel writes itself, x, which XLA does."""
  in_scan = a.port_gate is not None and p.keeps_products
  return {"x": Form(lambda x: x, lambda x: x)} if in_scan else {}


def put_all(layer: jax.Array, stacks: Any, own: Any) -> tuple[Any, ...]:
  """Stacks with a layer's own arrays in their places."""
  return tuple(map(functools.partial(_put, layer), stacks, own))


def take_all(layer: jax.Array, stacks: Any) -> tuple[Any, ...]:
  """A layer's own arrays, of stacks."""
  take = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
  return tuple(None if s is None else take(s, layer) for s in stacks)


def with_stores(grads: Arrays, d: Outs) -> Arrays:
  """The gradients; to the layer before, the stores go on as they are."""
  gate, up, normed = stores_of(d)
  return grads._replace(store_gate=gate, store_up=up, store_normed=normed)
