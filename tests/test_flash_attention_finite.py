"""NaN and infinity in padding and in other segments reach nobody else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_gemma.kernels import (
  FlashAttentionConfig,
  Rope,
  flash_attention,
  flash_attention_reference,
)

CONFIG = FlashAttentionConfig(
  block_q=128, block_kv=128, rows=128, block_q_bwd=128, block_kv_bwd=128
)
IMPLEMENTATIONS = {
  "pallas": functools.partial(
    flash_attention, implementation="pallas", config=CONFIG
  ),
  "default": flash_attention,  # off TPU, the reference by its own gradient
  "reference": flash_attention_reference,
}
EACH = [
  "pallas",
  pytest.param("default", marks=pytest.mark.no_interpreter),
  pytest.param("reference", marks=pytest.mark.no_interpreter),
]
# Two documents and padding, in two blocks of keys.
LENGTHS = (40, 100, 116)
FIRST, SECOND, PADDING = (
  slice(0, 40),
  slice(40, 140),
  slice(140, 256),
)


def draw(h, dtype):
  rng = np.random.default_rng(0)
  shapes = (1, 256, 2, h), (1, 256, 1, h), (1, 256, 1, h), (1, 256, 2, h)
  return [
    jnp.asarray(rng.standard_normal(s, np.float32), dtype) for s in shapes
  ]


def poisoned(x, where):
  """Some NaN, some infinities, some left as they are."""
  bad = x[:, where].at[..., ::2].set(jnp.nan).at[..., 1::4].set(-jnp.inf)
  return x.at[:, where].set(bad)


def run(function, arrays, **kwargs):
  ids = jnp.asarray(np.repeat([1, 2, 0], LENGTHS)[None])

  @jax.jit
  def all_of(q, k, v, dout):
    (out, lse), vjp = jax.vjp(
      lambda *qkv: function(*qkv, segment_ids=ids, return_lse=True, **kwargs),
      q,
      k,
      v,
    )
    dlse = 0.1 * dout.astype(jnp.float32).sum(axis=3).swapaxes(1, 2)
    return out, lse.swapaxes(1, 2), *vjp((dout, dlse))

  return [np.asarray(x, np.float32) for x in all_of(*arrays)]


@pytest.mark.parametrize("implementation", EACH)
@pytest.mark.parametrize(
  "h, dtype, kwargs",
  [
    (64, jnp.bfloat16, {}),
    (64, jnp.float32, {"logits_soft_cap": 2.0, "is_causal": True}),
    (256, jnp.bfloat16, {"is_causal": True, "rope": True}),
  ],
  ids=["bfloat16", "soft cap", "rope"],
)
def test_padding_may_be_anything(implementation, h, dtype, kwargs):
  """In q, k, v and the cotangents; nothing real changes by a bit."""
  if "rope" in kwargs:
    kwargs = kwargs | {"rope": Rope(jnp.arange(256)[None])}
  function, clean = IMPLEMENTATIONS[implementation], draw(h, dtype)
  want = run(function, clean, **kwargs)
  got = run(function, [poisoned(x, PADDING) for x in clean], **kwargs)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_array_equal(g[:, :140], w[:, :140])
  out, lse, *gradients = got
  assert not out[:, PADDING].any() and (lse[:, PADDING] == -np.inf).all()
  for gradient in gradients:
    assert not gradient[:, PADDING].any()


@pytest.mark.parametrize("implementation", EACH)
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "do"])
def test_who_sees_nan_gets_nan(implementation, which):
  """A document with NaN or infinity has them in its results, no other has."""
  if implementation == "reference" and which == 3:
    pytest.skip("plain differentiation lets a cotangent into every document")
  function, clean = IMPLEMENTATIONS[implementation], draw(64, jnp.bfloat16)
  broken = list(clean)
  broken[which] = poisoned(clean[which], slice(50, 52))
  want, got = run(function, clean), run(function, broken)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_array_equal(g[:, FIRST], w[:, FIRST])
  out, lse, dq, dk, dv = got
  hit = slice(50, 52) if which in (0, 3) else SECOND
  for by_query in (dq,) if which == 3 else (out, lse[..., None], dq):
    assert np.isnan(by_query[:, hit]).any(axis=3).all()
  for by_key in (dk, dv):
    assert np.isnan(by_key[:, SECOND]).any(axis=(2, 3)).all()


@pytest.mark.no_interpreter
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("implementation", ["default", "reference"])
def test_debug_nans_is_silent(implementation, jit):
  """Rows that see nothing make no NaN on the way, forward or backward."""
  function = IMPLEMENTATIONS[implementation]
  q, k, v, dout = draw(64, jnp.float32)

  def loss(q, k, v):
    out, lse = function(
      q, k, v, segment_ids=jnp.zeros((1, 256), jnp.int32), return_lse=True
    )
    return (out * dout).sum() + jnp.where(lse > -jnp.inf, lse, 0.0).sum()

  gradient = jax.value_and_grad(loss, (0, 1, 2))
  with jax.debug_nans(True):
    value, gradients = (jax.jit(gradient) if jit else gradient)(q, k, v)
  assert value == 0 and not any(g.any() for g in gradients)
