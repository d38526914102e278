"""The tools that are run by hand."""

import dataclasses
import importlib.util
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_gemma import bench
from pallas_gemma.kernels import OPS, Case, Cost, Op
from pallas_gemma.kernels._frame import tuned

pytestmark = pytest.mark.no_interpreter
ROOT = pathlib.Path(__file__).resolve().parents[1]


def tool(name) -> Any:
  spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module


TUNE, DUMP, BESIDE = map(tool, ("tune", "dump", "beside_torch"))


def test_neighbours_change_one_field():
  config = {"rows": 64, "odd": 7, "fused": True, "kept": 8}
  assert list(TUNE.neighbours(config, ("kept",))) == [
    config | {"rows": 128},
    config | {"rows": 32},
    config | {"odd": 14},
    config | {"fused": False},
  ]


def test_search_goes_down_to_the_best(monkeypatch):
  """Cycles are least at 256; above 512 a config is refused."""

  def estimate(arguments, configs):
    return [
      bench.Row(
        op="rms_norm",
        case="gemma_2b_8k",
        which="fwd+bwd",
        implementation="pallas",
        error="too large" if c["rows"] > 512 else None,
        cycles=1000 + abs(c["rows"] - 256),
      )
      for c in configs
    ]

  monkeypatch.setattr(TUNE, "estimate", estimate)
  arguments = TUNE.Arguments("rms_norm", "gemma_2b_8k")
  assert TUNE.search(arguments, {"rows": 16}) == ({"rows": 256}, 1000)
  assert TUNE.search(arguments, {"rows": 1024}) == ({"rows": 256}, 1000)


def test_the_key_is_what_the_op_asks_for():
  def function(x, implementation=None):
    tuned.tuned_config("asking", length=x.shape[0], causal=True)
    return x

  case = Case("case", (jax.ShapeDtypeStruct((8, 128), jnp.float32),))
  op = Op(
    name="asking",
    function=function,
    reference=function,
    cost=lambda x: (Cost(0, 0), None),
    tests=(),
    benches=(case,),
  )
  key = {"causal": True, "chip": "v5e", "length": 8}
  assert TUNE.table_keys(op, case, "fwd") == [key]
  silent = dataclasses.replace(op, function=lambda x, implementation: x)
  assert TUNE.table_keys(silent, case, "fwd") == []


def test_a_config_of_two_kernels_is_searched_and_entered_by_part():
  op = next(op for op in OPS if op.name == "feed_forward")
  start = {"residuals": "none", "forward": {"rows": 64, "cols": 256}}
  near = list(TUNE.neighbours(start, ("cols",)))
  assert [c["forward"]["rows"] for c in near] == [128, 32]
  assert bench.make_config(op, start).forward.rows == 64
  keys = TUNE.table_keys(op, op.tests[0], "fwd+bwd")
  assert {key["which"] for key in keys} == {"forward", "backward"}
  written = TUNE.entries(keys, start | {"backward": None}, cycles=1)
  assert {e["key"]["which"] for e in written} == {"forward"}
  assert all(e["config"] == start["forward"] for e in written)


def test_an_entry_replaces_the_one_with_its_key(tmp_path, monkeypatch):
  monkeypatch.setattr(tuned, "_DIRECTORY", tmp_path)
  first = {"key": {"heads": 1}, "config": {"rows": 16}, "cycles": 2}
  other = {"key": {"heads": 2}, "config": {"rows": 16}, "cycles": 2}
  better = {"key": {"heads": 1}, "config": {"rows": 32}, "cycles": 1}
  for entry in (other, first, better):
    path = tuned.write_entry("rms_norm", entry)
  assert json.loads(path.read_text()) == [better, other]


def test_refuses_what_is_not_there():
  with pytest.raises(ValueError, match="op must be one of rms_norm"):
    TUNE.find(TUNE.Arguments("no_op", "case"))
  with pytest.raises(ValueError, match="case must be one of gemma_2b"):
    TUNE.find(TUNE.Arguments("rms_norm", "no_case"))


def test_tuned_tables_are_of_registered_ops_and_without_duplicates():
  """That their configs compile is what the sweep of bench cases shows."""
  names = {op.name for op in OPS}
  for path in (ROOT / "kernels/tuned").glob("*.json"):
    assert path.stem in names
    entries = json.loads(path.read_text())
    for entry in entries:
      assert {"key", "config", "cycles", "jax", "libtpu"} == set(entry)
    keys = [json.dumps(e["key"], sort_keys=True) for e in entries]
    assert len(keys) == len(set(keys))


def test_finds_the_hottest_loop():
  program = "\n".join(
    [
      "  0   : { %s1 = smov 0 }",
      "0x1   : { %s2 = sphi %s1, %s3 } /* Start region 1 */",
      "0x2   : { %s3 = sadd.s32 1, %s2 ;; %v1 = vmatmul.bf16.gmra.mxu0 %v2 }",
      "0x3   : { %p4 = scmp.ge.s32.totalorder %s3, 9 ;; %v3 = vld [vmem:%s9] }",
      "0x4   : { %5 = sbr.rel (!%p4) target = $region1 }",
      *(f"{hex(i)} : {{}}" for i in range(5, 30)),
    ]
  )
  listing = bench.parse_listing(program)
  cycles = bench.count_cycles(listing)
  assert DUMP.hottest(listing, cycles) == range(1, 9)
  assert cycles.visits[:10] == (1, *[9] * 8, 1)
  units = [DUMP.unit(i.opcode) for b in listing.bundles for i in b]
  assert units.count("matrix unit") == units.count("load") == 1


@pytest.mark.parametrize(
  "opcode, unit",
  [
    ("vpop.f32.mrf.mxu0", "matrix unit"),
    ("vadd.xlane.f32.xlu0", "transpose unit"),
    ("vst.msk", "store"),
    ("vstv", "vector"),
    ("vpop.eup", "extended (exp, tanh, ...)"),
    ("dma.done.wait", "copies"),
    ("sadd.s32", "scalar"),
  ],
)
def test_names_units(opcode, unit):
  assert DUMP.unit(opcode) == unit


def test_a_step_beside_torch_is_one_of_training():
  """On a batch that stays the same the loss falls, from that of a guess."""
  step = BESIDE._ours(BESIDE.Size(64, 1, 16, 32, 1, 16, rows=2, tokens=8))
  first, *_, last = (step() for _ in range(30))
  assert first == pytest.approx(np.log(64), rel=0.3) and last < 0.9 * first


def test_a_size_beside_torch_that_there_is_not(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["beside_torch.py", "large"])
  with pytest.raises(SystemExit):
    BESIDE.main()
  assert "must be one of tiny, small, got 'large'" in capsys.readouterr().err
