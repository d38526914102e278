"""keras_hub with its layers swapped gives what it gave."""

import os

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
SMALL = dict(
  vocabulary_size=48,
  num_layers=1,
  num_query_heads=4,
  num_key_value_heads=2,
  hidden_dim=32,
  intermediate_dim=64,
)
OF_GEMMA = dict(head_dim=16)
MODELS = {
  "gemma": ("Gemma", OF_GEMMA),
  "gemma_2": (
    "Gemma",
    OF_GEMMA
    | dict(
      attention_logit_soft_cap=50.0,
      use_sliding_window_attention=True,
      sliding_window_size=6,
      use_post_attention_norm=True,
      use_post_ffw_norm=True,
    ),
  ),
  "llama_3": (
    "Llama3",
    dict(
      rope_max_wavelength=500_000,
      rope_frequency_adjustment_factor=8.0,
      rope_low_freq_factor=1.0,
      rope_high_freq_factor=4.0,
      rope_pretraining_sequence_length=16,
    ),
  ),
  "qwen_3": ("Qwen3", dict(head_dim=16)),
}


@pytest.fixture(scope="module")
def library():
  os.environ.setdefault("KERAS_BACKEND", "jax")
  return pytest.importorskip("keras_hub", reason="keras_hub is not installed")


@pytest.fixture(autouse=True)
def undone():
  yield
  integrations.keras_hub.undo()


def make(library, name, **changes):
  family, fields = MODELS[name]
  cls = getattr(library.models, f"{family}Backbone")
  return cls(**(SMALL | fields | changes))


def scored(model):
  """The model's output where there are tokens, and gradients."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 48, (2, 12))
  mask = np.ones((2, 12), np.int32)
  mask[1, -3:] = 0
  inputs = dict(token_ids=jnp.asarray(tokens), padding_mask=jnp.asarray(mask))
  weights = [
    jnp.asarray(0.3 * rng.standard_normal(v.shape), jnp.float32)
    for v in model.trainable_variables
  ]
  others = [v.value for v in model.non_trainable_variables]

  def loss(weights):
    y, _ = model.stateless_call(weights, others, inputs)
    y = jnp.where(jnp.asarray(mask)[..., None] != 0, y, 0)
    return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

  (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(weights)
  return [y, *gradients]


def assert_close(got, wanted, slack=1e-4):
  for have, want in zip(got, wanted, strict=True):
    assert have.dtype == want.dtype
    error = np.abs(np.asarray(have - want)).max()
    assert error <= slack * np.abs(np.asarray(want)).max()


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_what_they_were(library, name):
  model = make(library, name)
  wanted = scored(model)
  integrations.keras_hub.apply(implementation="pallas")
  assert_close(scored(model), wanted)
  assert report().left_alone == ()
  assert {x.part for x in report()} == {"attention", "feed_forward"}
  integrations.keras_hub.undo()
  assert_close(scored(model), wanted, slack=0)


@pytest.mark.no_interpreter
def test_what_kernels_do_not_serve_is_left_alone_and_said(library):
  model = make(library, "llama_3", dropout=0.5)
  wanted = scored(model)
  integrations.keras_hub.apply(implementation="xla")
  assert_close(scored(model), wanted)
  assert {x.why for x in report().left_alone} == {"it has dropout"}
  integrations.keras_hub.undo()
  model = make(library, "gemma")
  model.transformer_layers[0].gating_ffw.enable_lora(2)
  wanted = scored(model)
  integrations.keras_hub.apply(implementation="xla")
  assert_close(scored(model), wanted)
  assert {x.why for x in report().left_alone} == {"its layers have LoRA"}
  assert len(report()) == 2


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  "name, shape", [("gemma_2", (1, 1)), ("llama_3", (2, 4))]
)
def test_kernels_are_in_the_program_and_no_collective_more(
  library, name, shape
):
  """The gradient of a small block, weights split over heads and over F."""
  sizes = dict(num_query_heads=8, num_key_value_heads=4, hidden_dim=1024)
  head = {"head_dim": 128} if name == "gemma_2" else {}
  model = make(
    library, name, **sizes, **head, intermediate_dim=1024, dtype="bfloat16"
  )
  chips = v5e.devices("x".join(map(str, shape)))
  mesh = Mesh(np.array(chips).reshape(shape), ("data", "model"))

  def spec(path, ndim):
    if (
      "attention" in path and ndim == 3
    ):  # [N, D, H] and [N, H, D], or [D, N, H]
      of_llama = name == "llama_3" and "output" not in path
      dims = ((None,) if of_llama else ()) + ("model",)
    elif ("ffw" in path or "feedforward" in path) and ndim == 2:  # [D, F]
      is_down = "linear" in path or "output" in path
      dims = ("model",) if is_down else (None, "model")
    else:
      dims = ()
    return NamedSharding(mesh, PartitionSpec(*dims))

  weights = [
    jax.ShapeDtypeStruct(
      v.shape, jnp.bfloat16, sharding=spec(v.path, len(v.shape))
    )
    for v in model.trainable_variables
  ]
  others = [v.value for v in model.non_trainable_variables]
  rows = NamedSharding(mesh, PartitionSpec("data"))
  tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=rows)

  def gradient(weights, tokens):
    def loss(weights):
      inputs = dict(token_ids=tokens, padding_mask=jnp.ones_like(tokens))
      y, _ = model.stateless_call(weights, others, inputs)
      return y.astype(jnp.float32).sum()

    return jax.grad(loss)(weights)

  rules = {"B": "data", "N": "model", "F": "model"}
  v5e.assert_swapped(
    integrations.keras_hub,
    lambda: kernels.sharding(mesh, rules),
    gradient,
    weights,
    tokens,
  )
