"""A Gemma with random parameters, drawn by numpy.

They are distributed as Gemma's own are at the start, but nothing is compiled
for them: XLA takes seconds for the seven normals of `Gemma(config, rngs=...)`.
Tests of the initialisation itself call that.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pallas_gemma.gemma import KERNELS, Gemma, GemmaConfig, Ops


def random_gemma(
  config: GemmaConfig, *, ops: Ops = KERNELS, seed: int = 0, norms: float = 0.0
) -> Gemma:
  """A model of `config`; `norms` is the deviation of the scales of norms."""
  deviation = {
    "embedding": 0.5 * config.width**-0.5,
    "out": (config.num_heads * config.head_size) ** -0.5,
    "down": config.hidden_size**-0.5,
    **dict.fromkeys(("q", "kv", "gate", "up"), config.width**-0.5),
    **dict.fromkeys(
      ("attention_norm", "feed_forward_norm", "final_norm"), norms
    ),
  }
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    values = deviation[path[-1].key] * rng.standard_normal(leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  abstract = nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0), ops=ops))
  graph, state = nnx.split(abstract)
  params = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))
  return nnx.merge(graph, nnx.State(params))
