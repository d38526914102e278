"""What `jax.checkpoint` may keep of the kernels, so as not to run them again.

A policy such as `jax.checkpoint_policies.dots_saveable` keeps the results of
XLA's products.  That a kernel makes products too it cannot see: the kernel runs
again in the backward pass.  But what an op keeps for its own backward kernel
has names, such as "flash_attention_out", and these a policy can tell.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax

from ._frame.kernel import kernel_op
from ._frame.op import Op


def names_of(ops: Iterable[Op]) -> tuple[str, ...]:
  """The names of what the ops keep, from where their functions are written."""
  return tuple(
    f"{op.name}_{field}"
    for op in ops
    for value in vars(sys.modules[op.function.__module__]).values()
    if isinstance(value, kernel_op) and value.name == op.name
    for field in value.names
  )


def products_or(names: Iterable[str]) -> Callable[..., Any]:
  """The policy that keeps XLA's products, and what has one of the names."""
  policies = jax.checkpoint_policies
  return policies.save_from_both_policies(
    policies.dots_saveable, policies.save_only_these_names(*names)
  )
