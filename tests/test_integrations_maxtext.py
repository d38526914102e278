"""maxtext with its classes swapped gives what it gave."""

import contextlib
import importlib
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import v5e
from flax import linen, nnx
from flax.linen.spmd import logical_to_mesh
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_gemma.kernels import integrations, sharding
from pallas_gemma.kernels.integrations import report

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def library():
  pytest.importorskip("maxtext.layers", reason="maxtext is not installed")
  config, llama, attention = (
    importlib.import_module(f"maxtext.{name}")
    for name in ("configs.pyconfig", "models.llama2", "layers.attention_op")
  )
  return types.SimpleNamespace(config=config, llama=llama, attention=attention)


@pytest.fixture(autouse=True)
def undone():
  yield
  integrations.maxtext.undo()


def make(library, devices=None, sizes=None, **changes):
  """A little decoder layer, and the mesh it wants.

  Args:
    library: its modules.
    devices: of the mesh, by default one; then the layer has shapes alone.
    sizes: of the mesh's axes, 1 for others.
    **changes: of the config.
  """
  folder = pathlib.Path(library.config.__file__).parent
  fields = dict(
    run_name="little",
    enable_checkpointing=False,
    per_device_batch_size=2,
    max_target_length=16,
    base_emb_dim=32,
    base_mlp_dim=64,
    base_num_query_heads=4,
    base_num_kv_heads=2,
    base_num_decoder_layers=1,
    head_dim=16,
    vocab_size=48,
    dtype="float32",
    weight_dtype="float32",
    attention="dot_product",
    mlp_activations=["silu", "linear"],
    skip_jax_distributed_system=True,
    scan_layers=False,
  )
  config = library.config.initialize(
    ["", str(folder / "base.yml")], **(fields | changes)
  )
  axes = config.mesh_axes
  chips = np.array(jax.devices()[:1] if devices is None else devices)
  shape = [(sizes or {}).get(axis, 1) for axis in axes]
  mesh = Mesh(chips.reshape(shape), axes)

  def layer():
    return library.llama.LlamaDecoderLayer(config, "train", mesh, nnx.Rngs(0))

  return mesh, layer() if devices is None else nnx.eval_shape(layer)


IDS = jnp.asarray([[1] * 5 + [2] * 8 + [0] * 3, [1] * 16])


def scored(mesh, layer, **kwargs):
  """The layer's output where there are tokens, and gradients of it."""
  graph, state, rest = nnx.split(layer, nnx.Param, ...)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 16, 32)), jnp.float32)
  positions = jnp.broadcast_to(jnp.arange(16), (2, 16))

  def loss(state, x):
    y = nnx.merge(graph, state, rest)(
      x, IDS, positions, True, "train", **kwargs
    )
    y = jnp.where((IDS != 0)[..., None], y[0], 0)
    return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

  with mesh:
    (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(state, x)
  return jax.tree.leaves((y, gradients))


def assert_close(got, wanted, slack=1e-4):
  assert len(got) == len(wanted)
  for have, want in zip(got, wanted, strict=True):
    assert have.dtype == want.dtype
    error = np.abs(np.asarray(have - want)).max()
    assert error <= slack * np.abs(np.asarray(want)).max()


def test_outputs_and_gradients_are_what_they_were(library):
  mesh, layer = make(library)
  wanted = scored(mesh, layer)
  integrations.maxtext.apply(implementation="pallas")
  assert_close(scored(mesh, layer), wanted)
  assert report().left_alone == ()
  assert {x.part for x in report()} == {"norm", "attention", "feed_forward"}
  integrations.maxtext.undo()
  assert_close(scored(mesh, layer), wanted, slack=0)


@pytest.mark.no_interpreter
def test_a_window_and_what_is_left_alone(library):
  mesh, layer = make(library, mlp_activations=["relu"])
  op = layer.self_attention.attention_op
  op.attention_type = library.attention.AttentionType.LOCAL_SLIDING
  op.sliding_window_size = 4
  op.attn_logits_soft_cap = 5.0
  wanted = scored(mesh, layer)
  integrations.maxtext.apply(implementation="xla")
  assert_close(scored(mesh, layer), wanted)
  assert [x.part for x in report().left_alone] == ["feed_forward"]


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
@pytest.mark.parametrize("topology", ["1x1", "2x4"])
def test_kernels_are_in_the_program_and_no_collective_more(library, topology):
  """Gradients, weights split over both axes as the library says."""
  sizes = {"fsdp": 2, "tensor": 4} if topology == "2x4" else {}
  mesh, layer = make(
    library,
    v5e.devices(topology),
    sizes,
    dtype="bfloat16",
    weight_dtype="bfloat16",
    base_emb_dim=256,
    base_mlp_dim=512,
    base_num_query_heads=8,
    base_num_kv_heads=4,
    head_dim=128,
    max_target_length=256,
    ici_fsdp_parallelism=sizes.get("fsdp", 1),
    ici_tensor_parallelism=sizes.get("tensor", 1),
  )
  graph, state, rest = nnx.split(layer, nnx.Param, ...)
  rules = layer.config.logical_axis_rules
  specs = logical_to_mesh(nnx.get_partition_spec(state), rules)
  state = v5e.split_shapes(state, specs, mesh)
  rows = NamedSharding(mesh, PartitionSpec("fsdp"))
  x = jax.ShapeDtypeStruct((4, 256, 256), jnp.bfloat16, sharding=rows)

  def gradient(state, x):
    def loss(state, x):
      positions = jnp.broadcast_to(jnp.arange(256), x.shape[:2])
      layer = nnx.merge(graph, state, rest)
      y = layer(x, jnp.ones_like(positions), positions, True, "train")
      return y[0].astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1))(state, x)

  @contextlib.contextmanager
  def around():
    split = {"B": "fsdp", "N": "tensor", "F": "tensor"}
    with mesh, linen.logical_axis_rules(rules), sharding(mesh, split):
      yield

  v5e.assert_swapped(integrations.maxtext, around, gradient, state, x)
