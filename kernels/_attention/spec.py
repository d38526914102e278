"""Page 1: the arrays and the problem, and what is computed."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from .._frame import switches
from .._frame.check import Implementation, is_traced
from .._rope import Rope, apply_rope_reference
from .shapes import LayoutName, from_btnh, to_btnh

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
class Logits:
  """How logits come from the products q . k.

  Attributes:
    scale: multiplies the logits, as does that of the arrays.
    soft_cap: cap of the logits, or None.
  """

  scale: float
  soft_cap: float | None = None

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


@dataclasses.dataclass(frozen=True)
class Problem(Logits):
  """Everything that is not an array.

  Attributes:
    is_causal: query i sees keys up to i.
    window: (left, right), both inclusive; or None, and it may be an array.
    base_frequency: of the rotation, if positions come along without a base.
    return_lse: whether the log of the sum of exponentials is a result.
    layout: how the caller's arrays lie in memory; `Arrays` is always [B, T, N,
      H], of which XLA makes the caller's, and nothing is moved.
    implementation: as the caller gave it.
    config: tile sizes, None for the op's own choice.
  """

  is_causal: bool = False
  window: tuple[int, int] | None = None
  base_frequency: float = 10_000.0
  return_lse: bool = False
  layout: LayoutName | None = None
  implementation: Implementation = None
  config: FlashAttentionConfig | None = None

  @property
  def tiles(self) -> FlashAttentionConfig:
    """The config that was chosen, once one was."""
    assert self.config is not None
    return self.config


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
  bias: Any = None,
) -> Outs:
  """Attention under mask [B, T, S]: out [B, T, N, H] and lse [B, N, T].

  The bias, of shape [B, K, N / K, T, S] or one that broadcasts to it, is added
  to the logits of what is visible.
  """
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
  if bias is not None:
    logits += bias
  logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
  # A row that sees nothing has lse = -inf, and its weights are 0.  There is no
  # NaN on the way, in the value or in the gradient: `jax_debug_nans` looks.
  seen = mask.any(axis=-1)
  of_logits = seen[:, None, None, :, None]
  top = jax.lax.stop_gradient(
    logits.max(axis=-1, keepdims=True, initial=-jnp.inf)
  )
  top = jnp.where(of_logits, top, 0.0)
  total = jnp.exp(logits - top).sum(axis=-1, keepdims=True)
  finite_lse = top + jnp.log(jnp.where(of_logits, total, 1.0))
  # Of a row whose lse is NaN, too, the hidden weights are 0.
  weights = jnp.exp(logits - finite_lse)
  weights = jnp.where(mask[:, None, None], weights, 0.0)
  out = jnp.einsum(
    "bkgts,bskh->btkgh",
    weights.astype(v.dtype),
    v,
    preferred_element_type=at_least_float32,
  )
  out = jnp.where(seen[..., None, None], out.reshape(q.shape), 0.0)
  lse = jnp.where(of_logits, finite_lse, -jnp.inf).reshape(batch, n, t)
  return Outs(out.astype(q.dtype), lse)


def attention(p: Problem, a: Arrays) -> Outs:
  """The maths of the room's docstring in plain jnp."""
  q, k = a.q, a.k
  if a.positions is not None:
    q, k = (_rotated(p, a, x) for x in (q, k))
  v, bias, scale = a.v, None, p.scale
  if a.scale is not None:
    scale *= a.scale[:, None, None, None, None]
  if a.segments is not None:
    bias = _nan_by_finiteness(q, k, v)
    q, k, v = (jnp.where(jnp.isfinite(x), x, 0) for x in (q, k, v))
  outs = masked_attention(q, k, v, visible(p, a), scale, p.soft_cap, bias)
  return outs if p.return_lse else outs._replace(lse=None)


def visible(p: Problem, a: Arrays) -> jax.Array:
  """Which keys each query sees: [B, T, S] booleans."""
  (b, t), s, window = a.q.shape[:2], a.k.shape[1], p.window
  if a.window is not None:  # of each batch element, beside [T, S]
    window = a.window[:, 0, None, None], a.window[:, 1, None, None]
  mask = visible_pairs(jnp.arange(t), jnp.arange(s), p.is_causal, window)
  if a.segments is not None:
    of_q, of_k = a.segments.q[:, :, None], a.segments.k[:, None, :]
    mask = mask & (of_q == of_k) & (of_k != 0)
  return jnp.broadcast_to(mask, (b, t, s))


def _nan_by_finiteness(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """NaN for queries and keys of which an element is not finite, 0 for others.

  What the mask hides must not be a factor, as 0 times NaN is NaN; who sees it
  is to get NaN through the logits.
  """
  (b, t), kv_heads = q.shape[:2], k.shape[2]
  good_q = jnp.isfinite(q).all(axis=-1).reshape(b, t, kv_heads, -1)
  good_k = (jnp.isfinite(k) & jnp.isfinite(v)).all(axis=-1)
  good = good_q.transpose(0, 2, 3, 1)[..., None]
  good &= good_k.transpose(0, 2, 1)[:, :, None, None, :]
  return jnp.where(good, 0.0, jnp.nan).astype(jnp.float32)


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
    return apply_rope_reference(x, positions, base_frequency=base)[0]

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
  layout: LayoutName | None = None,
  head_size: int | None = None,
  mask: None = None,
  bias: None = None,
) -> Any:
  """The maths of the room's docstring in plain jnp.  The specification."""
  refuse_arrays("flash_attention", mask=mask, bias=bias)
  q, k, v = (to_btnh(x, layout, head_size) for x in (q, k, v))
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
  out = from_btnh(outs.out, layout)
  return (out, outs.lse) if return_lse else out
