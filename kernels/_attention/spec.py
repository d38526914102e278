"""Page 1: the arrays and the problem."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from .._frame.check import Implementation
from .shapes import LayoutName

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


class Dropout(NamedTuple):
  """Words, of which follows what is dropped; see `dropout`."""

  rows: Any  # [B, T, N] int32
  keys: Any  # [B, S] int32


class Arrays(NamedTuple):
  """What attention is given; None for what a problem does not have.

  Four are numbers that are not known when the program is traced, one for each
  element of the batch, as vmap may make them; known ones stand in the
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
  mask: Any = None  # [B or 1, N or 1, T, S] booleans
  bias: Any = None  # [B or 1, N or 1, T, S]
  sinks: Any = None  # [N] float32
  alibi: Any = None  # [B or 1, N] float32: slopes, without gradient
  first_position: Any = None  # [B] int32: of ALiBi, beside the problem's
  dropout: Dropout | None = None
  masks: Any = None  # what kernels have in the place of `mask`, see `masks`


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
    query_offset: position of the first query among the keys.
    first_position: the same for ALiBi, also where a mask has taken the place of
      `query_offset`.
    dropout_rate: the part of the weights that is dropped, 0 without words.
    has_bias: whether there is a bias, beside which a token's heads are apart.
    base_frequency: of the rotation, if positions come along without a base.
    return_lse: whether the log of the sum of exponentials is a result.
    gives_mean: whether a query that sees no key gives the mean of all values,
      as `jax.nn.dot_product_attention` does, and not 0.
    layout: how the caller's arrays lie in memory; `Arrays` is always [B, T, N,
      H], of which XLA makes the caller's, and nothing is moved.
    context_parts: of how many parts the tokens' order is, see `ring_order`.
    is_partial: whether it is of some of the rows and keys; see `ring`.
    implementation: as the caller gave it.
    config: tile sizes, None for the op's own choice.
  """

  is_causal: bool = False
  window: tuple[int, int] | None = None
  query_offset: int = 0
  first_position: int = 0
  dropout_rate: float = 0.0
  has_bias: bool = False
  base_frequency: float = 10_000.0
  return_lse: bool = False
  gives_mean: bool = False
  layout: LayoutName | None = None
  context_parts: int = 1
  is_partial: bool = False
  implementation: Implementation = None
  config: FlashAttentionConfig | None = None

  def gradient_type(self, dtype: Any) -> Any:
    """Of gradients as the backward kernel gives them; parts are added up."""
    return jnp.float32 if self.is_partial else dtype

  @property
  def kept_scale(self) -> float:
    """What multiplies the weights that dropout keeps."""
    return 1 / (1 - self.dropout_rate)

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


def has_window(p: Problem, a: Arrays) -> bool:
  """Whether there is a local window, known or traced."""
  return p.window is not None or a.window is not None


def default_scale(q: jax.Array) -> float:
  """1 / sqrt(H); of no values, 1."""
  return max(q.shape[3], 1) ** -0.5
