"""The walls of the house: who may import whom, and what each room must hold."""

import ast
import inspect
import pathlib
import sys
import tomllib

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
  kernels_folder = ROOT / "kernels"
  for path in kernels_folder.rglob("*.py"):
    depth = len(path.relative_to(kernels_folder).parts)
    for name in imports(path):
      outside = len(name) - len(name.lstrip(".")) > depth
      message = f"{path.name} imports {name}: kernels/ must be vendorable"
      assert not outside and not name.startswith("pallas_gemma"), message


def test_kernels_need_jax_alone():
  """Other libraries are for integrations, which import them when asked to."""
  known = {*sys.stdlib_module_names, "jax", "numpy", ""}
  for path in (ROOT / "kernels").rglob("*.py"):
    tops = {name.split(".")[0] for name in imports(path)}
    modules = {"flax"} if path.stem in ("nnx", "linen") else set()
    assert tops <= known | modules, f"{path} imports {tops - known}"


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


# Signatures that are public, hence as long as users need.
PUBLIC = {
  *(op.function.__name__ for op in kernels.OPS),
  *(op.reference.__name__ for op in kernels.OPS),
  "dot_product_attention",
  "feed_forward_with_barrier",  # stands in for feed_forward
  *("yarn", "longrope"),  # of RopeFrequencies
  "__call__",
}


@pytest.mark.parametrize("room", ["kernels", "gemma", "bench", "tools"])
def test_files_and_functions_are_short(room):
  """At most 400 lines a file; 60 a function, without its docstring, blank lines
  and comments; 8 parameters, of public functions aside.
  """
  for path in (ROOT / room).rglob("*.py"):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400, path
    for node in ast.walk(ast.parse("\n".join(lines))):
      if isinstance(node, ast.FunctionDef):
        code = lines_of_code(node, lines)
        assert code <= 60, f"{path}: {node.name} has {code} lines of code"
        count = parameters(node)
        short = count <= 8 or node.name in PUBLIC
        assert short, f"{path}: {node.name} has {count} parameters"


def lines_of_code(node: ast.FunctionDef, lines: list[str]) -> int:
  assert node.end_lineno is not None
  numbers = set(range(node.lineno, node.end_lineno + 1))
  if ast.get_docstring(node) is not None:
    doc = node.body[0]
    assert doc.end_lineno is not None
    numbers -= set(range(doc.lineno, doc.end_lineno + 1))
  texts = [lines[number - 1].strip() for number in numbers]
  return sum(bool(text) and not text.startswith("#") for text in texts)


def parameters(node: ast.FunctionDef) -> int:
  a = node.args
  names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
  return len([n for n in names if n not in ("self", "cls")])


def test_a_file_that_is_too_long_is_noticed():
  lines = ["def f(self, a, *, b):", '  """Doc."""', "  # why", "", "  return a"]
  (node,) = ast.parse("\n".join(lines)).body
  assert isinstance(node, ast.FunctionDef)
  assert lines_of_code(node, lines) == 2 and parameters(node) == 2


def test_the_frame_of_an_op_is_told_once():
  """Mesh, choice of implementation, VJP, vmap and remat names."""
  frame = {"custom_vjp", "platform_dependent", "shard_map", "custom_vmap"}
  frame |= {"sequential_vmap", "checkpoint_name", "custom_batching"}
  dialects = {"SimpleNamespace", "setattr", "hasattr"}
  found = set()
  for path in (ROOT / "kernels").rglob("*.py"):
    tree = ast.parse(path.read_text())
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    names |= {a.name for a in ast.walk(tree) if isinstance(a, ast.alias)}
    if path.parent.name != "integrations":  # it sets what others defined
      assert not names & dialects, f"{path}: refs are records, with names"
    if path.parent.name == "_frame":
      found |= names & frame
    else:
      assert not names & frame, f"{path}: {names & frame} are the frame's"
  assert found >= {"custom_vjp", "platform_dependent", "shard_map"}


def test_kernels_take_and_give_records():
  """Every list of specs, shapes and scratch holds one record; kernels name
  their parameters.
  """
  calls = 0
  for path in (ROOT / "kernels").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef) and "kernel" in node.name:
        assert node.args.vararg is None, f"{path}: {node.name} takes *refs"
      if not isinstance(node, ast.Call):
        continue
      lists = {k.arg: k.value for k in node.keywords}
      calls += isinstance(node.func, ast.Attribute) and (
        node.func.attr == "pallas_call"
      )
      for name in ("in_specs", "out_specs", "scratch_shapes"):
        value = lists.get(name)
        if isinstance(value, ast.List):
          assert len(value.elts) == 1, f"{path}: {name} is one record"
  assert calls >= 8


def test_every_package_is_installed():
  """A wheel has every folder of modules, though pyproject lists them."""
  text = (ROOT / "pyproject.toml").read_text()
  listed = set(tomllib.loads(text)["tool"]["setuptools"]["packages"])
  found = {
    "pallas_gemma." + ".".join(path.parent.relative_to(ROOT).parts)
    for room in ("kernels", "gemma", "bench")
    for path in (ROOT / room).rglob("__init__.py")
  }
  assert listed == found


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
  modules = {p.stem for p in (ROOT / "kernels").glob("*")}
  modules.remove("integrations")  # public by that name, and imported by it
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
def test_a_story_opens_with_its_maths(op):
  """In its file, or in the room's first page and those of its own."""
  module = sys.modules[op.function.__module__]
  room = sys.modules[str(module.__package__)]
  doc = str(module.__doc__) + (str(room.__doc__) if room is not kernels else "")
  for heading in ("Maths", "Traffic", "Tiling"):
    assert heading in doc, f"{op.name}: no docstring has {heading!r}"
