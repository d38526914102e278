"""What others measured, and what whoever has a v5e can measure."""

import dataclasses
import importlib
import io
import json
import os
import pathlib
import subprocess
import sys
from importlib import metadata

import pytest
import rich.console
from pallas_gemma import bench
from pallas_gemma.bench.show import beside
from pallas_gemma.bench.show import published as shown
from pallas_gemma.bench.suites import published

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "bench" / "notebooks" / "v5e.ipynb"
ESTIMATED = "rms_norm/gemma_2b_64k/fwd/xla"  # quick on a CPU, and in results/


def row(key, milliseconds, **fields):
  op, case, which, implementation = key.split("/")
  return bench.Row(
    op=op,
    case=case,
    which=which,
    implementation=implementation,
    seconds=milliseconds * 1e-3,
    cycles=round(milliseconds * 1.5e6),
    **fields,
  )


def printed(show, *arguments):
  text = io.StringIO()
  show(rich.console.Console(width=200, file=text), *arguments)
  return text.getvalue()


def at_hand(monkeypatch, **versions):
  """Makes packages look installed."""

  def version(name):
    if name not in versions:
      raise metadata.PackageNotFoundError(name)
    return versions[name]

  monkeypatch.setattr(published.metadata, "version", version)


# --- what others measured -----------------------------------------------------


def test_what_was_published_is_listed_once_and_has_a_source():
  found = list(published.measurements())
  assert {m.source for m in found} == set(published.SOURCES)
  keys = [m.program.key for m in found]
  assert len(set(keys)) == len(keys)
  for m in found:
    # The chip allows no less, and the host takes part of the time.
    seconds = bench.V5E.seconds(bench.bound(m.program.costs)[0])
    assert seconds < (m.ms - m.source.dispatch_ms) * 1e-3, m.program.key


def test_only_the_version_that_was_measured_is_asked_for(monkeypatch):
  at_hand(monkeypatch)
  assert shown.jobs() == []
  assert len(list(shown.missing())) == len(published.SOURCES)

  at_hand(monkeypatch, **{"deltanet-tpu": "0.3.0", "pallas-forge": "0.1.2"})
  assert {job.key.rpartition("/")[2] for job in shown.jobs()} == {
    "pallas-forge-0.1.2",
    "xla",
  }
  left_out = "\n".join(shown.missing())
  assert "pip install --no-deps deltanet-tpu==0.1.0" in left_out
  assert "pallas-forge" not in left_out


def test_an_estimate_stands_beside_its_measurement():
  (measurement,) = (
    m for m in published.measurements() if m.program.op == "add_rms_norm"
  )
  key = measurement.program.key  # 0.89 ms, of which 0.15 are dispatch
  result = bench.Result(row(key, 0.37))
  assert shown.line(result, measurement) == [
    key,
    "555,000",
    "0.370",
    "0.890",
    "0.740",
    "0.416",
    "0.500",
    "[1]",
  ]
  loose = dataclasses.replace(result.row, lower_bound=True)
  assert "≥ 0.500" in shown.line(bench.Result(loose), measurement)
  failed = dataclasses.replace(result.row, error="ListingError: no")
  cells = shown.line(bench.Result(failed), measurement)
  assert cells == [key, "no estimate", "", "0.890", "0.740", "", "", "[1]"]
  assert f"{key}: ListingError: no" in printed(
    shown.show, [bench.Result(failed)]
  )


def test_the_sources_are_said(monkeypatch):
  at_hand(monkeypatch, **{"pallas-forge": "0.1.2"})
  results = [bench.Result(row(job.key, 1.0)) for job in shown.jobs()]
  text = " ".join(printed(shown.show, results).split())
  assert "[1] pallas-forge 0.1.2: notebooks/" in text
  assert "dispatch included" in text and "gdn2-pallas" not in text


# --- now beside earlier -------------------------------------------------------


def test_times_beside_earlier_ones():
  a, b, c = (f"op/{name}/fwd/pallas" for name in "abc")
  earlier = [row(a, 2.0, method="estimated"), row(b, 1.0), row(c, 1.0)]
  now = [
    row(b, 1.5, method="measured", versions={"device": "TPU v5 lite"}),
    row(a, 2.2),
    row("op/new/fwd/pallas", 1.0),
    dataclasses.replace(row(c, 1.0), error="it broke"),
  ]
  both = beside.pairs(earlier, now)
  assert [pair.now.key for pair in both] == [b, a]
  assert [pair.ratio for pair in both] == pytest.approx([1.5, 1.1])
  text = printed(beside.show, both)
  assert "measured" in text and "estimated" in text and "1.500" in text
  assert "median 1.300, 1.100 to 1.500" in text
  assert "say nothing" not in text


def test_another_device_is_not_taken_for_a_v5e():
  key = "op/a/fwd/xla"
  both = beside.pairs(
    [row(key, 1.0)], [row(key, 2.0, versions={"device": "cpu"})]
  )
  assert "measured on cpu, of which estimates" in beside.summary(both)


def test_files_to_stand_beside_must_be_there(monkeypatch, tmp_path):
  arguments = ["pallas-gemma-bench", "--mode", "measured", "-k", ESTIMATED]
  absent = ["--beside", str(tmp_path / "none.json")]
  monkeypatch.setattr(sys, "argv", arguments + absent)
  with pytest.raises(SystemExit, match="--beside: results: no such file"):
    importlib.import_module("pallas_gemma.bench._cli").main()


# --- the notebook -------------------------------------------------------------


def test_the_notebook_installs_measures_and_compares(tmp_path):
  """On this CPU, with a pip that only writes down what it was asked for."""
  notebook = json.loads(NOTEBOOK.read_text())
  (cell,) = (c for c in notebook["cells"] if c["cell_type"] == "code")
  assert cell["outputs"] == []
  (tmp_path / "pip").mkdir()
  (tmp_path / "pip" / "__init__.py").touch()
  (tmp_path / "pip" / "__main__.py").write_text(
    "import pathlib, sys\n"
    "*_, wanted = sys.argv\n"
    "folder, _, extras = wanted.partition('[')\n"
    "files = sorted(p.name for p in pathlib.Path(folder).iterdir())\n"
    "print('pip', sys.argv[1], extras, files)\n"
  )
  (tmp_path / "cell.py").write_text("".join(cell["source"]))
  ran = subprocess.run(
    [sys.executable, "cell.py"],
    cwd=tmp_path,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "PIP_DRY_RUN": "1",  # should the real one ever run
      "PALLAS_GEMMA": str(ROOT),
      "PALLAS_GEMMA_BENCH": f"-k {ESTIMATED} --runs 1",
      "PYTHONPATH": str(tmp_path),
    },
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert "pip install bench,tpu] [" in ran.stdout
  for name in ("bench", "gemma", "kernels", "pyproject.toml", "results"):
    assert f"'{name}'" in ran.stdout
  assert "measured on cpu, beside estimated from the compiled" in ran.stdout
  assert "1 programs, now / earlier: median" in ran.stdout
  (line,) = (tmp_path / "v5e_measured.json").read_text().splitlines()
  assert json.loads(line)["method"] == "measured on cpu"


def test_the_notebook_says_when_there_is_nothing_to_install(tmp_path):
  notebook = json.loads(NOTEBOOK.read_text())
  (cell,) = (c for c in notebook["cells"] if c["cell_type"] == "code")
  (tmp_path / "cell.py").write_text("".join(cell["source"]))
  ran = subprocess.run(
    [sys.executable, "cell.py"],
    cwd=tmp_path,
    env=os.environ | {"PALLAS_GEMMA": str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 1
  assert "no checkout of pallas-gemma found" in ran.stderr
