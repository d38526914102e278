"""Training over several devices: the same numbers, in parts."""

import dataclasses
import importlib
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import v5e
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pallas_gemma.bench.v5e import hlo, links
from pallas_gemma.gemma import (
  GemmaConfig,
  OptimizerConfig,
  TrainConfig,
  UserError,
)
from small_gemma import printed

MESH, LAYOUT, STEP = (
  importlib.import_module(f"pallas_gemma.gemma._train.{name}")
  for name in ("mesh", "layout", "step")
)
PARTS = importlib.import_module("pallas_gemma.gemma._parts")
pytestmark = pytest.mark.no_interpreter
MODEL = dataclasses.replace(GemmaConfig.tiny(400), num_layers=2)


def config(directory, **changes):
  fields = dict(
    work_dir=directory,
    cache_dir=directory.parent / "cache",
    model=MODEL,
    steps=6,
    sequence_length=64,
    evaluate_every=3,
    save_every=3,
    eval_batches=2,
    optimizer=OptimizerConfig(warmup_steps=2),
  )
  return TrainConfig(**{**fields, **changes})


def run(config):
  """The losses of all steps, and what was printed."""
  shown = printed(config)
  lines = (config.work_dir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  losses = [r["loss"] for r in records]
  losses += [r["held_out_loss"] for r in records if "held_out_loss" in r]
  return np.array(losses), shown


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The losses on one device, and where the text's cache is."""
  directory = tmp_path_factory.mktemp("mesh") / "alone"
  return run(config(directory))[0], directory.parent


@pytest.mark.parametrize(
  "mesh",
  [
    "fsdp=8",
    "pods=2,data=2,fsdp=2",
    "context=4",
    "fsdp=2,context=2,model=2",
  ],
)
def test_losses_are_those_of_one_device(mesh, alone):
  want, folder = alone
  got, shown = run(config(folder / mesh, mesh=mesh))
  devices = MESH.parse(mesh).devices
  assert f"mesh      {mesh}, {devices} devices" in shown
  assert ("are not used" in shown) == (devices < 8)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_run_goes_on_over_other_devices(alone):
  want, folder = alone
  # The schedule is that of all steps: this run is stopped, not shorter.
  first = config(folder / "moved", mesh="fsdp=2,model=2")
  step = importlib.import_module("pallas_gemma.gemma._train.loop").Loop
  taken = step.take_step

  class Stopped(Exception):
    pass

  def take_step(self):
    if self.step == 4:
      raise Stopped
    taken(self)

  with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
    patch.setattr(step, "take_step", take_step)
    run(first)
  got, shown = run(dataclasses.replace(first, mesh="data=4"))
  assert "3 done" in shown and "mesh fsdp=2,model=2 -> data=4" in shown
  assert "4 more are not used" in shown
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_state_is_made_in_parts():
  settings = config(pathlib.Path("unused"), mesh="fsdp=4,model=2")
  layout = LAYOUT.layout_of(settings)
  params, optimizer = STEP.initial_state(settings, layout)
  gate = params["blocks"]["gate"]
  assert {s.data.shape for s in gate.addressable_shards} == {(2, 32, 256)}
  moments = [
    x
    for path, x in jax.tree_util.tree_leaves_with_path(optimizer)
    if "gate" in jax.tree_util.keystr(path)
  ]
  assert len(moments) == 2
  assert all(x.sharding == gate.sharding for x in moments)
  whole = STEP.initial_state(settings, None)[0]["blocks"]["gate"]
  np.testing.assert_allclose(gate, whole, rtol=1e-6)


@pytest.mark.parametrize("model", [GemmaConfig.gemma_2b, GemmaConfig.gemma_7b])
def test_every_parameter_is_in_the_table_and_split_where_it_can_be(model):
  settings = TrainConfig(model=model(), sequence_length=128)
  params, _ = STEP.abstract_state(settings)
  mesh = MESH.MeshConfig(fsdp=2, model=4)
  layout = LAYOUT.Layout(LAYOUT.make_mesh(mesh, jax.devices()), mesh)
  names = set()
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    name = path[-1].key
    names.add(name)
    spec = layout.spec(name, x.shape)
    axes = [axis for axis in spec if axis]
    assert ("fsdp" in axes) == (not name.endswith("norm")), name
    takes_part = LAYOUT._SPLIT[name] is not None
    few = name == "kv" and settings.model.num_kv_heads == 1
    assert ("model" in axes) == (takes_part and not few), name
  assert names == set(LAYOUT._SPLIT)
  lines = list(LAYOUT.describe(layout, params))
  assert len(lines) == len(names)
  gate = next(line for line in lines if line.startswith("blocks.gate "))
  assert "[-, fsdp, model]" in gate


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.parametrize(
  "mesh, remat, words",
  [
    ("fsdp=8", "none", 512),
    ("fsdp=8", "unrolled", 4096),  # more than tokens: these are exchanged
    ("fsdp=4,model=2", "none", 512),
  ],
)
def test_kernels_are_compiled_for_a_slice(mesh, remat, words):
  model = GemmaConfig(
    vocab_size=words,
    num_layers=3,  # of two, the newest compiler makes no loop
    width=256,
    hidden_size=512,
    num_heads=4,
    num_kv_heads=1,
    head_size=128,
    context_length=384,
    remat=remat,
  )
  settings = TrainConfig(
    model=model,
    sequence_length=384,
    mesh=mesh,
    head="recompute",
    z_loss=1e-4,
  )
  sizes = MESH.parse(mesh)
  chips = v5e.devices("2x4", (2, 4, 1))
  layout = LAYOUT.Layout(LAYOUT.make_mesh(sizes, chips), sizes)
  step, _ = STEP.make_steps(settings, words, layout)
  ids = jax.ShapeDtypeStruct((8, 384), jnp.int32)
  batch: dict[str, Any] = dict.fromkeys(
    ("tokens", "labels", "segment_ids"), ids
  )
  batch["weights"] = jax.ShapeDtypeStruct((8, 384), jnp.float32)
  text = step.lower(*STEP.abstract_state(settings), batch).compile().as_text()
  for kernel in ("flash_attention", "feed_forward", "linear_cross_entropy"):
    assert f"{kernel}_fwd" in text and f"{kernel}_bwd" in text
  # With the z-loss and without it, the logits are computed once.
  of_logits = re.findall(r"%(linear_cross_entropy_fwd[.\d]*) = ", text)
  assert len(set(of_logits)) == 1
  assert unplanned(text, settings, layout) == []
  if mesh == "fsdp=8":  # a device's products with gate and up, of all layers
    assert ("bf16[3,384,512]" in text) == (remat == "none")
    # Nobody has the whole table where a device has a part of the vocabulary.
    assert (f"bf16[{words},256]" in text) == (words == 512)
    # Nor are the parts of all layers cast before the loop over them.
    for part in ("3,32,512", "3,4,32,128", "3,4,128,32"):  # gate, q, out
      assert f" f32[{part}]" in text and f" bf16[{part}]" not in text
    # A layer's attention, backwards, is there for gathers to go on behind: the
    # sums of the feed-forward's three gradients come before it.
    steps = re.findall(
      r"%(feed_forward_bwd|reduce_scatter|flash_attention_bwd)[.\d]* = .*"
      r'op_name="([^"]*)"',
      text,
    )
    of_layer = (
      "feed_forward_bwd",
      *["reduce_scatter"] * 3,
      "flash_attention_bwd",
    )
    order = [
      step
      for step, source in steps
      if step != "reduce_scatter" or "feed_forward" in source
    ]
    assert order and order == len(order) // len(of_layer) * [*of_layer]


def test_over_other_axes_parts_of_gradients_are_summed():
  """Not whole ones: between slices that would be fsdp times the bytes."""
  settings = config(
    pathlib.Path("unused"), mesh="data=2,fsdp=4", head="recompute", batch_size=8
  )
  step, _ = STEP.make_steps(settings, 400, LAYOUT.layout_of(settings))
  ids = jax.ShapeDtypeStruct((8, 64), jnp.int32)
  batch: dict[str, Any] = dict.fromkeys(
    ("tokens", "labels", "segment_ids"), ids
  )
  batch["weights"] = jax.ShapeDtypeStruct((8, 64), jnp.float32)
  text = step.lower(*STEP.abstract_state(settings), batch).as_text()
  summed = re.findall(
    r'"stablehlo.all_reduce"[^{]*<{.*\n(?:.*\n){3}.*\(tensor<([\dx]*)x\w+>',
    text,
  )
  # Of gate, up and down; weights are [128, 512] and [512, 128].
  assert sorted(dims for dims in summed if dims in ("32x512", "128x128")) == [
    "128x128",
    *["32x512"] * 2,
  ]
  assert not {"128x512", "512x128"} & set(summed)


@v5e.needs_compiler
def test_a_pod_is_not_asked_for_what_it_cannot():
  """All 256 chips exchange parts, told what the trainer tells the compiler."""
  mesh = Mesh(np.array(v5e.devices("16x16", (16, 16, 1))), ("fsdp",))

  def exchange(x):
    def again(x, _):
      other = jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)
      return 2 * other, jnp.tanh(x[0])  # what could go on meanwhile

    return jax.lax.scan(again, x, None, length=3)

  run = jax.shard_map(
    exchange,
    mesh=mesh,
    in_specs=P("fsdp"),
    out_specs=(P("fsdp"), P(None, "fsdp")),
  )
  rows = jax.ShapeDtypeStruct(
    (256 * 256, 384, 8), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp"))
  )
  options = PARTS.compiler_options(mesh)
  program = jax.jit(run, compiler_options=options).lower(rows).compile()
  assert "all-to-all" in (program.as_text() or "")


# Over which axes a step's collectives go.  Whatever the model axis splits is
# summed over it.
PLAN = {
  "all-gather": [("fsdp",)],
  "all-to-all": [("fsdp",)],
  "reduce-scatter": [("fsdp",)],
  "all-reduce": [("fsdp",), ("model",), ("fsdp", "model")],
}


def unplanned(text, settings, layout):
  """The collectives of a step that the plan does not know.

  Over fsdp go a layer's weights, in the compute dtype, and their gradients,
  token ids, and rows of the table, which are exchanged; over model go sums of
  tokens' rows.  Where there are fewer tokens than words, all devices' rows and
  their gradients go to all, and parts of the table from columns to rows and
  back.
  """
  params, _ = STEP.abstract_state(settings)
  weights = set()
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    split = "model" in str(layout.spec(path[-1].key, x.shape))
    stacked = settings.model.num_layers if len(x.shape) > 2 else 1
    weights.add(x.size // stacked // (layout.config.model if split else 1))
  rows = settings.batch_size // layout.config.rows * settings.sequence_length
  tokens = settings.batch_size * settings.sequence_length
  width = settings.model.width
  in_parts = tokens < settings.model.vocab_size
  part_of_table = width * settings.model.vocab_size // layout.config.fsdp
  of_vocabulary = {
    ("all-gather", tokens * width, "bf16"),
    ("all-gather", tokens, "f32"),
    ("all-reduce", tokens * width, "bf16"),
    ("all-reduce", tokens, "f32"),
    ("all-to-all", part_of_table, "bf16"),
  }

  def is_planned(kind, axes, array, source):
    if axes not in PLAN.get(kind, []):
      return False
    if array.size <= width:  # sums, and scales of norms
      return True
    if in_parts and (kind, array.size, array.dtype) in of_vocabulary:
      return True
    match kind, axes:
      case "all-gather", _:
        is_weight = array.size in weights and array.dtype == "bf16"
        return is_weight or (array.size, array.dtype) == (tokens, "s32")
      case "all-to-all", _:
        return array.size == rows * width and "embed" in source
      case "reduce-scatter", _:
        return array.size * layout.config.fsdp in weights
      case _, ("model",):
        return array.size % rows == 0
    return array.size in weights

  return [
    (kind, axes, f"{array.dtype}[{array.dims}]", each.source)
    for each in hlo.parse(text).instructions.values()
    if (kind := each.opcode.removesuffix("-start")) in hlo.COLLECTIVES
    for axes in [axes_of(each.text, layout)]
    for array in each.arrays
    if not is_planned(kind, axes, array, each.source)
  ]


def axes_of(text, layout):
  """The axes of more than one device along which a collective goes."""
  group = links.first_group(text) or sum(links.pairs_of(text), ())
  group = group or range(layout.mesh.size)  # no groups: all are one
  places = np.unravel_index(np.array(group, int), layout.mesh.devices.shape)
  pairs = zip(layout.mesh.axis_names, places, strict=True)
  return tuple(name for name, place in pairs if len(set(place)) > 1)


# --- what the user may ask for ------------------------------------------------


def test_presets_and_axes_are_read():
  assert MESH.parse("auto") is None
  assert MESH.parse("v5e-8") == MESH.MeshConfig(fsdp=8)
  assert MESH.parse("report-7b").devices == 16 * 256
  assert MESH.parse(" fsdp=4, model=2") == MESH.MeshConfig(fsdp=4, model=2)
  for mesh in MESH.PRESETS.values():
    assert MESH.parse(str(mesh)) == mesh


@pytest.mark.parametrize(
  "text", ["", "v5e-9", "fsdp", "fsdp=", "fsdp=-1", "rows=2", "fsdp=2,fsdp=4"]
)
def test_another_text_is_refused(text):
  with pytest.raises(UserError, match="wanted auto, v5e-1, .* fsdp=4,model=2"):
    TrainConfig(mesh=text)
  with pytest.raises(UserError, match="mesh.fsdp: wanted 1 or more, got 0"):
    TrainConfig(mesh="fsdp=0")


@given(st.integers(1, 64), st.integers(1, 64))
def test_auto_takes_all_devices_or_says_why_not(devices, rows):
  try:
    mesh = MESH.chosen(None, devices, rows, MODEL)
  except UserError as error:
    assert "give a --batch-size" in str(error)
    model = devices // np.gcd(devices, rows)
    assert MODEL.num_heads % model or MODEL.hidden_size % model
    return
  assert mesh.devices == devices and rows % mesh.rows == 0
  assert MODEL.num_heads % mesh.model == 0


@pytest.mark.parametrize(
  "text, message",
  [
    ("fsdp=16", "wants 16 devices, and there are 8"),
    ("data=8", "which does not divide the 4 rows of a pass"),
    ("context=3", "context=3 wants a sequence_length that is a multiple of 6"),
    ("model=8", "model=8 does not divide the model's heads, 4"),
  ],
)
def test_what_does_not_divide_is_refused_before_anything_is_read(
  text, message, tmp_path
):
  settings = config(tmp_path / "run", mesh=text, accumulation=2)
  with pytest.raises(UserError, match=message):
    run(settings)


def test_keys_and_values_are_split_as_far_as_there_are_heads():
  model = dataclasses.replace(MODEL, num_heads=12, num_kv_heads=6)
  with pytest.raises(UserError, match="key/value heads, 6"):
    MESH.chosen(MESH.MeshConfig(model=4), 8, 8, model)
