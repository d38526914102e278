"""Gemma 1 written a second time, in float64 numpy: the truth for the model.

Nothing is shared with the package, and nothing is clever: one sequence at a
time, one head at a time, every number in double precision.
"""

import jax
import numpy as np
from flax import nnx
from pallas_gemma.gemma import Gemma


def gelu_tanh(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def norm(x, scale, epsilon):
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + epsilon) * (1 + scale)


def rotate(x, base):
  """Half-split RoPE of [T, H] at positions 0, 1, ..."""
  half = x.shape[-1] // 2
  timescale = base ** (np.arange(half) / half)
  angle = np.arange(len(x))[:, None] / timescale
  first, second = x[:, :half], x[:, half:]
  return np.concatenate(
    [
      first * np.cos(angle) - second * np.sin(angle),
      second * np.cos(angle) + first * np.sin(angle),
    ],
    axis=-1,
  )


def attend(q, k, v):
  """Causal attention of one head, all [T, H]."""
  logits = q @ k.T / np.sqrt(q.shape[-1])
  logits[np.triu_indices(len(q), 1)] = -np.inf
  p = np.exp(logits - logits.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True) @ v


def hidden_states(model: Gemma, tokens):
  """[T, D] for one sequence [T]."""
  config = model.config
  w = jax.tree.map(
    lambda x: np.asarray(x, np.float64),
    nnx.to_pure_dict(nnx.state(model, nnx.Param)),
  )
  epsilon, base = config.norm_epsilon, config.rope_base_frequency
  x = w["embedder"]["embedding"][np.asarray(tokens)] * np.sqrt(config.width)
  for layer in range(config.num_layers):
    b = {name: stacked[layer] for name, stacked in w["blocks"].items()}
    y = norm(x, b["attention_norm"], epsilon)
    keys = [rotate(y @ each, base) for each in b["kv"][0]]
    values = [y @ each for each in b["kv"][1]]
    group = config.num_heads // config.num_kv_heads
    for n in range(config.num_heads):
      q = rotate(y @ b["q"][n], base)
      x = x + attend(q, keys[n // group], values[n // group]) @ b["out"][n]
    y = norm(x, b["feed_forward_norm"], epsilon)
    x = x + (gelu_tanh(y @ b["gate"]) * (y @ b["up"])) @ b["down"]
  return norm(x, w["final_norm"], epsilon)


def logits(model: Gemma, tokens):
  """[T, V] for one sequence [T]."""
  table = np.asarray(model.embedder.embedding[...], np.float64)
  return hidden_states(model, tokens) @ table.T
