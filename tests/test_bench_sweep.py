"""Every op compiles for v5e at its real sizes, forward and backward.

Mosaic refuses what it cannot lower and what does not fit VMEM; the compiler,
what does not fit HBM.  By default the first case of each op, `-m sweep` all.
"""

import jax
import pytest
import v5e
from pallas_gemma import bench
from pallas_gemma.kernels import OPS
from pallas_gemma.kernels._frame import tuned

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


def test_every_tuned_config_is_compiled():
  """The problems of the sweep ask for every entry of the tuned tables."""
  entries = {
    (op.name, frozenset(entry["key"].items()))
    for op in OPS
    for entry in tuned.entries(op.name)
  }
  tables = {name for name, _ in entries}
  with tuned.asked_keys() as asked:
    for program in PROGRAMS.values():
      if program.op in tables:
        built = program.build()
        jax.eval_shape(built.function, *built.specs)
  wanted = {(name, frozenset(key.items())) for name, key in asked}
  assert entries and not entries - wanted
