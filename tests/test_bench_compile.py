"""The lab from end to end: what is made slower on purpose shows as slower."""

import pathlib
import subprocess
import sys

import pytest
import v5e
from pallas_gemma import bench

pytestmark = [pytest.mark.no_interpreter, v5e.needs_compiler]
SUITE = str(pathlib.Path(__file__).with_name("slowed_kernels.py"))


def run(key, suite=SUITE, **fields):
  result = bench.run_job(bench.Job(suite, key, **fields))
  assert result["error"] is None, result["error"]
  return result


@pytest.mark.parametrize(
  "fast, slow",
  [
    ("blocks/slow/fwd/512", "blocks/slow/fwd/256"),
    ("reads/slow/fwd/1", "reads/slow/fwd/2"),
    ("registers/slow/fwd/128", "registers/slow/fwd/1024"),
  ],
)
def test_what_is_made_slower_shows_as_slower(fast, slow):
  before, after = run(fast), run(slow)
  assert after["cycles"] > 1.1 * before["cycles"]
  if fast.startswith("reads"):
    assert after["hbm_bytes"] == pytest.approx(1.5 * before["hbm_bytes"])
  if fast.startswith("registers"):
    assert after["spill_bytes"] > before["spill_bytes"]


def test_two_runs_give_the_same_numbers():
  key = "apply_rope/gemma_2b_8k/fwd/pallas"
  results = [run(key, suite="registry") for _ in range(2)]
  for result in results:
    del result["compile_seconds"]
  assert results[0] == results[1]
  assert results[0]["notes"] == [] and not results[0]["lower_bound"]


def test_agrees_with_the_compilers_own_model():
  """Within 5 % where the matrix units set the time."""
  result = run("matmul/1024/fwd/xla", suite="calibration", static=True)
  static = result["static"]
  assert static["model"] == pytest.approx(static["compiler"], rel=0.05)


def test_a_config_is_the_kernels(tmp_path):
  key = "rms_norm/gemma_2b_8k/fwd/pallas"
  halved = run(key, suite="registry", config={"rows": 16})
  assert halved["config"] == {"rows": 16}
  assert halved["cycles"] > 1.1 * run(key, suite="registry")["cycles"]


def test_one_failure_does_not_end_the_sweep(tmp_path):
  jobs = [
    bench.Job("registry", "rms_norm/no_such_case/fwd/pallas"),
    bench.Job("registry", "rms_norm/gemma_2b_8k/fwd/pallas", {"rows": 15}),
    bench.Job("registry", "rms_norm/gemma_2b_8k/fwd/pallas"),
  ]
  seen = []
  results = bench.run_jobs(
    jobs, cache=tmp_path, done=lambda job, result: seen.append(job)
  )
  assert "no program is called" in results[0]["error"]
  assert "multiple of 16" in results[1]["error"]
  assert results[2]["error"] is None and len(seen) == 3
  # A second run reads what the first one kept.
  assert bench.run_jobs(jobs, cache=tmp_path, timeout=1e-3) == results


def test_the_command_prints_a_table(tmp_path):
  lines = tmp_path / "rows.json"
  command = [sys.executable, "-P", "-m", "pallas_gemma.bench._cli"]
  command += ["--filter", "rms_norm/gemma_2b_8k/fwd/pallas", "--json", lines]
  command += ["--cache", tmp_path / "cache", "--mode", "compiled"]
  shown = subprocess.run(command, capture_output=True, text=True, check=True)
  assert "estimated from the compiled program" in shown.stdout
  assert "libtpu" in shown.stdout and "HBM" in shown.stdout
  assert len(lines.read_text().splitlines()) == 1
  wrong = subprocess.run(
    [*command[:4], "--filter", "nothing"], capture_output=True, text=True
  )
  assert wrong.returncode == 1 and "no program matches nothing" in wrong.stderr
