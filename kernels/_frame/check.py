"""Refusals at the public door: the op, what was wanted, what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

Implementation = Literal["pallas", "xla"] | None


def check_implementation(
  op: str, implementation: Implementation, *, pallas: bool = True
) -> None:
  """Refuses unknown implementations, and kernels that are not written yet."""
  if implementation not in ("pallas", "xla", None):
    raise ValueError(
      f"{op}: implementation must be 'pallas', 'xla' or None, "
      f"got {implementation!r}"
    )
  if implementation == "pallas" and not pallas:
    raise NotImplementedError(
      f"{op}: there is no Pallas kernel yet; pass implementation='xla' or None"
    )


def check_integers(op: str, name: str, array: jax.Array) -> None:
  """Refuses arrays that are not integers."""
  if not jnp.issubdtype(array.dtype, jnp.integer):
    raise ValueError(f"{op}: {name} must be integers, got {array.dtype}")


def check_float(op: str, **arrays: jax.Array) -> None:
  """Refuses arrays that are neither float32 nor bfloat16."""
  for name, array in arrays.items():
    if array.dtype not in (jnp.float32, jnp.bfloat16):
      raise ValueError(
        f"{op}: {name} must be float32 or bfloat16, got {array.dtype}"
      )


def check_shape(
  op: str, name: str, array: jax.Array, shape: Sequence[int], why: str
) -> None:
  """Refuses an array whose shape is not `shape`; `why` explains the latter."""
  if array.shape != tuple(shape):
    raise ValueError(
      f"{op}: {name} must be {tuple(shape)} ({why}), got {array.shape}"
    )


def check_positive(op: str, **values: float | None) -> None:
  """Refuses numbers that are not positive; None is none at all."""
  for name, value in values.items():
    if value is not None and not value > 0:
      raise ValueError(f"{op}: {name} must be positive or None, got {value}")
