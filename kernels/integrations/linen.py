"""Modules for `flax.linen`, whose insides are the kernels.

    from flax import linen as nn
    from pallas_gemma.kernels.integrations.linen import Attention, GatedMLP

Parameters are made by `self.param`, so that `nn.scan` over layers, `nn.remat`
and `nn.with_partitioning` take them as those of flax's own modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from .._attention.spec import SegmentIds
from .._frame.check import Implementation, as_floats
from .._gated import feed_forward
from .._gated.activation import Activation
from .._rope import Rope, RopeFrequencies, apply_rope
from . import _parts
from ._weights import Weights as Weights
from ._weights import attention


class RMSNorm(nn.Module):
  """Root-mean-square normalisation, as `kernels.rms_norm`.

  Attributes:
    epsilon: added to the mean square.
    scale_offset: added to the scale: 1.0 for Gemma, 0.0 for Llama.
    scale_init: makes the scale, perhaps by `nn.with_partitioning`; None makes
      the norm an identity scale.
    param_dtype: of the scale.
    implementation: as of `rms_norm`; None is plain `jax.numpy`, which XLA fuses
      into the products that follow.
  """

  epsilon: float = 1e-6
  scale_offset: float = 0.0
  scale_init: Callable[..., Any] | None = None
  param_dtype: Any = jnp.float32
  implementation: Implementation = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """The norm of x [..., D], of x's dtype."""
    (x,) = as_floats("RMSNorm", x=x)
    identity = jax.nn.initializers.constant(1.0 - self.scale_offset)
    init = self.scale_init or identity
    scale = self.param("scale", init, x.shape[-1:], self.param_dtype)
    y = _parts.norm(
      x,
      scale,
      epsilon=self.epsilon,
      scale_offset=self.scale_offset,
      implementation=self.implementation,
    )
    return y.astype(x.dtype)


def _weight(
  module: nn.Module,
  weights: Weights,
  name: str,
  shape: tuple[int, ...],
  dtype: Any,
) -> jax.Array:
  """A weight of a module, with its adapter if it has one.

  Products sum over its first dimension, or the first two of "out".
  """
  inputs = 2 if name == "out" else 1
  init: Callable[..., Any] = weights.init_of(name, shape, inputs)
  axes = weights.axes_of(name)
  if axes is not None:
    init = nn.with_partitioning(init, axes)
  w = module.param(name, init, shape, weights.param_dtype)
  if not weights.has_adapter(name):
    return weights.merged(w, None, None, dtype)
  a_shape, b_shape = weights.adapter_shapes(shape, inputs)
  draw = jax.nn.initializers.normal(math.prod(shape[:inputs]) ** -0.5)
  zeros = jax.nn.initializers.zeros
  a = module.param(f"{name}_lora_a", draw, a_shape, weights.param_dtype)
  b = module.param(f"{name}_lora_b", zeros, b_shape, weights.param_dtype)
  return weights.merged(w, a, b, dtype)


class GatedMLP(nn.Module):
  """The gated feed-forward block, as `kernels.feed_forward`.

  Attributes:
    hidden_features: F.
    activation: of the gate.
    weights: how "gate" and "up" [D, F] and "down" [F, D] are made.
    implementation: as of `feed_forward`.
  """

  hidden_features: int
  activation: Activation = "silu"
  weights: Weights = Weights()
  implementation: Implementation = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] of x [..., D], in the dtype of the products."""
    x = self.weights.as_input("GatedMLP", x)
    d, f = x.shape[-1], self.hidden_features
    shapes = {"gate": (d, f), "up": (d, f), "down": (f, d)}
    gate, up, down = (
      _weight(self, self.weights, name, shape, x.dtype)
      for name, shape in shapes.items()
    )
    return feed_forward(
      x,
      gate,
      up,
      down,
      activation=self.activation,
      implementation=self.implementation,
    )


class RotaryEmbedding(nn.Module):
  """Rotary position embedding: of an array, or inside attention.

  Attributes:
    base_frequency: the base of the geometric series of wavelengths.
    frequencies: others than of one base.
    implementation: as of `apply_rope`.
  """

  base_frequency: float = 10_000.0
  frequencies: RopeFrequencies | None = None
  implementation: Implementation = None

  def rope(self, positions: jax.Array) -> Rope:
    """For `flash_attention(rope=)`: positions [B, T]."""
    return Rope(positions, self.base_frequency, self.frequencies)

  def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """x [B, T, N, H], rotated by positions [B, T]."""
    return apply_rope(
      x,
      positions,
      base_frequency=self.base_frequency,
      frequencies=self.frequencies,
      implementation=self.implementation,
    )


class Attention(nn.Module):
  """Self-attention with its projections, by `kernels.flash_attention`.

  Attributes:
    num_heads: N.
    num_kv_heads: K.
    head_size: H.
    rope: rotates q and k inside the kernel.
    qk_norm: makes a norm, of q and of k, such as `RMSNorm`.
    weights: how "q" [D, N, H], "k" and "v" [D, K, H] and "out" [N, H, D] are
      made.
    options: of `flash_attention`, such as scale, local_window_size,
      logits_soft_cap, implementation; is_causal is True if not said.
  """

  num_heads: int
  num_kv_heads: int
  head_size: int
  rope: RotaryEmbedding | None = None
  qk_norm: Callable[..., nn.Module] | None = None
  weights: Weights = Weights()
  options: Mapping[str, Any] | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array | None = None,
    *,
    segment_ids: SegmentIds = None,
  ) -> jax.Array:
    """Attends.

    Args:
      x: [B, T, D].
      positions: [B, T], of `rope`; None counts from 0.
      segment_ids: as of `flash_attention`.

    Returns:
      [B, T, D], in the dtype of the products.
    """
    x = self.weights.as_input("Attention", x)
    d, n, k, h = x.shape[-1], self.num_heads, self.num_kv_heads, self.head_size
    shapes = {"q": (d, n, h), "k": (d, k, h), "v": (d, k, h), "out": (n, h, d)}
    make = self.qk_norm
    return attention(
      x,
      {
        name: _weight(self, self.weights, name, shape, x.dtype)
        for name, shape in shapes.items()
      },
      {} if make is None else {x: make(name=f"{x}_norm") for x in ("q", "k")},
      self.rope,
      positions,
      segment_ids=segment_ids,
      **dict(self.options or {}),
    )
