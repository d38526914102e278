"""What every kernel shares: its registry record, and the choice of
implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Implementation = Literal["pallas", "xla"] | None


from ._frame.op import Case as Case
from ._frame.op import Cost as Cost
from ._frame.op import Integers as Integers
from ._frame.op import Op as Op


def dispatch(
  implementation: Implementation,
  pallas: Callable[..., Any],
  xla: Callable[..., Any],
  *args: Any,
) -> Any:
  """Runs what the caller chose, else what suits the target platform.

  The platform is the one that the computation is lowered for, not the one that
  traces it: ahead-of-time compilation for TPU on a CPU host gets the kernel.
  """
  match implementation:
    case "pallas":
      return pallas(*args)
    case "xla":
      return xla(*args)
    case _:
      return jax.lax.platform_dependent(*args, tpu=pallas, default=xla)


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


def check_float(op: str, **arrays: jax.Array) -> None:
  """Refuses arrays that are neither float32 nor bfloat16."""
  for name, array in arrays.items():
    if array.dtype not in (jnp.float32, jnp.bfloat16):
      raise ValueError(
        f"{op}: {name} must be float32 or bfloat16, got {array.dtype}"
      )


def check_shape(op: str, name: str, array: jax.Array, shape, why: str) -> None:
  """Refuses an array whose shape is not `shape`; `why` explains the latter."""
  if array.shape != tuple(shape):
    raise ValueError(
      f"{op}: {name} must be {tuple(shape)} ({why}), got {array.shape}"
    )


def nbytes(*arrays: Any) -> int:
  """Total size in bytes of arrays or of their descriptions."""
  return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in arrays)
