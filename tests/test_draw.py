"""Which tokens may be drawn, against a sort."""

import importlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

DRAW = importlib.import_module("pallas_gemma.gemma._draw")
pytestmark = pytest.mark.no_interpreter
cut = jax.jit(DRAW._cut)


def by_sorting(logits, top_k, top_p, min_p):
  """The tokens that are kept, in float64."""
  order = np.argsort(-logits, kind="stable")
  order = order[: min(top_k, len(order))]
  order = [i for i in order if logits[i] > -np.inf]
  p = np.exp(np.float64(logits[order]) - np.max(logits))
  likelier = np.cumsum(p) - p
  total = p.sum()
  # Sums within a rounding of the limit may go either way.
  sure = [
    i for i, m in zip(order, likelier, strict=True) if m < top_p * total - 1e-6
  ]
  maybe = [
    i for i, m in zip(order, likelier, strict=True) if m < top_p * total + 1e-6
  ]
  least = np.log(min_p) if min_p else -np.inf
  near = 1e-5 * (1 + abs(least)) if min_p else 0.0
  ratio = logits - np.max(logits)
  return (
    {int(i) for i in sure[:] or order[:1] if ratio[i] > least + near},
    {int(i) for i in maybe or order[:1] if ratio[i] > least - near},
  )


SOME = st.integers(-4, 4).map(float) | st.floats(-30, 30, width=32)


@hypothesis.settings(max_examples=300)
@hypothesis.given(
  logits=st.lists(SOME | st.just(-np.inf), min_size=24, max_size=24),
  top_k=st.integers(1, 30),
  top_p=st.floats(0.01, 1.0) | st.just(np.inf),
  min_p=st.just(0.0) | st.floats(0.001, 1.0),
)
def test_keeps_what_a_sort_keeps(logits, top_k, top_p, min_p):
  logits = np.array(logits, np.float32)
  hypothesis.assume(np.isfinite(logits).any())
  limits = DRAW.Cut(np.int32(top_k), np.float32(top_p), np.float32(min_p))
  kept = set(np.flatnonzero(np.isfinite(cut(logits, limits))).tolist())
  sure, maybe = by_sorting(logits, top_k, top_p, min_p)
  assert sure <= kept <= maybe, (sure, kept, maybe)


def test_a_whole_vocabulary():
  logits = np.random.default_rng(0).standard_normal(256_128, np.float32) * 3
  for top_k, top_p in ((1, np.inf), (40, 0.9), (300_000, 0.5), (1000, np.inf)):
    limits = DRAW.Cut(np.int32(top_k), np.float32(top_p), np.float32(0))
    kept = np.isfinite(cut(logits, limits))
    sure, maybe = by_sorting(logits, top_k, top_p, 0.0)
    assert len(sure) <= kept.sum() <= len(maybe)
    assert kept[list(sure)].all()


def test_equal_logits_are_kept_by_their_ids():
  limits = DRAW.Cut(np.int32(3), np.float32(np.inf), np.float32(0))
  kept = np.isfinite(cut(np.zeros(50, np.float32), limits))
  np.testing.assert_array_equal(np.flatnonzero(kept), [0, 1, 2])
  limits = DRAW.Cut(np.int32(50), np.float32(0.101), np.float32(0))
  kept = np.isfinite(cut(np.zeros(50, np.float32), limits))
  np.testing.assert_array_equal(np.flatnonzero(kept), range(6))


def test_no_sort_is_compiled():
  limits = DRAW.Cut(np.int32(3), np.float32(0.9), np.float32(0.1))
  keys = jax.random.split(jax.random.key(0), 2)
  text = jax.jit(DRAW.draw).lower(keys, jnp.zeros((2, 1000)), limits).as_text()
  assert "sort" not in text and "top_k" not in text


def test_frequencies():
  logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
  limits = DRAW.Cut(np.int32(3), np.float32(0.8), np.float32(0.0))
  keys = jax.random.split(jax.random.key(0), 4000)
  tokens = DRAW.draw(keys, jnp.tile(logits, (4000, 1)), limits)
  got = np.bincount(tokens, minlength=4) / 4000
  deviation = np.sqrt(5 / 8 * 3 / 8 / 4000)  # of a share of so many draws
  np.testing.assert_allclose(got, [5 / 8, 3 / 8, 0, 0], atol=3 * deviation)
