"""Every op compiles for v5e at its real sizes, forward and backward.

Mosaic refuses what it cannot lower and what does not fit VMEM; the compiler,
what does not fit HBM.  By default the first case of each op, `-m sweep` all.
"""

import pytest
import v5e
from pallas_gemma.bench import of_case
from pallas_gemma.kernels import OPS

pytestmark = [pytest.mark.no_interpreter, v5e.needs_compiler]
CASES = [
  pytest.param(
    op,
    case,
    id=f"{op.name}-{case.name}",
    marks=[pytest.mark.sweep] if i else [],
  )
  for op in OPS
  if op.pallas
  for i, case in enumerate(op.benches)
]


@pytest.mark.parametrize("op, case", CASES)
def test_compiles_within_memory(op, case):
  # The last pass holds the others: it has the gradients, if there are any.
  built = of_case(op, case, "pallas")[-1].build()
  text = v5e.compile(built.function, *built.specs).as_text() or ""
  assert "tpu_custom_call" in text
