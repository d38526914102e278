"""Mutants: a kernel with one line changed, which the tests must notice."""

import contextlib
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


@contextlib.contextmanager
def replaced(monkeypatch, owner, name, wrong):
  """Puts `wrong` in place of a named step of a module or a class.

  Nothing that was traced with the one is run again with the other.
  """
  with monkeypatch.context() as patch:
    patch.setattr(owner, name, wrong)
    jax.clear_caches()
    yield
  jax.clear_caches()


def assert_killed(check, *args):
  """`check` must fail on a mutant: by its verdict, or by a detected race."""
  with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
    check(*args)
