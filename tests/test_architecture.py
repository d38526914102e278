"""The walls of the house: who may import whom, and what each room must hold."""

import ast
import inspect
import pathlib

import jax
import pytest
from pallas_gemma import kernels

ROOT = pathlib.Path(__file__).resolve().parents[1]
OPS = [pytest.param(op, id=op.name) for op in kernels.OPS]


def imports(path: pathlib.Path) -> set[str]:
  """Absolute names imported by a file; relative imports keep their dots."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {a.name for a in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = "." * node.level + (node.module or "")
      start = base if base.endswith(".") else f"{base}."
      found |= {base} | {f"{start}{a.name}" for a in node.names}
  return found


def test_kernels_stand_alone():
  for path in (ROOT / "kernels").glob("*.py"):
    bad = {m for m in imports(path) if m.startswith(("pallas_gemma", ".."))}
    assert not bad, f"{path.name} imports {bad}: kernels/ must be vendorable"


GEMMA = ROOT / "gemma"


def test_gemma_knows_no_pallas_and_has_one_door():
  for path in GEMMA.rglob("*.py"):
    names = imports(path)
    assert not any("pallas" in m and "pallas_gemma" not in m for m in names)
    if path != GEMMA / "ops.py":
      assert not any("kernels" in m for m in names), path.name


def test_the_trainer_stands_on_the_model_and_not_beneath_it():
  for path in GEMMA.glob("*.py"):
    if path.name != "_cli.py":
      assert not any("_train" in m for m in imports(path)), path.name
  for name in ("step", "optimizer"):  # arithmetic, which knows no storage
    names = imports(GEMMA / "_train" / f"{name}.py")
    assert not any("_checkpoint" in m or "_files" in m for m in names), name


def test_files_and_functions_of_gemma_are_short():
  """At most 400 lines a file, 60 a function without its docstring."""
  for path in GEMMA.rglob("*.py"):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, path.name
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef):
        first = node.body[ast.get_docstring(node) is not None :] or node.body
        assert node.end_lineno is not None
        assert node.end_lineno - first[0].lineno < 60, node.name
        a = node.args
        count = len([*a.posonlyargs, *a.args, *a.kwonlyargs])
        public = (path.name, node.name) == ("_sampler.py", "__call__")
        assert count <= 8 or public, node.name


@pytest.mark.parametrize(
  "room, below",
  [
    ("kernels", set()),
    ("gemma", {"kernels"}),
    ("bench", {"gemma", "kernels"}),
    ("tools", {"bench", "gemma", "kernels"}),
  ],
)
def test_arrows_point_one_way(room, below):
  files = list((ROOT / room).rglob("*.py"))
  assert files
  for path in files:
    names = imports(path)
    rooms = {m.split(".")[1] for m in names if m.startswith("pallas_gemma.")}
    assert rooms <= below | {room}, f"{path.name} imports {rooms}"
    own = {"tests", "tools", "numerics", "mutation", "v5e"}
    assert not own & names, path.name


@pytest.mark.parametrize(
  "room, below",
  [
    ("v5e", set()),
    ("suites", {"v5e"}),
    ("run", {"suites", "v5e"}),
    ("show", {"run", "suites", "v5e"}),
  ],
)
def test_arrows_point_one_way_inside_bench(room, below):
  files = list((ROOT / "bench" / room).rglob("*.py"))
  assert files
  for path in files:
    names = {m for m in imports(path) if m.startswith("..")} - {".."}
    rooms = {m.lstrip(".").split(".")[0] for m in names}
    assert rooms <= below, f"{path.name} imports {rooms}"
    if room == "v5e":  # a model of the chip, whatever runs on it
      assert not any("pallas_gemma" in m for m in imports(path)), path.name


def test_exports_do_not_shadow_modules():
  modules = {p.stem for p in (ROOT / "kernels").glob("*.py")}
  assert not modules & {n for n in vars(kernels) if not n.startswith("_")}


@pytest.mark.parametrize("op", OPS)
def test_reference_is_pure_jnp(op):
  for case in op.tests:
    jaxpr = str(jax.make_jaxpr(case.bind(op.reference))(*case.specs))
    assert "pallas_call" not in jaxpr and "custom_vjp" not in jaxpr


@pytest.mark.parametrize("op", OPS)
def test_function_and_reference_share_a_signature(op):
  function = dict(inspect.signature(op.function).parameters)
  for added in ("config", "implementation"):
    parameter = function.pop(added)
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert parameter.default is None
  assert function == dict(inspect.signature(op.reference).parameters)


@pytest.mark.parametrize("op", OPS)
def test_kernel_file_opens_with_its_maths(op):
  doc = inspect.getmodule(op.function).__doc__
  for heading in ("Maths", "Traffic", "Tiling"):
    assert heading in doc, f"{op.name}: module docstring lacks {heading!r}"
