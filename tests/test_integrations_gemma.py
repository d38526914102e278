"""DeepMind's gemma with its classes swapped gives what it gave."""

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import v5e
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_gemma import kernels
from pallas_gemma.kernels import integrations
from pallas_gemma.kernels.integrations import report

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def library():
  gm = pytest.importorskip("gemma.gm", reason="gemma is not installed")
  inner = {
    name: importlib.import_module(f"gemma.gm.nn._{name}")
    for name in ("config", "modules", "transformer")
  }
  return types.SimpleNamespace(gm=gm, **inner)


@pytest.fixture(autouse=True)
def undone():
  yield
  integrations.gemma.undo()


def make(library, **changes):
  """Gemma 2 in little: a local layer and a global one."""
  kind = library.modules.AttentionType
  fields = dict(
    num_embed=48,
    embed_dim=32,
    hidden_dim=64,
    num_heads=4,
    head_dim=16,
    num_kv_heads=2,
    final_logit_softcap=30.0,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=(kind.LOCAL_SLIDING, kind.GLOBAL),
    attn_logits_soft_cap=50.0,
    sliding_window_size=6,
  )
  config = library.config.TransformerConfig(**(fields | changes))
  return library.transformer.Transformer(
    config=config, dtype=jnp.float32, tokens="tokens"
  )


def drawn(model, length=16):
  """Tokens of which a few at the end are padding, and random parameters."""
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(1, 48, (2, length))).at[1, -3:].set(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  parameters = jax.tree.map(
    lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes
  )
  return tokens, parameters


def scored(model, tokens, parameters, **kwargs):
  """The log-probabilities of the tokens that are, and gradients of them."""

  def loss(parameters):
    out = model.apply(parameters, tokens, **kwargs)
    logp = jax.nn.log_softmax(out.logits)
    return jnp.where((tokens != 0)[..., None], logp, 0).sum() / 48, out.logits

  (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
  return jnp.where((tokens != 0)[..., None], logits, 0), gradients


def assert_close(got, wanted, slack=3e-5):
  for path, want in jax.tree_util.tree_leaves_with_path(wanted):
    have = got
    for key in path:
      have = have[getattr(key, "key", getattr(key, "idx", None))]
    assert have.dtype == want.dtype
    error = np.abs(np.asarray(have - want)).max()
    assert error <= slack * np.abs(np.asarray(want)).max(), (path, error)


GEMMA_3 = dict(
  use_qk_norm=True,
  transpose_gating_einsum=True,
  global_scale_factor=8.0,
  attn_logits_soft_cap=None,
)


@pytest.mark.parametrize(
  "changes, implementation",
  [({}, "pallas"), (GEMMA_3, "pallas")],
  ids=["gemma_2", "gemma_3"],
)
def test_logits_and_gradients_are_what_they_were(
  library, changes, implementation
):
  model = make(library, **changes)
  tokens, parameters = drawn(model)
  wanted = scored(model, tokens, parameters)
  integrations.gemma.apply(implementation=implementation)
  assert_close(scored(model, tokens, parameters), wanted)
  assert report().left_alone == ()
  paths = {(layer.part, layer.path) for layer in report()}
  assert {("attention", f"layer_{i}/attn") for i in (0, 1)} <= paths
  assert {("feed_forward", f"layer_{i}/mlp") for i in (0, 1)} <= paths
  assert ("norm", "final_norm") in paths
  integrations.gemma.undo()
  assert_close(scored(model, tokens, parameters), wanted, slack=0)


@pytest.mark.no_interpreter  # it takes no `jax.checkpoint`
def test_so_are_those_of_the_references(library):
  test_logits_and_gradients_are_what_they_were(library, {}, "xla")


def test_the_loss_needs_no_logits(library):
  model = make(library)
  tokens, parameters = drawn(model)
  out = model.apply(parameters, tokens, return_hidden_states=True)
  got = integrations.gemma.cross_entropy(
    out, parameters["params"], tokens, logits_soft_cap=30.0
  )
  logp = jax.nn.log_softmax(out.logits)
  wanted = -jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.no_interpreter
def test_what_kernels_do_not_serve_is_left_alone_and_said(library):
  model = make(library)
  tokens, parameters = drawn(model, 8)
  tokens = jnp.maximum(tokens, 1)  # queries that are padding see other keys
  cache = model.init_cache(batch_size=2, dtype=jnp.float32, cache_length=8)
  mask = jnp.tril(jnp.ones((2, 8, 8), bool))
  positions = jnp.broadcast_to(2 * jnp.arange(8), (2, 8))
  lora = library.gm.nn.LoRA(rank=2, model=model)

  def weights(module, name):
    return "attention_weights" in module.path

  ways = {
    "a KV cache": lambda p: model.apply(
      p, tokens, cache=cache, attention_mask=mask
    ),
    "an array of the caller's own": lambda p: model.apply(
      p, tokens, attention_mask=mask
    ),
    "positions of the caller's own": lambda p: model.apply(
      p, tokens, positions=positions
    ),
    "attention weights are captured": lambda p: model.apply(
      p, tokens, capture_intermediates=weights
    ),
    "LoRA": lambda p: lora.apply(p, tokens),
  }
  for why, run in ways.items():
    drawn_for = parameters
    if why == "LoRA":
      drawn_for = drawn(lora, 8)[1]
    wanted = jax.tree.leaves(run(drawn_for))
    integrations.gemma.apply(implementation="xla")
    got = jax.tree.leaves(run(drawn_for))
    assert len(got) == len(wanted)
    for have, want in zip(got, wanted, strict=True):
      np.testing.assert_allclose(have, want, rtol=2e-4, atol=2e-5)
    reasons = {layer.why for layer in report().left_alone}
    assert len(reasons) == 1 and why in str(report()), why
    integrations.gemma.undo()


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
@pytest.mark.parametrize("topology", ["1x1", "2x4"])
def test_kernels_are_in_the_program_and_no_collective_more(library, topology):
  """The gradient of a small block, weights in shards over two mesh axes."""
  chips = v5e.devices(topology, *([] if topology == "2x4" else [(1, 1, 1)]))
  shape = (2, 4) if topology == "2x4" else (1, 1)
  mesh = Mesh(np.array(chips).reshape(shape), ("data", "model"))
  heads = dict(num_heads=8, num_kv_heads=4, head_dim=128)
  model = make(library, hidden_dim=512, embed_dim=256, **heads)
  tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32)
  parameters = jax.eval_shape(model.init, jax.random.key(0), tokens)

  def placed(path, leaf):
    name = jax.tree_util.keystr(path)
    spec = [None] * leaf.ndim
    if "einsum" in name or "linear" in name:
      # Heads, and the feed-forward's width.
      of_heads = {"kv_einsum": 1, "q_einsum": 0, "attn_vec": 0, "linear": 0}
      dim = next((d for n, d in of_heads.items() if n in name), 2)
      spec[dim] = "model" if leaf.shape[dim] % 4 == 0 else None
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=sharding)

  parameters = jax.tree_util.tree_map_with_path(placed, parameters)
  by_row = NamedSharding(mesh, PartitionSpec("data"))
  tokens = jax.ShapeDtypeStruct(tokens.shape, jnp.int32, sharding=by_row)

  def gradient(parameters, tokens):
    def loss(parameters):
      out = model.apply(parameters, tokens, return_hidden_states=True)
      return out.hidden_states.astype(jnp.float32).sum()

    return jax.grad(loss)(parameters)

  rules = {"B": "data", "N": "model", "F": "model"}
  v5e.assert_swapped(
    integrations.gemma,
    lambda: kernels.sharding(mesh, rules),
    gradient,
    parameters,
    tokens,
    kernels=8,  # two layers, both passes
  )
