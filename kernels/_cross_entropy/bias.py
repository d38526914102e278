"""A bias of the logits, and its gradient, inside the kernels.

In HBM it is [1, V], words along the lanes; beside a tile of logits,
[vocab_block, rows], it is wanted in sublanes.  Its gradient is the sum of dz
over the rows, which are lanes there: registers are added to each other first,
and the lanes of what is left once for a block of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._frame import tpu
from .spec import RowArrays


def bias_row(a: RowArrays) -> Any:
  """The bias as an operand, [1, V] float32; None for none."""
  return None if a.bias is None else a.bias.astype(jnp.float32)[None]


def bias_block(a: RowArrays, block: int, index: Callable[..., Any]) -> Any:
  """Of it, and of its gradient; `index` is of the grid's indices."""
  if a.bias is None:
    return None
  return pl.BlockSpec((1, block), lambda *grid: (0, index(*grid)))


def plus_bias(product: jax.Array, bias: Any) -> jax.Array:
  """Logits [vocab_block, chunk] with a ref of their words' bias, or None."""
  if bias is None:
    return product
  return product + tpu.across(bias[...], product.shape[1])


def start_bias(i: Any, s: Any) -> None:
  """The block's bias beside its words, and no gradient of it as yet."""
  if s.bias is not None:
    s.bias[...] = tpu.lanes_to_column(i.bias[...])
  if s.db is not None:
    s.db[...] = jnp.zeros_like(s.db)


def add_lanes(dz: jax.Array) -> jax.Array:
  """[vocab_block, LANES]: a tile's registers along the rows, added up."""
  parts = [dz[:, r : r + tpu.LANES] for r in range(0, dz.shape[1], tpu.LANES)]
  return sum(parts[1:], parts[0])


def finish_bias(o: Any, s: Any) -> None:
  """The gradient of a block's bias, its words along the lanes."""
  for w in range(0, s.db.shape[0], tpu.LANES):
    words = s.db[w : w + tpu.LANES, :].T
    o.db[:, w : w + tpu.LANES] = jnp.sum(words, axis=0, keepdims=True)
