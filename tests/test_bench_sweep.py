"""Every op compiles for v5e at its real sizes, forward and backward.

Mosaic refuses what it cannot lower and what does not fit VMEM; the compiler,
what does not fit HBM.  By default the first case of each op, `-m sweep` all.
"""

import importlib

import jax
import pytest
import v5e
from pallas_gemma import bench
from pallas_gemma.kernels import OPS

pytestmark = [pytest.mark.no_interpreter, v5e.needs_compiler]
PROGRAMS = {
  # The last pass holds the others: it has the gradients, if there are any.
  f"{p.op}-{p.case}-{p.implementation}": p
  for p in bench.suite("registry")
  if p.implementation.startswith("pallas")
}
FIRST = {(op.name, op.benches[0].name, "pallas") for op in OPS}


@pytest.mark.parametrize(
  "program",
  [
    pytest.param(
      program,
      id=name,
      marks=[]
      if (program.op, program.case, program.implementation) in FIRST
      else [pytest.mark.sweep],
    )
    for name, program in PROGRAMS.items()
  ],
)
def test_compiles_within_memory(program):
  built = program.build()
  text = v5e.compile(built.function, *built.specs).as_text() or ""
  assert "tpu_custom_call" in text


def test_every_tuned_config_is_compiled(monkeypatch):
  """The problems of the sweep ask for every entry of the tuned tables."""
  tuned = importlib.import_module("pallas_gemma.kernels._tuned")
  wanted = set()

  def look_up(op, **key):
    wanted.add((op, tuned._frozen({"chip": tuned.chip(), **key})))
    return original(op, **key)

  original = tuned.tuned_config
  for name in ("_flash_attention", "_geglu_tiles"):
    module = importlib.import_module(f"pallas_gemma.kernels.{name}")
    monkeypatch.setattr(module, "tuned_config", look_up)
  for program in PROGRAMS.values():
    built = program.build()
    jax.eval_shape(built.function, *built.specs)
  entries = {(op.name, key) for op in OPS for key in tuned._table(op.name)}
  assert entries and not entries - wanted
