"""How the modules of flax, either of them, make and read their weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._frame.check import (
  as_float_dtype,
  as_floats,
  as_number,
  as_whole_number,
  is_size,
)
from . import _parts

Axes = tuple[str | None, ...]

# Of `GatedMLP`, then of `Attention`, which may share one `Weights`.
_NAMES = "gate", "up", "down", "q", "k", "v", "out"
# Of `flash_attention`, by which modules go themselves.
_TAKEN = "layout", "head_size", "return_lse"


@dataclasses.dataclass(frozen=True)
class Weights:
  """How a module's weights are made.

  Attributes:
    dtype: in which products are computed; None is that of their input.
    param_dtype: in which weights are kept.
    init: makes a weight of a key, a shape and a dtype; None draws normal
      numbers, of the variance 1 / fan-in.
    axes: the partitioning metadata of a weight by its name, such as
      `{"gate": ("embed", "mlp")}`: names of mesh axes, or logical ones.
    lora_rank: of the low-rank adapter of each weight in `lora`; 0 for none.
      The kernels are given weight + alpha / rank * a b, so that they run as
      ever, and a and b get gradients of their own.
    lora_alpha: as in Hu et al., arXiv 2106.09685; None is the rank.
    lora: the names of the weights that have adapters; None is all.
  """

  dtype: Any = None
  param_dtype: Any = jnp.float32
  init: Callable[..., jax.Array] | None = None
  axes: Mapping[str, Axes] | tuple[tuple[str, Axes], ...] = ()
  lora_rank: int = 0
  lora_alpha: float | None = None
  lora: tuple[str, ...] | None = None

  def __post_init__(self):
    """Makes it hashable, as flax and JAX want what is static.

    Raises:
      ValueError: on names of no weight, which would change nothing in silence,
        and on a rank or an alpha that is no such number.
    """
    axes = tuple(sorted(dict(self.axes).items()))
    object.__setattr__(self, "axes", axes)
    _check_names("axes", dict(axes))
    if self.lora is not None:
      if isinstance(self.lora, str):
        raise ValueError(
          f"Weights: lora must be a tuple of names or None, got {self.lora!r}"
        )
      object.__setattr__(self, "lora", tuple(self.lora))
      _check_names("lora", self.lora)
    if as_whole_number("Weights", "lora_rank", self.lora_rank) < 0:
      raise ValueError(
        f"Weights: lora_rank must not be negative, got {self.lora_rank}"
      )
    if self.lora_alpha is not None:
      as_number("Weights", "lora_alpha", self.lora_alpha)

  def axes_of(self, name: str) -> Axes | None:
    """The partitioning metadata of a weight."""
    return dict(self.axes).get(name)

  def init_of(
    self, name: str, shape: tuple[int, ...], inputs: int
  ) -> Callable[..., jax.Array]:
    """What makes a weight whose products sum over so many first dimensions."""
    if not all(map(is_size, shape)):
      raise ValueError(
        f"weight {name!r} must have sizes that are positive integers, got "
        f"{shape}"
      )
    fan_in = math.prod(shape[:inputs])
    return self.init or jax.nn.initializers.normal(fan_in**-0.5)

  def has_adapter(self, name: str) -> bool:
    """Whether a weight has a low-rank adapter."""
    return self.lora_rank > 0 and (self.lora is None or name in self.lora)

  def adapter_shapes(
    self, shape: tuple[int, ...], inputs: int
  ) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a and b, for a weight whose first `inputs` dimensions are summed."""
    rank = self.lora_rank
    return (*shape[:inputs], rank), (rank, *shape[inputs:])

  def merged(self, w: jax.Array, a: Any, b: Any, dtype: Any) -> jax.Array:
    """A weight with its adapter, if it has one, in the dtype of products."""
    if a is None:
      return w.astype(dtype)
    alpha = self.lora_rank if self.lora_alpha is None else self.lora_alpha
    low_rank = jnp.tensordot(a, b, 1) * (alpha / self.lora_rank)
    return (w + low_rank.astype(w.dtype)).astype(dtype)

  def as_input(self, module: str, x: Any) -> jax.Array:
    """x in the dtype of products; refused if it is no array of floats."""
    (x,) = as_floats(module, x=x)
    if x.ndim == 0:
      raise ValueError(
        f"{module}: x must have at least one dimension, got a scalar"
      )
    dtype = as_float_dtype("Weights", "dtype", self.dtype)
    return x if dtype is None else x.astype(dtype)


def _check_names(what: str, names: Iterable[str]) -> None:
  unknown = [name for name in names if name not in _NAMES]
  if unknown:
    raise ValueError(
      f"Weights: {what} must be of weights among {', '.join(_NAMES)}, got "
      f"{', '.join(map(str, unknown))}"
    )


def attention(
  x: jax.Array,
  weights: Mapping[str, jax.Array],
  norms: Mapping[str, Callable[[jax.Array], jax.Array]],
  embedding: Any,
  positions: jax.Array | None,
  **options: Any,
) -> jax.Array:
  """Self-attention with its projections.

  Args:
    x: [B, T, D].
    weights: "q" [D, N, H], "k" and "v" [D, K, H], "out" [N, H, D].
    norms: of the heads of "q" and "k", where they have one.
    embedding: a `RotaryEmbedding`, or None.
    positions: [B, T], of the embedding; None counts from 0.
    **options: as `flash_attention` takes them; is_causal is True if not said.

  Returns:
    [B, T, D].
  """
  q = weights["q"]
  if x.ndim != 3 or x.shape[-1] != q.shape[0]:
    raise ValueError(
      f"Attention: x must be [B, T, D] with D = {q.shape[0]}, got {x.shape}"
    )
  taken = [name for name in _TAKEN if name in options]
  if taken:
    raise ValueError(
      f"Attention: {', '.join(_TAKEN)} must not be among its options, got "
      f"{', '.join(taken)}"
    )
  if embedding is not None and not hasattr(embedding, "rope"):
    raise ValueError(
      f"Attention: rope must be a RotaryEmbedding or None, got "
      f"{type(embedding).__name__}"
    )
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  rope = None if embedding is None else embedding.rope(positions)
  q, k, v = (
    jnp.einsum("btd,dnh->btnh", x, weights[name]) for name in ("q", "k", "v")
  )
  q, k = (
    norms[name](heads) if name in norms else heads
    for name, heads in (("q", q), ("k", k))
  )
  options = {"is_causal": True, "rope": rope} | options
  out = _parts.attend(q, k, v, **options)
  return jnp.einsum("btnh,nhd->btd", out, weights["out"])
