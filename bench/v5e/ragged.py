"""XLA's own kernel of `jax.lax.ragged_dot`: which tiles of rows it visits.

It is given tables that another kernel makes of the group sizes, so that its
cycles follow from these.  A tile of rows is visited once for every group that
has rows in it, as JAX's megablox does it, whose kernel it is.
"""

from __future__ import annotations

import re

import numpy as np

# Rows, and what is summed over and columns, of its tiles.
_TILING = re.compile(r'ragged_dot_tiling="(\d+),')
_VISITS = re.compile(r"s32\[1\][^,]*, s32\[\d+\][^,]*, s32\[(\d+)\]")

PRODUCT, TABLES = "ragged-dot-none", "ragged-dot-metadata"


def operands_of(text: str, sizes: np.ndarray) -> dict[int, np.ndarray] | None:
  """The integer operands of the kernel that an instruction calls.

  Args:
    text: of the instruction.
    sizes: [groups], how many rows each has.

  Returns:
    How many visits there are, where groups begin, and of each visit the group
    and the tile; by their places.  None if the text has no tiling.
  """
  tiling, visits = _TILING.search(text), _VISITS.search(text)
  if tiling is None or visits is None:
    return None
  tile, room = int(tiling[1]), int(visits[1])
  starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
  pairs = [
    (group, at)
    for group, size in enumerate(sizes)
    if size
    for at in range(starts[group] // tile, (starts[group + 1] - 1) // tile + 1)
  ]
  table = np.zeros((2, room), np.int32)
  table[:, : len(pairs)] = np.transpose(pairs)
  table[:, len(pairs) :] = table[:, len(pairs) - 1 : len(pairs)]
  count = np.full(1, len(pairs), np.int32)
  return {0: count, 1: starts, 2: table[0], 3: table[1], 4: count}
