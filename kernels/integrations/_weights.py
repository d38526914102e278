"""How the modules of flax, either of them, make and read their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from . import _parts

Axes = tuple[str | None, ...]


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
    """Makes it hashable, as flax and JAX want what is static."""
    axes = tuple(sorted(dict(self.axes).items()))
    object.__setattr__(self, "axes", axes)

  def axes_of(self, name: str) -> Axes | None:
    """The partitioning metadata of a weight."""
    return dict(self.axes).get(name)

  def init_of(self, fan_in: int) -> Callable[..., jax.Array]:
    """What makes a weight whose products sum over so many inputs."""
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

  def dtype_of(self, x: jax.Array) -> Any:
    """In which the products of x are computed."""
    return x.dtype if self.dtype is None else jnp.dtype(self.dtype)


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
