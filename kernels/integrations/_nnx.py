"""What the integrations of libraries on flax.nnx have in common."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._frame.sharding import rules_are_given, sharding


def value(variable: Any) -> jax.Array:
  """The array of an `nnx.Variable`."""
  return jnp.asarray(variable[...])


# --- names --------------------------------------------------------------------

_paths: dict[int, str] = {}


@contextlib.contextmanager
def named(model: Any) -> Iterator[None]:
  """Lets `path_of` know the modules of a model, while it runs."""
  before = dict(_paths)
  for path, module in _modules(model):
    _paths[id(module)] = "/".join(map(str, path))
  try:
    yield
  finally:
    _paths.clear()
    _paths.update(before)


def _modules(model: Any) -> Iterator[tuple[Any, Any]]:
  """The modules of a model, and their paths."""
  nnx = importlib.import_module("flax.nnx")
  yield from nnx.iter_modules(model)


def path_of(module: Any, otherwise: str) -> str:
  """Where a module is in the model that runs.

  A copy, as a `remat` makes it, has no path; nor has a layer that runs alone.
  """
  return _paths.get(id(module), otherwise)


# --- linear layers ------------------------------------------------------------


def why_not_linear(*layers: Any) -> str | None:
  """Why the products of `nnx.Linear`s are theirs alone; None if they are not.

  They are where there is more to them than one array: a bias, an adapter, a
  quantised weight, a product of somebody else's.
  """
  for layer in layers:
    if (
      variables(layer) - {"kernel", "bias"} or "Linear" != type(layer).__name__
    ):
      return "its products have adapters or weights of their own kind"
    if getattr(layer, "bias", None) is not None:
      return "its products have a bias"
    if layer.dot_general is not None and layer.dot_general is not (
      jax.lax.dot_general
    ):
      return "its products go by a dot_general of the caller's own"
    kernel = layer.kernel[...]
    if not isinstance(kernel, jax.Array) or not jnp.issubdtype(
      kernel.dtype, jnp.floating
    ):
      return "its weights are quantised"
  return None


def variables(layer: Any) -> set[str]:
  """The names of a layer's own variables."""
  return {name for name, x in vars(layer).items() if _is_variable(x)}


def _is_variable(x: Any) -> bool:
  """Whether something is state of a module; its own `bias` may be None."""
  names = {kind.__name__ for kind in type(x).__mro__}
  return "Variable" in names


def dtype_of(x: jax.Array, *layers: Any) -> Any:
  """In which `nnx.Linear`s compute."""
  if layers[0].dtype is not None:
    return layers[0].dtype
  return jnp.result_type(
    x.dtype, *(layer.kernel[...].dtype for layer in layers)
  )


# --- qwix ---------------------------------------------------------------------


def _providers() -> Iterator[tuple[int, Any]]:
  """Of qwix, which changes products while a model runs: who does so now."""
  qwix = sys.modules.get("qwix._src.interception")
  if qwix is None:
    return
  manager, here = qwix.interception_manager, threading.get_ident()
  for interceptor in manager._interceptors:
    if manager._intercepted_threads.get((here, interceptor.id)):
      owners = (getattr(f, "__self__", None) for f in interceptor.values())
      yield interceptor.id, next((o for o in owners if o is not None), None)


def is_intercepted() -> bool:
  """Whether qwix changes products here, for adapters or for quantisation."""
  return any(True for _ in _providers())


def is_quantised() -> bool:
  """Whether qwix changes products for anything but adapters in floats."""
  for _, provider in _providers():
    rules = getattr(provider, "_rules", [None])
    if type(provider).__name__ != "LoraProvider":
      return True
    for rule in rules:
      kinds = [getattr(rule, f"{x}_qtype", "?") for x in ("weight", "act")]
      if kinds != [None, None]:
        return True
  return False


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
  """Lets products inside be what they are, where qwix changes products."""
  found = [identity for identity, _ in _providers()]
  here = threading.get_ident()
  if not found:
    yield
    return
  manager = sys.modules["qwix._src.interception"].interception_manager
  keys = [(here, identity) for identity in found]
  manager._intercepted_threads.update(dict.fromkeys(keys, False))
  try:
    yield
  finally:
    manager._intercepted_threads.update(dict.fromkeys(keys, True))


# --- meshes -------------------------------------------------------------------


def rules_of(
  mesh: Any, sizes: Mapping[str, int], axes: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
  """Rules for the kernels, of how a library splits its activations.

  Args:
    mesh: the mesh of the context.
    sizes: of the dimensions, by letter.
    axes: of a letter, an axis' name, several, or None.

  Returns:
    The axes of each letter: those that the mesh has, as far as they divide it.
  """
  rules = {}
  for letter, entry in axes.items():
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    names = tuple(n for n in names if mesh.shape.get(n, 1) > 1)
    while names and sizes[letter] % _devices(mesh, names):
      names = names[:-1]
    if names:
      rules[letter] = names
  return rules


def _devices(mesh: Any, names: Sequence[str]) -> int:
  count = 1
  for name in names:
    count *= mesh.shape[name]
  return count


@contextlib.contextmanager
def split(mesh: Any, rules: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
  """`kernels.sharding`, unless the caller has said it or there is one chip."""
  if mesh.empty or mesh.size == 1 or rules_are_given():
    yield
  else:
    with sharding(mesh, rules):
      yield
