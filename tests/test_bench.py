"""The cycle model and the benchmarks around it, on a few bundles."""

import dataclasses
import functools
import importlib
import importlib.util
import json
import pathlib
import shutil
import sys
import textwrap
from importlib import metadata
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from pallas_gemma import bench
from pallas_gemma.bench import V5E
from pallas_gemma.bench.run import sources
from pallas_gemma.bench.show import compare, files, report
from pallas_gemma.bench.v5e import environment, estimate, estimate_module
from pallas_gemma.kernels import OPS, Cost

pytestmark = pytest.mark.no_interpreter


def listing(*bundles):
  """A listing in the compiler's form, from the slots of its bundles."""
  lines = [
    f"{'0' if i == 0 else hex(i):>6}   : > {{ {slots} }}"
    for i, slots in enumerate(bundles)
  ]
  return bench.parse_listing("header\n\n" + "\n".join(lines))


def cycles(*bundles, operands=None):
  return bench.count_cycles(listing(*bundles), operands)


# --- listings -----------------------------------------------------------------


def test_parses_an_instruction():
  (bundle,) = listing(
    "%5 = dma.hbm_to_vmem [thread:$0]  (!%p2), /*hbm=*/%s3,"
    " /*size_in_granules=*/64, /*dst_syncflagno=*/[#allocation2 + $0x1]"
    "  ;;  %v1_v0 = vld [vmem:[%s4 + $0x8] sm:$0xff] /* a, comment */"
  ).bundles
  copy, load = bundle
  assert (copy.opcode, copy.dest) == ("dma.hbm_to_vmem", "%5")
  assert copy.predicate == ("%p2", False)
  assert copy.keywords == {
    "hbm": "%s3",
    "size_in_granules": "64",
    "dst_syncflagno": "[#allocation2 + $0x1]",
  }
  assert (load.opcode, load.dest, load.predicate) == ("vld", "%v1_v0", None)


@pytest.mark.parametrize("text", ["", "bundle 0: sadd r1, r2", "{}"])
def test_another_format_is_one_clear_error(text):
  with pytest.raises(bench.ListingError, match="prints a format") as error:
    bench.parse_listing(text, "fusion.1")
  installed = [d.version for d in metadata.distributions(name="libtpu")]
  found = installed[0] if installed else "none"
  assert f"found libtpu {found}; its listings are known" in str(error.value)


@pytest.mark.parametrize(
  "libtpu, total", [("0.0.50.1", 4894), ("0.0.52", 4887)]
)
def test_each_libtpus_listing_is_read(libtpu, total):
  """exp(x @ w) for x [128, 128] in 8 blocks: the same but for the schedule."""
  path = pathlib.Path(__file__).parent / "listings" / f"libtpu_{libtpu}.txt"
  got = bench.count_cycles(bench.parse_listing(path.read_text()))
  assert got.total == total and not got.notes
  assert got.copied == {
    "hbm_to_vmem": 2 * 128 * 128 * 2,
    "vmem_to_hbm": 128 * 128 * 4,
  }


def test_a_malformed_slot_is_an_error():
  with pytest.raises(bench.ListingError, match="not an instruction"):
    listing("%s1 <- add 2 3")


# --- control flow -------------------------------------------------------------


@pytest.mark.parametrize("move", ["smov", "smov.u32"])
def test_counts_a_loop(move):
  """A branch takes effect four bundles later."""
  program = textwrap.dedent(
    f"""\
         0   : {{ %s1 = {move} 0 }}
       0x1 LB: > {{ %s2 = sphi %s1, %s3 }} /* Start region 1 */
       0x2   : > {{ %s3 = sadd.s32 1, %s2 }}
       0x3   : > {{ %p4 = scmp.ge.s32.totalorder %s3, 10 }}
       0x4   : > {{ %5 = sbr.rel (!%p4) target = $region1 }}
       0x5   : > {{ %v1 = vadd.f32 %v2, %v3 }}
       0x6   :  {{}}
       0x7   :  {{}}
       0x8   :  {{}}
    """
  )
  assert bench.count_cycles(bench.parse_listing(program)).total == 1 + 10 * 8


def test_a_branch_on_an_unknown_value_is_undecidable():
  program = "\n".join(
    [
      "0 : { %p1 = vcmp.any %v1 } /* Start region 1 */",
      "0x1 : { %2 = sbr.rel (%p1) target = $region1 }",
    ]
  )
  with pytest.raises(bench.Undecidable, match="%p1"):
    bench.count_cycles(bench.parse_listing(program))


def test_division_gives_quotient_and_remainder():
  wait = "%9 = vdelay {}"
  got = cycles(
    "%1 = sdivrem.u32 20, 6",
    "%s2 = spop.drf %1",
    "%s3 = spop.drf %1",
    "%4 = vsyncpa [#allocation1], %s2",
    "%5 = vsyncadd [#allocation1], %s3",
    "%6 = dma.done.wait [#allocation1], 5",
    wait.format(7),
  )
  assert got.total == 7 + 7 and not got.notes
  short = cycles(
    "%1 = sdivrem.u32 20, 6",
    "%s2 = spop.drf %1",
    "%4 = vsyncpa [#allocation1], %s2",
    "%6 = dma.done.wait [#allocation1], 5",
  )
  assert short.notes == ("waits without a copy",)


def test_division_by_a_constant_multiplies_into_the_upper_word():
  """20 / 3 = 6, as the compiler writes it."""
  got = cycles(
    "%s1 = smulhi.u32 2863311531, 20",
    "%s2 = sshrl.u32 %s1, 1",
    "%3 = vsyncpa [#allocation1], %s2",
    "%4 = dma.done.wait [#allocation1], 6",
  )
  assert not got.notes


def test_an_opcode_that_is_not_modelled_is_said():
  assert cycles("%s1 = snew.u32 1, 2").notes == ("snew.u32",)


# --- copies -------------------------------------------------------------------


def copy_in(granules, flag="[#allocation1]", kind="hbm_to_vmem"):
  return (
    f"%1 = dma.{kind} /*hbm=*/%s1, /*size_in_granules=*/{granules}, "
    f"/*vmem=*/%s2, /*dst_syncflagno=*/{flag}"
  )


def test_a_wait_lasts_until_the_bytes_are_there():
  granules = 32768
  got = cycles(
    copy_in(granules), f"%2 = dma.done.wait [#allocation1], {granules}"
  )
  transfer = granules * 32 / V5E.hbm_bytes_per_cycle
  assert got.total == pytest.approx(V5E.read_latency + transfer, abs=4)
  assert got.hbm_bytes == granules * 32 and not got.notes


def test_copies_share_the_channel():
  granules, flags = 32768, ("[#allocation1]", "[#allocation2]")
  got = cycles(
    *(copy_in(granules, flag) for flag in flags),
    *(f"%2 = dma.done.wait {flag}, {granules}" for flag in flags),
  )
  transfer = 2 * granules * 32 / V5E.hbm_bytes_per_cycle
  assert got.total == pytest.approx(V5E.read_latency + transfer, abs=5)


def test_a_short_copy_is_topped_up_by_the_program():
  """The last window of a ragged array: its flag gets the rest by vsyncadd."""
  got = cycles(
    copy_in(40),
    "%2 = vsyncadd [#allocation1], 24",
    "%3 = dma.done.wait [#allocation1], 64",
    "%4 = vsyncadd [#allocation1], 4294967232",
    copy_in(64),
    "%5 = dma.done.wait [#allocation1], 64",
  )
  assert not got.notes and got.copy_stall > 2 * V5E.read_latency - 10


def test_a_copy_of_unknown_size_is_said():
  got = cycles(copy_in("%s77"))
  assert got.notes == ("the size of a hbm_to_vmem copy",)


# --- units --------------------------------------------------------------------


def test_a_matrix_unit_takes_a_cycle_for_each_row():
  matmul = "%1 = vmatmul.bf16.gmra.mxu0 %v1"
  got = cycles(*[matmul] * 100)
  assert got.queue_stall == pytest.approx(100 * 15, abs=50)
  assert (
    cycles(*[matmul.replace("mxu0", f"mxu{i % 4}") for i in range(8)]).total
    == 8
  )
  half = matmul.replace(".bf16.gmra", ".lmr.bf16.gmra.16")
  assert cycles(*[half] * 100).total == pytest.approx(got.total / 2, rel=0.05)


@pytest.mark.parametrize(
  "gives, takes",
  [
    ("vmatmul.bf16.gmra.mxu1", "vpop.f32.mrf.mxu1"),
    ("vadd.xlane.f32.xlu0", "vpop.xlane.xlu0"),
    ("vrot.lane.b32.xlu1", "vpop.permute.xlu1"),
    ("vxpose.xlu0.b32.end", "vpop.trf.xlu0"),
  ],
)
def test_a_result_is_waited_for(gives, takes):
  work, take = f"%1 = {gives} %v1", f"%v2 = {takes} %1"
  at_once = cycles(work, take)
  assert at_once.result_stall > 40
  # The time is hidden where there is something else to do.
  hidden = cycles(work, *["%v3 = vadd.f32 %v4, %v5"] * 200, take)
  assert hidden.result_stall == 0
  other = takes[:-1] + str(int(takes[-1]) + 1)
  assert cycles(work, f"%v2 = {other} %1").result_stall == 0


def test_results_of_a_transposition_outlast_the_end_of_the_next():
  push = "%1 = vxpose.binary.xlu0.c.b16.cont %v1"
  end = "%1 = vxpose.binary.xlu0.c.b16.end %v1"
  pop, other = "%v2 = vpop.trf.xlu0 %1", "%v3 = vadd.f32 %v4, %v5"
  whole = [push, *[other] * 15] * 7 + [end]  # with four results in this test
  first = [*whole, *[other] * 200]
  assert cycles(*first, *[pop] * 4).result_stall == 0
  # The last two of the first are taken after the second has ended.
  between = [*first, pop, pop, *whole, pop, pop]
  assert 50 < cycles(*between, *[pop] * 4).result_stall < 100
  assert cycles(*between, *[other] * 100, *[pop] * 4).result_stall == 0


def loop(body, rounds):
  """A listing that runs bundles so many times, predicate %p9 in every other."""
  head = [
    "%s1 = smov 0",
    "%s2 = sphi %s1, %s3  ;;  %v9 = vld [vmem:[%s8]] /* Start region 1 */",
    "%s3 = sadd.s32 1, %s2  ;;  %s8 = sand.u32 1, %s2",
    "%p9 = scmp.eq.s32.totalorder %s8, 0",
  ]
  tail = [
    f"%p4 = scmp.ge.s32.totalorder %s3, {rounds}",
    "%5 = sbr.rel (!%p4) target = $region1",
    *["%v1 = vadd.f32 %v2, %v3"] * 4,
  ]
  return listing(*head, *body, *tail)


GIVES = ("%1 = vmatmul.lmr.bf16.gmra.16.mxu0 %v1", "%1 = vadd.xlane.xlu0 %v1")
TAKES = ("%v2 = vpop.f32.mrf.mxu0 %1", "%v2 = vpop.xlane.xlu0 %1")
OTHERS = (
  "%1 = vmatpush1.bf16.msra.mxu0 %v1",
  "%1 = vmatpush1.bf16.msra.mxu0 (%p9), %v1",
  "%v1 = vadd.f32 %v2, %v3",
  "%1 = vdelay 3",
  copy_in(64),
  "%2 = dma.done.wait [#allocation1], 64",
)


@hypothesis.settings(max_examples=60)
@hypothesis.example([(OTHERS[1], 12), ("%1 = vdelay 3", 12)], 4)
@hypothesis.given(
  runs=st.lists(
    st.tuples(st.sampled_from(GIVES + TAKES + OTHERS), st.integers(1, 12)),
    min_size=1,
    max_size=6,
  ),
  rounds=st.integers(2, 9),
)
def test_a_stretch_seen_before_takes_what_it_took(runs, rounds):
  """What is remembered of a loop changes nothing that is counted."""
  machine = importlib.import_module("pallas_gemma.bench.v5e.machine")
  body = [slot for slot, times in runs for _ in range(times)]
  for give, take in zip(GIVES, TAKES, strict=True):
    body += [take] * (body.count(give) - body.count(take))
  program, counts = loop(body, rounds), []
  for shortest in (10**9, 1):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(machine, "_SHORTEST_STRETCH", shortest)
      counts.append(bench.count_cycles(program))
  assert counts[0] == counts[1]
  assert counts[0].visits[2] == rounds


# --- whole programs -----------------------------------------------------------

HLO = """\
HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  ROOT %inner = (s32[], f32[8]) fusion(%p), kind=kLoop, calls=%work
}

%cond (q: (s32[], f32[8])) -> pred[] {
  ROOT %q = pred[] parameter(0)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[1024]{0} parameter(0)
  %first = f32[1024]{0} fusion(%a), kind=kLoop, calls=%work
  %again = f32[1024]{0} fusion(%first), kind=kLoop, calls=%work
  %fetch = (f32[1048576]{0:S(1)}, f32[1048576]{0}, u32[]{:S(2)}) \
copy-start(%a)
  %busy = f32[1024]{0} fusion(%again), kind=kOutput, calls=%long
  %fetched = f32[1048576]{0:S(1)} copy-done(%fetch)
  %room = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  %sum = f32[256]{0} all-reduce(%busy), to_apply=%add
  ROOT %loop = (s32[], f32[8]) while(%busy), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
}
"""


@pytest.fixture
def listings(tmp_path):
  """`first` takes 10 cycles, `busy` 500, `inner` 3."""
  found = {}
  for name, length in dict(first=10, busy=500, inner=3).items():
    found[name] = tmp_path / name
    bundles = [f"{hex(i) if i else 0:>6} : {{}}" for i in range(length)]
    found[name].write_text("\n".join(bundles))
  return found


def test_sums_a_program(listings):
  got = estimate_module(HLO, listings)
  fetch = (1 << 22) / V5E.hbm_bytes_per_cycle
  # `again` equals `first` and is printed once; `busy` hides part of the fetch.
  assert got.cycles == round(10 + 10 + fetch + 7 * 3)
  assert [(s.name, s.times, s.cycles) for s in got.steps] == [
    ("first", 1, 10),
    ("again", 1, 10),
    ("busy", 1, 500),
    ("inner", 7, 3),
  ]
  assert got.hbm_bytes == 1 << 22
  assert [(c.name, c.nbytes) for c in got.collectives] == [("sum", 1024)]
  assert not got.lower_bound and not got.notes


def test_says_what_it_leaves_out(listings):
  del listings["busy"]
  unknown = HLO.replace('"known_trip_count":{"n":"7"}', "")
  got = estimate_module(unknown, listings)
  assert got.lower_bound
  assert got.notes == [
    "busy: no listing for this fusion",
    "loop: trip count unknown, counted once",
  ]


def test_the_bound_is_the_larger_of_both_units():
  mxu, hbm = Cost(V5E.flops_per_cycle * 1000, 8), Cost(8, 546_000)
  assert bench.bound([mxu]) == (1000, "MXU")
  assert bench.bound([hbm]) == (1000, "HBM")
  assert bench.bound([mxu, hbm, hbm])[1] == "HBM"


def test_finds_values_that_kernels_branch_on():
  def kernel(lengths_ref, x_ref, o_ref):
    o_ref[...] = x_ref[...] * lengths_ref[0]

  def function(x, lengths):
    doubled = jax.jit(lambda n: jax.lax.cumsum(n) * 2)(lengths)
    grid = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(1,),
      in_specs=[pl.BlockSpec((8, 128), lambda i, n: (0, 0))],
      out_specs=pl.BlockSpec((8, 128), lambda i, n: (0, 0)),
    )
    call = pl.pallas_call(
      kernel,
      grid_spec=grid,
      out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
      name="scaled",
    )
    return jax.lax.platform_dependent(
      doubled, x, tpu=call, default=lambda n, x: x
    )

  specs = (
    jax.ShapeDtypeStruct((8, 128), jnp.float32),
    jax.ShapeDtypeStruct((3,), jnp.int32),
  )
  values = (None, np.array([1, 2, 3], np.int32))
  found = bench.kernel_operands(function, specs, values)
  assert list(found) == ["scaled"]
  np.testing.assert_array_equal(found["scaled"][0], [2, 6, 12])
  assert not bench.kernel_operands(function, specs, (None, None))


def test_estimates_only_where_the_compiler_was_told_to_print(
  monkeypatch, tmp_path
):
  spec = jax.ShapeDtypeStruct((8, 128), jnp.float32)
  monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
  with pytest.raises(RuntimeError, match=r"v5e\.environment\(folder\)"):
    estimate(jnp.sin, [spec])
  prepared = environment(tmp_path)["LIBTPU_INIT_ARGS"]
  monkeypatch.setenv("LIBTPU_INIT_ARGS", prepared)
  (tmp_path / "7-fusion.1-9-final_bundles.txt").write_text("")
  with pytest.raises(RuntimeError, match="listings of an earlier compilation"):
    estimate(jnp.sin, [spec])


# --- what a number depends on -------------------------------------------------

MADE_UP = {
  "kernels/__init__.py": "from ._one.op import one\nfrom ._two import two",
  "kernels/_frame/__init__.py": "",
  "kernels/_frame/tpu.py": "",
  "kernels/_frame/kernel.py": "from . import tpu",
  "kernels/_one/__init__.py": "",
  "kernels/_one/spec.py": "",
  "kernels/_one/forward.py": "from .._frame.kernel import f\nimport jax",
  "kernels/_one/op.py": "from . import forward, spec",
  "kernels/_one/notes.py": "",
  "kernels/_two.py": "from ._frame import tpu\nfrom ._lib import f",
  "kernels/_lib.py": "",
  "kernels/tuned/one.json": "[]",
  "kernels/tuned/two.json": "[]",
  "gemma/train/loop.py": "",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """bench/ as it is, beside two made-up ops, one of them a folder."""
  home = tmp_path_factory.mktemp("home")
  shutil.copytree(sources.HOME / "bench", home / "bench")
  for name, text in MADE_UP.items():
    (home / name).parent.mkdir(parents=True, exist_ok=True)
    (home / name).write_text(text)
  return home


ANYTHING = (
  "bench/v5e/__init__.py",
  "bench/v5e/units.py",
  "bench/suites/program.py",
  "bench/run/worker.py",
  "bench/run/row.py",
)
NOTHING = (
  "bench/__init__.py",
  "bench/__init__.pyi",
  "bench/_cli.py",
  "bench/bench_ops.py",
  "bench/run/measured.py",
  "bench/run/sweep.py",
  "bench/show/compare.py",
  "bench/show/report.py",
  "bench/show/table.py",
  "bench/suites/calibration.py",
)
DEPENDENCIES = {
  ("registry", "one"): (
    (
      "bench/suites/registry.py",
      "kernels/_frame/__init__.py",
      "kernels/_frame/kernel.py",
      "kernels/_frame/tpu.py",
      "kernels/_one/__init__.py",
      "kernels/_one/forward.py",
      "kernels/_one/notes.py",
      "kernels/_one/op.py",
      "kernels/_one/spec.py",
      "kernels/tuned/one.json",
    ),
    (
      "bench/suites/baselines.py",
      "bench/suites/gemma.py",
      "gemma/train/loop.py",
      "kernels/__init__.py",
      "kernels/_lib.py",
      "kernels/_two.py",
      "kernels/tuned/two.json",
    ),
  ),
  ("registry", "two"): (
    ("kernels/_two.py", "kernels/_lib.py", "kernels/_frame/tpu.py"),
    ("kernels/_one/op.py", "kernels/_frame/kernel.py"),
  ),
  ("baselines", "one"): (
    (
      "bench/suites/baselines.py",
      "gemma/train/loop.py",
      "kernels/_two.py",
      "kernels/_one/op.py",
      "kernels/tuned/two.json",
    ),
    ("bench/suites/registry.py", "bench/suites/gemma.py"),
  ),
  ("gemma", "block"): (
    (
      "bench/suites/gemma.py",
      "bench/suites/baselines.py",
      "gemma/train/loop.py",
      "kernels/_one/op.py",
    ),
    ("bench/suites/registry.py",),
  ),
}


@pytest.mark.parametrize("suite, op", DEPENDENCIES)
def test_a_digest_changes_with_what_the_number_depends_on(
  monkeypatch, home, suite, op
):
  modules = {"one": "_one.op", "two": "_two"}
  monkeypatch.setattr(sources, "module_of", modules.get)
  job = bench.Job(suite, f"{op}/case/fwd/pallas")
  before = job.digest(home)
  changing, others = DEPENDENCIES[suite, op]
  for name in (*ANYTHING, *changing, *NOTHING, *others):
    path = home / name
    text = path.read_text()
    path.write_text(text + "\n")
    changed = job.digest(home) != before
    path.write_text(text)
    assert changed == (name in (*ANYTHING, *changing)), name
  assert job.digest(home) == before
  assert dataclasses.replace(job, ask_compiler=True).digest(home) != before
  assert dataclasses.replace(job, config={"rows": 8}).digest(home) != before


def test_a_digest_changes_with_the_file_that_is_a_suite(tmp_path):
  path = tmp_path / "suite.py"
  path.write_text("")
  job = bench.Job(str(path), "one/case/fwd/pallas")
  before = job.digest()
  path.write_text("\n")
  assert job.digest() != before


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS])
def test_a_registered_op_depends_on_its_own_room(op):
  found = sources.sources("registry", op.name)
  module = importlib.import_module(op.function.__module__)
  record = importlib.import_module(type(op).__module__)
  assert {pathlib.Path(str(m.__file__)) for m in (module, record)} <= found
  assert sources.HOME / "kernels/__init__.py" not in found
  assert not any("gemma" in path.parts for path in found)


# --- what is timed, and how it is shown ---------------------------------------


def test_lists_every_op_of_the_registry():
  keys = {c.program.key for c in bench.choose(bench.Arguments(all=True))}
  for op in OPS:
    for case in op.benches:
      assert f"{op.name}/{case.name}/fwd/xla" in keys
      kernel = f"{op.name}/{case.name}/fwd/pallas"
      assert (kernel in keys) == op.pallas
  assert len(keys) == len(bench.choose(bench.Arguments(all=True)))


@pytest.mark.parametrize(
  "pattern",
  [
    "gemma_2b_32k",
    "gemma_2b_8k_f32_weights",
    "geglu/gemma_2b_8k_normed/*",
    "*/pallas-residuals-none",
    "feed_forward/*/fwd+bwd/xla",
    "flash_attention/*/fwd+bwd/jax-splash-1024x1024x512",
    "linear_cross_entropy/gemma_2b_8k/*",
    "linear_cross_entropy/gemma_7b_4k/*",
    "gemma_block/gemma_2b_4x2k/*",
  ],
)
def test_the_default_table_leaves_out_what_is_slow(pattern):
  default = {c.program.key for c in bench.choose(bench.Arguments())}
  slow = {
    choice.program.key
    for choice in bench.choose(bench.Arguments(filter=(pattern,)))
  }
  assert slow and not slow & default


def test_the_default_table_has_the_first_case_of_every_op():
  default = {c.program.key for c in bench.choose(bench.Arguments())}
  first = {(op.name, op.benches[0].name) for op in OPS}
  assert first <= {tuple(key.split("/")[:2]) for key in default}


def test_filters_by_part_and_by_pattern():
  by_part = bench.choose(bench.Arguments(filter=("rms_norm",)))
  assert {c.program.op for c in by_part} == {"rms_norm"}
  (one,) = bench.choose(
    bench.Arguments(filter=("rms_norm/gemma_7b_8k/fwd/pal*",))
  )
  assert one.program.key == "rms_norm/gemma_7b_8k/fwd/pallas"
  assert not bench.choose(bench.Arguments(filter=("no_such_op",)))


def test_measures_on_the_device_at_hand():
  function = jax.jit(lambda x: x @ x)
  spec = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  (program,) = bench.passes(
    lambda: bench.Built(function, (spec,), (None,)),
    (Cost(2 * 64**3, 3 * 64**2 * 4), None),
    op="matmul",
    case="64",
    implementation="xla",
  )
  row = bench.measure(program, runs=5)
  assert row.error is None and len(row.samples) == 5
  assert min(row.samples) <= row.seconds <= max(row.samples)
  assert row.method.startswith("measured on ")
  again = bench.Row.from_json(json.loads(json.dumps(row.to_json())))
  assert again.seconds == row.seconds and again.key == row.key


def test_a_program_that_fails_gives_a_row_that_says_why():
  def build():
    raise ValueError("wanted more, got less")

  (program,) = bench.passes(
    build, (Cost(0, 0), None), op="a", case="b", implementation="xla"
  )
  assert bench.measure(program).error == "ValueError: wanted more, got less"


def rows():
  common: dict[str, Any] = dict(
    op="rms_norm",
    case="8k",
    which="fwd",
    method="estimated from the compiled program",
    bound_cycles=900,
    bound_by="HBM",
    versions={"jax": "1.2.3"},
  )
  ours = bench.Row(implementation="pallas", seconds=1e-3, cycles=1000, **common)
  xla = bench.Row(implementation="xla", seconds=2e-3, cycles=2000, **common)
  return [ours, xla]


def changed(**fields):
  ours, xla = rows()
  (change, other) = compare.changes(
    [dataclasses.replace(ours, temp_bytes=512), xla],
    [xla, dataclasses.replace(ours, **({"temp_bytes": 512} | fields))],
  )
  assert other.verdict == "equal" and not other.is_worse
  return change


@pytest.mark.parametrize(
  "fields, verdict, is_worse",
  [
    ({}, "equal", False),
    ({"cycles": 999}, "lower", False),
    ({"temp_bytes": 0}, "lower", False),
    ({"temp_bytes": None}, "equal", False),
    ({"temp_bytes": 513}, "higher", True),
    ({"cycles": 999, "temp_bytes": 513}, "higher", True),
    ({"cycles": 1001}, "higher", True),
    ({"lower_bound": True}, "higher", True),
    ({"cycles": 0, "error": "too large"}, "missing", True),
  ],
)
def test_compares_a_row_with_an_earlier_one(fields, verdict, is_worse):
  change = changed(**fields)
  assert (change.verdict, change.is_worse) == (verdict, is_worse)


def test_a_rise_within_the_tolerance_is_allowed():
  before = dataclasses.replace(rows()[0], cycles=1_000_000)
  for cycles, is_worse in ((1_000_500, False), (1_000_501, True)):
    now = dataclasses.replace(before, cycles=cycles)
    (change,) = compare.changes([before], [now])
    assert change.verdict == "higher" and change.is_worse == is_worse


def run_command(monkeypatch, *arguments):
  """Runs pallas-gemma-bench in this process; returns how it exits."""
  command = ["pallas-gemma-bench", *map(str, arguments)]
  monkeypatch.setattr(sys, "argv", command)
  try:
    importlib.import_module("pallas_gemma.bench._cli").main()
  except SystemExit as end:
    return end.code
  return 0


def test_the_command_compares_files(monkeypatch, tmp_path, capsys):
  ours, xla = rows()
  failed = dataclasses.replace(ours, case="64k", error="too large")
  new = dataclasses.replace(ours, case="32k")
  old = tmp_path / "old"
  files.write(old / "a.json", [ours, failed], "pallas-gemma-bench")
  files.write(old / "b.json", [xla], "pallas-gemma-bench")
  same, slower = tmp_path / "same.json", tmp_path / "slower.json"
  files.write(same, [new, xla, ours], "pallas-gemma-bench")
  later = dataclasses.replace(ours, cycles=1100)
  files.write(slower, [later], "pallas-gemma-bench")
  compared = functools.partial(run_command, monkeypatch, "--compare")

  assert compared(old, "--against", same) == 0
  *_, last = capsys.readouterr().out.strip().splitlines()
  assert last.startswith("2 programs: 2 equal, 0 lower, 0 higher, 0 missing")

  assert compared(old, "--against", slower) == 1
  shown = capsys.readouterr().out
  line = next(x for x in shown.splitlines() if "rms_norm/8k/fwd/pallas" in x)
  for part in ("1,000", "1,100", "+100 (+10.000%)", "higher !"):
    assert part in line
  assert "1 higher, 1 missing; 2 worse" in shown.splitlines()[-1]
  assert "before: jax 1.2.3" in shown and "now: jax 1.2.3" in shown

  only = ("--filter", "xla", "--against", same)
  assert compared(old, *only) == 0
  assert "1 programs: 1 equal" in capsys.readouterr().out
  assert compared(old / "a.json", old / "b.json", "--against", same) == 0

  assert "no such file" in str(compared(tmp_path / "nothing.json"))
  assert "no results" in str(compared(old, "--filter", "nothing"))
  (tmp_path / "other.json").write_text('{"rows": 3}\n')
  assert "wanted lines of" in str(compared(tmp_path / "other.json"))


def test_a_program_that_is_not_listed_any_more_is_missing(
  monkeypatch, tmp_path, capsys
):
  old = tmp_path / "old.json"
  gone = dataclasses.replace(rows()[0], case="no_such_case")
  files.write(old, [gone], "pallas-gemma-bench")
  options = ("--cache", tmp_path / "cache", "--mode", "compiled")
  assert run_command(monkeypatch, "--compare", old, *options) == 1
  shown = capsys.readouterr().out
  assert "no such row any more" in shown and "1 missing; 1 worse" in shown


def test_what_needs_a_library_that_is_missing_is_not_gone(monkeypatch, capsys):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name: None if name == "tunix" else find(name),
  )
  others = sources.HOME / "results" / "v5e_others.json"
  assert not run_command(monkeypatch, "--compare", others, "--mode", "compiled")
  shown = capsys.readouterr()
  assert "0 missing" in shown.out and "tunix is not installed" in shown.err


@pytest.mark.parametrize(
  "path", sorted((sources.HOME / "results").glob("*.json"))
)
def test_reads_the_committed_results(path):
  lines = files.read([path])
  assert lines and all(line.command and line.row.cycles for line in lines)
  assert (
    files.read([path.parent])[-1]
    == files.read(sorted(path.parent.glob("*.json")))[-1]
  )


def test_the_report_computes_the_table():
  table = report.markdown(rows(), ["pallas-gemma-bench"])
  assert (
    "| `rms_norm` | 8k | fwd | 1.000 | 90.0% HBM | 2.000 | xla | 2.00 |"
    in table
  )
  chunked = dataclasses.replace(rows()[0], implementation="pallas-chunked")
  both = report.markdown([*rows(), chunked], ["pallas-gemma-bench"])
  assert "| 8k | fwd | 1.000 |" in both
  assert "| 8k, chunked | fwd | 1.000 | 90.0% HBM | 2.000 | xla |" in both
  assert "estimated from the compiled program" in table and "jax 1.2.3" in table
  readme = "before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n"
  assert report.insert(readme, table) == (
    f"before\n<!-- bench -->\n{table}\n<!-- /bench -->\nafter\n"
  )
  with pytest.raises(ValueError, match="<!-- bench -->"):
    report.insert("no markers", table)


def test_the_report_draws(tmp_path):
  drawn = report.draw(rows(), tmp_path)
  assert [p.name for p in drawn] == ["roofline.png", "attention.png"]
  assert all(p.stat().st_size > 1000 for p in drawn)


def test_results_survive_a_round_trip(tmp_path):
  line = json.dumps(rows()[0].to_json() | {"command": "pallas-gemma-bench"})
  (tmp_path / "v5e.json").write_text(line + "\n")
  read, commands = report.read(tmp_path)
  assert read == rows()[:1] and commands == ["pallas-gemma-bench"]
  with pytest.raises(ValueError, match="no results"):
    report.read(pathlib.Path(tmp_path / "elsewhere"))
