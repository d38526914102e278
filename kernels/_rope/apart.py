"""Page 8: rotations that attention's own kernels do not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from .spec import Rope, rotation_of


def rotated_apart(
  rope: Rope | None,
  rotate: Callable[..., jax.Array],
  *arrays: Any,
  **options: Any,
) -> tuple[Any, ...]:
  """(rope, *arrays) for an op that knows plain rotations alone.

  Of a plain rope, or none, as they came.  Of another, no rope, and arrays that
  `rotate`, `apply_rope` or its reference, has rotated; None stays None.
  """
  if rope is None or rope.is_plain:
    return rope, *arrays
  of = rotation_of(rotate, rope, **options)
  return None, *(x if x is None else of(x) for x in arrays)
