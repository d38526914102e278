"""JAX's switches, where an op must not follow them.

A user turns them for the code that they write.  What an op computes with, and
in which types, is the op's own, and stated in its docstring.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function`, whose jnp may mix ranks and dtypes.

  Whatever `jax_numpy_rank_promotion` and `jax_numpy_dtype_promotion` say.
  """

  @functools.wraps(function)
  def run(*args: Any, **kwargs: Any) -> Any:
    with (
      jax.numpy_rank_promotion("allow"),
      jax.numpy_dtype_promotion("standard"),
    ):
      return function(*args, **kwargs)

  return run


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function`, whose indices and Python numbers are of 32 bits.

  Under `jax_enable_x64` they would have 64, which a TPU's scalar core lacks.
  """

  @functools.wraps(function)
  def run(*args: Any, **kwargs: Any) -> Any:
    with jax.enable_x64(False):
      return function(*args, **kwargs)

  return plain(run)
