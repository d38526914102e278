"""Where text meets text: stop strings, characters, and the prompt's end."""

import functools
import importlib
import io
from typing import Any

import hypothesis
import numpy as np
import pytest
import sentencepiece
from flax import nnx
from hypothesis import strategies as st
from pallas_gemma.gemma import Sampler, Tokenizer, UserError
from random_gemma import random_gemma
from test_sampler import CONFIG, PROMPTS, Chain
from test_sampler import tokenizer as own_tokenizer

TEXT_OF_ROWS = importlib.import_module("pallas_gemma.gemma._sample.text")
Growing, Row, Stops = (
  getattr(TEXT_OF_ROWS, name) for name in ("Growing", "Row", "Stops")
)
pytestmark = pytest.mark.no_interpreter

TEXT = "The value of the quick brown fox jumps over the lazy dog. " * 9


@functools.cache
def of_llama(**changes: Any) -> Tokenizer:
  """With Llama's settings: every text begins with a space that is not there."""
  model = io.BytesIO()
  settings: dict[str, Any] = dict(
    vocab_size=330,
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    add_dummy_prefix=True,
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([TEXT]), model_writer=model, **settings | changes
  )
  return Tokenizer(model.getvalue())


KINDS = {"ours": own_tokenizer, "Llama's": of_llama}


def grown(tokenizer, ids, *, prompt="The", stop=(), tokens=()):
  """The completion of a row that is given these ids, and its stream."""
  pieces: list[str] = []
  growing = Growing(tokenizer, tokenizer.encode(prompt, add_bos=True))
  stops = Stops(frozenset(tokens), tuple(stop))
  row = Row(0, growing, stops, lambda i, piece: pieces.append(piece))
  for i, token in enumerate(ids):
    row.add(token, -float(i))
  return row.completion(), pieces


# --- the seam of prompt and completion ----------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_and_its_completion_are_the_whole_text(kind):
  """Also where the model begins every text with a space."""
  tokenizer = KINDS[kind]()
  for text in ("The value of the fox", "The  value\n of", "The", "The né€😀 x"):
    ids = tokenizer.encode(text)
    for cut in range(len(ids) + 1):
      prompt = tokenizer.decode(ids[:cut])
      if "\ufffd" in prompt:
        continue  # within a character
      growing = Growing(tokenizer, [tokenizer.bos_id, *ids[:cut]])
      row = Row(0, growing, Stops(), None)
      for token in ids[cut:]:
        row.add(token, 0.0)
      assert prompt + row.completion().text == text, cut


def test_the_space_of_llamas_pieces_stays():
  tokenizer = of_llama()
  ids = tokenizer.encode("value of")
  assert tokenizer.decode(ids) == "value of"
  assert tokenizer.decode(ids, after=tokenizer.encode("The")) == " value of"
  got, pieces = grown(tokenizer, ids)
  assert got.text == " value of" == "".join(pieces)
  assert pieces[0].startswith(" ")
  # After nothing but BOS it is the beginning of a text.
  assert grown(tokenizer, ids, prompt="")[0].text == "value of"


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_growing_text_is_that_of_all_tokens(kind, data):
  """Whatever the tokens, bytes that are no UTF-8 included; the stream too."""
  tokenizer = KINDS[kind]()
  some = st.integers(0, tokenizer.vocab_size - 1)
  ids = data.draw(st.lists(some, max_size=12))
  prompt = data.draw(st.sampled_from(["", " ", "The", "The ", "\n", "é"]))
  before = tokenizer.encode(prompt, add_bos=True)
  got, pieces = grown(tokenizer, ids, prompt=prompt)
  assert got.text == tokenizer.decode(ids, after=before) == "".join(pieces)
  assert got.tokens == tuple(ids)


def test_long_texts_are_not_decoded_anew_at_each_token(monkeypatch):
  tokenizer, decoded = of_llama(), []
  decode = Tokenizer.decode

  def counted(self, ids, *, after=()):
    decoded.append(len(ids) + len(after))
    return decode(self, ids, after=after)

  monkeypatch.setattr(Tokenizer, "decode", counted)
  ids = tokenizer.encode(TEXT)
  grown(tokenizer, ids)
  assert len(ids) > 100 and sum(decoded) < 6 * len(ids)


def test_a_space_mark_is_a_space_to_a_model_that_adds_one():
  tokenizer = of_llama()
  assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"
  no_bytes = of_llama(byte_fallback=False, vocab_size=50)
  assert no_bytes.unk_id not in no_bytes.encode("The\u2581value")


def test_an_end_of_turn_is_known_behind_a_space_too():
  turns = of_llama(user_defined_symbols="<end_of_turn>")
  id_ = turns.piece_id("<end_of_turn>")
  assert id_ is not None and of_llama().piece_id("<end_of_turn>") is None
  model = Chain(np.zeros((CONFIG.vocab_size, 1)))
  assert Sampler(model, turns)._stops() == {turns.eos_id, id_}
  assert Sampler(model, of_llama())._stops() == {turns.eos_id}


# --- stop strings -------------------------------------------------------------


def byte_ids(text):
  first = own_tokenizer().piece_id("<0x00>")
  assert first is not None
  return [first + byte for byte in text.encode()]


@pytest.mark.parametrize(
  "text, stop, want, ended_by",
  [
    ("fox. The", ["."], "fox", "."),
    ("fox. The", [". T"], "fox", ". T"),  # over the border of tokens
    ("fox. The", ["x. The"], "fo", "x. The"),
    ("fox. The", ["The"], "fox. ", "The"),
    ("fox. The", ["fox"], "", "fox"),  # nothing is left
    ("fox. The", [".  ", "nothing"], "fox. The", None),
    ("fox. The", ["The.", "The "], "fox. The", None),  # it only begins so
    ("aab", ["ab"], "a", "ab"),  # a false start
    ("aXbXc", ["Xc", "X"], "a", "X"),
    ("abcd", ["abcd", "c"], "ab", "c"),  # complete first
    ("abcd", ["bc", "abc"], "", "abc"),  # of two the longer
    ("a\n\nb", ["\n\n"], "a", "\n\n"),
    ("né€😀!", ["€"], "né", "€"),
    ("né€😀!", ["😀!"], "né€", "😀!"),
  ],
)
@pytest.mark.parametrize("split", ["tokens", "bytes"])
def test_the_text_ends_before_a_stop_string(text, stop, want, ended_by, split):
  tokenizer = own_tokenizer()
  ids = byte_ids(text) if split == "bytes" else tokenizer.encode(text)
  got, pieces = grown(tokenizer, [*ids, 9], stop=stop, tokens=[9])
  assert (got.text, got.stop, got.finish_reason) == (want, ended_by, "stop")
  assert "".join(pieces) == want
  assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
  # The fewest tokens that hold the text.
  kept = len(got.tokens)
  assert got.tokens == tuple(ids[:kept]) and len(got.logprobs) == kept
  assert tokenizer.decode(got.tokens).startswith(want)
  assert not kept or not tokenizer.decode(got.tokens[:-1]).startswith(want)


def test_what_may_begin_a_stop_string_is_held_back():
  _, pieces = grown(own_tokenizer(), byte_ids("a-b--c"), stop=["--x"])
  assert pieces == ["a", "-b", "--c"]
  # What is held back in the end is sent.
  got, pieces = grown(own_tokenizer(), byte_ids("ab-"), stop=["-x"])
  assert pieces == ["a", "b", "-"]
  assert (got.text, got.finish_reason, got.stop) == ("ab-", "length", None)


@hypothesis.settings(max_examples=200)
@hypothesis.given(
  st.text("ab-\n€", max_size=12),
  st.lists(st.text("ab-\n€", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_found_as_by_reading_character_by_character(
  text, stops
):
  ends = [
    (end, -len(s), s)
    for end in range(len(text) + 1)
    for s in stops
    if text[:end].endswith(s)
  ]
  end, length, stop = min(ends, default=(len(text), 0, None))
  got, pieces = grown(own_tokenizer(), byte_ids(text), stop=stops)
  assert got.text == text[: end + length] == "".join(pieces)
  assert got.stop == stop


def cycle(*ids):
  """After each of these ids comes the next, and again."""
  table = np.zeros((CONFIG.vocab_size, CONFIG.vocab_size))
  fox = own_tokenizer().encode("fox", add_bos=True)[-1]
  for before, after in zip([fox, *ids], [*ids, ids[0]], strict=True):
    table[before, after] = 100.0
  return Chain(table)


@pytest.mark.parametrize("streams", [False, True])
def test_rows_that_end_at_a_stop_string_make_room(streams):
  """The device knows nothing of it: rows go on until the host has looked."""
  ids = byte_ids("xy--z")
  ids = [*ids[:3], *own_tokenizer().encode("."), ids[-1]]  # each once
  sample = Sampler(cycle(*ids), own_tokenizer(), batch_size=2)
  pieces: dict[int, str] = {}

  def stream(i, piece):
    pieces[i] = pieces.get(i, "") + piece

  got = sample(
    ["fox"] * 5,
    max_new_tokens=30,
    stop="-.z",
    stream=stream if streams else None,
  )
  for completion in got:
    assert (completion.text, completion.finish_reason) == ("xy", "stop")
    assert completion.tokens == tuple(ids[:2]) and completion.stop == "-.z"
  assert pieces == (dict.fromkeys(range(5), "xy") if streams else {})


def test_stop_strings_of_the_prompt_do_not_count():
  (got,) = Sampler(cycle(*byte_ids("xyz")), own_tokenizer())(
    ["xyz fox"], max_new_tokens=3, stop=["z fox", "foxx"]
  )
  assert (got.text, got.finish_reason) == ("xyz", "length")


def test_neighbours_go_on_when_a_row_stops():
  """Each text is that of a call without stop strings, cut; with guesses too."""
  sample = functools.partial(
    Sampler(random_gemma(CONFIG, seed=1), own_tokenizer(), batch_size=2),
    PROMPTS,
    max_new_tokens=12,
    temperature=1.5,
    stop_tokens=(),
    speculate=3,
  )
  whole = sample()
  stop = [whole[1].text[3:6], whole[2].text[2:5]]
  got = sample(stop=stop)
  assert {completion.finish_reason for completion in got} == {"stop", "length"}
  for cut, all_of_it in zip(got, whole, strict=True):
    text = all_of_it.text
    if ends := [text.find(s) + len(s) for s in stop if s in text]:
      assert text.startswith(cut.text + str(cut.stop))
      assert len(cut.text + str(cut.stop)) == min(ends)
    else:
      assert (cut.text, cut.tokens) == (text, all_of_it.tokens)
      assert (cut.finish_reason, cut.stop) == ("length", None)


@pytest.mark.parametrize("stop", ["", ["."] + [""], [5], [None]])
def test_a_stop_string_that_is_none_is_refused(stop):
  sample = Sampler(Chain(np.zeros((CONFIG.vocab_size, 1))), own_tokenizer())
  with pytest.raises(UserError, match="stop must be .*texts"):
    sample.check(["fox"], max_new_tokens=1, stop=stop)


def test_a_check_computes_nothing():
  """It raises what the call would, and needs no model that runs."""

  class Dead(Chain):
    def __init__(self):
      self.config = CONFIG
      self.table = nnx.Param(np.zeros(1))

    def cast(self):
      raise AssertionError("computes")

  sample = Sampler(Dead(), own_tokenizer())
  sample.check(["fox"], max_new_tokens=1, seed=2**63 - 1, stream=print)
  with pytest.raises(UserError, match="prompt 1 has 41 tokens"):
    sample.check(["fox", "0" * 40], max_new_tokens=9)
  with pytest.raises(AssertionError, match="computes"):
    sample(["fox"], max_new_tokens=1)
