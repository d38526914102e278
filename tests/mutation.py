"""Mutants: an op with one named step replaced, which the tests must notice.

A mutant is made with `monkeypatch.setattr(module, step, wrong)`.  Steps are
found through their module when a kernel is traced, and each check traces anew.
"""

import functools

import jax
import pytest


def replaced(monkeypatch, module, name, wrong):
  """Puts `wrong` in a function's place, and gives it that as first argument."""
  right = getattr(module, name)
  monkeypatch.setattr(module, name, functools.partial(wrong, right))


def assert_killed(check, *args):
  """`check` must fail on a mutant: by its verdict, or by a detected race."""
  with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
    check(*args)
