"""The benchmarks from end to end: what is made slower shows as slower."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
import v5e
from pallas_gemma import bench

pytestmark = [pytest.mark.no_interpreter, v5e.needs_compiler]
SUITE = str(pathlib.Path(__file__).with_name("slowed_kernels.py"))
KEY = "rms_norm/gemma_2b_8k/fwd/pallas"
JOBS = [
  bench.Job("registry", "rms_norm/no_such_case/fwd/pallas"),
  bench.Job("registry", KEY, {"rows": 15}),
  bench.Job("registry", KEY),
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
  """Results of this run of pytest, in whichever of its processes."""
  base = tmp_path_factory.getbasetemp()
  return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "rows"


@pytest.fixture
def run(cache):
  """The results of jobs, two processes at a time."""

  def run(*jobs):
    results = bench.run_jobs(jobs, workers=2, cache=cache)
    for result in results:
      assert result.row.error is None, result.row.error
    return results

  return run


def test_one_failure_does_not_end_the_sweep(tmp_path):
  seen = []
  results = bench.run_jobs(
    JOBS, cache=tmp_path, done=lambda job, result: seen.append(job)
  )
  assert "no program is called" in str(results[0].row.error)
  assert "multiple of 16" in str(results[1].row.error)
  assert results[2].row.error is None and len(seen) == 3
  # A second run reads what the first one kept.  Not from the cache that the
  # other tests share: another process may keep its own result there between.
  assert bench.run_jobs(JOBS, cache=tmp_path, timeout=1e-3) == results


@pytest.mark.parametrize(
  "fast, slow",
  [
    ("blocks/slow/fwd/512", "blocks/slow/fwd/256"),
    ("reads/slow/fwd/1", "reads/slow/fwd/2"),
    ("registers/slow/fwd/128", "registers/slow/fwd/1024"),
  ],
)
def test_what_is_made_slower_shows_as_slower(run, fast, slow):
  results = run(bench.Job(SUITE, fast), bench.Job(SUITE, slow))
  before, after = (result.row for result in results)
  assert after.cycles > 1.1 * before.cycles
  if fast.startswith("reads"):
    assert after.hbm_bytes == pytest.approx(1.5 * before.hbm_bytes)
  if fast.startswith("registers"):
    assert after.spill_bytes > before.spill_bytes


def test_two_runs_give_the_same_numbers(run):
  (kept,) = run(bench.Job("registry", KEY))
  results = [
    kept.row.to_json(),
    bench.run_job(bench.Job("registry", KEY)).row.to_json(),
  ]
  for result in results:
    del result["compile_seconds"]
  assert results[0] == results[1]
  assert results[0]["notes"] == [] and not results[0]["lower_bound"]


def test_agrees_with_the_compilers_own_model(run):
  """Within 5 % where the matrix units set the time."""
  job = bench.Job("calibration", "matmul/1024/fwd/xla", ask_compiler=True)
  (result,) = run(job)
  static = result.static
  assert static.model == pytest.approx(static.compiler, rel=0.05)


def test_a_config_is_the_kernels(run):
  default, halved = run(
    bench.Job("registry", KEY), bench.Job("registry", KEY, {"rows": 16})
  )
  assert halved.row.config == {"rows": 16}
  assert halved.row.cycles > 1.1 * default.row.cycles


def test_the_command_prints_a_table_and_compares(
  run, cache, tmp_path, monkeypatch, capsys
):
  run(bench.Job("registry", KEY))
  lines = tmp_path / "rows.json"
  command = [sys.executable, "-P", "-m", "pallas_gemma.bench._cli"]
  options = ["--cache", str(cache), "--mode", "compiled"]
  command += ["--filter", KEY, "--json", str(lines), *options]
  shown = subprocess.run(command, capture_output=True, text=True, check=True)
  assert "estimated from the compiled program" in shown.stdout
  assert "libtpu" in shown.stdout and "HBM" in shown.stdout
  assert len(lines.read_text().splitlines()) == 1

  def main(*arguments):
    monkeypatch.setattr(sys, "argv", ["pallas-gemma-bench", *arguments])
    importlib.import_module("pallas_gemma.bench._cli").main()

  with pytest.raises(SystemExit, match="no program matches nothing"):
    main("--filter", "nothing")
  main("--compare", str(lines), *options)
  assert "1 programs: 1 equal" in capsys.readouterr().out
  fields = json.loads(lines.read_text())
  lines.write_text(json.dumps(fields | {"cycles": fields["cycles"] - 100}))
  with pytest.raises(SystemExit, match="1"):
    main("--compare", str(lines), *options)
  assert "1 higher" in capsys.readouterr().out
