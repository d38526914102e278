"""RMSNorm of whole rows in VMEM, for its own kernels and for others' input.

`_rms_norm.py` has the maths and the derivation.  Everything here is float32.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ._frame.check import check_float, check_shape


@dataclasses.dataclass(frozen=True)
class Norm:
  """RMSNorm that an op takes of its input where it reads it.

  Attributes:
    scale: [D] float32 or bfloat16.
    epsilon: added to the mean square, in the units of the input squared.
    scale_offset: added to the scale: 1.0 for Gemma, 0.0 for Llama.
  """

  scale: jax.Array
  epsilon: float = 1e-6
  scale_offset: float = 0.0


jax.tree_util.register_dataclass(
  Norm, data_fields=["scale"], meta_fields=["epsilon", "scale_offset"]
)


def check_norm(op: str, x: jax.Array, norm: Norm, prefix: str = "") -> None:
  """Refuses a norm that does not fit x; `prefix` is how errors call it."""
  check_float(op, **{f"{prefix}scale": norm.scale})
  width = x.shape[-1:]
  check_shape(op, f"{prefix}scale", norm.scale, width, "x's last dimension")
  if not norm.epsilon >= 0:
    raise ValueError(
      f"{op}: {prefix}epsilon must not be negative, got {norm.epsilon}"
    )


@dataclasses.dataclass(frozen=True)
class RowNorm:
  """The norm of a tile of rows, and its gradients; hashable.

  Attributes:
    epsilon: as in `Norm`.
    scale_offset: as in `Norm`.
  """

  epsilon: float
  scale_offset: float

  def of(self, x: jax.Array, scale: jax.Array) -> jax.Array:
    """The norm of x [rows, D] with a scale [1, D]."""
    r = jax.lax.rsqrt(self._mean_square(x))
    return x * r * self._gain(scale)

  def gradients(
    self, x: jax.Array, scale: jax.Array, dy: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """dx [rows, D], and each row's part of dscale [rows, D]."""
    mean_square = self._mean_square(x)
    r = jax.lax.rsqrt(mean_square)
    g = dy * self._gain(scale)
    if x.shape[1] > 1:
      mean_gx = jnp.mean(g * x, axis=-1, keepdims=True)
      dx = r * (g - x * (mean_gx / mean_square))
    else:
      # One column: the difference is epsilon / mean_square, and nothing but
      # rounding error would be left of it if it were computed as above.
      dx = r * (g * (self.epsilon / mean_square))
    return dx, dy * x * r

  def _mean_square(self, x: jax.Array) -> jax.Array:
    return jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon

  def _gain(self, scale: jax.Array) -> jax.Array:
    return self.scale_offset + scale.astype(jnp.float32)
