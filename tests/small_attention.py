"""Little problems of attention, with tiles of which they have several."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
from pallas_gemma.kernels import FlashAttentionConfig, flash_attention

MEMORY = importlib.import_module("pallas_gemma.kernels._attention.memory")
SMALL = FlashAttentionConfig(
  block_q=128, block_kv=128, rows=128, block_q_bwd=64, block_kv_bwd=256
)
KERNEL = functools.partial(
  flash_attention, implementation="pallas", config=SMALL
)
# For calls of 128 keys.
NARROW = functools.partial(
  KERNEL, config=dataclasses.replace(SMALL, block_kv_bwd=128)
)


def draw(b, t, s, n, k, h, dtype=jnp.float32):
  """q, k and v."""
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
    for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, h))
  ]


def mesh_of(kind):
  """2 x 4 devices, for the batch and the heads."""
  return jax.sharding.Mesh(
    np.array(jax.devices()).reshape(2, 4),
    ("data", "model"),
    axis_types=(kind,) * 2,
  )


def assert_same(got, want):
  """Two programs of the same float32 sums, in any order, of values about 1."""
  np.testing.assert_allclose(got, want, atol=1e-5)
