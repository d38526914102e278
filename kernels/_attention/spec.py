"""Page 1: the arrays and the problem, what is computed, and rows in memory."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from .._frame import switches
from .._frame.check import Implementation, is_traced
from .._rope import Rope, apply_rope_reference

if TYPE_CHECKING:
  from .tiles import FlashAttentionConfig

# Whole numbers, or traced values.
Window = tuple[Any, Any] | int | None
SegmentIds = jax.Array | tuple[jax.Array, jax.Array] | None

# --- the problem --------------------------------------------------------------


class Segments(NamedTuple):
  """Segment ids; 0 is padding."""

  q: Any  # [B, T] integers
  k: Any  # [B, S] integers


class Arrays(NamedTuple):
  """What attention is given; None for what a problem does not have.

  The last three are numbers that are not known when the program is traced, one
  for each element of the batch, as vmap may make them; known ones stand in the
  `Problem`.
  """

  q: Any  # [B, T, N, H]
  k: Any  # [B, S, K, H]
  v: Any  # [B, S, K, H]
  segments: Segments | None = None
  positions: Any = None  # [B, T] integers: q and k are to be rotated
  scale: Any = None  # [B] float32
  window: Any = None  # [B, 2] int32
  base: Any = None  # [B] float32


class Outs(NamedTuple):
  """What attention gives."""

  out: Any  # [B, T, N, H]
  lse: Any  # [B, N, T] float32, or None; between the passes [B K, 1, T G]


def segments_of(segment_ids: SegmentIds) -> Segments | None:
  """One array is that of queries and keys alike."""
  if segment_ids is None:
    return None
  if isinstance(segment_ids, tuple | list):
    return Segments(*segment_ids)
  return Segments(segment_ids, segment_ids)


@dataclasses.dataclass(frozen=True)
class Problem:
  """Everything that is not an array.

  Attributes:
    scale: multiplies the logits, as does that of the arrays.
    is_causal: query i sees keys up to i.
    window: (left, right), both inclusive; or None, and it may be an array.
    soft_cap: cap of the logits, or None.
    base_frequency: of the rotation, if positions come along without a base.
    return_lse: whether the log of the sum of exponentials is a result.
    implementation: as the caller gave it.
    config: tile sizes, None for the op's own choice.
  """

  scale: float
  is_causal: bool = False
  window: tuple[int, int] | None = None
  soft_cap: float | None = None
  base_frequency: float = 10_000.0
  return_lse: bool = False
  implementation: Implementation = None
  config: FlashAttentionConfig | None = None

  @property
  def tiles(self) -> FlashAttentionConfig:
    """The config that was chosen, once one was."""
    assert self.config is not None
    return self.config

  @property
  def unit(self) -> float:
    """What the kernels count logits in: the scale, or the soft cap.

    So logits are q . k itself, or its tanh, and differences of them are formed
    before any rounding of a product.
    """
    return self.scale if self.soft_cap is None else self.soft_cap

  @property
  def to_base_2(self) -> float:
    """Takes differences of the kernels' logits to exponents of 2."""
    return self.unit * math.log2(math.e)

  def logits(self, products: jax.Array, scale: Any = None) -> jax.Array:
    """The kernels' logits, in units of `unit`, from the products q . k.

    Args:
      products: float32.
      scale: that of the arrays, if they have one.
    """
    if self.soft_cap is None:
      return products if scale is None else products * scale
    factor = self.scale / self.soft_cap
    return jnp.tanh(products * (factor if scale is None else factor * scale))


def sides(window: Window) -> tuple[Any, Any] | None:
  """(left, right) of a window; one number is both."""
  if window is None or isinstance(window, tuple):
    return window
  return window, window


def problem_of(
  q: Any,
  k: Any,
  v: Any,
  *,
  scale: Any,
  segment_ids: SegmentIds,
  local_window_size: Window,
  rope: Rope | None,
  **static: Any,
) -> tuple[Problem, Arrays]:
  """A problem and its arrays, from the arguments of the public functions."""
  wide = jnp.promote_types(q.dtype, jnp.float32)
  arrays = Arrays(q, k, v, segments_of(segment_ids))
  if is_traced(scale):
    arrays = arrays._replace(scale=_of_batch(scale, q, wide))
    scale = 1.0
  static["scale"] = default_scale(q) if scale is None else float(scale)
  if rope is not None:
    arrays = arrays._replace(positions=rope.positions)
    if is_traced(rope.base_frequency):
      arrays = arrays._replace(base=_of_batch(rope.base_frequency, q, wide))
    else:
      static["base_frequency"] = float(rope.base_frequency)
  window = sides(local_window_size)
  if window is not None:
    # More than all keys is no more than all, and sums of it do not overflow.
    most = max(q.shape[1], k.shape[1])
    window = tuple(most if side is None else side for side in window)
    if any(map(is_traced, window)):
      both = jnp.stack([_clipped(side, most) for side in window])
      arrays = arrays._replace(window=_of_batch(both, q, jnp.int32))
    else:
      left, right = (min(int(side), most) for side in window)
      hides = left < q.shape[1] - 1
      hides |= right < k.shape[1] - 1 and not static["is_causal"]
      static["window"] = (left, right) if hides else None
  return Problem(**static), arrays


def has_window(p: Problem, a: Arrays) -> bool:
  """Whether there is a local window, known or traced."""
  return p.window is not None or a.window is not None


def _of_batch(value: Any, q: Any, dtype: Any) -> jax.Array:
  """The same for every element of the batch."""
  value = jnp.asarray(value, dtype)
  return jnp.broadcast_to(value, (q.shape[0], *value.shape))


def _clipped(side: Any, most: int) -> jax.Array:
  side = jnp.asarray(side) if is_traced(side) else jnp.int32(min(side, most))
  if side.dtype.itemsize < 4:  # `most` might not be one of these
    side = side.astype(jnp.int32)
  return jnp.clip(side, 0, most).astype(jnp.int32)


# --- the references -----------------------------------------------------------


def visible_pairs(
  q_index: jax.Array,
  k_index: jax.Array,
  is_causal: bool,
  local_window_size: Window,
) -> jax.Array:
  """Which keys each query sees by position: [..., T, S] booleans.

  A side of the window is a number, or an array that broadcasts with them.

  Six queries and keys, causal with a window of (2, 0); x marks the visible:

        k 0 1 2 3 4 5
    q 0   x
      1   x x
      2   x x x
      3     x x x
      4       x x x
      5         x x x
  """
  q, k = q_index[..., :, None], k_index[..., None, :]
  mask = jnp.broadcast_to(True, jnp.broadcast_shapes(q.shape, k.shape))
  if is_causal:
    mask &= k <= q
  window = sides(local_window_size)
  if window is not None:
    left, right = window
    if left is not None:
      mask &= k >= q - left
    if right is not None:
      mask &= k <= q + right
  return mask


def default_scale(q: jax.Array) -> float:
  """1 / sqrt(H); of no values, 1."""
  return max(q.shape[3], 1) ** -0.5


def masked_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  scale: Any,
  logits_soft_cap: float | None,
) -> Outs:
  """Attention under mask [B, T, S]: out [B, T, N, H] and lse [B, N, T]."""
  batch, t, n, h = q.shape
  kv_heads = k.shape[2]
  at_least_float32 = jnp.promote_types(q.dtype, jnp.float32)
  grouped = q.reshape(batch, t, kv_heads, n // max(kv_heads, 1), h)
  logits = jnp.einsum(
    "btkgh,bskh->bkgts", grouped, k, preferred_element_type=at_least_float32
  )
  logits *= default_scale(q) if scale is None else scale
  if logits_soft_cap is not None:
    logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
  logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
  lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  # A row that sees nothing has lse = -inf; its weights are 0, not exp(nan), in
  # the value and in the gradient.
  seen = lse > -jnp.inf
  weights = jnp.exp(logits - jnp.where(seen, lse, 0.0))
  out = jnp.einsum(
    "bkgts,bskh->btkgh",
    weights.astype(v.dtype),
    v,
    preferred_element_type=at_least_float32,
  )
  return Outs(out.reshape(q.shape).astype(q.dtype), lse.reshape(batch, n, t))


def attention(p: Problem, a: Arrays) -> Outs:
  """The maths of the room's docstring in plain jnp."""
  q, k = a.q, a.k
  if a.positions is not None:
    q, k = (_rotated(p, a, x) for x in (q, k))
  (b, t), s = q.shape[:2], k.shape[1]
  window, scale = p.window, p.scale
  if a.window is not None:  # of each batch element, beside [T, S]
    window = a.window[:, 0, None, None], a.window[:, 1, None, None]
  if a.scale is not None:
    scale *= a.scale[:, None, None, None, None]
  mask = visible_pairs(jnp.arange(t), jnp.arange(s), p.is_causal, window)
  if a.segments is not None:
    of_q, of_k = a.segments.q[:, :, None], a.segments.k[:, None, :]
    mask = mask & (of_q == of_k) & (of_k != 0)
  mask = jnp.broadcast_to(mask, (b, t, s))
  outs = masked_attention(q, k, a.v, mask, scale, p.soft_cap)
  return outs if p.return_lse else outs._replace(lse=None)


def refuse_arrays(op: str, **arrays: Any) -> None:
  """Refuses a mask or a bias, which would else be dropped in silence.

  flax's attention modules pass both to an `attention_fn` that names them, and
  leave them out for one that does not.
  """
  for name, array in arrays.items():
    if array is not None:
      raise ValueError(
        f"{op}: {name} must be None, got an array of shape "
        f"{jnp.shape(array)}: what a query sees is said by is_causal, "
        f"segment_ids and local_window_size; with another {name}, use "
        f"jax.nn.dot_product_attention"
      )


def _rotated(p: Problem, a: Arrays, x: jax.Array) -> jax.Array:
  if a.base is None:
    base = p.base_frequency
    return apply_rope_reference(x, a.positions, base_frequency=base)

  def one(x: jax.Array, positions: jax.Array, base: jax.Array) -> jax.Array:
    x, positions = x[None], positions[None]
    return apply_rope_reference(x, positions, base_frequency=base)[0]  # type: ignore[arg-type]

  return jax.vmap(one)(x, a.positions, a.base)


@switches.plain
def flash_attention_reference(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float | None = None,
  is_causal: bool = False,
  segment_ids: SegmentIds = None,
  local_window_size: Window = None,
  logits_soft_cap: float | None = None,
  rope: Rope | None = None,
  return_lse: bool = False,
  mask: None = None,
  bias: None = None,
) -> Any:
  """The maths of the room's docstring in plain jnp.  The specification."""
  refuse_arrays("flash_attention", mask=mask, bias=bias)
  problem, arrays = problem_of(
    q,
    k,
    v,
    scale=scale,
    is_causal=is_causal,
    segment_ids=segment_ids,
    local_window_size=local_window_size,
    soft_cap=logits_soft_cap,
    rope=rope,
    return_lse=return_lse,
  )
  outs = attention(problem, arrays)
  return tuple(outs) if return_lse else outs.out


# --- rows and keys ------------------------------------------------------------
# The kernels see rows: the G = N / K query heads of a kv head lie side by side
# under their token, row r = t G + g, so that one matmul serves all of them.


def to_rows(x: jax.Array, kv_heads: int) -> jax.Array:
  """[B, T, N, H] to [B K, T G, H]; for one kv head and G = 8 or more, free."""
  b, t, n, h = x.shape
  x = x.reshape(b, t, kv_heads, n // kv_heads, h).swapaxes(1, 2)
  return x.reshape(b * kv_heads, t * (n // kv_heads), h)


def from_rows(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B K, T G, H] to shape [B, T, N, H]."""
  b, t, n, h = shape
  group = rows.shape[1] // t
  return rows.reshape(b, n // group, t, group, h).swapaxes(1, 2).reshape(shape)


def to_keys(x: jax.Array) -> jax.Array:
  """[B, S, K, H] to [B K, S, H]; for one kv head, free."""
  b, s, kv_heads, h = x.shape
  return x.swapaxes(1, 2).reshape(b * kv_heads, s, h)


def from_keys(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B K, S, H] to shape [B, S, K, H]."""
  b, s, kv_heads, h = shape
  return keys.reshape(b, kv_heads, s, h).swapaxes(1, 2)


def lse_to_rows(lse: jax.Array, kv_heads: int) -> jax.Array:
  """[B, N, T] to [B K, 1, T G]."""
  b, n, t = lse.shape
  rows = lse.reshape(b * kv_heads, n // kv_heads, t).swapaxes(1, 2)
  return rows.reshape(b * kv_heads, 1, t * (n // kv_heads))


def lse_from_rows(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B K, 1, T G] to [B, N, T], given q's shape."""
  b, t, n, _ = shape
  return (
    rows.reshape(b, -1, t, rows.shape[2] // t).swapaxes(2, 3).reshape(b, n, t)
  )
