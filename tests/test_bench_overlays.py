"""How programs are cut for the instruction memory, and what loading costs."""

import dataclasses
import os
import sys

import pytest
import rich.console
from pallas_gemma import bench
from pallas_gemma.bench import V5E
from pallas_gemma.bench.show import table
from pallas_gemma.bench.v5e import (
  CodeLoop,
  Loop,
  estimate_module,
  loading,
  overlays,
  parse_log,
)
from pallas_gemma.bench.v5e import hlo as texts

pytestmark = pytest.mark.no_interpreter


def log(*lines):
  """The compiler's log with lines of the module that cuts programs."""
  noise = "I1128 16:35:26.830 21 llo_dumper.cc:767] dumping x-final_bundles.txt"
  told = [
    f"I1128 16:35:26.8 21 overlay_partitioner.cc:1381] {x}" for x in lines
  ]
  return "\n".join([noise, *told, "B = OverlayPartition 9: [0, 4):4", noise])


START = "OverlayPartitioner::Run for program with control flow:"
FLOW = [
  START,
  "ControlFlow (3000 bundles):",
  "    14 : branch to 41 (cond)",
  "    41 : [branch from 14]",
  "   165 : [branch from 2886]",
  "  2700 : [branch from 2800]",
  "  2800 : branch to 2700 (cond)",
  "  2886 : branch to 165 (cond)",
  "Initial partitions:",
  "OverlayPartition 0: [0, 14):14, kind=0, fallthrough",
]
CUT = [
  "Partitions:",
  "OverlayPartitioner (regular/jumbo/hlo overlay size 21744/65232/48928, ...):",
  "OverlayPartition 35: [0, 165):165, kind=0, fallthrough",
  "OverlayPartition 37: [165, 2000):1835, kind=0, fallthrough",
  "OverlayPartition 12: [2000, 3000):1000, kind=0, program exit",
]


def test_reads_how_a_program_is_cut():
  cut = parse_log(log(*FLOW, *CUT))
  assert cut.bundles == 3000
  assert cut.overlays == (range(165), range(165, 2000), range(2000, 3000))
  assert cut.branches == {(14, 41), (2800, 2700), (2886, 165)}
  inner, outer = cut.loops
  assert inner == Loop(range(2700, 2805), (range(2000, 3000),))
  assert outer.bundles == range(165, 2891) and len(outer.overlays) == 2
  assert outer.is_reloaded and not inner.is_reloaded


@pytest.mark.parametrize(
  "text, why",
  [
    ("", "says of 0 programs"),
    (log(*FLOW, *CUT) + log(*FLOW, *CUT), "says of 2 programs"),
    (log(*FLOW), "no partitions"),
    (log(*FLOW, *CUT[:-1]), "overlays end at 2000"),
    (log(*FLOW, *CUT[:3], CUT[-1]), "gaps"),
    (log(*FLOW[:2], "jump 3", *FLOW[2:], *CUT), "wanted a point"),
    (log(START, *FLOW[2:], *CUT), "after"),
  ],
)
def test_another_log_is_one_clear_error(text, why):
  with pytest.raises(bench.ListingError, match=why) as error:
    parse_log(text)
  assert "pallas-gemma-bench does not know" in str(error.value)


# --- where instructions stand -------------------------------------------------

PROGRAM = bench.parse_listing(
  "\n".join(
    [
      "0 : { %s1 = smov 0 }",
      "0x1 LB: > { %2 = inlined_call %s1 /* %first = fusion(%a) */ } "
      "/* Start region 1 */",
      "0x2 : > { %3 = call %s1 /* %second = custom-call(%b) */ }",
      "0x3 : > { %4 = call %s1 /* %third = fusion(%c) */ }",
      "0x4 : > { %5 = sbr.rel (%p4) target = $region1 }",
      "0x5 : { %6 = inlined_call /* <late-finalization> */ }",
    ]
  ),
  "TLP",
)
LENGTHS = {"first": 20, "second": 7, "third": 100, "<late-finalization>": 4}
FUNCTIONS = frozenset([range(500, 600)])


def cut_of(*branches):
  return bench.Overlays((range(600),), frozenset(branches), FUNCTIONS)


def test_instructions_stand_in_place_of_their_calls_or_are_functions():
  cut = cut_of((28, 500), (29, 1))
  assert overlays.place(PROGRAM, LENGTHS.get, cut) == {
    "first": range(1, 21),
    "second": range(21, 28),
    "third": range(500, 600),
    "<late-finalization>": range(30, 34),
  }


@pytest.mark.parametrize(
  "lengths, branches, why",
  [
    (LENGTHS | {"first": 21}, [(28, 500), (29, 1)], "stand elsewhere"),
    (LENGTHS | {"third": 99}, [(28, 500), (29, 1)], "99 bundles, but 100"),
    ({"first": 20}, [(28, 500), (29, 1)], "second: called, but no listing"),
  ],
)
def test_a_log_of_another_program_is_noticed(lengths, branches, why):
  with pytest.raises(bench.ListingError, match=why):
    overlays.place(PROGRAM, lengths.get, cut_of(*branches))


def test_a_branch_to_an_empty_last_region_leads_to_the_last_bundle():
  """As the compiler's log has it; no bundle of the listing names that region.

  Where no region is named at all, the listing is of another form.
  """
  text = "\n".join(
    [
      "0 : { %p1 = scmp.eq.s32.totalorder 1, 1 } /* Start region 1 */",
      "0x1 : { %2 = sbr.rel (%p1) target = $region9 }",
      *[f"{hex(i)} : {{ %v1 = vadd.f32 %v2, %v3 }}" for i in range(2, 50)],
    ]
  )
  assert bench.parse_listing(text).regions == {1: 0, 9: 49}
  # The branch, four bundles until it is taken, and the last.
  assert bench.count_cycles(bench.parse_listing(text)).total == 2 + 4 + 1
  with pytest.raises(bench.ListingError, match="no known region"):
    bench.count_cycles(bench.parse_listing(text.replace("Start region 1", "")))


# --- loading ------------------------------------------------------------------


def loop(length, rounds):
  """A listing whose loop has so many bundles, from its third on."""
  head = [
    "%s1 = smov 0",
    "%s9 = smov 0",
    "%s2 = sphi %s1, %s3 /* Start region 1 */",
    "%s3 = sadd.s32 1, %s2",
    f"%p4 = scmp.ge.s32.totalorder %s3, {rounds}",
  ]
  branch = ["%5 = sbr.rel (!%p4) target = $region1", *[""] * 4]
  body = ["%v1 = vadd.f32 %v2, %v3"] * (length - 8)
  return bench.parse_listing(
    "\n".join(
      f"{hex(i) if i else 0} : > {{ {slots} }}"
      for i, slots in enumerate([*head, *body, *branch])
    )
  )


def test_a_loop_over_two_overlays_loads_both_at_every_turn():
  program, rounds = loop(10_000, 9), 9
  cuts = range(-1000, 3000), range(3000, 10_500)
  loaded = bench.count_cycles(program)
  got = bench.count_cycles(program, part=loading.Part(cuts))
  # Each turn enters the second and then the first; the last ends in the second,
  # for which it has loaded the first ahead in vain.
  assert got.loads == 2 * rounds
  size = sum(map(len, cuts)) * V5E.bundle_bytes
  assert got.copied == {"hbm_to_code": rounds * size}
  assert got.hbm_bytes == rounds * size and not loaded.hbm_bytes
  # The second is there by when the first has run; but not at the first turn's
  # end, when the first is wanted again and was not foreseen.
  assert loading.load_cycles(cuts[1], V5E) < 2998
  unforeseen = loading.load_cycles(cuts[0], V5E)
  assert got.total - loaded.total == pytest.approx(unforeseen, abs=3)
  assert got.in_last_overlay == pytest.approx(7000, abs=10)


def test_what_runs_too_briefly_hides_nothing():
  program, rounds = loop(300, 50), 50
  cuts = range(0, 100), range(100, 20_100)
  extra = (
    bench.count_cycles(program, part=loading.Part(cuts)).total
    - bench.count_cycles(program).total
  )
  both = sum(loading.load_cycles(cut, V5E) for cut in cuts)
  assert 0.8 * rounds * both < extra < 1.05 * rounds * both


def test_what_is_loaded_ahead_is_not_waited_for():
  program, cuts = loop(300, 1), (range(-9000, 100), range(100, 20_100))
  cold = bench.count_cycles(program, part=loading.Part(cuts))
  ahead = bench.count_cycles(program, part=loading.Part(cuts, is_ahead=True))
  assert ahead.total == bench.count_cycles(program).total < cold.total
  assert ahead.copied == cold.copied and ahead.loads == cold.loads == 1


def test_a_route_waits_for_what_does_not_hide():
  a, b = range(1000), range(1000, 21_000)
  route = loading.Route()
  route.run([a], 100, 100)
  route.run([a], 200, 200)
  assert route.since_entered(a) == 300 and not route.since_entered(b)
  route.run([b], 5000, 5000)
  loads = route.loads(V5E)
  assert (loads.count, loads.nbytes) == (1, 20_000 * 64)
  assert loads.cycles == pytest.approx(loading.load_cycles(b, V5E) - 300)
  around = route.loads(V5E, around=True)
  assert (around.count, around.nbytes) == (2, 21_000 * 64)
  assert around.cycles == loads.cycles
  # A step within an instruction is counted where that is.
  within = loading.Route()
  within.run([a, b], 5000, 4000)
  assert within.loads(V5E).count == 0
  assert within.loads(V5E, around=True).count == 1


# --- whole programs -----------------------------------------------------------

HLO = """\
HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8] get-tuple-element(%p), index=1
  %inner = f32[8] fusion(%x), kind=kLoop, calls=%work
  %outer = f32[8] fusion(%inner), kind=kOutput, calls=%work
  %k = s32[]{:T(128)} copy(%i)
  %next = s32[]{:T(128)} add(%k, %one)
  ROOT %both = (s32[]{:T(128)}, f32[8]) tuple(%next, %outer)
}

%cond (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8]) parameter(0)
  %end = s32[]{:T(128)} constant(7)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %end), direction=LT
}

ENTRY %main (a: f32[8]) -> (s32[], f32[8]) {
  %a = f32[8] parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = s32[]{:T(128)} copy(%zero)
  %fetch = (f32[1048576]{0:S(1)}, f32[1048576]{0}, u32[]{:S(2)}) \
copy-start(%a)
  %init = (s32[]{:T(128)}, f32[8]) tuple(%start, %a)
  %loop = (s32[]{:T(128)}, f32[8]) while(%init), condition=%cond, body=%body
  ROOT %fetched = f32[1048576]{0:S(1)} copy-done(%fetch)
}
"""
TLP = """\
0 : { %s1 = smov 0 }
0x1 : > { %2 = inlined_call %s1 /* %inner = fusion(%x) */ } /* Start region 1 */
0x2 : > { %3 = inlined_call %s1 /* %outer = fusion(%inner) */ }
0x3 : > { %5 = sbr.rel (%p4) target = $region1 }
0x4 : { }
"""
INNER, OUTER = 1000, 2000  # bundles


@pytest.fixture
def listings(tmp_path):
  """`inner` is of 1000 bundles, `outer` of 2000, in a loop of seven turns."""

  def listing(length):
    lines = (f"{hex(i) if i else 0:>6} : {{}}" for i in range(length))
    return "\n".join(lines)

  texts = {"TLP": TLP, "inner": listing(INNER), "outer": listing(OUTER)}
  for name, text in texts.items():
    (tmp_path / name).write_text(text)
  return {name: tmp_path / name for name in texts}


FETCH = (1 << 22) / V5E.hbm_bytes_per_cycle
BRANCHES = frozenset([(3001, 1)])


@pytest.mark.parametrize("turns", [7, 3])
def test_a_loop_that_counts_tells_how_often_it_runs(listings, turns):
  hlo = HLO.replace("constant(7)", f"constant({turns})")
  cut = bench.Overlays((range(3003),), BRANCHES)
  got = estimate_module(hlo, listings, cut=cut)
  # The fetch is under way in all turns.
  busy = turns * (INNER + OUTER)
  assert got.cycles == round(max(busy, FETCH)) and not got.notes
  assert [(s.name, s.times) for s in got.steps] == [
    ("inner", turns),
    ("outer", turns),
  ]
  assert got.code == bench.Code(3003, 1, 0, 0, 0, 0, ())


@pytest.mark.parametrize(
  "told, untold",
  [
    ("direction=LT", "direction=NE"),
    ("tuple(%start, %a)", "tuple(%p9, %a)"),
    ("add(%k, %one)", "add(%one, %one)"),
    ("constant(7)", "parameter(1)"),
  ],
)
def test_a_loop_that_does_not_tell_is_counted_once(listings, told, untold):
  hlo = HLO.replace(told, untold).replace(
    "  %zero", "  %p9 = s32[] parameter(1)\n  %zero"
  )
  got = estimate_module(hlo, listings)
  assert got.lower_bound and [s.times for s in got.steps] == [1, 1]
  assert "loop: trip count unknown, counted once" in got.notes


def test_a_loop_over_overlays_loads_them_at_every_turn(listings):
  cuts = range(1001), range(1001, 3003)
  got = estimate_module(HLO, listings, cut=bench.Overlays(cuts, BRANCHES))
  nbytes = [len(cut) * V5E.bundle_bytes for cut in cuts]
  # The first time, `inner` is there with the program.
  loaded = 7 * nbytes[1] + 6 * nbytes[0]
  seconds = [loading.load_cycles(cut, V5E) for cut in cuts]
  assert INNER > seconds[1] and OUTER > seconds[0]  # all of it is hidden
  assert got.code == bench.Code(
    bundles=3003,
    overlays=2,
    loaded_bytes=loaded,
    cycles=0,
    best_cycles=0,
    worst_cycles=round(7 * seconds[1] + 6 * seconds[0]),
    loops=(CodeLoop("loop", 3002, 2, 7, sum(nbytes)),),
  )
  assert got.cycles == 7 * (INNER + OUTER)
  assert got.hbm_bytes == (1 << 22) + loaded


def test_an_instruction_over_overlays_loads_them_too(listings):
  """`outer` lies in both; what it waits for is counted within it."""
  cuts = range(1501), range(1501, 3003)
  got = estimate_module(HLO, listings, cut=bench.Overlays(cuts, BRANCHES))
  assert got.code is not None
  first, second = (len(cut) * V5E.bundle_bytes for cut in cuts)
  assert got.code.loaded_bytes == 7 * second + 6 * first
  assert got.code.cycles == got.cycles - 7 * (INNER + OUTER)


def test_what_communicates_is_apart_and_has_twins_on_other_channels(listings):
  hlo = """\
%sum (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %all = f32[64]{0} all-reduce(%p), channel_id=1, to_apply=%add
  ROOT %own = f32[8]{0} dynamic-slice(%all), dynamic_slice_sizes={8}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %inner = f32[64]{0} all-gather(%a), channel_id=2, dimensions={0}
  %again = f32[64]{0} all-gather(%a), channel_id=3, dimensions={0}
  ROOT %part = f32[8]{0} fusion(%again), kind=kCustom, calls=%sum
}
"""
  got = estimate_module(hlo, listings)
  assert not got.cycles and not got.notes
  assert [(c.name, c.nbytes) for c in got.collectives] == [
    ("inner", 256),
    ("again", 256),
    ("part", 32),
  ]
  program = TLP.replace("%outer", "%again")
  listings["TLP"].write_text(program)
  cut = bench.Overlays((range(2003),), frozenset([(2001, 1)]))
  assert estimate_module(hlo, listings, cut=cut).code is not None


def test_twins_are_known_by_what_they_compute_in_any_order():
  """The order in which a body is printed does not matter."""
  body = """\
%{name} (p: f32[8], q: f32[8]) -> f32[8] {{
{lines}
  ROOT %{name}.sum = f32[8]{{0}} add(%{name}.p, %{name}.q)
}}

"""
  one, other = (
    "  %{name}.p = f32[8]{{0}} negate(%p)",
    "  %{name}.q = f32[8]{{0}} sine(%q)",
  )
  parameters = (
    "  %p = f32[8]{{0}} parameter(0)\n  %q = f32[8]{{0}} parameter(1)\n"
  )
  bodies = "".join(
    body.format(
      name=name, lines=(parameters + "\n".join(lines)).format(name=name)
    )
    for name, lines in (("f", (one, other)), ("g", (other, one)))
  )
  module = texts.parse(
    bodies
    + """\
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %x = f32[8]{0} fusion(%a, %a), kind=kLoop, calls=%f
  %y = f32[8]{0} fusion(%a, %a), kind=kLoop, calls=%g
  ROOT %z = f32[8]{0} fusion(%x, %y), kind=kLoop, calls=%f
}
"""
  )
  x, y = (module.signature(module.instructions[name]) for name in "xy")
  assert x == y
  swapped = bodies.replace("add(%g.p, %g.q)", "add(%g.q, %g.p)")
  module = texts.parse(
    swapped + "ENTRY %main (a: f32[8]) -> f32[8] {\n"
    "  %a = f32[8]{0} parameter(0)\n"
    "  %x = f32[8]{0} fusion(%a, %a), kind=kLoop, calls=%f\n"
    "  ROOT %y = f32[8]{0} fusion(%a, %a), kind=kLoop, calls=%g\n}\n"
  )
  x, y = (module.signature(module.instructions[name]) for name in "xy")
  assert x != y


# --- the log, the table -------------------------------------------------------


def test_the_log_is_what_the_process_writes_to_standard_error(tmp_path, capfd):
  assert bench.compiler_log(tmp_path) == ""
  with pytest.raises(ValueError), bench.recorded(tmp_path):
    os.write(2, b"by the compiler\n")
    print("by Python", file=sys.stderr)
    raise ValueError
  os.write(2, b"afterwards\n")
  kept = bench.compiler_log(tmp_path)
  assert "by the compiler" in kept and "afterwards" not in kept
  assert "afterwards" in capfd.readouterr().err


CODE = bench.Code(
  *(85_011, 8, 701_042_112, 500, 0, 1000),
  (CodeLoop("feed_forward_fwd.1", 84_726, 5, 130, 5_422_464),),
)


def test_the_table_says_what_loading_costs(capsys):
  row = bench.Row(
    op="feed_forward",
    case="8k",
    which="fwd",
    implementation="pallas",
    cycles=10_500,
    code=CODE,
  )
  assert bench.Row.from_json(row.to_json()) == row
  table.show(rich.console.Console(width=200), [row])
  shown = capsys.readouterr().out
  assert "0.0% to 10.0%" in shown and "if all of it is hidden" in shown
  assert "130 turns" in shown and "MFU" not in shown
  step = dataclasses.replace(
    row, code=None, seconds=2.0, model_flops=round(197e12), peak_bytes=3 << 20
  )
  table.show(rich.console.Console(width=200), [step])
  shown = capsys.readouterr().out
  assert "50.0%" in shown and "3.0" in shown and "code" not in shown
