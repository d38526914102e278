"""ALiBi: logits that fall with the distance."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from jax.sharding import AxisType
from pallas_gemma.kernels import (
  context_order,
  flash_attention,
  flash_attention_reference,
  sharding,
)
from small_attention import MEMORY, NARROW, assert_same, draw, mesh_of


def slopes_of(n):
  return jnp.asarray(0.5 ** np.arange(1, n + 1), jnp.float32)


def agrees(arrays, **kwargs):
  kwargs["alibi_slopes"] = slopes_of(arrays[0].shape[2])
  numerics.assert_agrees(
    functools.partial(NARROW, **kwargs),
    functools.partial(flash_attention_reference, **kwargs),
    arrays,
    softmax=True,
  )


def test_the_reference_is_what_it_says():
  q, k, v = draw(1, 5, 7, 2, 1, 16)
  distance = np.abs(np.arange(5)[:, None] + 2 - np.arange(7))
  bias = -slopes_of(2)[:, None, None] * distance
  causal: Any = dict(query_offset=2, is_causal=True)
  for more in (
    {},
    {"prefix_lengths": jnp.asarray([4])},
    {"query_offset": jnp.asarray(2)},
  ):
    kwargs: Any = causal | more
    want = flash_attention_reference(q, k, v, bias=bias[None], **kwargs)
    kwargs |= {"alibi_slopes": slopes_of(2)}
    got = flash_attention_reference(q, k, v, **kwargs)
    np.testing.assert_allclose(got, want, atol=1e-6)


IDS = jnp.asarray([[1] * 90 + [2] * 60])
CASES = {
  "mqa, soft cap, segments": (
    (1, 150, 150, 4, 1, 64),
    {"is_causal": True, "logits_soft_cap": 5.0, "segment_ids": IDS},
  ),
  "offsets of a batch": (
    (2, 40, 60, 4, 2, 64),
    {"is_causal": True, "query_offset": jnp.asarray([20, 3])},
  ),
  "gqa, window, lse, in calls of 128 keys": (
    (1, 40, 150, 4, 2, 64),
    {"local_window_size": (60, 20), "query_offset": 60, "return_lse": True},
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_meet_the_bar(name, monkeypatch):
  shape, kwargs = CASES[name]
  if "calls" in name:
    monkeypatch.setattr(MEMORY, "keys_that_fit", lambda *_: 128)
  agrees(draw(*shape), **kwargs)


def test_vmap_of_slopes_and_of_pairs_of_kv_heads():
  q, k, v = (x[:, None] for x in draw(2, 8, 8, 4, 2, 128))
  prefix, layout = jnp.asarray([7]), "BTNH"
  kwargs: Any = {"query_offset": 3, "prefix_lengths": prefix, "layout": layout}
  several = jnp.stack([slopes_of(4), 2 * slopes_of(4)])
  for slopes, axis in ((several, 0), (several[0], None)):

    def run(function, slopes=slopes, axis=axis):
      def one(q, k, v, slopes):
        more = kwargs | {"alibi_slopes": slopes, "is_causal": True}
        return function(q, k, v, **more)

      return jax.vmap(one, (0, 0, 0, axis))(q, k, v, slopes)

    got, want = map(run, (NARROW, flash_attention_reference))
    assert_same(got, want)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_slopes_are_split_as_heads_are(kind):
  arrays, mesh = draw(2, 8, 8, 4, 2, 16), mesh_of(kind)
  kwargs: Any = {"alibi_slopes": slopes_of(4), "is_causal": True}
  want = flash_attention_reference(*arrays, **kwargs)
  with jax.set_mesh(mesh):
    with sharding(mesh, {"B": "data", "N": "model"}):
      got = jax.jit(functools.partial(flash_attention, **kwargs))(*arrays)
    assert_same(got, want)


@pytest.mark.no_interpreter
def test_tokens_in_the_order_of_a_context():
  arrays = draw(1, 16, 16, 2, 1, 16)
  order = context_order(16, 2)
  for is_causal in (True, False):
    kwargs: Any = {"alibi_slopes": slopes_of(2), "is_causal": is_causal}
    want = flash_attention_reference(*arrays, **kwargs)[:, order]
    for f in NARROW.func, flash_attention_reference:
      got = f(*(x[:, order] for x in arrays), context_parts=2, **kwargs)
      assert_same(got, want)


@pytest.mark.no_interpreter
def test_what_is_wrong_is_refused():
  arrays = draw(1, 8, 8, 2, 1, 16)
  with pytest.raises(
    ValueError, match=r"flash_attention: alibi_slopes must be"
  ):
    flash_attention(*arrays, alibi_slopes=jnp.ones(3))
