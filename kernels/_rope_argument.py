"""`Rope`, by which an op is told to rotate what it reads; see `_rope`."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding that an op applies where it reads its inputs.

  Attributes:
    positions: [B, T] integers, of queries and keys alike.
    base_frequency: the base of the geometric series of wavelengths.  Among the
      arguments of a `jit`, a number is known when it is traced, and a scalar
      array is data.
  """

  positions: jax.Array
  base_frequency: float | jax.Array = 10_000.0


def _flatten(rope: Rope) -> tuple[tuple[Any, ...], Any]:
  if isinstance(rope.base_frequency, numbers.Real):
    return (rope.positions,), rope.base_frequency
  return (rope.positions, rope.base_frequency), None


def _unflatten(base: Any, children: tuple[Any, ...]) -> Rope:
  return Rope(*children) if base is None else Rope(children[0], base)


jax.tree_util.register_pytree_node(Rope, _flatten, _unflatten)
