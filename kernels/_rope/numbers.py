"""Of page 1: the numbers from which frequencies are made, or a refusal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._frame.check import as_number, as_scalar, as_whole_number, is_traced

OP = "RopeFrequencies"


def yarn_scale(factor: float, weight: float = 1.0) -> float:
  """YaRN's attention scale: 0.1 weight ln(factor) + 1."""
  return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def geometric(base: Any, size: int) -> Any:
  """base^(-2 i / size), float64; of a traced base float32."""
  base = as_scalar(OP, "base", base)
  exponents = -2.0 * np.arange(size // 2) / size
  if is_traced(base):
    return base ** exponents.astype(np.float32)
  return np.float64(positive("base", base)) ** exponents


def like(base: Any, values: Any) -> Any:
  """NumPy's float64 beside a traced base: float32."""
  return np.float32(values) if is_traced(base) else np.asarray(values)


def at_least(length: Any, known: float) -> Any:
  """A length, a number or traced, that is no less than a known one."""
  if is_traced(length):
    return jnp.maximum(length.astype(jnp.float32), known)
  return max(number("length", length), known)


def number(name: str, value: Any) -> float:
  """One that is part of the program."""
  return as_number(OP, name, value)


def positive(name: str, value: Any) -> float:
  """One above zero."""
  known = number(name, value)
  if not known > 0:
    raise ValueError(f"{OP}: {name} must be positive, got {known}")
  return known


def fraction(rotated: Any) -> float:
  """The part of a head that is rotated."""
  part = positive("rotated", rotated)
  if part > 1:
    raise ValueError(f"{OP}: rotated must be at most 1, got {part}")
  return part


def rotated_size(head_size: Any, rotated: Any) -> int:
  """R, the elements of a head that are rotated."""
  size = int(as_whole_number(OP, "head_size", head_size) * fraction(rotated))
  if size < 2 or size % 2:
    raise ValueError(
      f"{OP}: the rotated part of a head must be even, got {size} of "
      f"head_size {head_size}"
    )
  return size


def factors(name: str, values: Sequence[float], count: int) -> np.ndarray:
  """Of each pair one, as LongRoPE has them."""
  factors = np.asarray(values, np.float64)
  if factors.shape != (count,) or not (factors > 0).all():
    raise ValueError(
      f"{OP}: {name}_factor must be {count} positive numbers, one for each "
      f"pair, got shape {factors.shape}"
    )
  return factors
