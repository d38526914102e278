"""JAX's switches, where an op must not follow them.

A user turns them for the code that they write.  What an op computes with, and
in which types, is the op's own, and stated in its docstring.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

_P = ParamSpec("_P")
_T = TypeVar("_T")


def plain(function: Callable[_P, _T]) -> Callable[_P, _T]:
  """`function`, whose jnp may mix ranks and dtypes.

  Whatever `jax_numpy_rank_promotion` and `jax_numpy_dtype_promotion` say.
  """

  @functools.wraps(function)
  def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
    with (
      jax.numpy_rank_promotion("allow"),
      jax.numpy_dtype_promotion("standard"),
    ):
      return function(*args, **kwargs)

  return run


def kernel(function: Callable[_P, _T]) -> Callable[_P, _T]:
  """`function`, whose indices and Python numbers are of 32 bits.

  Under `jax_enable_x64` they would have 64, which a TPU's scalar core lacks.
  """

  @functools.wraps(function)
  def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
    with jax.enable_x64(False):
      return function(*args, **kwargs)

  return plain(run)


def compiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
  """`function` as a program of its own, under `jax_disable_jit` too.

  Of a primitive that is known only where a program is lowered: evaluated by
  itself, it would come back to itself for ever.
  """

  @functools.wraps(function)
  def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
    with jax.disable_jit(False):
      return jax.jit(function)(*args, **kwargs)

  return run
