"""Collectives: what they move, how long that takes, what covers it."""

import dataclasses
from typing import Any

import pytest
from pallas_gemma.bench import Row
from pallas_gemma.bench.show import train_step
from pallas_gemma.bench.v5e import V5E, estimate_module, links

Move, Place = links.Move, links.Place
first_group, pairs_of = links.first_group, links.pairs_of

SLICE = [Place(0, x, y) for x in range(2) for y in range(4)]
ROW = [Place(0, 0, y) for y in range(4)]
RING = [Place(0, 3, y) for y in range(16)]
POD = [Place(0, x, y) for x in range(16) for y in range(16)]
PODS = [Place(0, 0, 0), Place(1, 0, 0)]
S, LINK = 90e9, 45e9


@pytest.mark.parametrize(
  "kind, group, seconds",
  [
    ("all-gather", SLICE, 7 / 8),  # round both dimensions: two directions
    ("reduce-scatter", SLICE, 7 / 8),
    ("all-reduce", SLICE, 2 * 7 / 8),
    ("all-gather", ROW, 2 * 3 / 4),  # a line: the end has one link
    ("all-gather", RING, 15 / 16),
    ("all-gather", POD, 255 / 256 / 2),  # rings of both dimensions
    ("all-to-all", SLICE, 8 / 8 * 2),
    ("all-gather", PODS, 90 / 3.125 / 2),
    ("all-gather", ROW[:1], 0),
  ],
)
def test_the_time_of_a_collective(kind, group, seconds):
  assert Move(kind, int(S), group).seconds == pytest.approx(seconds)


def test_the_time_of_a_permute():
  pairs = [(ROW[0], ROW[1]), (ROW[1], ROW[2]), (ROW[2], ROW[0])]
  move = Move("collective-permute", int(LINK), pairs)
  assert move.seconds == pytest.approx(2)  # the farthest goes over two links
  assert not move.is_between_slices
  turned = [*zip(RING, RING[1:] + RING[:1], strict=True)]
  turn = Move("collective-permute", int(LINK), turned)
  assert turn.seconds == pytest.approx(1)  # the last is next to the first
  over = Move("collective-permute", int(LINK), [(PODS[0], PODS[1])])
  assert over.is_between_slices and over.seconds == pytest.approx(45 / 3.125)


def test_groups_as_programs_say_them():
  mesh = "replica_groups=mesh['pods'=1,'data'=2,'fsdp'=2,'model'=2] {'fsdp'}"
  assert first_group(mesh) == [0, 2]
  assert first_group(mesh.replace("{'fsdp'}", "{'data', 'model'}")) == [
    *(0, 1),
    *(4, 5),
  ]
  assert first_group("replica_groups={{0,4},{1,5}}, dimensions={0}") == [0, 4]
  assert first_group("replica_groups=[2,4]<=[8], dim") == [0, 1, 2, 3]
  assert first_group("replica_groups=[4,2]<=[2,4]T(1,0), dim") == [0, 4]
  assert first_group("to_apply=%add") == []
  assert pairs_of("source_target_pairs={{0,1},{1,0}}") == [(0, 1), (1, 0)]


# 1,024 x 1,024 float32 gathered over 8 chips, 4 MiB: 41 us of links.
HLO = """\
HloModule m

%body (p: f32[1024,1024]) -> f32[128,1024] {
  %p = f32[1024,1024]{1,0} parameter(0)
  %inner = f32[1024,1024]{1,0} all-reduce(%p), channel_id=3, \
replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %own = f32[128,1024]{1,0} dynamic-slice(%inner)
}

%begins (q: f32[128,1024]) -> f32[1024,1024] {
  %q = f32[128,1024]{1,0} parameter(0)
  %g1 = f32[1024,1024]{1,0} all-gather(%q), channel_id=9, \
replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %s = f32[1024,1024]{1,0} custom-call(%g1), \
custom_call_target="AsyncCollectiveStart"
}

%goes_on (r: f32[1000,985]) -> f32[1000,1000] {
  %r = f32[1000,985]{1,0} parameter(0)
  %g2 = f32[1024,1024]{1,0} all-gather(%r), channel_id=9
  %w = f32[985,1000]{1,0} parameter(1)
  ROOT %d = f32[1000,1000]{1,0} convolution(%r, %w), dim_labels=bf_io->bf
}

%ends (t: f32[1024,1024]) -> f32[1024,1024] {
  %t = f32[1024,1024]{1,0} parameter(0)
  %g3 = f32[1024,1024]{1,0} all-gather(%t), channel_id=9
  ROOT %e = f32[1024,1024]{1,0} custom-call(%g3), \
custom_call_target="AsyncCollectiveDone"
}

%exchange (u: f32[8,16,1024]) -> f32[8,16,1024] {
  %u = f32[8,16,1024]{2,1,0} parameter(0)
  ROOT %x = f32[8,16,1024]{2,1,0} all-to-all(%u), channel_id=4, \
replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

ENTRY %main (a: f32[128,1024]) -> f32[1024,1024] {
  %a = f32[128,1024]{1,0} parameter(0)
  %sent = (f32[128,1024]{1,0}, f32[128,1024]{1,0}, u32[]) \
collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %busy = f32[128,1024]{1,0} fusion(%a), kind=kLoop, calls=%long
  %got = f32[128,1024]{1,0} collective-permute-done(%sent)
  %whole = f32[1024,1024]{1,0} all-gather(%got), channel_id=1, \
replica_groups=[1,8]<=[8], dimensions={0}, \
metadata={op_name="jit(run)/while/body/blocks/gate"}
  %scattered = f32[128,1024]{1,0} fusion(%whole), kind=kCustom, calls=%body
  %parts = f32[8,16,1024]{2,1,0} bitcast(%a)
  %swap = ((f32[8,16,1024]{2,1,0}), f32[8,16,1024]{2,1,0}, u32[]) \
async-start(%parts), calls=%exchange
  %later = f32[128,1024]{1,0} fusion(%a), kind=kLoop, calls=%long
  %swapped = f32[8,16,1024]{2,1,0} async-done(%swap)
  %one = f32[1024,1024]{1,0} fusion(%a), kind=kCustom, calls=%begins
  %two = f32[1000,1000]{1,0} fusion(%one), kind=kOutput, calls=%goes_on
  ROOT %three = f32[1024,1024]{1,0} fusion(%one), kind=kCustom, calls=%ends
}
"""


@pytest.fixture
def met(tmp_path):
  listing = tmp_path / "busy"
  bundles = [f"{hex(i) if i else 0:>6} : {{}}" for i in range(3000)]
  listing.write_text("\n".join(bundles))
  total = estimate_module(HLO, {"busy": listing}, places=SLICE)
  return {c.name: c for c in total.collectives}


def test_what_is_computed_meanwhile_covers_a_collective(met):
  gather = (4 << 20) * 7 / 8 / 90e9
  permute = (4 << 17) / 45e9
  whole, sent = met["whole"], met["sent"]
  assert whole.seconds == whole.exposed == pytest.approx(gather)
  assert sent.seconds == pytest.approx(permute)
  assert sent.exposed == pytest.approx(permute - V5E.seconds(3000))
  product = 2 * 1000 * 1000 * 985 / V5E.peak_flops
  assert met["one"].seconds == pytest.approx(gather)
  assert met["one"].exposed == pytest.approx(gather - product)
  assert met["scattered"].kind == "reduce-scatter"
  assert met["scattered"].exposed == pytest.approx(gather)
  swap = met["swap"]
  assert (swap.kind, swap.nbytes) == ("all-to-all", 4 << 17)
  assert swap.seconds == pytest.approx((4 << 17) / 45e9)
  assert swap.exposed == pytest.approx(swap.seconds - V5E.seconds(3000))
  assert set(met) == {"sent", "whole", "scattered", "swap", "one"}


def test_collectives_are_added_up_by_what_they_are_of(met):
  row = [vars(one) for one in met.values()]
  twice = [{**vars(met["whole"]), "times": 2}]
  found = train_step.traffic([*row, *twice])
  gate = next(t for t in found if t.source == "blocks/gate")
  assert (gate.kind, gate.runs) == ("all-gather", 3)
  assert gate.nbytes == 3 * (4 << 20)
  assert gate.exposed == pytest.approx(3 * met["whole"].seconds)
  assert found[0] == gate


def test_readers_get_a_line_for_each_step_and_its_long_collectives(met):
  long = {**vars(met["whole"]), "times": 100}
  fields: dict[str, Any] = dict(
    op="gemma_train_step", case="gemma_on_a_slice", which="step"
  )
  apart = Row(
    implementation="pallas", seconds=0.1, model_flops=197 * 10**11, **fields
  )
  overlapped = Row(
    implementation="pallas-overlapped",
    peak_bytes=3 << 30,
    collectives=[vars(met["sent"]), long],
    **fields,
  )
  alone = dataclasses.replace(overlapped, case="without_the_other")
  lines = train_step.markdown([overlapped, apart, alone]).splitlines()
  links, exposed = (
    1e3 * (100 * met["whole"].seconds + of)
    for of in (met["sent"].seconds, met["sent"].exposed)
  )
  assert lines[2] == (
    f"| gemma_on_a_slice | 3.00 | 100.0 | {links:.1f} | {exposed:.1f} | "
    f"100.0% | {100 / (100 + exposed):.1%} |"
  )
  assert sum("all-gather" in line for line in lines) == 1
  assert not any(
    "permute" in line or "without_the_other" in line for line in lines
  )
