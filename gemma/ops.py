"""The array functions Gemma calls, and the two ways to get them.

The one module of `gemma` that knows of kernels and of platforms.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from pallas_gemma import kernels
from pallas_gemma.kernels import FeedForwardConfig as FeedForwardConfig
from pallas_gemma.kernels import (
  LinearCrossEntropyConfig as LinearCrossEntropyConfig,
)
from pallas_gemma.kernels import Norm as Norm
from pallas_gemma.kernels import QuantizedWeight as QuantizedWeight
from pallas_gemma.kernels import Rope as Rope
from pallas_gemma.kernels import ScanPart as ScanPart
from pallas_gemma.kernels import context_order as context_order
from pallas_gemma.kernels import layer_einsum as layer_einsum
from pallas_gemma.kernels import scan_layers as scan_layers
from pallas_gemma.kernels import sharding as sharding
from pallas_gemma.kernels._frame.debug import checked as checked
from pallas_gemma.kernels._layers.weight import cast_here as cast_here


@dataclasses.dataclass(frozen=True)
class Ops:
  """What the model calls, with the signatures of `pallas_gemma.kernels`.

  It is frozen, so that it can be hashed, as JAX wants of the static part of a
  model.  To try a kernel of your own: `dataclasses.replace(KERNELS,
  rms_norm=mine)`.

  Gemma 1 itself needs neither `add_rms_norm` nor `geglu`, since `feed_forward`
  takes the norm and the residual; they are here for models made of the same
  parts.
  """

  rms_norm: Callable[..., Any]
  add_rms_norm: Callable[..., Any]
  apply_rope: Callable[..., Any]
  geglu: Callable[..., Any]
  feed_forward: Callable[..., Any]
  flash_attention: Callable[..., Any]
  decode_attention: Callable[..., Any]
  linear_cross_entropy: Callable[..., Any]

  def __reduce__(self) -> Any:
    """Pickles and copies the two sets of this module as what they are.

    Their functions are wrapped, which cannot be pickled, and JAX compiles anew
    for a set that is not the same.
    """
    for name in ("KERNELS", "REFERENCE"):
      if self is globals().get(name):
        return name
    return super().__reduce__()

  def attend(
    self, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any
  ) -> jax.Array:
    """`flash_attention` between projections.

    XLA has them write and read arrays heads first for nothing; with the heads
    of a token one below the other it copies all of them.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H].
      v: [B, S, K, H].
      **kwargs: as `flash_attention` takes them, but for the layout.

    Returns:
      [B, N, T, H].
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return self.flash_attention(q, k, v, layout="BNTH", **kwargs)


_NAMES = {field.name for field in dataclasses.fields(Ops)}
_CALLED = tuple(op for op in kernels.OPS if op.name in _NAMES)


def _ops(default: str | None, **implementations: str) -> Ops:
  return Ops(
    **{
      op.name: functools.partial(
        op.function, implementation=implementations.get(op.name, default)
      )
      for op in _CALLED
    }
  )


def _recomputed(norm: Callable[..., Any]) -> Callable[..., Any]:
  """A norm in plain jnp, of which the backward pass keeps the arguments alone.

  JAX's derivative would keep two arrays as large as x, in float32, and a scan
  over layers writes them to a stack and reads them back.
  """

  @functools.wraps(norm.func if isinstance(norm, functools.partial) else norm)
  def run(*args: Any, **kwargs: Any) -> Any:
    function = functools.partial(norm, **kwargs)
    return jax.checkpoint(function, prevent_cse=False)(*args)

  run.__wrapped__ = norm  # with its keywords, for `describe_ops`
  return run


_WITHOUT_NORMS = _ops(None, rms_norm="xla", add_rms_norm="xla")
KERNELS = dataclasses.replace(
  _WITHOUT_NORMS,
  rms_norm=_recomputed(_WITHOUT_NORMS.rms_norm),
  add_rms_norm=_recomputed(_WITHOUT_NORMS.add_rms_norm),
)
"""Each op's kernel where it is lowered for TPU, else its reference.

The two norms are the exception: they are always the reference.  The norm before
the feed-forward is done inside the feed-forward's kernel.  The norm before
attention XLA fuses into the matrix products that follow, where a kernel would
read and write the residual stream once more.  docs/kernels/rms_norm.md has the
cycles of a block either way."""

REFERENCE = _ops("xla")
"""Each op's reference in plain jnp, on every platform."""


@functools.cache
def in_context(ops: Ops, parts: int) -> Ops:
  """The ops for tokens in the order of `context_order(T, parts)`.

  The same set for the same arguments, so that JAX compiles once.
  """
  if parts == 1:
    return ops
  attention = functools.partial(ops.flash_attention, context_parts=parts)
  return dataclasses.replace(ops, flash_attention=attention)


def describe_ops(ops: Ops, platform: str) -> list[str]:
  """One line for each op: which implementation runs, and why.

  Args:
    ops: the functions of a model.
    platform: what the computation is lowered for, such as
      `jax.default_backend()`.

  Returns:
    Lines such as "rms_norm: reference (XLA), platform is cpu".
  """
  return [
    f"{op.name}: {_which(op, getattr(ops, op.name), platform)}"
    for op in _CALLED
  ]


def _which(op: kernels.Op, function: Callable[..., Any], platform: str) -> str:
  if not isinstance(function, functools.partial):
    function = getattr(function, "__wrapped__", function)
  if getattr(function, "func", function) is not op.function:
    return f"own function, {getattr(function, '__qualname__', function)!s}"
  match getattr(function, "keywords", {}).get("implementation"):
    case "pallas":
      return "Pallas kernel, by choice"
    case "xla":
      return "reference (XLA), by choice"
  if not op.pallas:
    return "reference (XLA), no Pallas kernel yet"
  if platform == "tpu":
    return "Pallas kernel, lowered for tpu"
  return f"reference (XLA), platform is {platform}"
