"""keras_hub with its layers swapped gives what it gave."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
