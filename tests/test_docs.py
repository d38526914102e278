"""The documentation is true: its Python runs, its tables are those computed."""

import inspect
import pathlib
import re

import jax
import pytest
from pallas_gemma import bench, gemma, kernels
from pallas_gemma.bench import v5e as cycle_model
from pallas_gemma.bench.show import report
from pallas_gemma.kernels import OPS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted(
  path
  for path in (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "results" / "README.md",
    *(ROOT / "docs").rglob("*.md"),
  )
)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ANY_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")

pytestmark = pytest.mark.no_interpreter  # pages ask for it where they want it


def name(path):
  return str(path.relative_to(ROOT))


def blocks(path):
  """Each Python block, at the line of its page for tracebacks."""
  text = path.read_text()
  for found in BLOCK.finditer(text):
    line = text.count("\n", 0, found.start(1))
    yield compile("\n" * line + found.group(1), str(path), "exec")


WITH_PYTHON = [page for page in PAGES if any(blocks(page))]


def test_the_readme_and_the_lesson_have_examples():
  assert {"README.md", "docs/first_kernel.md"} <= {*map(name, WITH_PYTHON)}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_examples_run(page):
  """The blocks of a page, one after the other, as a reader would."""
  namespace = {"__name__": "__main__"}
  for code in blocks(page):
    exec(code, namespace)
  jax.clear_caches()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
  for target in LINK.findall(ANY_BLOCK.sub("", page.read_text())):
    assert (page.parent / target).exists(), f"{name(page)} links to {target}"


def test_generated_tables_are_those_of_the_results():
  """`python -P -m pallas_gemma.bench.show.report` would change nothing."""
  rows, commands = report.read(ROOT / "results")
  readme = (ROOT / "README.md").read_text()
  assert report.readme_text(readme, rows) == readme
  full = (ROOT / "results" / "README.md").read_text()
  assert report.full_text(full, rows, commands) == full


def row(op, case, which, implementation, seconds):
  return bench.Row(
    op=op,
    case=case,
    which=which,
    implementation=implementation,
    method="estimated from the compiled program",
    seconds=seconds,
    cycles=1000,
    bound_cycles=900,
    bound_by="MXU",
    shapes=((1, 64, 128), (128, 256), (128, 256)),
  )


def test_the_headline_has_the_first_case_of_an_op_and_the_model():
  op = OPS[0]
  case = op.benches[0].name
  table = report.headline(
    [
      row(op.name, case, "fwd", "pallas", 1e-3),
      row(op.name, case, "fwd", "xla", 2e-3),
      row(op.name, case, "fwd+bwd", "pallas", 4e-3),
      row(op.name, case, "fwd+bwd", "xla", 6e-3),
      row(op.name, case, "fwd+bwd", "xla-barrier", 5e-3),
      row(op.name, case, "fwd+bwd", "pallas-chunked", 10e-3),
      row(op.name, "another", "fwd+bwd", "pallas", 7e-3),
      row(op.name, "another", "fwd+bwd", "xla", 7e-3),
      row("gemma_block", "gemma_2b_1x64", "fwd+bwd", "pallas", 3e-3),
      row("gemma_block", "gemma_2b_1x64", "fwd+bwd", "xla-splash", 6e-3),
    ]
  )
  arrays = "[1, 64, 128], 2 × [128, 256]"
  end = "90.0% MXU |"
  assert [line for line in table.splitlines() if line.endswith(end)] == [
    f"| `{op.name}` | {arrays} | 4.000 | 5.000 | xla-barrier | 1.25 | {end}",
    f"| `{op.name}`, chunked | {arrays} | 10.000 | 5.000 | xla-barrier | 0.50 "
    f"| {end}",
    f"| Gemma 2B | 1 × 64 | 3.000 | 6.000 | xla-splash | 2.00 | {end}",
  ]
  assert "**estimated from the compiled program**" in table


def test_the_ops_are_those_of_the_registry():
  lines = report.ops_table().splitlines()[2:]
  assert [line.split("`")[1] for line in lines] == [op.name for op in OPS]
  for op, line in zip(OPS, lines, strict=True):
    assert ("Pallas" in line) == op.pallas


def test_the_readme_says_estimated_before_its_first_time():
  """Before the first table, of which every number is an estimate."""
  text = (ROOT / "README.md").read_text()
  said = text.index("estimated from the compiled program, not measured")
  assert said < text.index("|") and said < text.index("<!-- headline -->")


@pytest.mark.parametrize(
  "page, package",
  [("kernels", kernels), ("gemma", gemma), ("v5e", cycle_model)],
  ids=["kernels", "gemma", "v5e"],
)
def test_the_api_pages_have_every_public_name(page, package):
  text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
  names = re.findall(r"^::: (?:\w+\.)+(\w+)$", text, re.MULTILINE)
  public = {
    name
    for name in dir(package)
    if not name.startswith("_") and not inspect.ismodule(getattr(package, name))
  }
  public -= {"main", "annotations"}  # a command's entry, and no name at all
  assert len(names) == len(set(names)) and set(names) == public
