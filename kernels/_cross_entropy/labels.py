"""Labels that are not vocabulary: an error under `checkify`, else NaN.

A `checkify.debug_check` would say the same, but leaves an effect in every
program, checked or not, and a program with one cannot be exported.  So the loss
passes a primitive that leaves nothing; `checkify` knows what it means.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

_checked = jax.extend.core.Primitive("pallas_gemma_labels_checked")


def labels_checked(
  loss: jax.Array, labels: jax.Array, weights: jax.Array | None, vocab: int
) -> jax.Array:
  """The loss; an error for `checkify` to find if a label is not below `vocab`.

  The label of a token of weight 0 may be anything.
  """
  if loss.size == 0:
    return loss
  allowed = (labels >= 0) & (labels < vocab)
  if weights is not None:
    allowed |= weights == 0
  found = jnp.max(jnp.where(allowed, jnp.iinfo(jnp.int32).min, labels))
  return _checked.bind(loss, jnp.all(allowed), found, vocab=vocab)


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
  return _checked.bind(*primals, **params), tangents[0]


def _batch(args: Any, dims: Any, **params: Any) -> Any:
  loss, allowed, found = args
  if dims[1] is not None:
    allowed = jnp.all(allowed)
  if dims[2] is not None:
    found = jnp.max(found)
  return _checked.bind(loss, allowed, found, **params), dims[0]


_checked.def_impl(lambda loss, *_, **__: loss)
_checked.def_abstract_eval(lambda loss, *_, **__: loss)
ad.primitive_jvps[_checked] = _jvp
batching.primitive_batchers[_checked] = _batch
mlir.register_lowering(_checked, lambda ctx, loss, *_, **__: [loss])

# JAX has no public way to tell `checkify` of a primitive.  Where this one is
# gone, a label that is not vocabulary still gives NaN.
try:
  from jax._src import checkify as _checkify
except ImportError:
  pass
else:

  def _check(*args: Any, vocab: int) -> Any:
    # A newer JAX has something of its own before these, and wants it back.
    *context, error, enabled, loss, allowed, found = args
    if _checkify.FailedCheckError in enabled:
      failed = _checkify.FailedCheckError(
        _checkify.get_traceback(),
        "linear_cross_entropy: labels must be from 0 to {last}, got {found}",
        last=jnp.int32(vocab - 1),
        found=found,
      )
      pred = jnp.logical_not(allowed)
      add: Any = _checkify.assert_func
      error = add(*context, error, pred, failed)
    return error, loss

  _checkify.error_checks[_checked] = _check
