"""The tokenizer: exact, with Gemma's ids, and clear about what it cannot do."""

import pathlib
import re

import hypothesis
import pytest
from hypothesis import strategies as st
from pallas_gemma.gemma import Tokenizer, UserError

TEXT = pathlib.Path(__file__).read_text()
SPACE_MARK = "\u2581"  # SentencePiece's own sign for a space


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer.train([TEXT], 400)


TRICKY = st.sampled_from(
  [SPACE_MARK, "\0", "\u2585", "\t", "\r\n", "  ", "<bos>", "<eos>", "<0x41>"]
  + [
    "<start_of_turn>",
    "<end_of_turn>",
    "<unk>",
    "\ufeff",
    "\u0301",
    "日本",
    "7",
  ]
)


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.lists(st.text() | TRICKY).map("".join))
def test_any_text_comes_back_exactly(tokenizer, text):
  ids = tokenizer.encode(text, add_bos=True, add_eos=True)
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert ids[0] == 2 and ids[-1] == 1
  assert not {0, 1, 2, 3} & set(ids[1:-1])


def test_special_ids_are_gemmas(tokenizer):
  assert tokenizer.vocab_size == 400
  specials = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id)
  assert (*specials, tokenizer.unk_id) == (0, 1, 2, 3)
  turn = tokenizer.encode("<start_of_turn>user\nHi<end_of_turn>\n")
  assert turn[0] == 4 and turn.count(5) == 1
  assert tokenizer.decode([0, 1, 2]) == ""


def test_bos_is_there_once_however_often_it_is_asked_for(tokenizer):
  ids = tokenizer.encode("hello", add_bos=True)
  assert ids.count(2) == 1
  assert tokenizer.with_bos(ids) == ids
  assert tokenizer.with_bos(tokenizer.encode("hello")) == ids
  assert tokenizer.encode("<bos>hello", add_bos=True).count(2) == 1
  assert tokenizer.encode("", add_bos=True) == [2]


def test_digits_are_single_and_whitespace_is_kept():
  tokenizer = Tokenizer.train(["2024 2024 2024\n\n    x = 2024\n" * 9], 275)
  assert len(tokenizer.encode("2024")) == 4
  assert tokenizer.encode("  x") != tokenizer.encode(" x")
  # Pieces of nothing but spaces are learnt, as indented text needs.
  assert len(tokenizer.encode("    ")) == 1


def test_texts_with_characters_the_trainer_refuses_still_count():
  plain = Tokenizer.train(["hello world", "hello world"], 275)
  marked = Tokenizer.train(["hello world\0hello world\u2585"], 275)
  assert marked.encode("hello world") == plain.encode("hello world")


@pytest.mark.parametrize("size", [1000, 100_000])
def test_too_large_a_vocabulary_names_the_largest(size):
  texts = ["a short text of few words"]
  with pytest.raises(UserError, match=f"vocab_size {size}: too large") as error:
    Tokenizer.train(texts, size)
  most = int(re.findall(r"at most (\d+)", str(error.value))[0])
  assert Tokenizer.train(texts, most).vocab_size == most
  with pytest.raises(UserError, match="too large"):
    Tokenizer.train(texts, most + 1)


def test_too_small_a_vocabulary_names_the_smallest():
  with pytest.raises(UserError, match="vocab_size 9: too small") as error:
    Tokenizer.train([TEXT], 9)
  least = int(re.findall(r"give (\d+) or more", str(error.value))[0])
  assert Tokenizer.train([TEXT], least).vocab_size == least


@pytest.mark.parametrize("texts", [[], [""], ["\0"]])
def test_no_text_is_said(texts):
  with pytest.raises(UserError, match="no text to learn from"):
    Tokenizer.train(texts, 300)


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "tokenizer.model")
  loaded = Tokenizer.load(tmp_path / "tokenizer.model")
  assert loaded.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("content", [b"", b"hello world\n" * 9, bytes(100)])
def test_a_file_that_is_no_model_is_refused(content, tmp_path):
  path = tmp_path / "tokenizer.model"
  path.write_bytes(content)
  with pytest.raises(UserError, match="not a SentencePiece model") as error:
    Tokenizer.load(path)
  assert str(path) in str(error.value)


def test_a_model_cut_short_is_refused(tokenizer, tmp_path):
  path = tmp_path / "tokenizer.model"
  path.write_bytes(tokenizer.model[: len(tokenizer.model) // 2 + 1])
  with pytest.raises(UserError, match="not a SentencePiece model"):
    Tokenizer.load(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
  for path in (tmp_path, tmp_path / "nothing"):
    with pytest.raises(UserError, match=re.escape(f"tokenizer {path}: ")):
      Tokenizer.load(path)


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
  for wrong in (-1, 400):
    with pytest.raises(ValueError, match=rf"in \[0, 400\), got {wrong}"):
      tokenizer.decode([5, wrong])
