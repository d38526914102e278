"""Mutants: a kernel with one line changed, which the tests must notice."""

import functools
import inspect
import types

import jax
import pytest


def mutant(module, old, new):
  """A copy of `module` in which the one occurrence of `old` reads `new`."""
  source = inspect.getsource(module)
  assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
  assert module.__file__ is not None
  copy = types.ModuleType(module.__name__)
  copy.__package__ = module.__package__
  exec(compile(source.replace(old, new), module.__file__, "exec"), vars(copy))
  return copy


def replaced(monkeypatch, module, name, wrong):
  """Puts `wrong` in a function's place, and gives it that as first argument."""
  right = getattr(module, name)
  monkeypatch.setattr(module, name, functools.partial(wrong, right))


def assert_killed(check, *args):
  """`check` must fail on a mutant: by its verdict, or by a detected race."""
  with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
    check(*args)
