"""A block of other people's models: as it is, and with `integrations.*.apply`.

Each is built by its own library, which must be installed; where it is not, its
programs are left out.  Weights and activations are bfloat16.  A program is
compiled or run in the process that built it, so the classes are swapped there.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pallas_gemma.kernels import OPS, Cost

from .program import Built, Program, passes

_DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Block:
  """The sizes of one layer, and the library that computes it.

  Attributes:
    library: the module of `kernels.integrations`.
    needs: the library's own module.
    make: what is timed, of the block and its length.
    sizes: D, F, N, K, H.
    window: left and right, if the layer is local.
    model: the name of the model in the library.
  """

  library: str
  needs: str
  make: Callable[[Block, int], tuple[Callable[..., Any], Any]]
  sizes: tuple[int, int, int, int, int]
  model: str
  window: int | None = None

  def costs(self, length: int) -> tuple[Cost, Cost]:
    """Matmuls and attention, each pass bound by the MXU."""
    d, f, n, k, h = self.sizes
    weights = d * (h * 2 * (n + k) + 3 * f)
    q, kv = (
      jax.ShapeDtypeStruct((1, length, heads, h), _DTYPE) for heads in (n, k)
    )
    left = None if self.window is None else (self.window - 1, 0)
    attention = next(op for op in OPS if op.name == "flash_attention")
    forward, backward = attention.cost(
      q, kv, kv, is_causal=True, local_window_size=left
    )
    assert backward is not None
    stream = 2 * length * d
    return (
      Cost(2 * weights * length + forward.flops, 2 * weights + 2 * stream),
      Cost(4 * weights * length + backward.flops, 4 * weights + 3 * stream),
    )


Implementation = Literal["library", "pallas"]


def programs() -> Iterator[Program]:
  """Every block at both lengths, by its library and with classes swapped."""
  for name, block in _BLOCKS.items():
    for length in (4096, 8192):
      for implementation in ("library", "pallas"):
        yield from passes(
          functools.partial(_built, block, length, implementation),
          block.costs(length),
          op="others",
          case=f"{name}_{length // 1024}k",
          implementation=implementation,
          default=False,
          needs=block.needs,
        )


def _built(block: Block, length: int, implementation: Implementation) -> Built:
  integration = _integration(block.library)
  integration.undo()
  function, parameters = block.make(block, length)
  if implementation == "pallas":
    integration.apply()
  leaves, treedef = jax.tree.flatten(parameters)
  specs = tuple(jax.ShapeDtypeStruct(leaf.shape, _DTYPE) for leaf in leaves)
  x = jax.ShapeDtypeStruct((1, length, block.sizes[0]), _DTYPE)
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def run(tokens: jax.Array, x: jax.Array, *arrays: jax.Array) -> jax.Array:
    return function(jax.tree.unflatten(treedef, arrays), x, tokens > 0)

  ones = jnp.ones(tokens.shape, jnp.int32)
  values = (jax.device_get(ones), *(None,) * (1 + len(specs)))
  return Built(run, (tokens, x, *specs), values)


def _integration(name: str) -> Any:
  return importlib.import_module(f"pallas_gemma.kernels.integrations.{name}")


def _mask(tokens: jax.Array, is_swapped: bool) -> Any:
  """Causal, as the swapped library makes it, or as the library does."""
  mask = _integration("_mask").CausalMask(tokens)
  return mask if is_swapped else mask.dense()


# --- DeepMind's gemma ---------------------------------------------------------


def _gemma(block: Block, length: int) -> tuple[Callable[..., Any], Any]:
  gm = importlib.import_module("gemma.gm")
  modules = importlib.import_module("gemma.gm.nn._modules")
  config = getattr(gm.nn, block.model)(tokens="tokens").config
  is_local = block.window is not None
  kind = modules.AttentionType
  reach = "local" if is_local else "global"
  layer = modules.Block(
    name="layer",
    num_heads=config.num_heads,
    num_kv_heads=config.num_kv_heads,
    embed_dim=config.embed_dim,
    head_dim=config.head_dim,
    hidden_dim=config.hidden_dim,
    sliding_window_size=config.sliding_window_size,
    use_post_attn_norm=config.use_post_attn_norm,
    use_post_ffw_norm=config.use_post_ffw_norm,
    attn_logits_soft_cap=config.attn_logits_soft_cap,
    attn_type=kind.LOCAL_SLIDING if is_local else kind.GLOBAL,
    query_pre_attn_scalar=config.query_pre_attn_scalar(),
    transpose_gating_einsum=config.transpose_gating_einsum,
    use_qk_norm=config.use_qk_norm,
    rope_base_frequency=getattr(config, f"{reach}_base_frequency"),
    rope_scale_factor=getattr(config, f"{reach}_scale_factor"),
  )
  own = modules.Attention.__call__
  positions = jnp.broadcast_to(jnp.arange(length), (1, length))

  def run(parameters: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
    mask = _mask(tokens, modules.Attention.__call__ is not own)
    return layer.apply({"params": parameters}, x, positions, None, mask)[1]

  x = jax.ShapeDtypeStruct((1, 8, config.embed_dim), _DTYPE)
  mask = jax.ShapeDtypeStruct((1, 8, 8), bool)
  key = jax.random.key(0)
  shapes = jax.eval_shape(layer.init, key, x, positions[:, :8], None, mask)
  return run, shapes["params"]


# --- tunix --------------------------------------------------------------------


def _tunix(block: Block, length: int) -> tuple[Callable[..., Any], Any]:
  nnx = importlib.import_module("flax.nnx")
  name, size = block.model.split(".")
  model = importlib.import_module(f"tunix.models.{name}.model")
  config = getattr(model.ModelConfig, size)()
  if name == "qwen3":
    config = dataclasses.replace(config, dtype=_DTYPE, param_dtype=_DTYPE)
  layer = nnx.eval_shape(
    lambda: model.DecoderLayer(config=config, rngs=nnx.Rngs(0))
  )
  graph, state = nnx.split(layer)
  own = model.Attention.block
  positions = jnp.broadcast_to(jnp.arange(length), (1, length))

  def run(parameters: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
    mask = _mask(tokens, model.Attention.block is not own)
    return nnx.merge(graph, parameters)(x, positions, None, mask)[1]

  return run, state


# --- blocks -------------------------------------------------------------------

_of_gemma = functools.partial(Block, "gemma", "gemma", _gemma)
_of_tunix = functools.partial(Block, "tunix", "tunix", _tunix)
_GEMMA_2_2B = (2304, 9216, 8, 4, 256)
_GEMMA_3_4B = (2560, 10240, 8, 4, 256)
_BLOCKS = {
  "gemma2_2b_local": _of_gemma(_GEMMA_2_2B, "Gemma2_2B", 4096),
  "gemma2_2b_global": _of_gemma(_GEMMA_2_2B, "Gemma2_2B"),
  "gemma3_4b_local": _of_gemma(_GEMMA_3_4B, "Gemma3_4B", 1024),
  "gemma3_4b_global": _of_gemma(_GEMMA_3_4B, "Gemma3_4B"),
  "llama3_8b": _of_tunix((4096, 14336, 32, 8, 128), "llama3.llama3p1_8b"),
  "qwen3_4b": _of_tunix((2560, 9728, 32, 8, 128), "qwen3.qwen3_4b"),
}
