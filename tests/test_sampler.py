"""The sampler: against a loop without a cache, and on models whose next token
is known.
"""

import collections
import dataclasses
import functools
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import v5e
from flax import nnx
from pallas_gemma.gemma import KERNELS, Gemma, GemmaConfig, Sampler, Tokenizer
from random_gemma import random_gemma

LOOP, SAMPLER, SETTINGS = (
  importlib.import_module(f"pallas_gemma.gemma._sample.{name}")
  for name in ("loop", "sampler", "settings")
)
# In a scan, the interpreter's race detection does not lower (test_model.py).
pytestmark = pytest.mark.no_interpreter
TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 9
EXTRA = 1000  # rows of the embedding that no token has
CONFIG = GemmaConfig(
  vocab_size=300 + EXTRA,
  num_layers=2,
  width=64,
  hidden_size=96,
  num_heads=4,
  num_kv_heads=1,
  head_size=32,
  context_length=48,
  dtype="float32",
)


@functools.cache
def tokenizer():
  return Tokenizer.train([TEXT], vocab_size=300)


@functools.cache
def gemma():
  """A random Gemma whose next token depends on all before it.

  As it is initialised, the last token would decide: so attention is sharper
  and louder, and the residual stream's own token quieter.
  """
  model = random_gemma(CONFIG, seed=1)
  model.embedder.embedding[...] *= 0.05
  model.blocks.q[...] *= 3
  model.blocks.out[...] *= 2
  return model


@functools.cache
def sampler():
  return Sampler(gemma(), tokenizer())


@jax.jit
def last_logits(model, tokens, length):
  return model.logits(model.hidden_states(tokens)[0, length - 1])


def greedy_without_cache(prompt, steps):
  """Ids, each the likeliest after the whole text so far, read anew."""
  ids = tokenizer().encode(prompt, add_bos=True)
  start = len(ids)
  for _ in range(steps):
    padded = np.zeros((1, CONFIG.context_length), np.int32)
    padded[0, : len(ids)] = ids
    logits = last_logits(gemma(), padded, len(ids))
    ids.append(int(logits[: tokenizer().vocab_size].argmax()))
  return tuple(ids[start:])


# --- Gemma --------------------------------------------------------------------

PROMPTS = ["The quick", "", "again and again. The lazy dog", "fox"]
NEW = 16  # so that most prompts, alone, have the same compiled sizes


@functools.cache
def together():
  """All prompts in one call, without stop tokens, NEW tokens each."""
  return sampler()(PROMPTS, max_new_tokens=NEW, stop_tokens=())


@pytest.mark.parametrize("i", range(len(PROMPTS)))
def test_greedy_is_the_likeliest_token_of_the_whole_forward_pass(i):
  """One BOS, the right positions, no padding seen, none lost after the
  prompt."""
  assert together()[i].tokens == greedy_without_cache(PROMPTS[i], NEW)
  assert len({t for each in together() for t in each.tokens}) > 20
  assert together()[i].finish_reason == "length"


@pytest.mark.parametrize("i", range(len(PROMPTS)))
def test_company_changes_nothing(i):
  (alone,) = sampler()([PROMPTS[i]], max_new_tokens=NEW, stop_tokens=())
  assert alone.tokens == together()[i].tokens
  np.testing.assert_allclose(
    alone.logprobs, together()[i].logprobs, rtol=0, atol=1e-5
  )


def test_the_context_can_be_filled():
  prompt = "fox"
  room = CONFIG.context_length - len(tokenizer().encode(prompt, add_bos=True))
  (full,) = sampler()([prompt], max_new_tokens=room, stop_tokens=())
  assert full.tokens == greedy_without_cache(prompt, room)


def test_log_probabilities_are_the_models_own():
  completion = together()[0]
  ids = tokenizer().encode(PROMPTS[0], add_bos=True)
  padded = np.zeros((1, CONFIG.context_length), np.int32)
  padded[0, : len(ids)] = ids
  logits = last_logits(gemma(), padded, len(ids))[: tokenizer().vocab_size]
  want = jax.nn.log_softmax(logits)[completion.tokens[0]]
  assert completion.logprobs[0] == pytest.approx(float(want), abs=1e-5)


def test_rows_stop_alone():
  """A row ends at its stop token, which is left out; the others go on."""
  full = together()
  stop = full[2].tokens[3]
  got = sampler()(PROMPTS, max_new_tokens=NEW, stop_tokens=[stop])
  for before, after in zip(full, got, strict=True):
    stops = stop in before.tokens
    end = before.tokens.index(stop) if stops else NEW
    assert after.tokens == before.tokens[:end]
    assert len(after.logprobs) == end
    assert after.text == tokenizer().decode(before.tokens[:end])
    assert after.finish_reason == ("stop" if stops else "length")
  assert got[2].finish_reason == "stop" and got[2].tokens == full[2].tokens[:3]


def test_rows_without_a_token_are_never_sampled():
  """Three quarters of them are such rows; here all are nearly as likely."""
  got = sampler()(PROMPTS, max_new_tokens=NEW, temperature=50.0, stop_tokens=())
  drawn = {t for completion in got for t in completion.tokens}
  assert max(drawn) < tokenizer().vocab_size and len(drawn) > 20


def test_seeds_decide_and_rows_draw_for_themselves():
  draw = functools.partial(
    sampler(), max_new_tokens=NEW, temperature=2.0, stop_tokens=()
  )
  twins = [PROMPTS[2]] * 4
  first = draw(twins, seed=1)
  assert draw(twins, seed=1) == first
  assert draw(twins, seed=2)[0].tokens != first[0].tokens
  assert draw(twins[:1], seed=1)[0].tokens == first[0].tokens
  assert first[0].tokens != first[1].tokens


def test_a_seed_for_each_prompt_is_that_prompts_alone():
  """Wherever it stands; and as in a call of its own."""
  draw = functools.partial(
    sampler(), max_new_tokens=NEW, temperature=2.0, stop_tokens=()
  )
  twins = [PROMPTS[2]] * 4
  got = [c.tokens for c in draw(twins, seed=[5, 6, 5, 7])]
  assert got[0] == got[2] and len({*got}) == 3
  assert draw(twins[:1], seed=7)[0].tokens == got[3]
  most = 2**63 - 1
  assert draw(twins[:1], seed=most) == draw(twins[:1], seed=[most])
  # All bits count.
  assert draw(twins[:1], seed=7 + 2**32)[0].tokens != got[3]


# --- penalties ----------------------------------------------------------------

PENALTIES: dict[str, Any] = dict(
  repetition_penalty=1.3,
  presence_penalty=0.2,
  frequency_penalty=0.3,
  logit_bias={40: 0.5, 36: -math.inf},
)


def greedy_with_penalties(prompt, steps):
  """By NumPy, from the logits of the whole text so far."""
  ids = tokenizer().encode(prompt, add_bos=True)
  start = len(ids)
  for _ in range(steps):
    padded = np.zeros((1, CONFIG.context_length), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.array(last_logits(gemma(), padded, len(ids)))
    logits = logits[: tokenizer().vocab_size]
    for token in {*ids}:
      r = PENALTIES["repetition_penalty"]
      logits[token] = (
        logits[token] / r if logits[token] > 0 else (logits[token] * r)
      )
    for token, count in collections.Counter(ids[start:]).items():
      logits[token] -= PENALTIES["presence_penalty"]
      logits[token] -= PENALTIES["frequency_penalty"] * count
    for token, bias in PENALTIES["logit_bias"].items():
      logits[token] += bias
    ids.append(int(logits.argmax()))
  return tuple(ids[start:])


@functools.cache
def penalised():
  """In two rows, so that a row's state is that of the prompt now in it."""
  sample = Sampler(gemma(), tokenizer(), batch_size=2)
  return sample(PROMPTS, max_new_tokens=NEW, stop_tokens=(), **PENALTIES)


def test_penalties_count_what_a_row_has():
  for i, prompt in enumerate(PROMPTS):
    want = greedy_with_penalties(prompt, NEW)
    assert penalised()[i].tokens == want
    assert want != together()[i].tokens
  assert 36 in {t for c in together() for t in c.tokens}, "a token to ban"


def test_neutral_penalties_are_none():
  got = sampler()(
    PROMPTS,
    max_new_tokens=NEW,
    stop_tokens=(),
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias={},
  )
  assert got == together()


# --- more prompts than rows ---------------------------------------------------


@functools.cache
def unequal(temperature, rows=12, speculate=0):
  """Twelve prompts of unequal lengths that end at unequal times."""
  return Sampler(gemma(), tokenizer(), batch_size=rows)(
    [TEXT[i : i + 5 * (i % 4)] for i in range(12)],
    max_new_tokens=NEW,
    stop_tokens=[t for c in together() for t in c.tokens[4:6]],
    temperature=temperature,
    speculate=speculate,
  )


def assert_same(got, want):
  for a, b in zip(got, want, strict=True):
    assert (a.tokens, a.finish_reason) == (b.tokens, b.finish_reason)
    np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature, rows", [(0.0, 3), (2.0, 1)])
def test_rows_are_taken_by_the_next_prompt(temperature, rows):
  """Where, when and beside which others changes nothing."""
  want = unequal(temperature)
  assert {c.finish_reason for c in want} == {"stop", "length"}
  assert len({len(c.tokens) for c in want}) > 2
  assert_same(unequal(temperature, rows), want)


def test_other_neighbours_change_no_bit():
  two = Sampler(gemma(), tokenizer(), batch_size=2)
  sample = functools.partial(two, max_new_tokens=NEW, stop_tokens=())
  one, _ = sample([PROMPTS[0], PROMPTS[1]])
  other, _ = sample([PROMPTS[0], PROMPTS[3]])
  assert one == other


def test_a_row_that_ends_at_once_makes_room():
  """Its prompt's first token is a stop; the others go on."""
  script, fox = [20, 21, 22], tokenizer().encode("fox", add_bos=True)[-1]
  table = np.zeros((CONFIG.vocab_size, CONFIG.vocab_size))
  dog = tokenizer().encode("dog", add_bos=True)[-1]
  table[dog, 1] = 100.0
  for before, after in zip([fox, *script], [*script, 1], strict=True):
    table[before, after] = 100.0
  sample = Sampler(Chain(table), tokenizer(), batch_size=2)
  pieces = []
  got = sample(
    ["fox", "dog", "dog", "fox", "dog"],
    max_new_tokens=3,
    stream=lambda i, _: pieces.append(i),
  )
  assert [c.tokens for c in got] == [(20, 21, 22), (), (), (20, 21, 22), ()]
  ends = [c.finish_reason for c in got]
  assert ends == ["length", "stop", "stop", "length", "stop"]
  assert {*pieces} == {0, 3}


def test_prompts_are_read_in_chunks(monkeypatch):
  """One row alone, and all of them, whose prompts end in different chunks."""
  monkeypatch.setattr(SAMPLER, "_READ_OF_ROW", 16)
  monkeypatch.setattr(SAMPLER, "_READ_OF_ALL", 16)
  prompts = [TEXT[:46], TEXT[5:48], "", TEXT[20:50]]
  lengths = [len(tokenizer().encode(p, add_bos=True)) for p in prompts]
  new = CONFIG.context_length - max(lengths)
  assert max(lengths) > 33 and new > 4
  want = [greedy_without_cache(p, new) for p in prompts]
  for rows in (4, 3):  # with three, the last is read beside others
    sample = Sampler(gemma(), tokenizer(), batch_size=rows)
    got = sample(prompts, max_new_tokens=new, stop_tokens=())
    assert [c.tokens for c in got] == want


# --- speculation --------------------------------------------------------------


@pytest.mark.parametrize("temperature, guesses", [(0.0, 4), (2.0, 1)])
def test_guesses_change_nothing(temperature, guesses):
  got = unequal(temperature, rows=5, speculate=guesses)
  assert_same(got, unequal(temperature))


def test_guesses_count_for_penalties():
  got = sampler()(
    PROMPTS, max_new_tokens=NEW, stop_tokens=(), speculate=3, **PENALTIES
  )
  assert [c.tokens for c in got] == [c.tokens for c in penalised()]


def test_the_last_place_is_drawn_with_guesses_past_it():
  prompt = "fox"
  room = CONFIG.context_length - len(tokenizer().encode(prompt, add_bos=True))
  (full,) = sampler()(
    [prompt], max_new_tokens=room, stop_tokens=(), speculate=31
  )
  assert full.tokens == greedy_without_cache(prompt, room)


def test_right_guesses_are_drawn_in_one_step(monkeypatch):
  """A cycle of three: from its second turn on, four tokens a step."""
  fox = tokenizer().encode("fox", add_bos=True)[-1]
  table = np.zeros((CONFIG.vocab_size, CONFIG.vocab_size))
  for before, after in ((fox, 20), (20, 21), (21, 22), (22, 20)):
    table[before, after] = 100.0
  sample = Sampler(Chain(table), tokenizer())
  counts, run = [], LOOP.run

  def counted(*args):
    state, drawn = run(*args)
    counts.append(int(drawn.counts[0]))
    return state, drawn

  monkeypatch.setattr(LOOP, "run", counted)
  # A look at every step: the fewest tokens that a step could draw.
  monkeypatch.setattr(SAMPLER, "_STREAMED", 1)
  (got,) = sample(
    ["fox"], max_new_tokens=16, speculate=3, stream=lambda i, text: None
  )
  assert got.tokens == (20, 21, 22) * 5 + (20,)
  assert counts[-3:] == [4, 4, 4] and len(counts) <= 8


def test_compiles_once_for_similar_calls():
  traces = collections.Counter()

  def counted(*args, **kwargs):
    traces["rms_norm"] += 1
    return KERNELS.rms_norm(*args, **kwargs)

  ops = dataclasses.replace(KERNELS, rms_norm=counted)
  model = random_gemma(CONFIG, ops=ops)
  sample = functools.partial(
    Sampler(model, tokenizer()), max_new_tokens=6, stop_tokens=()
  )
  sample(["dog"], temperature=1.0, top_k=5)
  compiled = dict(traces)
  sample(["again"], temperature=0.3, top_k=9, seed=3)
  sample(["dog, fo"], temperature=0.7, top_k=2, top_p=1.0, min_p=0.0)
  # Weights may change; they are no part of what is compiled.
  model.final_norm[...] += 1.0
  sample(["fox"], temperature=1.0, top_k=5)
  assert traces == compiled


@v5e.needs_compiler
@v5e.around_kernels
def test_the_cache_is_written_in_place():
  """On a TPU a call keeps no second copy of it, nor of a row's penalties."""
  config = dataclasses.replace(CONFIG, head_size=128, context_length=4096)
  model = nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0)).cast())
  settings = SETTINGS.Request(
    **dict(max_new_tokens=1, temperature=0.0, speculate=3, stop_tokens=[1]),
    **dict(top_k=None, top_p=None, min_p=None),
    **PENALTIES,
  ).settings(300, config.vocab_size)
  empty = functools.partial(LOOP.empty, config, batch=4, length=4096)
  state = jax.eval_shape(empty, settings, jnp.zeros((1, 2), jnp.uint32))
  leaves, tree = jax.tree.flatten((model, state, settings, np.int32(32), True))
  given = len(jax.tree.leaves(model)) + np.arange(len(jax.tree.leaves(state)))

  def run(*leaves):
    return LOOP.run(*jax.tree.unflatten(tree, leaves))

  specs = [jax.ShapeDtypeStruct(np.shape(x), np.result_type(x)) for x in leaves]
  memory = v5e.compile(
    run, *specs, donate_argnums=tuple(given)
  ).memory_analysis()
  assert memory is not None
  cache = 2 * 4 * state.cache.k.size  # bytes
  assert memory.alias_size_in_bytes > cache > 4 * memory.temp_size_in_bytes


def test_bfloat16_samples_as_its_own_forward_pass():
  """The weights are cast once for all steps; the results are not another's."""
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  model = random_gemma(config, seed=1)
  (got,) = Sampler(model, tokenizer())(
    ["fox"], max_new_tokens=1, stop_tokens=()
  )
  ids = jnp.asarray([tokenizer().encode("fox", add_bos=True)])
  logits = last_logits(model, ids, ids.shape[1])[: tokenizer().vocab_size]
  assert got.tokens[0] == int(logits.argmax())


# --- a model whose next token is known ----------------------------------------


class Chain(Gemma):
  """The next token's logits are a row of a table: that of the last token."""

  def __init__(self, table):
    self.config = CONFIG
    self.table = nnx.Param(jnp.asarray(table, jnp.float32))

  def logits(self, hidden):
    return hidden

  def extend(self, tokens, cache, counts=None):
    new = tokens.shape[1] if counts is None else counts
    cache = dataclasses.replace(cache, lengths=cache.lengths + new)
    return self.table[tokens], cache


def chain(**probabilities):
  """Every token is followed by these ids (names `t7` for 7), so probable."""
  row = np.full(CONFIG.vocab_size, -np.inf)
  for name, p in probabilities.items():
    row[int(name[1:])] = math.log(p)
  return Sampler(Chain(np.tile(row, (CONFIG.vocab_size, 1))), tokenizer())


def scripted(script, last=1):
  """Whatever the prompt, these ids, then `last`; a row of its own for each."""
  table = np.zeros((CONFIG.vocab_size, CONFIG.vocab_size))
  ids = [*script, last]
  first = tokenizer().encode("fox", add_bos=True)[-1]
  assert len({first, *ids}) == len(ids) + 1, "each id needs its own row"
  for before, after in zip([first, *ids], ids, strict=False):
    table[before, after] = 100.0
  return Sampler(Chain(table), tokenizer())


DRAWS = 400


def frequencies(sample, **settings):
  got = sample(["fox"] * DRAWS, max_new_tokens=1, stop_tokens=(), **settings)
  count = collections.Counter(c.tokens[0] for c in got)
  return {token: n / DRAWS for token, n in count.items()}


def assert_distribution(got, want):
  assert got.keys() == want.keys()
  for token, p in want.items():
    deviation = math.sqrt(p * (1 - p) / DRAWS)
    assert abs(got[token] - p) <= 4 * deviation + 1e-9, token


FOUR = dict(t10=0.5, t11=0.3, t12=0.15, t13=0.05)


@pytest.mark.parametrize(
  "settings, want",
  [
    (dict(temperature=0.0), {10: 1}),
    (dict(temperature=0.0, top_k=3, top_p=0.9), {10: 1}),
    (dict(temperature=1e-30), {10: 1}),
    (dict(temperature=1e-45), {10: 1}),
    (dict(temperature=1.0), {10: 0.5, 11: 0.3, 12: 0.15, 13: 0.05}),
    (dict(temperature=1.0, top_p=1.0), {10: 0.5, 11: 0.3, 12: 0.15, 13: 0.05}),
    (dict(temperature=1.0, top_k=2), {10: 5 / 8, 11: 3 / 8}),
    (dict(temperature=1.0, top_k=1), {10: 1}),
    (dict(temperature=1.0, top_p=0.4), {10: 1}),
    (dict(temperature=1.0, top_p=0.6), {10: 5 / 8, 11: 3 / 8}),
    (dict(temperature=1.0, top_p=1e-45), {10: 1}),
    (dict(temperature=1.0, min_p=0.55), {10: 5 / 8, 11: 3 / 8}),
    # Top-k first: of 5/8 and 3/8, the first alone holds 0.6.
    (dict(temperature=1.0, top_k=2, top_p=0.6), {10: 1}),
    # Temperature first: at 2 the likeliest has 0.38 and does not hold 0.5.
    (
      dict(temperature=2.0, top_p=0.5),
      {10: 0.5**0.5 / (0.5**0.5 + 0.3**0.5), 11: 1 / (1 + (5 / 3) ** 0.5)},
    ),
  ],
  ids=lambda value: ",".join(map(str, value.items())),
)
def test_distributions(settings, want):
  assert_distribution(frequencies(chain(**FOUR), **settings), want)


def test_ties_do_not_widen_top_k():
  equal = {f"t{t}": 1 / 8 for t in range(20, 28)}
  got = frequencies(chain(**equal), temperature=1.0, top_k=3)
  assert_distribution(got, dict.fromkeys(got, 1 / 3))
  assert len(got) == 3


def test_log_probabilities_ignore_temperature_and_filters():
  got = chain(**FOUR)(
    ["fox"] * 30, max_new_tokens=1, temperature=3.0, top_k=2, stop_tokens=()
  )
  for completion in got:
    p = {10: 0.5, 11: 0.3}[completion.tokens[0]]
    assert completion.logprobs[0] == pytest.approx(math.log(p), abs=1e-6)


def test_stops_at_end_of_text_and_of_turn():
  (turn,) = tokenizer().encode("<end_of_turn>")
  for stop in (tokenizer().eos_id, turn):
    (got,) = scripted([20, 21], last=stop)(["fox"], max_new_tokens=9)
    assert (got.tokens, got.finish_reason) == ((20, 21), "stop")
  # At the very last place it still is a stop; one earlier, a length.
  sample = scripted([20, 21])
  assert sample(["fox"], max_new_tokens=3)[0].finish_reason == "stop"
  assert sample(["fox"], max_new_tokens=2)[0].finish_reason == "length"
  assert sample(["fox"], max_new_tokens=2)[0].tokens == (20, 21)
  # At once.
  (got,) = scripted([])(["fox"], max_new_tokens=9)
  assert (got.text, got.tokens, got.finish_reason) == ("", (), "stop")


def byte_ids(text):
  return [tokenizer().encode(chr(0x2581))[0] - 0xE2 + b for b in text.encode()]


def test_streaming_waits_for_whole_characters():
  script = byte_ids("né€😀")
  pieces = []
  (got,) = scripted(script)(
    ["fox"], max_new_tokens=20, stream=lambda i, text: pieces.append((i, text))
  )
  assert got.text == "né€😀" == str(got)
  assert pieces == [(0, c) for c in "né€😀"]


def test_streaming_ends_with_what_is_left():
  """A character cut short by the length: its bytes have no text but U+FFFD."""
  pieces = []
  (got,) = scripted(byte_ids("n€")[:3])(
    ["fox"], max_new_tokens=3, stream=lambda i, text: pieces.append(text)
  )
  assert "".join(pieces) == got.text == "n\ufffd\ufffd"


def test_streamed_pieces_make_up_each_text():
  pieces = collections.defaultdict(str)

  def stream(i, text):
    assert text
    pieces[i] += text

  got = sampler()(PROMPTS, max_new_tokens=NEW, temperature=1.5, stream=stream)
  for i, completion in enumerate(got):
    assert pieces[i] == completion.text


# --- bad input ----------------------------------------------------------------


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(prompts=[]), "prompts must hold at least one text, got none"),
    (dict(prompts="fox"), "prompts must be a list of texts, got one text"),
    (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
    (dict(temperature=-0.1), "temperature must be 0 or more, and finite, got"),
    (dict(temperature=math.nan), "temperature must be .* got nan"),
    (dict(temperature=math.inf), "temperature must be .* got inf"),
    (dict(top_k=0), "top_k must be at least 1, or None, got 0"),
    (dict(top_p=0.0), "top_p must be above 0 and at most 1, or None, got 0.0"),
    (dict(top_p=1.1), "top_p must be above 0 and at most 1, or None, got 1.1"),
    (dict(repetition_penalty=0.0), "repetition_penalty must be above 0, and"),
    (dict(presence_penalty=math.nan), "presence_penalty must be a finite"),
    (dict(frequency_penalty=math.inf), "frequency_penalty must be a finite"),
    (dict(logit_bias={300: 1.0}), "logit_bias must be of ids below 300, got"),
    (dict(logit_bias={3: math.inf}), "logit_bias must be finite, or -inf .*"),
    (dict(logit_bias={3: math.nan}), "logit_bias must be finite, or -inf .*"),
    (
      dict(logit_bias=dict.fromkeys(range(300), -math.inf)),
      "logit_bias must leave a token to draw",
    ),
    (dict(speculate=-1), "speculate must be from 0 to 31, got -1"),
    (dict(speculate=32), "speculate must be from 0 to 31, got 32"),
    (dict(seed=2**63), r"seed must be a whole number from 0 to 2\^63 - 1, got"),
    (dict(seed=[-1]), r"seed must be a whole number from 0 .* got -1"),
    (dict(seed=[1, 2]), "seed must be one number, or one for each of 1 .* 2"),
    (dict(min_p=-0.1), "min_p must be from 0 to 1, or None, got -0.1"),
    (dict(stop_tokens=[300]), "stop_tokens must be ids below 300, got 300"),
    (
      dict(prompts=["fox", "0" * 40]),
      "prompt 1 has 41 tokens, with max_new_tokens = 9 more than the 48",
    ),
  ],
)
def test_wrong_calls_are_refused(change, message):
  call = dict(prompts=["fox"], max_new_tokens=9) | change
  with pytest.raises(ValueError, match=f"Sampler: {message}"):
    sampler()(call.pop("prompts"), **call)


def test_wrong_pairs_are_refused():
  small = Chain(np.zeros((1, 1)))
  small.config = dataclasses.replace(CONFIG, vocab_size=299)
  with pytest.raises(ValueError, match="300 ids and the model 299 embedding"):
    Sampler(small, tokenizer())
  with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
    Sampler(gemma(), tokenizer(), batch_size=0)
  for length in (1, 49):
    with pytest.raises(ValueError, match=f"from 2 to .* 48, got {length}"):
      Sampler(gemma(), tokenizer(), max_length=length)
  with pytest.raises(ValueError, match="more than the 16 there is room"):
    Sampler(gemma(), tokenizer(), max_length=16)(["fox"], max_new_tokens=16)


def test_diverged_weights_are_named():
  broken = Sampler(
    Chain(np.full((CONFIG.vocab_size,) * 2, np.nan)), tokenizer()
  )
  with pytest.raises(ValueError, match="have diverged"):
    broken(["fox"], max_new_tokens=1)
