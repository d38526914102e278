"""The model in the benchmark: layers, steps of training, steps of decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import v5e
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from pallas_gemma import bench
from pallas_gemma.bench.show import report
from pallas_gemma.bench.suites import gemma_decode, gemma_layers, gemma_step
from pallas_gemma.bench.v5e import AXIS
from pallas_gemma.gemma import GemmaConfig, flops_per_token
from pallas_gemma.gemma._train import mesh as meshes

pytestmark = pytest.mark.no_interpreter
TINY = dataclasses.replace(GemmaConfig.tiny(256), dtype="bfloat16")
PROGRAMS = {p.key: p for p in bench.suite("gemma")}


def results(built):
  return jax.eval_shape(built.function, *built.specs)


def test_layers_are_the_models_own():
  built = gemma_layers.layers(TINY, 2, 128)
  assert results(built).shape == (2, 128, TINY.width)
  both = [p for p in PROGRAMS.values() if p.op == "gemma_layers"]
  assert {p.which for p in both} == {"fwd", "fwd+bwd"}
  two, four = (
    PROGRAMS[f"gemma_layers/gemma_2b_{n}_layers/fwd+bwd/pallas"] for n in (2, 4)
  )
  block = PROGRAMS["gemma_block/gemma_2b_1x8k/fwd+bwd/pallas"]
  cycles = [bench.bound(p.costs)[0] for p in (block, two, four)]
  np.testing.assert_allclose(cycles, np.multiply(cycles[0], (1, 2, 4)))


LENGTHS = (3, 64, 17)


def test_a_decoding_step_extends_every_row():
  built = gemma_decode.step(TINY, LENGTHS, 64)
  logits, cache = results(built)
  assert logits.shape == (3, TINY.vocab_size)
  assert cache.k.shape == (TINY.num_layers, 3, 64, 1, TINY.head_size)
  (before,) = (value for value in built.values if value is not None)
  np.testing.assert_array_equal(before, np.array(LENGTHS) - 1)
  given = [built.specs[i] for i in built.placement.donated]
  assert [x.shape for x in given] == [cache.k.shape, cache.v.shape, (3,)]
  matrices = [x.dtype for x in built.specs if len(x.shape) > 2]
  assert set(matrices) == {jnp.dtype("bfloat16")}


def test_a_decoding_step_may_draw_the_next_tokens():
  built = gemma_decode.step(TINY, LENGTHS, 64)
  logits, _ = results(built)
  drawing = gemma_decode.settings(TINY, temperature=0.0)
  drawn = gemma_decode.step(TINY, LENGTHS, 64, drawing=drawing)
  (tokens, logprobs), _ = results(drawn)
  assert (tokens.shape, logprobs.shape) == (logits.shape[:1],) * 2
  cases = [key for key in PROGRAMS if "8k_sampled" in key]
  assert len(cases) == 2 == len([key for key in PROGRAMS if "_greedy" in key])


def test_decoding_is_bound_by_weights_and_the_cache_that_there_is():
  full, mixed = (
    PROGRAMS[f"gemma_decode/gemma_2b_{name}/fwd/pallas"].costs[0]
    for name in ("32x8k", "32_mixed")
  )
  per_token = 2 * 18 * 2 * 256
  weights = 2 * (18 * 110_100_480 + 256_128 * 2048)
  assert full.hbm_bytes == weights + 32 * 8192 * per_token
  assert weights < mixed.hbm_bytes < weights + 32 * 5000 * per_token


@v5e.needs_compiler
@v5e.around_kernels
def test_the_cache_is_written_in_place():
  built = gemma_decode.step(TINY, (1024,) * 8, 1024)
  compiled = bench.compile_program(built.function, built.specs, built.placement)
  cache = sum(
    built.specs[i].size * built.specs[i].dtype.itemsize
    for i in built.placement.donated
  )
  assert compiled.output_bytes < cache < compiled.argument_bytes
  assert compiled.peak_bytes == (
    compiled.argument_bytes + compiled.output_bytes + compiled.temp_bytes
  )


def scaled(n, x):
  """A kernel that could branch on an integer operand."""

  def kernel(n_ref, x_ref, o_ref):
    o_ref[...] = x_ref[...] * n_ref[0]

  return pl.pallas_call(
    kernel,
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec()],
    out_shape=x,
    name="scaled",
  )(n, x)


@pytest.mark.parametrize("reverse, want", [(False, [7, 1]), (True, [7, 3])])
def test_values_reach_a_kernel_in_a_scan_as_in_its_first_turn(reverse, want):
  def function(x, n):
    def turn(carry, i):
      return (scaled(jnp.stack([n, i]), carry[0]), carry[1] + 1), None

    numbers = jnp.arange(1, 4)
    return jax.lax.scan(turn, (x, n), numbers, reverse=reverse)[0]

  specs = (
    jax.ShapeDtypeStruct((8, 128), jnp.float32),
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  found = bench.kernel_operands(function, specs, (None, np.array(7)))
  np.testing.assert_array_equal(found["scaled"][0], want)


def test_values_reach_a_kernel_on_the_first_chip_of_a_mesh():
  mesh = jax.sharding.AbstractMesh(
    (4,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rows = PartitionSpec(AXIS)

  def on_a_chip(n, m, x):
    return scaled(n + jax.lax.pcast(m, (AXIS,), to="varying"), x)

  function = jax.shard_map(
    on_a_chip,
    mesh=mesh,
    in_specs=(rows, PartitionSpec(), rows),
    out_specs=rows,
    check_vma=False,
  )
  specs = (
    jax.ShapeDtypeStruct((8,), jnp.int32),
    jax.ShapeDtypeStruct((2,), jnp.int32),
    jax.ShapeDtypeStruct((32, 128), jnp.float32),
  )
  values = (np.arange(8, dtype=np.int32), np.full(2, 10, np.int32), None)
  found = bench.kernel_operands(function, specs, values)
  np.testing.assert_array_equal(found["scaled"][0], [10, 11])


CASE = gemma_step.Case(
  "tiny", TINY, "v5e:2x4", 128, meshes.MeshConfig(fsdp=8), vocabulary=200
)


@v5e.needs_compiler
def test_a_training_step_is_the_trainers_with_its_state_in_shards():
  built = gemma_step.step(CASE)
  placement = built.placement
  mesh = placement.mesh().abstract_mesh
  with jax.sharding.use_abstract_mesh(mesh):
    state, measured = results(built)
  leaves = jax.tree.leaves(state)
  assert {"loss", "gradient_norm"} <= set(measured)
  assert {x.shape for x in measured.values()} == {()}
  assert [x.shape for x in leaves] == [
    built.specs[i].shape for i in placement.donated
  ]
  assert placement.arguments is not None
  pairs = list(zip(built.specs, placement.arguments, strict=True))
  for spec, partition in pairs:
    split = [d for d, axis in enumerate(partition) if axis == "fsdp"]
    assert all(spec.shape[d] % 8 == 0 for d in split)
    assert split or spec.size < 10_000, spec
  table = (TINY.vocab_size, TINY.width)
  assert {p for x, p in pairs if x.shape == table} == {
    PartitionSpec(None, "fsdp")
  }
  rows = [p for x, p in pairs if x.shape == (8, 128)]
  assert rows[-4:] == [PartitionSpec(meshes.ROWS)] * 4


@pytest.mark.parametrize("preset, model", [("v5e-256", "2b"), ("v5e-4", "7b")])
def test_a_preset_is_a_case(preset, model):
  case = gemma_step.case_of(preset, model)
  chips = case.mesh.devices // case.mesh.pods
  rows, columns = case.topology.partition(":")[2].split("x")
  assert int(rows) * int(columns) == chips
  assert case.config.batch_size == case.mesh.rows
  assert f"gemma_train_step/{case.name}/step/pallas-overlapped" in PROGRAMS


def test_another_preset_is_refused():
  with pytest.raises(ValueError, match="train-step: wanted one of v5e-1, "):
    gemma_step.case_of("v5e-9", "2b")


def test_what_counts_as_a_training_steps_work():
  step = PROGRAMS["gemma_train_step/gemma_2b_v5e_8/step/pallas"]
  flops = flops_per_token(GemmaConfig.gemma_2b(), 8192) * 8192
  assert step.model_flops == step.costs[0].flops == round(flops)
  assert bench.bound(step.costs)[1] == "MXU"


@pytest.mark.parametrize("op", ["gemma_layers", "gemma_train_step"])
def test_what_takes_minutes_is_for_those_who_ask(op):
  programs = [p for p in PROGRAMS.values() if p.op == op]
  assert programs and not any(p.default for p in programs)


def test_two_depths_give_a_layer_and_the_whole_model():
  def row(depth, cycles, **fields):
    return bench.Row(
      op="gemma_train_step",
      case=f"gemma_2b_{depth}_layers_v5e_8",
      which="step",
      implementation="pallas",
      cycles=cycles,
      seconds=cycles / 1.5e9,
      model_flops=cycles * 100_000,
      peak_bytes=3 << 30,
      **fields,
    )

  few, more = row(2, 3_000_000), row(4, 4_500_000)
  whole = dataclasses.replace(few, case="gemma_2b_v5e_8", cycles=9_000_000)
  other = dataclasses.replace(few, op="rms_norm")
  table = report.steps([few, more, other, whole])
  name = "`gemma_train_step` gemma_2b_v5e_8, step"
  mfu = f"{1e5 * 1.5e9 / 197e12:.1%}"
  assert table.splitlines()[2:] == [
    "| `gemma_train_step` gemma_2b_2_layers_v5e_8, step | 2.000 |  | "
    f"{mfu} | 3.00 |",
    "| `gemma_train_step` gemma_2b_4_layers_v5e_8, step | 3.000 |  | "
    f"{mfu} | 3.00 |",
    f"| {name}: a layer more | 0.500 | | | |",
    f"| {name}: 18 layers by a straight line | 10.000 |  | {mfu} |  |",
    f"| {name} | 2.000 |  | {mfu} | 3.00 |",
  ]
  assert "≥ 3.000" in report.steps(
    [few, dataclasses.replace(more, lower_bound=True)]
  )
