"""tunix with its classes swapped gives what it gave."""

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import v5e
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_gemma.kernels import integrations
from pallas_gemma.kernels.integrations import CausalMask, report

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def library():
  pytest.importorskip("tunix.models", reason="tunix is not installed")
  names = ("models.llama3.model", "models.qwen3.model", "sft.utils")
  llama, qwen, utils = (
    importlib.import_module(f"tunix.{name}") for name in names
  )
  return types.SimpleNamespace(llama3=llama, qwen3=qwen, utils=utils)


@pytest.fixture(autouse=True)
def undone():
  yield
  integrations.tunix.undo()


def make(library, name, layers=2, **changes):
  """A little model, with random weights where the library has zeros."""
  model = getattr(library, name)
  fields = dict(
    num_layers=layers,
    vocab_size=48,
    embed_dim=32,
    hidden_dim=64,
    num_heads=4,
    head_dim=16,
    num_kv_heads=2,
    rope_theta=1_000_000,
    norm_eps=1e-5,
  )
  config = model.ModelConfig(**(fields | changes))
  whole = model.Llama3 if name == "llama3" else model.Qwen3
  return whole(config, rngs=nnx.Rngs(0))


def drawn(model):
  graph, state = nnx.split(model, nnx.Param)[:2]
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), state
  )
  return graph, state


def scored(library, model, tokens, mask=None):
  """The log-probabilities of the tokens that are, and gradients of them."""
  graph, state = drawn(model)

  def loss(state):
    keys = tokens != 0
    given = library.utils.make_causal_attn_mask(keys) if mask is None else mask
    positions = library.utils.build_positions_from_mask(keys)
    logits, _ = nnx.merge(graph, state)(tokens, positions, None, given)
    logp = jax.nn.log_softmax(logits)
    hidden = ~keys[..., None]
    return jnp.where(hidden, 0, logp).sum() / 48, jnp.where(hidden, 0, logits)

  (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(state)
  return jax.tree.leaves((logits, gradients))


def assert_close(got, wanted, slack=3e-5):
  assert len(got) == len(wanted)
  for have, want in zip(got, wanted, strict=True):
    assert have.dtype == want.dtype
    error = np.abs(np.asarray(have - want)).max()
    assert error <= slack * np.abs(np.asarray(want)).max()


TOKENS = jnp.asarray(np.random.default_rng(1).integers(1, 48, (2, 16)))
TOKENS = TOKENS.at[1, -3:].set(0).at[0, :2].set(0)


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_logits_and_gradients_are_what_they_were(library, name):
  model = make(library, name, layers=1)
  tokens = TOKENS[1:]
  wanted = scored(library, model, tokens)
  integrations.tunix.apply(implementation="pallas")
  assert_close(scored(library, model, tokens), wanted)
  assert report().left_alone == ()
  paths = {(layer.part, layer.path) for layer in report()}
  expected = {("attention", "layers/0/attn"), ("feed_forward", "layers/0/mlp")}
  assert expected | {("norm", "final_norm")} <= paths
  (inside,) = [
    x for x in report() if x.path.endswith("post_attention_layernorm")
  ]
  assert inside.part == "norm" and inside.runs == "feed_forward"
  integrations.tunix.undo()
  assert_close(scored(library, model, tokens), wanted, slack=0)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_with_remat_and_with_padding_anywhere(library, name):
  """Of its parts, or of whole layers, whose copies have no path."""
  kinds = getattr(library, name).RematConfig
  kind = kinds.BLOCK if name == "llama3" else kinds.DECODER
  model = make(library, name, layers=1, remat_config=kind)
  wanted = scored(library, model, TOKENS)
  integrations.tunix.apply(implementation="xla")
  assert_close(scored(library, model, TOKENS), wanted)
  assert report().left_alone == ()


@pytest.mark.no_interpreter
def test_what_kernels_do_not_serve_is_left_alone_and_said(library):
  qwix = pytest.importorskip("qwix")
  model = make(library, "llama3")
  tokens = TOKENS[1:]
  wanted = scored(library, model, tokens)
  integrations.tunix.apply(implementation="xla")
  dense = jnp.tril(jnp.ones((1, 16, 16), bool)) & (tokens != 0)[:, None]
  assert_close(scored(library, model, tokens, dense), wanted)
  assert {x.part for x in report().left_alone} == {"attention"}
  assert "array of the caller's own" in str(report())
  integrations.tunix.undo()

  # Low-rank adapters: made by the library's own products, and kept.
  provider = qwix.LoraProvider(
    module_path=".*q_proj|.*gate_proj|.*down_proj", rank=2, alpha=2.0
  )
  inputs = dict(
    input_tokens=tokens,
    positions=jnp.arange(16)[None],
    cache=None,
    attention_mask=dense,
  )
  integrations.tunix.apply(implementation="xla")
  lora = qwix.apply_lora_to_model(
    make(library, "llama3"), provider, rngs=nnx.Rngs(1), **inputs
  )
  adapters = nnx.state(lora, nnx.LoRAParam)
  assert len(jax.tree.leaves(adapters)) == 2 * 3 * 2
  integrations.tunix.undo()
  wanted = scored(library, lora, tokens)
  integrations.tunix.apply(implementation="xla")
  assert_close(scored(library, lora, tokens), wanted)
  assert {x.part for x in report().left_alone} == {"feed_forward"}


@pytest.mark.parametrize(
  "name, tied", [("llama3", {}), ("qwen3", {"use_tied_embedding": True})]
)
def test_losses_are_what_they_were_and_take_no_logits(library, name, tied):
  """Of fine-tuning and of preferences, of a head of its own and a tied one."""
  trainer, common, loss = (
    importlib.import_module(name)
    for name in (
      "tunix.sft.peft_trainer",
      "tunix.rl.common",
      "pallas_gemma.kernels.integrations._tunix_loss",
    )
  )
  graph, state = drawn(make(library, name, layers=1, **tied))
  keys = TOKENS != 0
  positions = library.utils.build_positions_from_mask(keys)
  inputs = positions, library.utils.make_causal_attn_mask(keys)

  def losses():
    def of(state):
      model = nnx.merge(graph, state)
      return trainer._default_loss_fn(model, TOKENS, keys[:, ::-1], *inputs)

    model = nnx.merge(graph, state)
    logps = common.get_per_token_logps(model, TOKENS, *inputs, logits_to_keep=5)
    return jax.tree.leaves((jax.value_and_grad(of)(state), logps))

  @jax.jit
  def called(state):
    return nnx.merge(graph, state)(TOKENS, inputs[0], None, inputs[1])[0]

  wanted = losses()
  integrations.tunix.apply(implementation="pallas", parts=["loss"])
  assert_close(losses(), wanted)
  (noted,) = [x for x in report() if x.part == "loss"]
  assert noted.runs == "linear_cross_entropy"
  with loss._HEADLESS(True):
    assert called(state).shape == (2, 16, 32)
  assert called(state).shape == (2, 16, 48)

  if tied:
    return
  model = nnx.merge(graph, state)
  model.lm_head.w_lora_a = nnx.LoRAParam(jnp.ones((32, 2)))
  graph, state = nnx.split(model)
  assert_close(losses()[:1], wanted[:1])
  assert [x.part for x in report().left_alone] == ["loss"]


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_over_fsdp_and_tensors_no_collective_is_added(
  library, name, monkeypatch
):
  """Gradients on v5e:2x4, weights split over both axes as the library says."""
  module = getattr(library, name)

  def shard(x, axes):  # the library's asks which devices this process has
    spec = PartitionSpec(*axes)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  monkeypatch.setattr(module, "shard", shard)
  chips = np.array(v5e.devices("2x4")).reshape(2, 4)
  mesh = Mesh(chips, ("fsdp", "tp"))
  sizes = dict(embed_dim=256, hidden_dim=512, num_heads=8, num_kv_heads=4)
  model = nnx.eval_shape(
    lambda: make(library, name, layers=1, head_dim=128, **sizes)
  )
  graph, state = nnx.split(model)
  specs = nnx.get_partition_spec(state)
  state = v5e.split_shapes(state, specs, mesh, jnp.bfloat16)
  rows = NamedSharding(mesh, PartitionSpec("fsdp"))
  tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=rows)

  def gradient(state, tokens):
    def loss(state):
      mask = CausalMask(tokens != 0)
      positions = jnp.broadcast_to(jnp.arange(256), tokens.shape)
      layers = nnx.merge(graph, state)
      x = layers.embedder.encode(tokens)
      for layer in layers.layers:
        _, x = layer(x, positions, None, mask)
      return x.astype(jnp.float32).sum()

    return jax.grad(loss)(state)

  v5e.assert_swapped(integrations.tunix, lambda: mesh, gradient, state, tokens)
