"""The public door: what comes becomes what an op takes, or is refused.

A refusal is a `ValueError` that says the op, what was wanted, and what came.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

Implementation = Literal["pallas", "xla"] | None

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
_INT32 = np.iinfo(np.int32)


def check_implementation(
  op: str, implementation: Implementation, *, pallas: bool = True
) -> None:
  """Refuses unknown implementations, and kernels that are not written yet."""
  if not is_one_of(implementation, ("pallas", "xla", None)):
    raise ValueError(
      f"{op}: implementation must be 'pallas', 'xla' or None, "
      f"got {implementation!r}"
    )
  if implementation == "pallas" and not pallas:
    raise NotImplementedError(
      f"{op}: there is no Pallas kernel yet; pass implementation='xla' or None"
    )


def check_config(op: str, config: Any, wanted: type) -> None:
  """Refuses a config that is not of the op's own class."""
  if config is not None and not isinstance(config, wanted):
    raise ValueError(
      f"{op}: config must be a {wanted.__name__} or None, got {config!r}"
    )


def is_one_of(value: Any, known: Sequence[str | None]) -> bool:
  """Whether it is; of an array, or what has no hash, that cannot be asked."""
  return (value is None or isinstance(value, str)) and value in known


# --- arrays -------------------------------------------------------------------


def as_array(op: str, name: str, value: Any) -> jax.Array:
  """What jnp takes for an array: NumPy's, a model's parameter, a list."""
  # NumPy's 64-bit numbers would wrap around, and JAX warn of it.
  if isinstance(value, np.ndarray) and value.dtype == np.float64:
    value = value.astype(np.float32)
  try:
    return jnp.asarray(value)
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(
      f"{op}: {name} must be an array, got {type(value).__name__}"
    ) from error


def as_floats(op: str, **values: Any) -> tuple[jax.Array, ...]:
  """Arrays of float32, bfloat16 or float16."""
  arrays = tuple(as_array(op, name, value) for name, value in values.items())
  check_float(op, **dict(zip(values, arrays, strict=True)))
  return arrays


def check_seen_products(
  op: str, implementation: Implementation, weights: str
) -> None:
  """Refuses a kernel where qwix is to replace its products, and could not.

  What it adds, LoRA's adapters or quantisation, would be lost in silence.
  """
  qwix = sys.modules.get("qwix._src.qconfig")
  if implementation == "xla" or qwix is None:
    return
  for product in ("dot_general", "einsum"):
    try:
      rule = qwix.get_current_rule(product)
    except (AttributeError, ValueError):  # another qwix; outside of a module
      continue
    for wanted in ("rank", "weight_qtype", "act_qtype"):
      if getattr(rule, wanted, None):
        raise ValueError(
          f"{op}: a qwix rule wants to replace the products with {weights}, "
          f"got a kernel that makes them where qwix cannot; pass "
          f"implementation='xla', or leave this module out of the rule"
        )


def as_integers(op: str, name: str, value: Any) -> jax.Array:
  """int32 from integers of any width; what is out of its range ends at it."""
  if isinstance(value, np.ndarray | np.integer) and value.dtype.kind in "iu":
    value = np.clip(value, _INT32.min, _INT32.max).astype(np.int32)
  array = as_array(op, name, value)
  check_integers(op, name, array)
  return _saturated(array)


def as_segment_ids(op: str, q: Any, k: Any) -> tuple[jax.Array, jax.Array]:
  """int32 [B, T] and [B, S], equal where q and k are and 0 where they are.

  Ids may be of any width, as hashes of documents are, and booleans.
  """
  if isinstance(q, np.ndarray) and q.dtype.kind in "iu" and _is_wide(q):
    keys = q if k is q else np.asarray(k)
    if keys.dtype.kind in "iub":  # else it is refused
      q, k = _ranks(np, q, keys)
  q_ids = as_array(op, "query segment_ids", q)
  k_ids = q_ids if k is q else as_array(op, "key segment_ids", k)
  for name, ids in (("query", q_ids), ("key", k_ids)):
    if ids.dtype != bool:
      check_integers(op, f"{name} segment_ids", ids)
  if _is_wide(q_ids) or _is_wide(k_ids):
    return _ranks(jnp, q_ids, k_ids)
  return _narrow_ids(q_ids), _narrow_ids(k_ids)


def _is_wide(ids: Any) -> bool:
  return getattr(getattr(ids, "dtype", None), "itemsize", 0) == 8


def _narrow_ids(ids: jax.Array) -> jax.Array:
  if ids.dtype == jnp.uint32:  # the same bits: a clamp would make ids equal
    return jax.lax.bitcast_convert_type(ids, jnp.int32)
  return ids.astype(jnp.int32)


def _ranks(numpy: Any, q: Any, k: Any) -> tuple[Any, Any]:
  """Of each id its place among all of them, from 1 on; 0 stays 0.

  With `numpy` or `jnp`, which outside of x64 would cut NumPy's ids to 32 bits.
  """
  known = q.ravel() if k is q else numpy.concatenate([q.ravel(), k.ravel()])
  known = numpy.sort(known)

  def ranks(ids: Any) -> Any:
    place = numpy.searchsorted(known, ids).astype(numpy.int32)
    return numpy.where(ids == 0, 0, place + 1)

  q_ranks = ranks(q)
  return q_ranks, q_ranks if k is q else ranks(k)


def _saturated(array: jax.Array) -> jax.Array:
  """int32; a label or a position beyond it stays beyond every length."""
  limits = jnp.iinfo(array.dtype)
  if limits.min >= _INT32.min and limits.max <= _INT32.max:
    return array.astype(jnp.int32)
  low = jnp.asarray(max(limits.min, _INT32.min), array.dtype)
  high = jnp.asarray(min(limits.max, _INT32.max), array.dtype)
  return jax.lax.clamp(low, array, high).astype(jnp.int32)


def check_integers(op: str, name: str, array: jax.Array) -> None:
  """Refuses arrays that are not integers."""
  if not jnp.issubdtype(array.dtype, jnp.integer):
    raise ValueError(f"{op}: {name} must be integers, got {array.dtype}")


def check_float(op: str, **arrays: jax.Array) -> None:
  """Refuses arrays that are not float32, bfloat16 or float16."""
  for name, array in arrays.items():
    if array.dtype not in _FLOATS:
      raise ValueError(
        f"{op}: {name} must be float32, bfloat16 or float16, got {array.dtype}"
      )


def check_shape(
  op: str, name: str, array: jax.Array, shape: Sequence[Any], why: str
) -> None:
  """Refuses an array whose shape is not `shape`; `why` explains the latter."""
  if array.shape != tuple(shape):
    raise ValueError(
      f"{op}: {name} must be {tuple(shape)} ({why}), got {array.shape}"
    )


def as_float_dtype(op: str, name: str, dtype: Any) -> np.dtype | None:
  """float32, bfloat16 or float16; None is that of what comes."""
  if dtype is None:
    return None
  try:
    is_array = isinstance(dtype, jax.Array | np.ndarray)  # which has a dtype
    known = None if is_array else jnp.dtype(dtype)
  except (TypeError, ValueError):
    known = None
  if known not in _FLOATS:
    raise ValueError(
      f"{op}: {name} must be float32, bfloat16, float16 or None, got {dtype!r}"
    )
  return known


# --- numbers ------------------------------------------------------------------


def is_traced(value: Any) -> bool:
  """Whether a number is known only when the program runs."""
  return isinstance(value, jax.core.Tracer)


def as_number(op: str, name: str, value: Any) -> float:
  """A number that is part of the program."""
  if is_traced(value):
    raise ValueError(
      f"{op}: {name} must be known when the program is traced, got a traced "
      f"value ({value.aval.str_short()})"
    )
  try:
    number = float(value)
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(f"{op}: {name} must be a number, got {value!r}") from error
  if math.isnan(number):
    raise ValueError(f"{op}: {name} must be a number, got {value!r}")
  return number


def as_scalar(op: str, name: str, value: Any) -> Any:
  """A number of the program, or a traced one as a float32 array []."""
  if not is_traced(value):
    return as_number(op, name, value)
  if value.shape != () or not jnp.issubdtype(value.dtype, jnp.number):
    raise ValueError(
      f"{op}: {name} must be a single number, got {value.aval.str_short()}"
    )
  return value.astype(jnp.float32)


def register_with_numbers(
  cls: type, arrays: Sequence[str], numbers: Sequence[str]
) -> None:
  """Makes a dataclass a pytree, of whose numbers the arrays alone are leaves.

  So a number is part of the program, as a keyword would be, and a traced one
  can be carried through `jit` and `scan`.
  """

  def flatten(x: Any) -> tuple[list[Any], Any]:
    traced = tuple(
      n for n in numbers if getattr(getattr(x, n), "dtype", None) is not None
    )
    static = tuple((n, getattr(x, n)) for n in numbers if n not in traced)
    return [getattr(x, n) for n in (*arrays, *traced)], (traced, static)

  def unflatten(aux: Any, children: Sequence[Any]) -> Any:
    traced, static = aux
    x: Any = object.__new__(cls)
    fields = dict(zip((*arrays, *traced), children, strict=True))
    for name, value in (*fields.items(), *static):
      object.__setattr__(x, name, value)
    return x

  jax.tree_util.register_pytree_node(cls, flatten, unflatten)


def as_whole_number(op: str, name: str, value: Any) -> int:
  """An integer that is part of the program; not a boolean."""
  if is_traced(value):
    return int(as_number(op, name, value))  # which refuses it
  try:
    number = operator.index(value)
  except TypeError:  # so do arrays of several, and of floats
    number = None
  if number is None or isinstance(value, bool | np.bool_):
    raise ValueError(f"{op}: {name} must be an integer, got {value!r}")
  return number


def is_size(value: Any, unit: int = 1) -> bool:
  """Whether it is a whole number that tiles can have: positive, of units."""
  if isinstance(value, bool) or not isinstance(value, int | np.integer):
    return False
  return bool(value > 0 and value % unit == 0)


def as_switch(op: str, name: str, value: Any) -> bool:
  """True or False, which are part of the program.

  To Python whatever is not empty is true: "no", and what was meant for the
  argument beside it.
  """
  if is_traced(value):
    as_number(op, name, value)  # which refuses it
  if isinstance(value, jax.Array | np.ndarray) and value.shape == ():
    value = value.item() if value.dtype == bool else value
  kinds = bool | np.bool_ | int | np.integer
  if not isinstance(value, kinds) or value not in (0, 1):
    raise ValueError(f"{op}: {name} must be True or False, got {value!r}")
  return bool(value)


def as_layer(op: str, layer: Any, count: int) -> jax.Array:
  """[] int32, which of `count` layers; one that is traced is kept in bounds.

  A kernel reads and writes where it says.
  """
  if not isinstance(layer, jax.Array | np.ndarray):
    layer = as_whole_number(op, "layer", layer)
    if not 0 <= layer < count:
      raise ValueError(
        f"{op}: layer must be from 0 to {count - 1}, the last of the stack, "
        f"got {layer}"
      )
  index = as_array(op, "layer", layer)
  if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
    raise ValueError(
      f"{op}: layer must be a single integer, got {index.dtype} {index.shape}"
    )
  return jnp.clip(index, 0, count - 1).astype(jnp.int32)


def check_positive(op: str, **values: float | None) -> None:
  """Refuses numbers that are not positive; None is none at all."""
  for name, value in values.items():
    if value is not None and not value > 0:
      raise ValueError(f"{op}: {name} must be positive or None, got {value}")
