"""The modules for flax: what they compute, in scans, split and adapted."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from pallas_gemma.kernels import Rope, RopeFrequencies
from pallas_gemma.kernels.integrations import linen as in_linen
from pallas_gemma.kernels.integrations import nnx as in_nnx

pytestmark = pytest.mark.unoptimised

B, T, D, F, N, K, H = 2, 9, 16, 32, 4, 2, 8
NONE: Any = None
X = jnp.asarray(
  np.random.default_rng(0).standard_normal((B, T, D)), jnp.float32
)
AXES = {"gate": ("embed", "mlp"), "q": ("embed", "heads", None)}
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
HEADS = jnp.ones((B, T, N, H))
FREQUENCIES = RopeFrequencies(np.geomspace(1.0, 0.01, H // 2))


class Block(nnx.Module):
  """A pre-norm block."""

  def __init__(self, weights, implementation=None, *, rngs):
    make = functools.partial(
      in_nnx.RMSNorm, rngs=rngs, implementation=implementation
    )
    self.norm, self.mlp_norm = make(D), make(D)
    self.attention = in_nnx.Attention(
      *(D, N, K, H),
      rope=in_nnx.RotaryEmbedding(frequencies=FREQUENCIES),
      qk_norm=functools.partial(in_nnx.RMSNorm, implementation=implementation),
      weights=weights,
      rngs=rngs,
      implementation=implementation,
      local_window_size=(4, 0),
    )
    self.mlp = in_nnx.GatedMLP(
      D, F, weights=weights, rngs=rngs, implementation=implementation
    )

  def __call__(self, x):
    x = x + self.attention(self.norm(x))
    return x + self.mlp(self.mlp_norm(x))


def norm(x, scale=1.0):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def by_hand(x, w):
  """The block in NumPy, of its weights by name."""
  h = norm(x)
  q, k, v = (np.einsum("btd,dnh->btnh", h, w[name]) for name in "qkv")
  angles = np.arange(T)[:, None, None] * FREQUENCIES.values
  sin, cos = np.sin(angles), np.cos(angles)

  def rotated(y):
    a, b = np.split(norm(y), 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  q, k = rotated(q), rotated(k)
  logits = np.einsum("btngh,bsnh->bngts", q.reshape(B, T, K, -1, H), k)
  i, j = np.arange(T)[:, None], np.arange(T)
  logits = np.where((j <= i) & (i - j <= 4), logits / np.sqrt(H), -np.inf)
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  out = np.einsum("bngts,bsnh->btngh", p, v).reshape(B, T, N, H)
  x = x + np.einsum("btnh,nhd->btd", out, w["out"])
  h = norm(x)
  gate, up = h @ w["gate"], h @ w["up"]
  return x + (gate / (1 + np.exp(-gate)) * up) @ w["down"]


def weights_of(block):
  modules = {name: block.attention for name in ("q", "k", "v", "out")}
  modules |= {name: block.mlp for name in ("gate", "up", "down")}
  return {
    name: np.asarray(getattr(module, name)(jnp.float32), np.float64)
    for name, module in modules.items()
  }


@pytest.mark.no_interpreter
def test_a_block_of_nnx_with_adapters_in_a_scan():
  weights = in_nnx.Weights(lora_rank=2, lora_alpha=4.0, lora=("q", "gate"))
  make = nnx.vmap(lambda rngs: Block(weights, rngs=rngs))
  blocks = nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))
  graph = nnx.graphdef(blocks)
  adapted = jax.tree.map(lambda x: x + 0.1, nnx.state(blocks, nnx.LoRAParam))
  nnx.update(blocks, adapted)
  scan = nnx.scan(
    lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
  )
  wanted = np.asarray(X, np.float64)
  for i in range(3):
    one = nnx.merge(graph, jax.tree.map(lambda x: x[i], nnx.state(blocks)))  # noqa: B023
    wanted = by_hand(wanted, weights_of(one))
  got = nnx.jit(lambda blocks, x: scan(x, blocks))(blocks, X)
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
  assert len(jax.tree.leaves(adapted)) == 4

  def loss(blocks):
    return scan(X, blocks).sum()

  only = nnx.DiffState(0, nnx.LoRAParam)
  gradients = jax.tree.leaves(nnx.grad(loss, argnums=only)(blocks))
  assert len(gradients) == 4 and all(jnp.abs(g).max() > 0 for g in gradients)


def test_kernels_run_inside():
  block = Block(in_nnx.Weights(), "pallas", rngs=nnx.Rngs(0))
  got = block(X)
  wanted = by_hand(np.asarray(X, np.float64), weights_of(block))
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


class LinenBlock(nn.Module):
  weights: in_linen.Weights

  @nn.compact
  def __call__(self, x, _=None):
    attention = in_linen.Attention(
      *(N, K, H),
      rope=in_linen.RotaryEmbedding(frequencies=FREQUENCIES),
      qk_norm=in_linen.RMSNorm,
      weights=self.weights,
      options={"local_window_size": (4, 0)},
      name="attention",
    )
    x = x + attention(in_linen.RMSNorm(name="norm")(x))
    mlp = in_linen.GatedMLP(F, weights=self.weights, name="mlp")
    return x + mlp(in_linen.RMSNorm(name="mlp_norm")(x)), None


@pytest.mark.no_interpreter
def test_a_block_of_linen_in_a_scan_with_metadata():
  weights = in_linen.Weights(axes=AXES, lora_rank=2, lora=("q", "gate"))
  layers = nn.scan(
    LinenBlock,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=2,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )(weights)
  boxed = layers.init(jax.random.key(0), X)
  specs = nn.get_partition_spec(boxed)["params"]
  assert specs["mlp"]["gate"] == jax.P("layers", "embed", "mlp")
  assert specs["attention"]["q"] == jax.P("layers", "embed", "heads", None)
  parameters = nn.unbox(boxed)["params"]
  wanted = np.asarray(X, np.float64)
  for i in range(2):  # b of an adapter begins as zeros
    own = jax.tree.map(lambda x: np.asarray(x[i], np.float64), parameters)  # noqa: B023
    wanted = by_hand(wanted, own["attention"] | own["mlp"])
  got, _ = layers.apply({"params": parameters}, X)
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
  half = in_linen.Weights(dtype=jnp.bfloat16)
  mlp = in_linen.GatedMLP(F, weights=half)
  out, _ = mlp.init_with_output(jax.random.key(0), X)
  assert out.dtype == jnp.bfloat16


def test_nnx_partitioning_metadata_and_dtypes():
  weights = in_nnx.Weights(axes=AXES, dtype=jnp.bfloat16)
  auto = (jax.sharding.AxisType.Auto,) * 2  # nnx wants the mesh at once
  with jax.set_mesh(jax.make_mesh((2, 2), ("embed", "mlp"), axis_types=auto)):
    mlp = in_nnx.GatedMLP(D, F, weights=weights, rngs=nnx.Rngs(0))
  specs = nnx.get_partition_spec(nnx.state(mlp))
  is_spec = lambda x: isinstance(x, jax.P)  # noqa: E731
  gate = jax.tree.leaves(specs["gate"], is_leaf=is_spec)
  assert gate == [jax.P("embed", "mlp")]
  assert hash(weights) == hash(in_nnx.Weights(axes=AXES, dtype=jnp.bfloat16))
  for rotary in (
    in_nnx.RotaryEmbedding(implementation="xla"),
    in_linen.RotaryEmbedding(implementation="xla"),
  ):
    assert rotary(HEADS, POSITIONS).shape == HEADS.shape


def of_nnx(make, *args, **kwargs):
  return make(*args, **kwargs, rngs=nnx.Rngs(0))


def of_linen(module, x):
  return module.init_with_output(jax.random.key(0), x)


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: of_nnx(in_nnx.RMSNorm, D)(X.astype(int)), "RMSNorm: x must be fl"),
    (lambda: of_linen(in_linen.RMSNorm(), X > 0), "RMSNorm: x must be float"),
    (lambda: of_nnx(in_nnx.GatedMLP, D, F)(NONE), "GatedMLP: x must be an arr"),
    (lambda: of_nnx(in_nnx.GatedMLP, D, 0), "'gate' must have sizes"),
    (lambda: of_nnx(in_nnx.Attention, D, N, K, H)(X[0]), r"x must be \[B, T,"),
    (lambda: of_nnx(in_nnx.Attention, D, 1.5, K, H), "'q' must have sizes"),
    (
      lambda: of_linen(in_linen.Attention(N, K, H, rope=Rope(POSITIONS)), X),  # type: ignore[arg-type]
      "Attention: rope must be a RotaryEmbedding or None, got Rope",
    ),
    (
      lambda: of_nnx(in_nnx.Attention, D, N, K, H, return_lse=True)(X),
      "must not be among its options, got return_lse",
    ),
    (
      lambda: in_linen.RotaryEmbedding(5e5, FREQUENCIES)(HEADS, POSITIONS),
      "wanted one of .* got .*frequencies and .*base_",
    ),
    (
      lambda: of_nnx(
        *(in_nnx.Attention, D, N, K, H),
        rope=in_nnx.RotaryEmbedding(5e5, frequencies=FREQUENCIES),
      )(X),
      "wanted one of .* got .*frequencies and .*base_",
    ),
    (lambda: in_nnx.Weights(lora="qv"), "lora must be a tuple of names"),  # type: ignore[arg-type]
    (lambda: in_nnx.Weights(lora=("query",)), "lora must be of weights among"),
    (lambda: in_nnx.Weights(axes={"mlp": ("a",)}), "axes must be of weights"),
    (lambda: in_nnx.Weights(lora_rank=-1), "lora_rank must not be negative"),
  ],
)
def test_what_would_do_nothing_or_fail_inside_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
