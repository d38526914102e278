"""What is timed: one pass of one implementation on one problem."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import pathlib
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pallas_gemma.kernels import Case, Cost, Integers, Op

from ..v5e import ONE_CHIP, V5E, Chip, Placement

Pass = Literal["fwd", "fwd+bwd", "step"]
APART, OVERLAPPED = "pallas", "pallas-overlapped"
"""Implementations of a step of training: its collectives apart, for the time of
what is computed; and as a user compiles it, for memory and collectives."""


class Built(typing.NamedTuple):
  """What of a program is compiled or run.

  Attributes:
    function: of the arrays alone.
    specs: shape and dtype of each array.
    values: of the integer arrays, None for the others.
    placement: the chips that it is compiled for, and how arrays lie on them.
  """

  function: Callable[..., Any]
  specs: tuple[jax.ShapeDtypeStruct, ...]
  values: tuple[np.ndarray | None, ...]
  placement: Placement = ONE_CHIP


@dataclasses.dataclass(frozen=True)
class Program:
  """A function to compile and time.

  Attributes:
    op: what it computes.
    case: the problem, named.
    implementation: whose it is: `pallas`, `xla`, or a baseline's name.
    which: `fwd`; `fwd+bwd`, the result and every gradient; or `step`, with the
      update of weights by the gradient.
    build: makes the function and describes its arguments.
    costs: of each pass, for the bound.
    default: whether the table shows it unless asked for more: not if it is of
      little interest, nor if it takes minutes of the compiler's time or of that
      of executing what it prints, since two cores are to finish the table in a
      quarter of an hour.
    needs: a package without which it cannot run.
    free_layouts: whether the compiler lays out arguments and results, as it
      does with what a model's other operations make and take; row-major if not.
    model_flops: of a chip in one run by the model's own formula, for the
      model-FLOPs utilisation; None where there is none.
  """

  op: str
  case: str
  implementation: str
  which: Pass
  build: Callable[[], Built] = dataclasses.field(repr=False)
  costs: tuple[Cost, ...]
  default: bool = True
  needs: str | None = None
  free_layouts: bool = False
  model_flops: int | None = None

  @property
  def key(self) -> str:
    """Its name: `rms_norm/gemma_2b_8k/fwd/pallas`."""
    return f"{self.op}/{self.case}/{self.which}/{self.implementation}"


def bound(costs: Sequence[Cost], chip: Chip = V5E) -> tuple[int, str]:
  """The fewest cycles for passes that run one after the other.

  Returns:
    The cycles, and which of MXU and HBM sets them, for the most part.
  """
  shares = {"MXU": 0, "HBM": 0}
  for cost in costs:
    mxu = -(-cost.flops // chip.flops_per_cycle)
    hbm = round(cost.hbm_bytes / chip.hbm_bytes_per_cycle)
    shares["MXU" if mxu >= hbm else "HBM"] += max(mxu, hbm)
  return sum(shares.values()), max(shares, key=lambda unit: shares[unit])


def with_gradients(
  function: Callable[..., Any], specs: Sequence[jax.ShapeDtypeStruct]
) -> tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]:
  """The result of `function` and the gradients of its float arguments.

  Cotangents are arguments, and the result is returned: otherwise XLA would fold
  the one and drop what only the other needs.

  Returns:
    The function of cotangents and arguments, and the cotangents' specs.
  """
  floats = [
    i for i, s in enumerate(specs) if jnp.issubdtype(s.dtype, jnp.floating)
  ]
  results, treedef = jax.tree.flatten(jax.eval_shape(function, *specs))
  cotangents = tuple(jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results)

  def both(*arrays: jax.Array) -> Any:
    dys, args = arrays[: len(cotangents)], list(arrays[len(cotangents) :])

    def of_floats(*values: jax.Array) -> Any:
      filled = list(args)
      for i, value in zip(floats, values, strict=True):
        filled[i] = value
      return function(*filled)

    y, vjp = jax.vjp(of_floats, *(args[i] for i in floats))
    return y, vjp(jax.tree.unflatten(treedef, dys))

  return both, cotangents


def passes(
  build: Callable[[], Built],
  costs: tuple[Cost, Cost | None],
  **fields: Any,
) -> list[Program]:
  """The programs of one implementation: forward, and with its gradients.

  Args:
    build: makes the forward function.
    costs: of the forward pass and of the backward, None if there is none.
    **fields: the others of `Program`.
  """
  forward, backward = costs
  programs = [Program(which="fwd", build=build, costs=(forward,), **fields)]
  if backward is not None:

    def build_both() -> Built:
      function, specs, values, _ = build()
      both, cotangents = with_gradients(function, specs)
      none = (None,) * len(cotangents)
      return Built(both, (*cotangents, *specs), (*none, *values))

    programs.append(
      Program(
        which="fwd+bwd", build=build_both, costs=(forward, backward), **fields
      )
    )
  return programs


def integer_values(case: Case, seed: int = 0) -> tuple[np.ndarray | None, ...]:
  """Drawn values of a case's integer arrays, None for its float ones."""
  leaves = jax.tree.leaves(
    (case.args, dict(case.kwargs)),
    is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct | Integers),
  )
  rng = np.random.default_rng(seed)
  return tuple(
    np.asarray(leaf.draw(rng), np.int32) if isinstance(leaf, Integers) else None
    for leaf in leaves
    if isinstance(leaf, jax.ShapeDtypeStruct | Integers)
  )


def of_case(
  op: Op,
  case: Case,
  implementation: str,
  config: Any = None,
  label: str | None = None,
  **fields: Any,
) -> list[Program]:
  """The programs of a registered op on one of its cases.

  Args:
    op: the op.
    case: the case.
    implementation: as the op takes it.
    config: the op's config, or its fields as JSON has them.
    label: what the programs call the implementation.
    **fields: the others of `Program`.
  """
  function = functools.partial(op.function, implementation=implementation)
  if isinstance(config, Mapping):
    config = make_config(op, config)
  if config is not None:
    function = functools.partial(function, config=config)

  def build() -> Built:
    placement = Placement(donated=case.donated)
    values = integer_values(case)
    return Built(case.bind(function), case.specs, values, placement)

  return passes(
    build,
    op.cost(*case.args, **case.kwargs),
    op=op.name,
    case=case.name,
    implementation=label or implementation,
    **fields,
  )


def config_class(op: Op) -> type:
  """The dataclass of an op's configs.

  Raises:
    ValueError: if its `config` parameter names none.
  """
  hint = typing.get_type_hints(op.function)["config"]
  classes = [t for t in typing.get_args(hint) if dataclasses.is_dataclass(t)]
  if not classes:
    raise ValueError(f"{op.name}: has no config to choose")
  return typing.cast(type, classes[0])


def make_config(op: Op, fields: Mapping[str, Any]) -> Any:
  """An op's config from JSON: lists become tuples, objects dataclasses."""
  return _from_json(config_class(op), fields)


def _from_json(cls: type, fields: Mapping[str, Any]) -> Any:
  hints = typing.get_type_hints(cls)

  def converted(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
      inner = filter(dataclasses.is_dataclass, typing.get_args(hints[name]))
      return _from_json(typing.cast(type, next(inner)), value)
    return tuple(value) if isinstance(value, list) else value

  return cls(**{name: converted(name, v) for name, v in fields.items()})


def suite(name: str) -> tuple[Program, ...]:
  """The programs of a suite.

  Args:
    name: a module of this package, or the path of a Python file; either defines
      `programs()`.
  """
  if name.endswith(".py"):
    path = pathlib.Path(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
      raise ValueError(f"suite: no such file, {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
  else:
    module = importlib.import_module(f"{__package__}.{name}")
  return tuple(module.programs())
