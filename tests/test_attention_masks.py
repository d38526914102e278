"""Masks that are arrays: block-sparse kernels."""

import functools

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from jax.sharding import AxisType
from pallas_gemma.kernels import (
  FlashAttentionConfig,
  flash_attention,
  flash_attention_reference,
  sharding,
)
from small_attention import KERNEL, MEMORY, assert_same, draw, mesh_of


def mask_of(parts, heads, t, s, seed=1):
  """Blocks of all three kinds, in all orders; some rows see nothing."""
  rng = np.random.default_rng(seed)
  kinds = rng.integers(0, 3, (parts, heads, -(-t // 128), -(-s // 128)))
  kinds = kinds.repeat(128, 2).repeat(128, 3)[:, :, :t, :s]
  mask = (kinds == 2) | ((kinds == 1) & (rng.random(kinds.shape) < 0.3))
  mask[:, :, 5:9] = False
  return jnp.asarray(mask)


def agrees(arrays, mask, kernel=KERNEL, **kwargs):
  numerics.assert_agrees(
    functools.partial(kernel, mask=mask, **kwargs),
    functools.partial(flash_attention_reference, mask=mask, **kwargs),
    arrays,
    softmax=True,
  )


CASES = {
  "of a token's heads": ((1, 300, 500, 4, 1, 128), (1, 1), {"is_causal": True}),
  "of heads": ((2, 140, 260, 4, 2, 64), (1, 4), {"return_lse": True}),
  "heads first": (
    (2, 140, 260, 2, 2, 128),
    (2, 1),
    {"layout": None, "local_window_size": (90, 60), "logits_soft_cap": 5.0},
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_masks_meet_the_bar(name):
  shape, parts, kwargs = CASES[name]
  agrees(draw(*shape), mask_of(*parts, *shape[1:3]), **kwargs)


def test_more_keys_than_a_column_of_words_or_a_call_holds(monkeypatch):
  monkeypatch.setattr(MEMORY, "keys_that_fit", lambda *_: 4096)
  config = FlashAttentionConfig(
    block_q=128, block_kv=512, rows=128, block_q_bwd=128, block_kv_bwd=512
  )
  kernel = functools.partial(KERNEL, config=config)
  agrees(draw(1, 40, 4300, 1, 1, 64), mask_of(1, 1, 40, 4300), kernel)


def test_vmap_of_one_mask_or_several():
  q, k, v = (x[:, None] for x in draw(2, 40, 70, 2, 1, 64))
  masks = mask_of(2, 1, 40, 70)[:, None]
  for mask, axis in ((masks, 0), (masks[0], None)):

    def run(function, mask=mask, axis=axis):
      return jax.vmap(
        lambda q, k, v, mask: function(q, k, v, mask=mask),
        (0, 0, 0, axis),
      )(q, k, v, mask)

    got, want = map(run, (KERNEL, flash_attention_reference))
    assert_same(got, want)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_masks_are_split_over_a_mesh(kind):
  """As batch and heads are, where they have them."""
  arrays, mesh = draw(2, 8, 8, 4, 2, 16), mesh_of(kind)
  rules = {"B": "data", "N": "model"}
  for parts, heads in ((1, 1), (2, 4), (1, 4), (2, 1)):
    mask = mask_of(parts, heads, 8, 8).at[:, :, 5:9].set(True)
    want = flash_attention_reference(*arrays, mask=mask, is_causal=True)
    with jax.set_mesh(mesh):
      with sharding(mesh, rules):
        got = jax.jit(functools.partial(flash_attention, is_causal=True))(
          *arrays, mask=mask
        )
    assert_same(got, want)
