"""The benchmark suite for pytest: `pytest bench --benchmark-only`."""

from __future__ import annotations

import pathlib
import sys


def pytest_configure() -> None:
  """Takes the checkout off sys.path, where it would hide other packages."""
  root = pathlib.Path(__file__).resolve().parents[1]
  sys.path[:] = [p for p in sys.path if pathlib.Path(p).resolve() != root]
