"""Several layers of the model, scanned over stacked weights.

`Gemma.hidden_states` itself, of a model with a vocabulary of next to nothing:
a small gather before the scan, the final norm behind it, and in the backward
pass what belongs to them.  The weights are float32, as training has them, and
`remat` is "none", so that a layer's parts are those of `gemma_block`; there the
matrices come in bfloat16 and alone.

What a layer costs in a deep model is the difference of two depths:

    (cycles of 4 layers - cycles of 2 layers) / 2
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from pallas_gemma.gemma import KERNELS, Gemma, GemmaConfig
from pallas_gemma.kernels import Cost

from .gemma_block import block_costs
from .program import Built, Program, passes

_CASES = (
  ("gemma_2b", GemmaConfig.gemma_2b(), 1, 8192),
  ("gemma_7b", GemmaConfig.gemma_7b(), 1, 4096),
)
_DEPTHS = (2, 4)
_WORDS = 128


def programs() -> Iterator[Program]:
  """Two and four layers, forward, and with the gradients of all weights."""
  for name, config, batch, length in _CASES:
    for depth in _DEPTHS:
      shallow = dataclasses.replace(
        config, num_layers=depth, vocab_size=_WORDS, remat="none"
      )
      forward, backward = (
        Cost(depth * cost.flops, depth * cost.hbm_bytes)
        for cost in block_costs(config, batch, length)
      )
      yield from passes(
        functools.partial(layers, shallow, batch, length),
        (forward, backward),
        op="gemma_layers",
        case=f"{name}_{depth}_layers",
        implementation="pallas",
        default=False,
      )


def layers(config: GemmaConfig, batch: int, length: int) -> Built:
  """The hidden states of tokens, of the tokens and the parameters."""
  model = nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0), ops=KERNELS))
  leaves, treedef = jax.tree.flatten(model)
  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

  def hidden_states(tokens: jax.Array, *arrays: jax.Array) -> jax.Array:
    return jax.tree.unflatten(treedef, arrays).hidden_states(tokens)

  specs = (tokens, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))
  return Built(hidden_states, specs, (None,) * len(specs))
