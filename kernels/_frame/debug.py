"""What `checkify` is to find, in a program that is not changed by it.

A `checkify.debug_check` would say the same, but leaves an effect in every
program, checked or not, and a program with one cannot be exported.  So a value
passes a primitive that leaves nothing; `checkify` knows what it means.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

_checked = jax.extend.core.Primitive("pallas_gemma_checked")


def checked(
  value: jax.Array, allowed: jax.Array, found: jax.Array, message: str
) -> jax.Array:
  """The value; an error for `checkify` to find if something is not allowed.

  Args:
    value: passes.
    allowed: booleans of any shape.
    found: integers of that shape; the largest that is not allowed is told.
    message: with "{found}" in it.
  """
  if value.size == 0 or found.size == 0:
    return value
  least = jnp.iinfo(found.dtype).min
  found = jnp.max(jnp.where(allowed, least, found))
  return _checked.bind(value, jnp.all(allowed), found, message=message)


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
  return _checked.bind(*primals, **params), tangents[0]


def _batch(args: Any, dims: Any, **params: Any) -> Any:
  value, allowed, found = args
  if dims[1] is not None:
    allowed = jnp.all(allowed)
  if dims[2] is not None:
    found = jnp.max(found)
  return _checked.bind(value, allowed, found, **params), dims[0]


_checked.def_impl(lambda value, *_, **__: value)
_checked.def_abstract_eval(lambda value, *_, **__: value)
ad.primitive_jvps[_checked] = _jvp
batching.primitive_batchers[_checked] = _batch
mlir.register_lowering(_checked, lambda ctx, value, *_, **__: [value])

# JAX has no public way to tell `checkify` of a primitive.  Where this one is
# gone, nothing is found.
try:
  from jax._src import checkify as _checkify
except ImportError:
  pass
else:

  def _check(*args: Any, message: str) -> Any:
    # A newer JAX has something of its own before these, and wants it back.
    *context, error, enabled, value, allowed, found = args
    if _checkify.FailedCheckError in enabled:
      failed = _checkify.FailedCheckError(
        _checkify.get_traceback(), message, found=found
      )
      add: Any = _checkify.assert_func
      error = add(*context, error, jnp.logical_not(allowed), failed)
    return error, value

  _checkify.error_checks[_checked] = _check
