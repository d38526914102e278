"""A step of decoding: one more token for every row, and the logits of the next.

`Gemma.decode` and `Gemma.logits` of a model cast to bfloat16, whose cache is
given away, so that it can be written in place.  Its bound is HBM: every weight
is read once, and of the cache the keys and values that a row has.

7B does not fit a v5e, which has 16 GB where its weights alone are 17: it has
half of its layers here.  With weights in int8, as `Gemma.quantize` makes them,
it fits whole.

The cases `_greedy` and `_sampled` go on to the next token, as the sampler draws
it: the likeliest, or what `pallas-gemma sample` draws by default.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pallas_gemma.gemma import KERNELS, Cache, Gemma, GemmaConfig
from pallas_gemma.gemma._sample import draw as sampler
from pallas_gemma.gemma._sample import settings as requests
from pallas_gemma.kernels import Cost

from ..v5e import Placement
from .program import Built, Program

_LENGTH = 8192  # of the cache
_SHORTEST = 256
_2B = GemmaConfig.gemma_2b()
_7B = GemmaConfig.gemma_7b()
_HALF_7B = dataclasses.replace(_7B, num_layers=14)
_FULL = (_LENGTH,)
_MIXED = tuple(np.linspace(_SHORTEST, _LENGTH, 32).astype(int).tolist())
# As many rows of 2,048 tokens as a chip serves, each somewhere in the middle.
_SERVED = tuple(np.linspace(8, 2048, 256).astype(int).tolist())
# Tokens in each row's cache, the new one included; whether weights are int8.
_CASES: tuple[tuple[str, GemmaConfig, tuple[int, ...], bool], ...] = (
  ("gemma_2b_1x8k", _2B, _FULL, False),
  ("gemma_2b_32x8k", _2B, 32 * _FULL, False),
  ("gemma_2b_32_mixed", _2B, _MIXED, False),
  ("gemma_2b_256x2k_mixed", _2B, _SERVED, False),
  ("gemma_7b_14_layers_1x8k", _HALF_7B, _FULL, False),
  ("gemma_2b_1x8k_int8", _2B, _FULL, True),
  ("gemma_2b_32_mixed_int8", _2B, _MIXED, True),
  ("gemma_7b_1x8k_int8", _7B, _FULL, True),
)
_DRAWN: dict[str, tuple[float, float | None]] = {  # temperature and top_p
  "greedy": (0.0, None),
  "sampled": (0.8, 0.95),  # the command's default
}


def programs() -> Iterator[Program]:
  """One step for a row, for many rows, and for rows of many lengths."""
  for i, (name, config, lengths, quantized) in enumerate(_CASES):
    yield Program(
      op="gemma_decode",
      case=name,
      which="fwd",
      implementation="pallas",
      build=functools.partial(
        step, config, lengths, max(lengths), quantized=quantized
      ),
      costs=(cost(config, lengths, quantized=quantized),),
      default=i == 0,
    )
  for rows in (1, 32):
    for name, chosen in _DRAWN.items():
      yield Program(
        op="gemma_decode",
        case=f"gemma_2b_{rows}x8k_{name}",
        which="fwd",
        implementation="pallas",
        build=functools.partial(
          step, _2B, rows * _FULL, _LENGTH, drawing=settings(_2B, *chosen)
        ),
        costs=(cost(_2B, rows * _FULL),),
        default=False,
      )


def settings(
  config: GemmaConfig, temperature: float, top_p: float | None = None
) -> requests.Settings:
  """How tokens are drawn with these options of the sampler."""
  request = requests.Request(
    max_new_tokens=1,
    temperature=temperature,
    top_p=top_p,
    logit_bias={},
    stop_tokens=(),
  )
  return request.settings(config.vocab_size, config.vocab_size)


def step(
  config: GemmaConfig,
  lengths: Sequence[int],
  size: int,
  *,
  quantized: bool = False,
  drawing: requests.Settings | None = None,
) -> Built:
  """Logits and cache after one step, of the model, tokens and the cache.

  Args:
    config: of the model.
    lengths: of each row, the new token included.
    size: that the cache has room for.
    quantized: whether weights are int8.
    drawing: the next tokens and their log-probabilities, drawn so, take the
      place of the logits.
  """

  def make() -> Gemma:
    model = Gemma(config, rngs=nnx.Rngs(0), ops=KERNELS)
    return (model.quantize() if quantized else model).cast()

  model = nnx.eval_shape(make)
  batch = len(lengths)
  tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
  cache = jax.eval_shape(lambda: Cache.empty(config, batch, size))
  leaves, treedef = jax.tree.flatten((model, tokens, cache))
  before = np.asarray(lengths, np.int32) - 1
  given = jax.tree.leaves(
    (
      jax.tree.map(lambda _: False, (model, tokens)),
      jax.tree.map(lambda _: True, cache),
    )
  )

  def decode(*arrays: jax.Array) -> tuple[Any, Cache]:
    model, tokens, cache = jax.tree.unflatten(treedef, arrays)
    hidden, cache = model.decode(tokens, cache)
    logits = model.logits(hidden)
    if drawing is None:
      return logits, cache
    # As in the sampler, a row's key is that of its place.
    place = functools.partial(jax.random.fold_in, jax.random.key(0))
    keys = jax.vmap(place)(cache.lengths)
    return sampler.draw(logits, keys, drawing, None, None), cache

  return Built(
    decode,
    tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves),
    tuple(before if x is cache.lengths else None for x in leaves),
    Placement(donated=tuple(i for i, is_given in enumerate(given) if is_given)),
  )


def cost(
  config: GemmaConfig, lengths: Sequence[int], *, quantized: bool = False
) -> Cost:
  """Every weight once, and the keys and values that there are."""
  d, h = config.width, config.head_size
  heads, kv_heads = config.num_heads, config.num_kv_heads
  layer = d * (2 * h * (heads + kv_heads) + 3 * config.hidden_size)
  weights = config.num_layers * layer + config.vocab_size * d
  tokens = config.num_layers * sum(lengths)
  size = jnp.dtype(config.dtype).itemsize
  return Cost(
    flops=2 * len(lengths) * weights + 4 * tokens * heads * h,
    hbm_bytes=(1 if quantized else size) * weights
    + size * 2 * tokens * kv_heads * h,
  )
