"""The same weights give the same logits as Hugging Face's Gemma.

Optional: needs torch and transformers, which nothing else here does.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pallas_gemma.gemma import Gemma, GemmaConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Neither library's warnings are ours to fix; the interpreter is not needed.
pytestmark = [
  pytest.mark.filterwarnings("default"),
  pytest.mark.no_interpreter,
]

MQA = GemmaConfig(  # 2B at an eighth of the width
  vocab_size=1000,
  num_layers=4,
  width=256,
  hidden_size=2048,
  num_heads=8,
  num_kv_heads=1,
  head_size=256,
  dtype="float32",
)
# 7B at an eighth: N H = 4096 / 3072 of the width.
MHA = dataclasses.replace(
  MQA,
  width=384,
  hidden_size=3072,
  num_heads=16,
  num_kv_heads=16,
  head_size=32,
)


def hugging_face(config):
  """Their model, with random norm scales too."""
  theirs = transformers.GemmaConfig(
    vocab_size=config.vocab_size,
    hidden_size=config.width,
    intermediate_size=config.hidden_size,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_size,
    max_position_embeddings=config.context_length,
    attn_implementation="eager",
  )
  torch.manual_seed(0)
  model = transformers.GemmaForCausalLM(theirs).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      # Large enough that attention attends and logits differ.
      parameter.normal_(std=0.3 if "norm" in name else 0.05)
  return model


def converted(config, model):
  """Our Gemma with the weights of theirs."""
  w = {
    name: jnp.asarray(p.detach().numpy())
    for name, p in model.named_parameters()
  }

  def stacked(name, convert=lambda x: x):
    layers = range(config.num_layers)
    return jnp.stack(
      [convert(w[f"model.layers.{i}.{name}.weight"]) for i in layers]
    )

  def heads(x):  # [N H, D] to [N, D, H]
    split = x.reshape(-1, config.head_size, config.width)
    return split.transpose(0, 2, 1)

  k = stacked("self_attn.k_proj", heads)
  v = stacked("self_attn.v_proj", heads)
  parameters = {
    "embedder": {"embedding": w["model.embed_tokens.weight"]},
    "blocks": {
      "attention_norm": stacked("input_layernorm"),
      "q": stacked("self_attn.q_proj", heads),
      "kv": jnp.stack([k, v], axis=1),
      "out": stacked(
        "self_attn.o_proj",
        lambda x: x.T.reshape(-1, config.head_size, config.width),
      ),
      "feed_forward_norm": stacked("post_attention_layernorm"),
      "gate": stacked("mlp.gate_proj", jnp.transpose),
      "up": stacked("mlp.up_proj", jnp.transpose),
      "down": stacked("mlp.down_proj", jnp.transpose),
    },
    "final_norm": w["model.norm.weight"],
  }
  ours = nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0)))
  graph, state = nnx.split(ours)
  nnx.replace_by_pure_dict(state, parameters)
  return nnx.merge(graph, state)


@pytest.mark.parametrize("config", [MQA, MHA], ids=["2b_like", "7b_like"])
def test_logits_agree_with_hugging_face(config):
  theirs = hugging_face(config)
  ours = converted(config, theirs)
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 128))
  with torch.no_grad():
    want = theirs(torch.asarray(tokens)).logits.numpy()
  got = np.asarray(jax.jit(lambda m, t: m(t))(ours, jnp.asarray(tokens)))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
