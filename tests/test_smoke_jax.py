"""The tool that runs every op under other versions of JAX."""

import dataclasses
import importlib.util
import pathlib
from typing import Any

import pallas_gemma.kernels
import pytest

pytestmark = pytest.mark.no_interpreter  # the tool asks for it
PATH = pathlib.Path(__file__).resolve().parents[1] / "tools" / "smoke_jax.py"


@pytest.fixture(scope="module")
def tool() -> Any:
  spec = importlib.util.spec_from_file_location("smoke_jax", PATH)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_what_works_and_what_does_not(tool, monkeypatch, capsys):
  norm = pallas_gemma.kernels.OPS[0]

  def broken(*args, **kwargs):
    raise TypeError("no such keyword\nand more")

  def far(*args, implementation, **kwargs):
    y = norm.function(*args, implementation=implementation, **kwargs)
    return y if implementation == "xla" else 2 * y

  ops = (
    norm,
    dataclasses.replace(norm, name="broken", function=broken),
    dataclasses.replace(norm, name="far", function=far),
  )
  monkeypatch.setattr(pallas_gemma.kernels, "OPS", ops)
  good, bad, wrong = tool._rows()
  assert good["lowered"] == good["gradient lowered"] == "yes"
  assert float(good["forward"]) < 1e-6 and float(good["gradient"]) < 1e-6
  assert not good["errors"] and tool._show("0.0", [good], "")
  assert bad["errors"].splitlines()[0] == (
    "broken, forward: TypeError: no such keyword"
  )
  assert "far, forward: ArithmeticError: 100% away" in wrong["errors"]
  assert not tool._show("0.0", [good, bad], "")
  assert not tool._show("0.0", [good], "no environment")
  shown = capsys.readouterr().out
  assert "JAX 0.0" in shown and "broken, gradient: TypeError" in shown
