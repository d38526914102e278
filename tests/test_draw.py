"""How a token is drawn, against NumPy and a sort."""

import importlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

CUT, DRAW, LOOKUP, SETTINGS = (
  importlib.import_module(f"pallas_gemma.gemma._sample.{name}")
  for name in ("cut", "draw", "lookup", "settings")
)
pytestmark = pytest.mark.no_interpreter


@jax.jit
def cut(logits, limits):
  """Weights [V], 0 for what a cut takes away: each token asked for."""
  logits -= jnp.max(logits)
  weights = CUT.weights_of(logits[None], limits.top_k)
  likely = CUT.within_min_p(weights, limits.min_p).reshape(-1)[: logits.size]
  if limits.top_p is None:
    return likely
  own, tokens = weights.reshape(1, -1), jnp.arange(weights.size)[None]
  before = CUT.sum_before(weights, own, tokens)
  is_within = before < CUT.mass_of(weights, limits.top_p)
  return jnp.where(is_within[0, : logits.size], likely, 0.0)


def by_sorting(logits, top_k, top_p, min_p):
  """The tokens that are kept: those that must be, and those that may be."""
  weights = np.asarray(jnp.exp(logits - np.max(logits)), np.float64)
  order = np.argsort(-weights, kind="stable")[:top_k]
  order = order[weights[order] > 0]
  p = weights[order]
  likelier = np.cumsum(p) - p
  # Sums within a rounding of the limit may go either way.
  limit, near = top_p * p.sum(), 1e-6
  sure, maybe = order[likelier < limit - near], order[likelier < limit + near]

  def likely(tokens):
    tokens = tokens if tokens.size else order[:1]
    return set(tokens[weights[tokens] >= min_p].tolist())

  return likely(sure), likely(maybe)


SOME = st.integers(-4, 4).map(float) | st.floats(-30, 30, width=32)


@hypothesis.settings(max_examples=300)
@hypothesis.given(
  logits=st.lists(SOME | st.just(-np.inf), min_size=24, max_size=24),
  top_k=st.integers(1, 30),
  top_p=st.floats(0.01, 1.0) | st.just(np.inf),
  min_p=st.just(0.0) | st.floats(0.001, 1.0),
)
def test_keeps_what_a_sort_keeps(logits, top_k, top_p, min_p):
  logits, min_p = np.array(logits, np.float32), float(np.float32(min_p))
  hypothesis.assume(np.isfinite(logits).any())
  limits = CUT.Cut(np.int32(top_k), np.float32(top_p), np.float32(min_p))
  kept = set(np.flatnonzero(cut(logits, limits)).tolist())
  sure, maybe = by_sorting(logits, top_k, top_p, min_p)
  assert sure <= kept <= maybe, (sure, kept, maybe)


def test_the_top_k_of_a_whole_vocabulary():
  logits = np.random.default_rng(0).standard_normal(256_128, np.float32) * 3
  for top_k in (1, 40, 1000, 300_000):
    kept = np.asarray(cut(logits, CUT.Cut(np.int32(top_k)))) > 0
    sure, maybe = by_sorting(logits, top_k, np.inf, 0.0)
    assert len(sure) <= kept.sum() <= len(maybe)
    assert kept[list(sure)].all()


def test_the_top_p_of_a_whole_vocabulary():
  """Of the tokens about the last one that is within."""
  logits = np.random.default_rng(0).standard_normal(256_128, np.float32) * 3
  weights = CUT.weights_of(logits[None] - logits.max(), None)
  flat, order = np.asarray(weights).reshape(-1), np.argsort(-logits)
  for top_p in (0.5, 0.9, 0.95):
    sure, maybe = by_sorting(logits, 300_000, top_p, 0.0)
    around = order[len(sure) - 20 : len(maybe) + 20]
    before = CUT.sum_before(weights, flat[None, around], around[None])
    kept = (before < CUT.mass_of(weights, np.float32(top_p)))[0]
    kept = set(around[np.asarray(kept)].tolist())
    assert sure & {*around.tolist()} <= kept <= maybe


def test_equal_logits_are_kept_by_their_ids():
  limits = CUT.Cut(np.int32(3), np.float32(np.inf), np.float32(0))
  kept = np.asarray(cut(np.zeros(50, np.float32), limits)) > 0
  np.testing.assert_array_equal(np.flatnonzero(kept), [0, 1, 2])
  limits = CUT.Cut(np.int32(50), np.float32(0.101), np.float32(0))
  kept = np.asarray(cut(np.zeros(50, np.float32), limits)) > 0
  np.testing.assert_array_equal(np.flatnonzero(kept), range(6))


# --- penalties, bias, temperature and cut -------------------------------------

V = 12


def request(**changes):
  neutral = dict(
    max_new_tokens=1,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias={},
    stop_tokens=(),
    speculate=0,
  )
  return SETTINGS.Request(**neutral | changes).settings(V - 2, V)


def naive(logits, seen, counts, temperature, top_k, top_p, min_p, **change):
  """The distribution drawn from, in float64, one token after the other."""
  logits = [float(x) for x in logits[: V - 2]]
  for i in range(len(logits)):
    if seen[i]:
      r = change["repetition_penalty"]
      logits[i] = logits[i] / r if logits[i] > 0 else logits[i] * r
    logits[i] -= change["frequency_penalty"] * counts[i]
    if counts[i] > 0:
      logits[i] -= change["presence_penalty"]
    logits[i] += change["logit_bias"].get(i, 0.0)
  weights = np.exp((np.array(logits) - max(logits)) / temperature)
  order = sorted(range(V - 2), key=lambda i: -weights[i])[:top_k]
  weights /= weights[order].sum()
  kept, mass = [], 0.0
  for i in order:
    if mass < top_p and weights[i] >= min_p * weights[order[0]]:
      kept.append(i)
    mass += weights[i]
  p = np.zeros(V)
  p[kept] = weights[kept] / weights[kept].sum()
  return p


@jax.jit
def distribution(logits, settings, seen, counts):
  seen = seen if settings.uses_seen else None
  counts = counts if settings.uses_counts else None
  logits = jnp.where(jnp.arange(V) < settings.vocab_size, logits, -jnp.inf)
  penalised = DRAW.penalise(logits, settings, seen, counts)
  scaled = DRAW._scale(penalised, settings.temperature)
  weights = cut(scaled[0], settings.cut)[None]
  return weights / weights.sum()


LIMITS = dict(temperature=0.7, top_k=7, top_p=0.9, min_p=0.05)
CHANGES = dict(
  repetition_penalty=1.7,
  presence_penalty=0.6,
  frequency_penalty=0.4,
  logit_bias={3: -np.inf, 5: 1.5, 6: -0.5},
)
NEUTRAL = dict(
  repetition_penalty=1.0,
  presence_penalty=0.0,
  frequency_penalty=0.0,
  logit_bias={},
)
WITHOUT = dict(temperature=1.0, top_k=V, top_p=2.0, min_p=0.0)


@pytest.mark.parametrize("name", [*CHANGES, "all", "all, uncut"])
def test_distributions_are_those_of_a_loop_over_the_tokens(name):
  limits = WITHOUT if name == "all, uncut" else LIMITS
  given = {} if name == "all, uncut" else LIMITS
  changes = CHANGES if "all" in name else {name: CHANGES[name]}
  settings = request(**given, **changes)
  rng = np.random.default_rng(0)
  changed = 0
  for _ in range(40):
    logits = rng.standard_normal(V, np.float32) * 3
    counts = rng.poisson(0.6, V).astype(np.int32)
    seen = (counts > 0) | (rng.random(V) < 0.3)
    got = distribution(logits[None], settings, seen[None], counts[None])[0]
    want = naive(logits, seen, counts, **limits, **NEUTRAL | changes)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    plain = naive(logits, seen, counts, **limits, **NEUTRAL)
    changed += np.abs(want - plain).max() > 0.01
  assert changed >= 10  # the change is seen in the distribution


def test_what_is_not_asked_for_is_not_compiled():
  neutral = request(**NEUTRAL)
  assert jax.tree.structure(neutral) == jax.tree.structure(request())
  assert not neutral.uses_seen and not neutral.uses_counts
  assert neutral.bias is None
  assert request(top_k=V - 2, top_p=1.0, min_p=0.0).cut == CUT.Cut()
  assert request(top_p=0.5).cut == CUT.Cut(top_p=np.float32(0.5))
  assert request(frequency_penalty=0.1).uses_counts
  assert request(presence_penalty=-0.1).uses_counts
  assert request(repetition_penalty=0.9).uses_seen
  greedy = request(temperature=0.0, **NEUTRAL)
  keys = jax.random.split(jax.random.key(0), 2)
  args = jnp.zeros((2, V)), keys, greedy, None, None
  text = jax.jit(DRAW.draw).lower(*args).as_text()
  assert "threefry" not in text and "exponential" in text


def test_no_sort_is_compiled():
  settings = request(top_k=3, top_p=0.9, min_p=0.1)
  keys = jax.random.split(jax.random.key(0), 2)
  args = jnp.zeros((2, V)), keys, settings, None, None
  text = jax.jit(DRAW.draw).lower(*args).as_text()
  assert "stablehlo.sort" not in text and "chlo.top_k" not in text


def test_frequencies():
  logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
  logits = np.pad(logits, (0, V - 4), constant_values=-np.inf)
  keys = jax.random.split(jax.random.key(0), 4000)
  tokens, logprobs = jax.jit(DRAW.draw)(
    jnp.tile(logits, (4000, 1)), keys, request(top_k=3, top_p=0.8), None, None
  )
  got = np.bincount(tokens, minlength=4) / 4000
  deviation = np.sqrt(5 / 8 * 3 / 8 / 4000)  # of a share of so many draws
  np.testing.assert_allclose(got, [5 / 8, 3 / 8, 0, 0], atol=3 * deviation)
  np.testing.assert_allclose(logprobs, logits[tokens], atol=1e-6)


def test_every_part_of_the_sum_is_its_own_tokens():
  """And none is a token's of weight 0, also at both ends."""
  rng = np.random.default_rng(0)
  weights = rng.random((500, 37), np.float32) * (rng.random((500, 37)) < 0.5)
  weights[:, :2] = weights[:, -2:] = 0
  weights[:, 5] += 1e-3
  part = rng.random(500, np.float32)
  part[:50], part[50:100] = 0, np.nextafter(np.float32(1), np.float32(0))
  invert = jax.jit(DRAW._invert)
  got = np.asarray(invert(weights[:, None], part[:, None]))[:, 0]
  ends = np.cumsum(weights.astype(np.float64), axis=1)
  limit, rows = part * ends[:, -1], np.arange(500)
  assert (weights[rows, got] > 0).all()
  assert (ends[rows, got] >= limit - 1e-5).all()
  assert ((ends - weights)[rows, got] <= limit + 1e-5).all()
  assert len({*got.tolist()}) > 25


# --- top-p by trial -----------------------------------------------------------


@jax.jit
def drawn(logits, keys, top_p, min_p):
  """Tokens of rows [B, V]."""
  limits = CUT.Cut(top_p=top_p, min_p=min_p)
  logits -= jnp.max(logits, axis=1, keepdims=True)
  return DRAW._draw_within(keys, logits, limits)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
  logits=st.lists(SOME | st.just(-np.inf), min_size=24, max_size=24),
  top_p=st.floats(0.01, 1.0),
  min_p=st.just(0.0) | st.floats(0.001, 1.0),
  seed=st.integers(0, 2**31 - 1),
)
def test_tries_end_within_what_a_sort_keeps(logits, top_p, min_p, seed):
  logits, min_p = np.array(logits, np.float32), float(np.float32(min_p))
  hypothesis.assume(np.isfinite(logits).any())
  keys = jax.random.split(jax.random.key(seed), 16)
  rows = np.tile(logits, (16, 1))
  got = drawn(rows, keys, np.float32(top_p), np.float32(min_p))
  _, maybe = by_sorting(logits, 24, float(np.float32(top_p)), min_p)
  assert set(np.asarray(got).tolist()) <= maybe


@pytest.mark.parametrize("top_p", [0.06, 0.31, 0.96])
@pytest.mark.parametrize("shape", ["steep", "flat", "equal"])
def test_tries_are_in_proportion_to_what_a_sort_keeps(top_p, shape):
  """Also where most of what is tried lies outside."""
  spread = dict(steep=2.0, flat=0.3, equal=0.0)[shape]
  logits = spread * np.random.default_rng(1).standard_normal(40, np.float32)
  sure, maybe = by_sorting(logits, 40, top_p, 0.0)
  assert sure == maybe  # no sum is near the limit
  draws = 4000
  keys = jax.random.split(jax.random.key(2), draws)
  rows = np.tile(logits, (draws, 1))
  tokens = np.asarray(drawn(rows, keys, np.float32(top_p), np.float32(0)))
  kept = sorted(sure)
  want = np.exp(logits[kept].astype(np.float64))
  want /= want.sum()
  got = np.bincount(tokens, minlength=40)[kept] / draws
  assert set(tokens.tolist()) <= sure
  deviation = np.sqrt(want * (1 - want) / draws)
  # Of up to 40 shares one is off by three deviations in a tenth of all seeds.
  assert (np.abs(got - want) <= 3.5 * deviation + 1e-12).all()


def test_rows_that_try_longer_do_not_change_the_others():
  rng = np.random.default_rng(3)
  rows = rng.standard_normal((9, 300), np.float32)
  keys = jax.random.split(jax.random.key(4), 9)
  p, no = np.float32(0.1), np.float32(0)
  together = np.asarray(drawn(rows, keys, p, no))
  alone = [
    int(drawn(rows[i : i + 1], keys[i : i + 1], p, no)[0]) for i in range(9)
  ]
  assert together.tolist() == alone


def test_a_row_that_is_not_a_number_ends():
  rows = np.zeros((2, 20), np.float32)
  rows[0, 3] = np.nan
  keys = jax.random.split(jax.random.key(5), 2)
  tokens = drawn(rows, keys, np.float32(0.5), np.float32(0))
  assert tokens[0] == 0 and 0 <= tokens[1] < 10


# --- guesses ------------------------------------------------------------------


def naive_guess(tokens, count):
  """As a loop over places would."""
  best, place = 0, None
  for i in range(len(tokens) - 1):
    length = 0
    while length < 3 and length <= i and tokens[i - length] == tokens[~length]:
      length += 1
    if length and length >= best:
      best, place = length, i
  if place is None:
    return None
  text = list(tokens)
  while len(text) < len(tokens) + count:
    text.append(text[place + 1 + len(text) - len(tokens)])
  return text[len(tokens) :]


def test_guesses_are_what_followed_before():
  rng = np.random.default_rng(0)
  guess = jax.jit(LOOKUP.guess, static_argnums=2)
  found = 0
  for _ in range(60):
    known = rng.integers(1, 20, 3)
    tokens = rng.integers(0, 4, (3, 20)).astype(np.int32)
    got = guess(tokens, known, 5)
    for row in range(3):
      want = naive_guess(tokens[row, : known[row]].tolist(), 5)
      if want is not None:
        found += 1
        assert got[row].tolist() == want
  assert found > 100


def test_a_guess_goes_on_as_the_text_does():
  row = np.array([[7, 8, 9, 7, 8, 0, 0, 0]], np.int32)
  got = jax.jit(LOOKUP.guess, static_argnums=2)(row, np.array([5]), 5)
  assert got.tolist() == [[9, 7, 8, 9, 7]]
