"""Page 15: an order of tokens in which all devices of a ring have equal work.

Under a causal mask the last tokens see many keys and the first ones few.  Of 2
n chunks, device i of n has the chunks i and 2 n - 1 - i, so that what one of
them lacks the other has.  With n = 4:

    device    0      1      2      3
    chunks   0 7    1 6    2 5    3 4
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._frame.check import as_switch, as_whole_number


def context_order(
  length: int, parts: int, *, inverse: bool = False
) -> np.ndarray:
  """The order in which tokens are split over devices by their context.

  `x[:, context_order(T, n)]` has the tokens of x [B, T] so that each of n equal
  parts has one chunk from the front and one from the end: then all n devices
  have equal work in causal `flash_attention(..., context_parts=n)`.  Labels,
  positions and segment ids are put in the same order.

  Zig-zag order: Brandon et al., Striped Attention, arXiv 2311.09431, has the
  reason; this one, with two chunks, is that of Llama 3, arXiv 2407.21783.

  Args:
    length: T, a multiple of 2 `parts`; or of anything with 1 part.
    parts: n, over how many devices T is split; 1 is the order of time.
    inverse: whether the order is wanted that leads back.

  Returns:
    [T] int32, a permutation.

  Raises:
    ValueError: if T is not such a multiple.
  """
  op = "context_order"
  length, parts = (
    as_whole_number(op, name, number)
    for name, number in (("length", length), ("parts", parts))
  )
  inverse = as_switch(op, "inverse", inverse)
  check_parts(op, length, parts)
  index = np.arange(length, dtype=np.int32)
  if parts == 1:
    return index
  chunks = _chunks(parts)
  if inverse:
    chunks = np.argsort(chunks)
  return index.reshape(2 * parts, -1)[chunks].reshape(length)


def check_parts(op: str, length: int, parts: Any) -> None:
  """Whether so many tokens are so many parts, of two chunks each."""
  if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
    raise ValueError(f"{op}: parts must be a positive integer, got {parts!r}")
  if parts > 1 and length % (2 * parts):
    raise ValueError(
      f"{op}: wanted a length that is a multiple of 2 x {parts} parts, got "
      f"{length}"
    )


def reordered(
  x: jax.Array, parts: int, axis: int, *, inverse: bool = False
) -> jax.Array:
  """An array whose axis is put in that order, or back in the order of time."""
  chunks = _chunks(parts)
  if inverse:
    chunks = np.argsort(chunks)
  shape = x.shape
  split = (*shape[:axis], 2 * parts, -1, *shape[axis + 1 :])
  return jnp.take(x.reshape(split), chunks, axis=axis).reshape(shape)


def in_time(a: Any, parts: int) -> Any:
  """The arrays, [B, T, ...], back in the order of time."""
  of_none = ("scale", "window", "base", "alibi", "first_position", "bias")
  tokens = a._replace(**dict.fromkeys(of_none))
  tokens = jax.tree.map(lambda x: reordered(x, parts, 1, inverse=True), tokens)
  tokens = tokens._replace(**{name: getattr(a, name) for name in of_none})
  if a.bias is None:
    return tokens
  by_query = reordered(a.bias, parts, 2, inverse=True)
  return tokens._replace(bias=reordered(by_query, parts, 3, inverse=True))


def in_context(outs: Any, parts: int) -> Any:
  """out [B, T, N, H] and lse [B, N, T] in the order of the parts."""
  lse = None if outs.lse is None else reordered(outs.lse, parts, 2)
  return outs._replace(out=reordered(outs.out, parts, 1), lse=lse)


def _chunks(parts: int) -> np.ndarray:
  """Which chunk of time is where: 0, 2 n - 1, 1, 2 n - 2, ..."""
  first = np.arange(parts)
  return np.stack([first, 2 * parts - 1 - first], axis=1).reshape(-1)
