"""Values of the integer operands of a function's Pallas kernels.

A kernel that reads block tables, lengths or segment bounds branches on them:
its cycles depend on their values.  They follow from the function's integer
arguments and constants, so its jaxpr is evaluated as far as they need it, on
the CPU; whatever depends on a float argument stays unknown.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr

from . import ragged

_MAX_SIZE = 1 << 22
_SUBPROGRAMS = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")
_NOT_INLINED = ("pallas_call", "while", "scan", "cond")
_OF_A_MESH = ("axis_index", "psum", "psum_invariant", "all_gather")


class _Unknown(Exception):
  """A value that depends on something which has none."""


class _Lazy:
  """A value, computed when it is first asked for."""

  def __init__(self, compute: Callable[[], Any]):
    self._compute = compute
    self._value: Any = None
    self._done = False

  def __call__(self) -> Any:
    if not self._done:
      self._value = self._compute()
      self._done = True
    return self._value


def _unknown() -> Any:
  raise _Unknown


def _known(value: Any) -> _Lazy:
  return _Lazy(lambda: value)


def kernel_operands(
  function: Callable[..., Any],
  specs: Sequence[jax.ShapeDtypeStruct],
  values: Sequence[np.ndarray | None],
) -> dict[str, dict[int, np.ndarray]]:
  """The integer operands of each kernel, by kernel name and operand index.

  Args:
    function: of arrays alone.
    specs: of its arguments.
    values: of its arguments, None where there is none.

  Returns:
    Those that could be computed.  Of kernels of one name with different
    operands, the last counts.
  """
  closed = jax.make_jaxpr(function)(*specs)
  arguments = [
    _Lazy(_unknown) if value is None else _known(value) for value in values
  ]
  found: dict[str, dict[int, np.ndarray]] = {}
  _walk(closed.jaxpr, _constants(closed), arguments, found)
  return found


def _constants(closed: Any) -> list[_Lazy]:
  return [_known(const) for const in closed.consts]


def _walk(
  jaxpr: Any,
  consts: list[_Lazy],
  args: list[_Lazy],
  found: dict,
  caller: str = "",
) -> list[_Lazy]:
  """Follows a jaxpr; returns its results, fills in what kernels get.

  `caller` is the name of the jitted function that it is of.
  """
  env: dict[Any, _Lazy] = {}
  env.update(zip(jaxpr.constvars, consts, strict=True))
  env.update(zip(jaxpr.invars, args, strict=True))

  def read(atom: Any) -> _Lazy:
    if hasattr(atom, "val"):
      return _known(atom.val)
    return env[atom]

  for eqn in jaxpr.eqns:
    inputs = [read(atom) for atom in eqn.invars]
    outputs = _equation(jaxpr, eqn, inputs, found, caller)
    env.update(zip(eqn.outvars, outputs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _equation(
  jaxpr: Any, eqn: Any, inputs: list[_Lazy], found: dict, caller: str
) -> list[_Lazy]:
  name, unknown = eqn.primitive.name, [_Lazy(_unknown)] * len(eqn.outvars)
  if name == "pallas_call":
    _record(eqn, inputs, found, caller)
    return unknown
  if name == "platform_index":
    return [_known(_tpu_branch(eqn.params["platforms"]))]
  if name == "ragged_dot_general":
    _record_group_sizes(inputs, found)
    return unknown
  if name == "pvary":  # the same values, of another type
    return inputs
  if name == "cond":
    return _branch(eqn, inputs, found) or unknown
  if name == "scan":
    closed = eqn.params["jaxpr"]
    _walk(closed.jaxpr, _constants(closed), _first_turn(eqn, inputs), found)
    return unknown
  inner = None if name in _NOT_INLINED else _subprogram(eqn.params)
  if inner is not None:
    body = getattr(inner, "jaxpr", inner)
    consts = _constants(inner) if hasattr(inner, "consts") else []
    if len(body.invars) != len(inputs):
      return unknown
    if name == "shard_map":
      _walk(body, consts, _first_blocks(body, inputs), found)
      return unknown
    return _walk(body, consts, inputs, found, eqn.params.get("name") or caller)
  if _too_large(eqn) or name in _OF_A_MESH:
    return unknown
  results = _Lazy(lambda: _evaluate(jaxpr, eqn, inputs))
  return [
    _Lazy(functools.partial(lambda i: results()[i], i))
    for i in range(len(eqn.outvars))
  ]


def _subprogram(params: Mapping[str, Any]) -> Any:
  """The program that an equation calls, if it calls one."""
  called = (params[key] for key in _SUBPROGRAMS if key in params)
  inner = next(called, None)
  if isinstance(inner, tuple):  # as the frame's `with_rule` holds it
    (inner,) = inner
  return inner


def _first_turn(eqn: Any, inputs: list[_Lazy]) -> list[_Lazy]:
  """What the body of a scan is called with at first; it stands for all turns.

  That is what the scan is called with, but for the arrays that it runs over:
  they have a dimension more than the body's, of which the first (or last, if
  the scan runs backwards) entry counts.
  """
  entry = -1 if eqn.params["reverse"] else 0

  def argument(value: _Lazy, outer: Any, inner: Any) -> _Lazy:
    if outer.aval.shape == inner.aval.shape:
      return value
    if getattr(outer.aval, "size", 0) > _MAX_SIZE:
      return _Lazy(_unknown)
    return _Lazy(lambda: value()[entry])

  body = eqn.params["jaxpr"].jaxpr.invars
  return [
    argument(value, outer, inner)
    for value, outer, inner in zip(inputs, eqn.invars, body, strict=True)
  ]


def _first_blocks(body: Any, inputs: list[_Lazy]) -> list[_Lazy]:
  """What the first device gets of the arguments of a `shard_map`."""

  def block(value: _Lazy, inner: Any) -> _Lazy:
    part = tuple(slice(size) for size in inner.aval.shape)
    return _Lazy(lambda: value()[part])

  return [block(*pair) for pair in zip(inputs, body.invars, strict=True)]


def _too_large(eqn: Any) -> bool:
  return any(
    getattr(var.aval, "size", 0) > _MAX_SIZE
    for var in (*eqn.invars, *eqn.outvars)
  )


def _evaluate(jaxpr: Any, eqn: Any, inputs: list[_Lazy]) -> list[Any]:
  """The results of one equation, as a program of its own."""
  variables = {
    atom: value
    for atom, value in zip(eqn.invars, inputs, strict=True)
    if not hasattr(atom, "val")
  }
  alone = jaxpr.replace(
    eqns=[eqn],
    constvars=[],
    invars=[*variables],
    outvars=eqn.outvars,
    debug_info=jaxpr.debug_info.with_unknown_names(),
  )
  return eval_jaxpr(alone, [], *(value() for value in variables.values()))


def _tpu_branch(platforms: Sequence[Sequence[str] | None]) -> int:
  """Index of the branch of `platform_dependent` that a TPU takes."""
  for i, names in enumerate(platforms):
    if names is None or "tpu" in names:
      return i
  return len(platforms)


def _branch(eqn: Any, inputs: list[_Lazy], found: dict) -> list[_Lazy] | None:
  """Follows the branch that is taken, or all of them where none is known."""
  branches = eqn.params["branches"]
  try:
    taken = [branches[int(inputs[0]())]]
  except _Unknown:
    taken = list(branches)
  for closed in taken:
    results = _walk(closed.jaxpr, _constants(closed), inputs[1:], found)
    if len(taken) == 1:
      return results
  return None


def _record(eqn: Any, inputs: list[_Lazy], found: dict, caller: str) -> None:
  values: dict[int, np.ndarray] = {}
  for i, value in _integers(eqn, inputs):
    try:
      values[i] = np.asarray(value())
    except _Unknown:
      continue
  if values:
    found[_kernel_name(eqn.params, caller)] = values


def _record_group_sizes(inputs: list[_Lazy], found: dict) -> None:
  """What XLA's own kernel makes its tables of; one for the whole program."""
  try:
    found[ragged.TABLES] = {0: np.asarray(inputs[2]())}
  except _Unknown:
    pass


def _integers(eqn: Any, inputs: list[_Lazy]) -> Iterator[tuple[int, _Lazy]]:
  for i, (atom, value) in enumerate(zip(eqn.invars, inputs, strict=True)):
    aval = atom.aval
    if aval.size <= _MAX_SIZE and jnp.issubdtype(aval.dtype, jnp.integer):
      yield i, value


def _kernel_name(params: Mapping[str, Any], caller: str) -> str:
  """The kernel's name as the compiler writes it; without one, its caller's."""
  name = params.get("name")
  if not name and "name_and_src_info" in params:
    name = params["name_and_src_info"].name
  name = name or caller
  return re.sub(r"[^\w.\-]", "_", name)
