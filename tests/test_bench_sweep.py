"""Every op compiles for v5e at its real sizes, forward and backward.

Mosaic refuses what it cannot lower and what does not fit VMEM; the compiler,
what does not fit HBM.  And no loop is so long that its code is loaded again at
every turn.  By default the first case of each op and those with the longest
loops, `-m sweep` all.
"""

import jax
import pytest
import v5e
from pallas_gemma import bench
from pallas_gemma.kernels import OPS
from pallas_gemma.kernels._frame import tuned

pytestmark = [pytest.mark.no_interpreter, v5e.needs_compiler]
PROGRAMS = {
  p.key: p
  for p in bench.suite("registry")
  if p.implementation.startswith("pallas")
}
# The last pass holds the others, but for a forward pass that keeps nothing.
LAST = {(p.op, p.case, p.implementation): p.key for p in PROGRAMS.values()}
BY_DEFAULT = {
  *(LAST[op.name, op.benches[0].name, "pallas"] for op in OPS if op.pallas),
  "feed_forward/gemma_2b_8k/fwd/pallas",
  "feed_forward/gemma_7b_4k/fwd+bwd/pallas",
  "geglu/gemma_7b_4k/fwd+bwd/pallas-residuals-none",
  "linear_cross_entropy/gemma_7b_4k/fwd+bwd/pallas-chunked",
}


@pytest.mark.parametrize(
  "key",
  [
    pytest.param(key, marks=[] if key in BY_DEFAULT else [pytest.mark.sweep])
    for key in PROGRAMS
  ],
)
def test_compiles_within_memory(key, tmp_path):
  built = PROGRAMS[key].build()
  compiled, cut = v5e.compile_and_cut(tmp_path, built.function, *built.specs)
  assert "tpu_custom_call" in (compiled.as_text() or "")
  reloaded = [loop for loop in cut.loops if loop.is_reloaded]
  assert not reloaded, "loops over several overlays of instruction memory"


def test_the_longest_loops_are_compiled_by_default():
  assert set(PROGRAMS) >= BY_DEFAULT


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
