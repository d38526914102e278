"""Runs every op once under other versions of JAX, each in an environment of its
own that is thrown away afterwards.

    make smoke-jax PYTHON=python3.12 VERSIONS="0.10.0 0.12.0.1"

Per op, with its first test case, by both implementations, the kernels in JAX's
TPU interpreter: the op, its gradient, and both lowered for a TPU.  A cell says
how far the kernel is from plain jnp, relative to the largest value, or what
went wrong.  How far it may be is another question, which the tests answer.

Needs nothing but Python: JAX, and this package, are in the environments.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_COLUMNS = ("forward", "gradient", "lowered", "gradient lowered")


def main() -> None:
  """One table per version; fails if anything did."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("versions", nargs="*", help="of JAX, such as 0.12.0.1")
  parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.here:
    for row in _rows():
      print(json.dumps(row), flush=True)
    return
  failed = [v for v in arguments.versions if not _show(v, *_run(v))]
  if failed:
    sys.exit(f"failed on JAX {', '.join(failed)}")


# --- one version, from outside ------------------------------------------------


def _run(version: str) -> tuple[list[dict[str, str]], str]:
  """The rows of a version, and why there are no more of them."""
  with tempfile.TemporaryDirectory(prefix=f"jax-{version}-") as folder:
    python = pathlib.Path(folder) / "bin" / "python"
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done = None
    for command in (
      [sys.executable, "-m", "venv", folder],
      [*pip, "install", f"jax=={version}"],
      [*pip, "install", "--no-deps", "--editable", _ROOT],
      [python, "-P", __file__, "--here"],
    ):
      done = subprocess.run(
        list(map(str, command)),
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
      )
      if done.returncode:
        break
    assert done is not None
    lines = [line for line in done.stdout.splitlines() if line[:1] == "{"]
    problem = done.stderr.strip()[-2000:] if done.returncode else ""
    return [json.loads(line) for line in lines], problem


def _show(version: str, rows: list[dict[str, str]], problem: str) -> bool:
  """Prints a version's table; returns whether all is well."""
  head = {"op": f"JAX {version}"} | {column: column for column in _COLUMNS}
  widths = {
    key: max(len(row.get(key, "")) for row in [head, *rows]) for key in head
  }
  for row in [head, *rows]:
    cells = [row.get(key, "").ljust(width) for key, width in widths.items()]
    print("  ".join(cells).rstrip())
  errors = [e for row in rows for e in row.get("errors", "").splitlines()]
  print(*(f"  {error}" for error in errors), problem, sep="\n", flush=True)
  return not errors and not problem


# --- in the environment of one version ----------------------------------------


def _rows() -> Iterator[dict[str, str]]:
  from pallas_gemma.kernels import OPS

  for op in OPS:
    row, errors = {"op": op.name}, []
    for column, check in zip(_COLUMNS, _checks(op), strict=True):
      try:
        row[column] = check()
      except Exception as error:
        row[column] = type(error).__name__
        first = (str(error).splitlines() or [""])[0]
        errors.append(f"{op.name}, {column}: {type(error).__name__}: {first}")
    yield row | {"errors": "\n".join(errors)}


def _checks(op: Any) -> list[Callable[[], str]]:
  case = op.tests[0]
  has_gradient = op.cost(*case.args, **case.kwargs)[1] is not None
  kernel = "pallas" if op.pallas else None

  def function(implementation: Any, gradient: bool) -> Callable[..., Any]:
    bound = case.bind(
      functools.partial(op.function, implementation=implementation)
    )
    return _gradient(bound, case.specs) if gradient else bound

  def compare(gradient: bool) -> str:
    if gradient and not has_gradient:
      return "none"
    arrays = case.sample()
    plain = _values(function("xla", gradient), arrays)
    if not op.pallas:
      return "no kernel"
    return (
      f"{_distance(_values(function(kernel, gradient), arrays), plain):.0e}"
    )

  def lower(gradient: bool) -> str:
    if gradient and not has_gradient:
      return "none"
    return _lowered(function(kernel, gradient), case.specs, bool(op.pallas))

  return [
    functools.partial(check, gradient)
    for check in (compare, lower)
    for gradient in (False, True)
  ]


def _gradient(function: Callable[..., Any], specs: Any) -> Callable[..., Any]:
  import jax
  import jax.numpy as jnp

  floating = [jnp.issubdtype(s.dtype, jnp.floating) for s in specs]
  floats = [i for i, is_float in enumerate(floating) if is_float]

  def gradient(*arrays: Any) -> Any:
    def loss(*values: Any) -> Any:
      filled = list(arrays)
      for i, value in zip(floats, values, strict=True):
        filled[i] = value
      outs = jax.tree.leaves(function(*filled))
      return sum((out.astype(jnp.float32) ** 2).sum() for out in outs)

    return jax.grad(loss, range(len(floats)))(*(arrays[i] for i in floats))

  return gradient


def _values(function: Callable[..., Any], arrays: Any) -> list[Any]:
  """What a function gives, the kernels in it interpreted."""
  import jax
  import numpy as np
  from jax.experimental.pallas import tpu as pltpu

  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
    outs = jax.tree.leaves(jax.jit(function)(*arrays))
  return [np.asarray(out, np.float32) for out in outs]


def _distance(got: list[Any], want: list[Any]) -> float:
  import numpy as np

  worst = 0.0
  for a, b in zip(got, want, strict=True):
    if not np.isfinite(a).all():
      raise FloatingPointError("a result that is not finite")
    worst = max(worst, float(abs(a - b).max() / max(abs(b).max(), 1e-30)))
  if worst > 0.1:
    raise ArithmeticError(f"{worst:.0%} away from plain jnp")
  return worst


def _lowered(function: Callable[..., Any], specs: Any, kernel: bool) -> str:
  import jax

  exported = jax.export.export(jax.jit(function), platforms=["tpu"])(*specs)
  if kernel and "tpu_custom_call" not in exported.mlir_module():
    raise RuntimeError("no kernel in what is lowered for a TPU")
  return "yes"


if __name__ == "__main__":
  main()
