"""Modules for `flax.nnx`, whose insides are the kernels.

    from flax import nnx
    from pallas_gemma.kernels.integrations.nnx import Attention, GatedMLP

They are made as those of `flax.nnx` are, by `rngs=`, and are ready for
`nnx.vmap` and `nnx.scan` over layers: all arrays are `nnx.Param`s, or
`nnx.LoRAParam`s, and all else is static and hashable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .._attention.spec import SegmentIds
from .._frame.check import Implementation, as_floats
from .._gated import feed_forward
from .._gated.activation import Activation
from .._rope import Rope, RopeFrequencies, apply_rope
from . import _parts
from ._weights import Weights as Weights
from ._weights import attention


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation, as `kernels.rms_norm`."""

  def __init__(
    self,
    num_features: int,
    *,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    scale_init: Callable[..., jax.Array] | None = None,
    param_dtype: Any = jnp.float32,
    implementation: Implementation = None,
    rngs: nnx.Rngs,
  ):
    """Makes the scale.

    Args:
      num_features: D.
      epsilon: added to the mean square.
      scale_offset: added to the scale: 1.0 for Gemma, 0.0 for Llama.
      scale_init: makes the scale, perhaps by `nnx.with_partitioning`; None
        makes the norm an identity scale.
      param_dtype: of the scale.
      implementation: as of `rms_norm`; None is plain `jax.numpy`, which XLA
        fuses into the products that follow.
      rngs: for `scale_init`.
    """
    init = scale_init or jax.nn.initializers.constant(1.0 - scale_offset)
    self.scale = nnx.Param(init(rngs.params(), (num_features,), param_dtype))
    self.epsilon = epsilon
    self.scale_offset = scale_offset
    self.implementation: Implementation = implementation

  def __call__(self, x: jax.Array) -> jax.Array:
    """The norm of x [..., D], of x's dtype."""
    (x,) = as_floats("RMSNorm", x=x)
    y = _parts.norm(
      x,
      self.scale[...],
      epsilon=self.epsilon,
      scale_offset=self.scale_offset,
      implementation=self.implementation,
    )
    return y.astype(x.dtype)


class Weight(nnx.Module):
  """One weight, with a low-rank adapter if it is to have one."""

  def __init__(
    self,
    name: str,
    shape: tuple[int, ...],
    inputs: int,
    weights: Weights,
    *,
    rngs: nnx.Rngs,
  ):
    """Makes a weight.

    Args:
      name: by which `weights` knows it.
      shape: of the weight.
      inputs: the number of its first dimensions that products sum over.
      weights: how it is made.
      rngs: of which "params" is drawn from.
    """
    init: Callable[..., Any] = weights.init_of(name, shape, inputs)
    axes = weights.axes_of(name)
    if axes is not None:
      init = nnx.with_partitioning(init, axes)
    self.kernel = nnx.Param(init(rngs.params(), shape, weights.param_dtype))
    a, b = None, None
    if weights.has_adapter(name):
      of_a, of_b = weights.adapter_shapes(shape, inputs)
      draw = jax.nn.initializers.normal(math.prod(shape[:inputs]) ** -0.5)
      dtype = weights.param_dtype
      a = nnx.LoRAParam(draw(rngs.params(), of_a, dtype))
      b = nnx.LoRAParam(jnp.zeros(of_b, dtype))
    self.lora_a, self.lora_b = a, b
    self.weights = weights

  def __call__(self, dtype: Any) -> jax.Array:
    """The weight that products take, in their dtype."""
    a, b = (None if x is None else x[...] for x in (self.lora_a, self.lora_b))
    return self.weights.merged(self.kernel[...], a, b, dtype)


class GatedMLP(nnx.Module):
  """The gated feed-forward block, as `kernels.feed_forward`."""

  def __init__(
    self,
    num_features: int,
    hidden_features: int,
    *,
    activation: Activation = "silu",
    weights: Weights | None = None,
    implementation: Implementation = None,
    rngs: nnx.Rngs,
  ):
    """Makes gate and up [D, F], and down [F, D].

    Args:
      num_features: D.
      hidden_features: F.
      activation: of the gate.
      weights: how "gate", "up" and "down" are made; None is `Weights()`.
      implementation: as of `feed_forward`.
      rngs: of which "params" is drawn from.
    """
    weights = weights or Weights()
    d, f = num_features, hidden_features
    self.gate = Weight("gate", (d, f), 1, weights, rngs=rngs)
    self.up = Weight("up", (d, f), 1, weights, rngs=rngs)
    self.down = Weight("down", (f, d), 1, weights, rngs=rngs)
    self.activation: Activation = activation
    self.implementation: Implementation = implementation

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] of x [..., D], in the dtype of the products."""
    x = self.gate.weights.as_input("GatedMLP", x)
    return feed_forward(
      x,
      self.gate(x.dtype),
      self.up(x.dtype),
      self.down(x.dtype),
      activation=self.activation,
      implementation=self.implementation,
    )


class RotaryEmbedding(nnx.Module):
  """Rotary position embedding: of an array, or inside attention."""

  def __init__(
    self,
    base_frequency: float = 10_000.0,
    *,
    frequencies: RopeFrequencies | None = None,
    implementation: Implementation = None,
  ):
    """Has no parameters.

    Args:
      base_frequency: the base of the geometric series of wavelengths.
      frequencies: others than of one base; of NumPy, for they are no state.
      implementation: as of `apply_rope`.
    """
    self.base_frequency = base_frequency
    numbers = None
    if frequencies is not None:
      if not isinstance(frequencies, RopeFrequencies):
        raise ValueError(
          f"RotaryEmbedding: frequencies must be a RopeFrequencies or None, "
          f"got {type(frequencies).__name__}"
        )
      values = tuple(map(float, frequencies.values))
      numbers = values, frequencies.attention_scale, frequencies.streams
    self.numbers = numbers
    self.implementation: Implementation = implementation

  @property
  def frequencies(self) -> RopeFrequencies | None:
    """Others than of one base, or None."""
    return None if self.numbers is None else RopeFrequencies(*self.numbers)

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


class Attention(nnx.Module):
  """Self-attention with its projections, by `kernels.flash_attention`."""

  def __init__(
    self,
    num_features: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    *,
    rope: RotaryEmbedding | None = None,
    qk_norm: Callable[..., Any] | None = None,
    weights: Weights | None = None,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    """Makes q [D, N, H], k and v [D, K, H], and out [N, H, D].

    Args:
      num_features: D.
      num_heads: N.
      num_kv_heads: K.
      head_size: H.
      rope: rotates q and k inside the kernel.
      qk_norm: makes a norm of H features, of q and of k, such as `RMSNorm`.
      weights: how "q", "k", "v" and "out" are made; None is `Weights()`.
      rngs: of which "params" is drawn from.
      **options: of `flash_attention`, such as scale, local_window_size,
        logits_soft_cap, implementation; is_causal is True if not said.
    """
    weights = weights or Weights()
    d, h = num_features, head_size
    self.q = Weight("q", (d, num_heads, h), 1, weights, rngs=rngs)
    self.k = Weight("k", (d, num_kv_heads, h), 1, weights, rngs=rngs)
    self.v = Weight("v", (d, num_kv_heads, h), 1, weights, rngs=rngs)
    self.out = Weight("out", (num_heads, h, d), 2, weights, rngs=rngs)
    self.q_norm = None if qk_norm is None else qk_norm(h, rngs=rngs)
    self.k_norm = None if qk_norm is None else qk_norm(h, rngs=rngs)
    self.rope = rope
    self.options = tuple(sorted(options.items()))

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
    x = self.q.weights.as_input("Attention", x)
    norms = {"q": self.q_norm, "k": self.k_norm}
    return attention(
      x,
      {name: getattr(self, name)(x.dtype) for name in ("q", "k", "v", "out")},
      {name: norm for name, norm in norms.items() if norm is not None},
      self.rope,
      positions,
      segment_ids=segment_ids,
      **dict(self.options),
    )
