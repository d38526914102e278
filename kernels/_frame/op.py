"""The registry's record of an op: what tests and benchmarks enumerate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Cost:
  """The least work any implementation of one pass must do.

  Attributes:
    flops: floating-point operations of the matrix unit; a multiply-add counts
      as two.
    hbm_bytes: compulsory traffic: each input read once, each output written
      once.
  """

  flops: int
  hbm_bytes: int


@dataclasses.dataclass(frozen=True)
class Integers:
  """An int32 argument of a case.

  Attributes:
    shape: its shape.
    draw: makes its values from a generator; returns an array of that shape.
  """

  shape: tuple[int, ...]
  draw: Callable[[np.random.Generator], Any]

  @property
  def dtype(self) -> np.dtype:
    """Always int32."""
    return np.dtype(np.int32)


def _is_array(leaf: Any) -> bool:
  return isinstance(leaf, jax.ShapeDtypeStruct | Integers)


@dataclasses.dataclass(frozen=True)
class Case:
  """One problem: array arguments without values, and static keywords.

  Attributes:
    name: unique within its op.
    args: positional arguments, each a ShapeDtypeStruct (floats) or Integers.
    kwargs: keyword arguments: static values, or arrays described likewise,
      also inside pytrees such as `Rope`.
    donated: which of its arrays, by their place among `specs`, results may
      take the memory of.
  """

  name: str
  args: tuple[Any, ...]
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  donated: tuple[int, ...] = ()

  def _flatten(self):
    return jax.tree.flatten((self.args, dict(self.kwargs)), is_leaf=_is_array)

  @property
  def specs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shape and dtype of every array of the problem, in order."""
    return tuple(
      jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
      for leaf in self._flatten()[0]
      if _is_array(leaf)
    )

  def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of this problem's arrays alone, the rest filled in."""
    leaves, treedef = self._flatten()

    def bound(*arrays: jax.Array) -> Any:
      supply = iter(arrays)
      filled = [next(supply) if _is_array(leaf) else leaf for leaf in leaves]
      args, kwargs = jax.tree.unflatten(treedef, filled)
      return function(*args, **kwargs)

    return bound

  def sample(self, seed: int = 0) -> list[jax.Array]:
    """Values for every array: normal floats, integers as each one draws."""
    rng = np.random.default_rng(seed)
    return [
      jnp.asarray(
        leaf.draw(rng)
        if isinstance(leaf, Integers)
        else rng.standard_normal(leaf.shape, np.float32),
        leaf.dtype,
      )
      for leaf in self._flatten()[0]
      if _is_array(leaf)
    ]


@dataclasses.dataclass(frozen=True)
class Op:
  """A kernel, its specification, and what it takes to test and time both.

  Attributes:
    name: prefix of the kernels' names in a trace, e.g. `rms_norm_fwd`.
    function: the public function.
    reference: the specification in plain jnp; `function` adds the keywords
      `implementation` and `config` to its signature.
    cost: maps a case's arguments to its (forward, backward) cost; the backward
      is None where the op has no gradient.
    tests: small problems; at least one ragged and one bfloat16.
    benches: problems of real models.
    pallas: whether a Pallas kernel stands behind `implementation="pallas"`.
    modes: other ways for its gradient than the default's, by name: each maps a
      case's arguments to a `config`.
    through_softmax: whether its gradients pass through a softmax, for which the
      numerics bar allows a wider margin.
    baselines: what else does the same, as the benchmarks name it.
  """

  name: str
  function: Callable[..., Any]
  reference: Callable[..., Any]
  cost: Callable[..., tuple[Cost, Cost | None]]
  tests: tuple[Case, ...]
  benches: tuple[Case, ...]
  pallas: bool = True
  modes: Mapping[str, Callable[..., Any]] = dataclasses.field(
    default_factory=dict
  )
  through_softmax: bool = False
  baselines: tuple[str, ...] = ()


def nbytes(*arrays: Any) -> int:
  """Total size in bytes of arrays or of their descriptions."""
  return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in arrays)
