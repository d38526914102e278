"""The way from files to batches: nothing lost, nothing leaked."""

import importlib
import itertools
import json
import pathlib
import random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from pallas_gemma.gemma import (
  Document,
  Rows,
  Tokenizer,
  UserError,
  evaluation_batches,
  pack,
  read_corpus,
  split_documents,
  tokenize,
  training_batches,
  unigram_loss,
)
from pallas_gemma.gemma._data import copies, spans, texts, windows
from pallas_gemma.gemma._data import split as split_module

mixture = importlib.import_module("pallas_gemma.gemma._data.mixture")

# --- packing ---

DOCUMENTS = st.lists(st.integers(1, 20), min_size=1, max_size=12)


def numbered(lengths) -> list[np.ndarray]:
  """Documents in which no token occurs twice; 0 is left for padding."""
  ends = np.cumsum([0, *lengths]) + 1
  return [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(ends)]


@hypothesis.given(DOCUMENTS, st.integers(1, 17))
def test_every_token_is_packed_once_and_labels_stay_inside(lengths, length):
  documents = numbered(lengths)
  rows = pack(documents, length)
  assert rows.tokens.shape == (-(-sum(lengths) // length), length)

  real = rows.segment_ids > 0
  np.testing.assert_array_equal(rows.tokens[real], np.concatenate(documents))
  assert (rows.tokens[~real] == 0).all() and (rows.weights[~real] == 0).all()

  # Every token but the first of its document is a label, once, of the token
  # before it.
  counted = rows.weights > 0
  pairs = zip(rows.tokens[counted], rows.labels[counted], strict=True)
  wanted = [pair for d in documents for pair in itertools.pairwise(d)]
  assert list(pairs) == wanted
  assert rows.num_labels == sum(lengths) - len(lengths)


@hypothesis.given(DOCUMENTS, st.integers(1, 17))
def test_segments_are_the_documents_of_a_row(lengths, length):
  documents = numbered(lengths)
  owner = np.repeat(np.arange(len(documents)), lengths)  # of token i + 1
  rows = pack(documents, length)
  for tokens, segments in zip(rows.tokens, rows.segment_ids, strict=True):
    real = segments > 0
    assert segments[0] == 1 and not real[np.argmin(real) :].any() or real.all()
    same = segments[real][:, None] == segments[real][None]
    owners = owner[tokens[real] - 1]
    np.testing.assert_array_equal(same, owners[:, None] == owners[None])
    assert (np.diff(segments[real]) >= 0).all()


def test_the_picture_in_the_module():
  a, b, c = numbered([6, 4, 6])
  rows = pack([a, b, c], 8)
  np.testing.assert_array_equal(
    rows.segment_ids, [[1, 1, 1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 2, 2, 2, 2]]
  )
  np.testing.assert_array_equal(
    rows.weights, [[1, 1, 1, 1, 1, 0, 1, 1], [1, 0, 1, 1, 1, 1, 1, 0]]
  )


def test_documents_are_framed_by_bos_and_eos():
  tokenizer = Tokenizer.train(["one two three " * 9], 280)
  (ids,) = tokenize([Document("x", "one two")], tokenizer)
  assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
  assert tokenizer.decode(ids.tolist()) == "one two"


# --- batching ---


def rows_of(count: int) -> Rows:
  return pack(numbered([4] * count), 4)


def test_a_batch_is_a_function_of_seed_and_step():
  rows = rows_of(10)
  one, two = (training_batches(rows, 3, seed=7) for _ in range(2))
  for step in (0, 5, 1000, 5):
    for name, array in one(step).items():
      np.testing.assert_array_equal(array, two(step)[name])
  other = training_batches(rows, 3, seed=8)
  assert any((one(i)["tokens"] != other(i)["tokens"]).any() for i in range(3))


def test_each_pass_has_every_row_once_in_another_order():
  rows = rows_of(12)
  batches = training_batches(rows, 4, seed=0)
  passes = [
    np.concatenate([batches(3 * p + i)["tokens"] for i in range(3)])
    for p in range(3)
  ]
  for each in passes:
    np.testing.assert_array_equal(np.sort(each, axis=0), rows.tokens)
  assert (passes[0] != passes[1]).any() and (passes[1] != passes[2]).any()


@pytest.mark.parametrize("count, size", [(7, 3), (6, 3), (2, 5), (1, 1)])
def test_evaluation_counts_every_row_once(count, size):
  rows = rows_of(count)
  batches = list(evaluation_batches(rows, size))
  assert all(b["tokens"].shape == (size, 4) for b in batches)
  tokens = np.concatenate([b["tokens"][b["weights"] > 0] for b in batches])
  np.testing.assert_array_equal(tokens, rows.tokens[rows.weights > 0])


def test_unigram_loss_by_hand():
  train = pack([np.array([2, 5, 5, 6])], 4)
  held_out = pack([np.array([2, 5, 7])], 3)
  # Labels 5, 5, 6; one added to each of 8 counts makes 11.
  wanted = -(np.log(3 / 11) + np.log(1 / 11)) / 2
  assert unigram_loss(train, held_out, 8) == pytest.approx(wanted, rel=1e-12)


# --- reading ---


def test_folders_are_read_whole_and_what_is_skipped_is_said(tmp_path):
  files = {
    "b.txt": b"second",
    "a/deep/x.md": "f\u00fcrst\r\n".encode(),
    "a/.hidden.txt": b"no",
    ".git/x.txt": b"no",
    "picture.png": b"\x89PNG",
    "blob.txt": b"a\0b",
    "latin.txt": b"caf\xe9",
    "blank.txt": b" \n",
  }
  for name, content in files.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
  (tmp_path / "gone.txt").symlink_to(tmp_path / "no such file")
  corpus = read_corpus([tmp_path])
  texts = {pathlib.Path(d.name).name: d.text for d in corpus.documents}
  assert texts == {"b.txt": "second", "x.md": "f\u00fcrst\r\n"}
  skipped = {
    reason: [pathlib.Path(name).name for name in names]
    for reason, names in corpus.skipped.items()
  }
  assert skipped == {
    "no text suffix": ["picture.png"],
    "binary, not text": ["blob.txt"],
    "not UTF-8 text (byte 3)": ["latin.txt"],
    "empty": ["blank.txt"],
    "a link to a folder": ["again"],
    "No such file or directory": ["gone.txt"],
  }


def test_without_paths_it_is_pythons_documentation():
  corpus = read_corpus([])
  assert len(corpus.documents) > 50
  assert sum(len(d.text) for d in corpus.documents) > 400_000


@pytest.mark.parametrize(
  "content, problem",
  [
    (None, "no such file or folder; check --data"),
    (b"a\0b", "binary, not text; give UTF-8 text files"),
    (b"caf\xe9", "not UTF-8 text"),
    (b" \n", "no text in it; empty"),
  ],
)
def test_a_named_file_must_be_text(content, problem, tmp_path):
  path = tmp_path / "file.any"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=problem) as error:
    read_corpus([path])
  assert str(path) in str(error.value)


def test_the_fingerprint_is_of_the_texts(tmp_path):
  (tmp_path / "a.txt").write_text("one")
  before = read_corpus([tmp_path]).fingerprint
  (tmp_path / "a.txt").rename(tmp_path / "b.txt")
  assert read_corpus([tmp_path]).fingerprint == before
  (tmp_path / "b.txt").write_text("two")
  assert read_corpus([tmp_path]).fingerprint != before


# --- splitting ---


WORDS = [
  "".join(letters)
  for letters in random.Random(0).sample(
    [*itertools.permutations("etaoin", 5)], 300
  )
]


def paragraph(i: int, words: int = 16) -> str:
  """Some 100 characters that no other has."""
  return f"Paragraph {i} {' '.join(random.Random(i).choices(WORDS, k=words))}."


def test_documents_are_held_out_whole_and_by_content():
  documents = [Document(str(i), paragraph(i) * 3) for i in range(40)]
  split = split_documents(documents, 0.2, seed=0)
  assert len(split.held_out) == 7 and not split.copied
  assert {*split.train, *split.held_out} == {*documents}
  backwards = split_documents(documents[::-1], 0.2, seed=0)
  assert {*backwards.held_out} == {*split.held_out}
  other = split_documents(documents, 0.2, seed=1)
  assert {*other.held_out} != {*split.held_out}


def test_paragraphs_of_held_out_text_are_not_trained_on():
  documents = [
    Document(str(i), f"{paragraph(i)}\n\n{paragraph(i + 1)}") for i in range(20)
  ]
  split = split_documents(documents, 0.2, seed=0)
  seen = {p for d in split.held_out for p in d.text.split("\n\n")}
  assert split.copied
  for document in split.train:
    assert not seen & {*document.text.split("\n\n")}


def normalised(text: str) -> str:
  return " ".join(text.split())


def share_in_both(train: list[str], held_out: list[str]) -> float:
  """Of the held-out stretches of 50 characters, by looking at each."""
  cut = [[d[i : i + 50] for d in train for i in range(len(d) - 49)]]
  seen = {*cut.pop()}
  asked = [d[i : i + 50] for d in held_out for i in range(len(d) - 49)]
  return sum(a in seen for a in asked) / len(asked)


def repeated_sentences() -> list[str]:
  """Each once to three times, in any order."""
  rng = random.Random(0)
  sentences = [paragraph(i) for i in range(400)]
  every = [s for s in sentences for _ in range(rng.choice((1, 2, 3)))]
  rng.shuffle(every)
  return every


def functions() -> list[str]:
  """Files of code; half of them hold a function that another file has too."""
  return [
    f"import os\n\n\ndef f{i}(a):\n  return '{paragraph(i)}'\n\n\n"
    f"def g(b):\n    if b:\n        return '{paragraph(i // 2 + 1000)}'\n"
    for i in range(120)
  ]


COPIES = {
  "one sentence a line": ["\n".join(repeated_sentences())],
  "CRLF": ["\r\n\r\n".join(repeated_sentences())],
  "no line ends": [" ".join(repeated_sentences())],
  "CSV": [
    "\n".join(f'{i},"{s}",x' for i, s in enumerate(repeated_sentences()))
  ],
  "JSONL": [
    "\n".join(
      json.dumps({"id": i, "text": s})
      for i, s in enumerate(repeated_sentences())
    )
  ],
  "a document each": repeated_sentences(),
  "code": functions(),
  "code, indented otherwise": [
    code.replace("    ", "\t") if i % 2 else code
    for i, code in enumerate(functions())
  ],
  "no ASCII": [
    "\n".join(repeated_sentences()).translate(
      {ord("e"): "\u00e9", ord("o"): "\u8a9e", ord("i"): "\U0001f600"}
    )
  ],
}


@pytest.mark.parametrize("block", [1 << 18, 1000])
@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found_by_content(kind, block, monkeypatch):
  monkeypatch.setattr(windows, "_BLOCK", block)
  documents = [Document(str(i), t) for i, t in enumerate(COPIES[kind])]
  split = split_documents(documents, 0.1, seed=0)
  train = [d.text for d in split.train]
  held_out = [d.text for d in split.held_out]
  assert share_in_both(train, held_out) <= 0.01
  shared = share_in_both(
    [*map(normalised, train)], [*map(normalised, held_out)]
  )
  assert shared <= 0.002
  assert split.report.shared == pytest.approx(shared, abs=0.002)
  # Nothing else was taken: two copies in three or fewer are in training text.
  whole = sum(len(d.text) for d in documents)
  assert sum(map(len, train)) > 0.6 * whole
  assert sum(map(len, held_out)) > 0.05 * whole
  # (Copies of a whole document are drawn together.)
  if kind != "a document each":
    assert split.copied > 0.002 * whole


def test_what_every_document_says_is_not_taken_from_all_of_them():
  head = "".join(f"# {paragraph(i)}\n" for i in range(900, 905))
  documents = [
    Document(str(i), head + paragraph(i, words=200)) for i in range(100)
  ]
  split = split_documents(documents, 0.1, seed=0)
  assert len(split.train) + len(split.held_out) == 100
  for document in split.train:
    assert document.text.startswith(head[:-60])
  assert split.report.repeated > 0 and split.report.shared == 0
  assert not any(head[:100] in d.text for d in split.held_out)


def test_a_text_that_repeats_itself_throughout_is_kept_and_said():
  documents = [Document("x", (paragraph(1) + "\n") * 1000)]
  split = split_documents(documents, 0.1, seed=0)
  assert not split.copied and split.report.shared == 1
  assert sum(len(d.text) for d in split.train) > 0.8 * len(documents[0].text)
  (line,) = copies.describe_copies(split.report)
  assert "100.00% of the held-out text's 50-character stretches remain" in line


def test_what_stands_beside_a_copy_stays_as_it_was():
  head, tail = (paragraph(i, words=30) for i in (1, 2))
  copy = f"{paragraph(3)}\n  {paragraph(4)}\n"
  text = f"{head}\n\n  if x:\n{copy}\n    {tail}\n"
  documents = [Document("a", text), Document("b", copy)]
  split = split_documents(documents, 0.4, seed=0)
  assert [d.name for d in split.held_out] == ["b"]
  # "if x:" goes with the copy: two short words could not be told from it.
  (document,) = split.train
  assert document.text == f"{head}\n\n  if x:\n\n    {tail}\n"
  assert split.copied == len(copy)


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.data())
def test_holes_are_taken_out_of_spans(data):
  ends = sorted({0, *data.draw(st.lists(st.integers(1, 60), min_size=1))})
  pairs = [p for p in itertools.pairwise(ends) if data.draw(st.booleans())]
  pairs = data.draw(st.permutations(pairs))
  table = np.array([(i, *p) for i, p in enumerate(pairs)], np.int64)
  parts = spans.Spans(*table.reshape(-1, 3).T)
  holes = []
  for a, b in pairs:
    c = data.draw(st.integers(a, b - 1))
    d = data.draw(st.integers(c + 1, b))
    holes += data.draw(st.sampled_from([[], [(c, d)], [(c, d), (a, d)]]))
  ranges = np.array(holes, np.int64).reshape(-1, 2)
  left = parts.without(spans.merged(ranges))
  gone = {i for a, b in holes for i in range(a, b)}
  wanted = [
    (n, i)
    for n, (a, b) in enumerate(pairs)
    for i in range(a, b)
    if i not in gone
  ]
  found = [
    (n, i)
    for n, a, b in zip(left.document, left.start, left.end, strict=True)
    for i in range(a, b)
  ]
  assert found == wanted


@hypothesis.given(
  st.lists(st.integers(1, 30), min_size=1, max_size=30), st.floats(0.01, 0.99)
)
def test_documents_are_held_out_as_long_as_they_fit(sizes, fraction):
  budget, wanted = fraction * sum(sizes), []
  for size in sizes:
    held = size <= budget and sum(wanted) < len(sizes) - 1
    wanted.append(held)
    budget -= size * held
  found = split_module.held_out_documents(np.array(sizes), fraction)
  assert found.tolist() == wanted


@hypothesis.given(
  st.text(" \n\rae\u00e9\u8a9e\U0001f600", min_size=2), st.floats(0.05, 0.95)
)
def test_a_document_of_any_size_is_cut_at_the_same_place(text, fraction):
  hypothesis.assume(len(text.strip()) > 1)
  whole_text = texts.texts_in_memory([Document("x", text)], 0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(split_module, "_BLOCK", 8)
    start, at, end = split_module.cut(whole_text, 0, fraction)
  whole = text.strip()
  wanted = min(max(int(len(whole) * (1 - fraction)), 1), len(whole) - 1)
  wanted = whole.rfind("\n", 1, wanted) + 1 or wanted
  content = text.encode()
  assert content[start:at].decode() == whole[:wanted]
  assert content[at:end].decode() == whole[wanted:]


def test_indentation_does_not_hide_a_copy():
  copy = Document("copy", "    " + paragraph(1).replace(" ", "\n\t ", 5))
  rest = [Document(str(i), paragraph(i) * 2) for i in range(2, 9)]
  original = Document("original", paragraph(1))
  for seed in range(20):
    split = split_documents([original, copy, *rest], 0.1, seed)
    names = {d.name for d in split.held_out}
    if len(names & {"original", "copy"}) == 1:
      assert not {d.name for d in split.train} & {"original", "copy"}
      return
  raise AssertionError("no seed held out just one of the two")


def test_one_document_is_cut_at_the_end_of_a_line():
  text = "".join(f"line {i}\n" for i in range(100))
  split = split_documents([Document("x", text)], 0.1, seed=0)
  (head,), (tail,) = split.train, split.held_out
  assert head.text + tail.text == text.strip()
  assert head.text.endswith("\n") and 0.05 < len(tail.text) / len(text) < 0.15


def test_text_that_cannot_be_split_is_refused():
  with pytest.raises(UserError, match="one character cannot be split"):
    split_documents([Document("x", "a")], 0.1, seed=0)
  with pytest.raises(UserError, match="nothing but copies"):
    twice = [Document("x", paragraph(1)), Document("y", paragraph(1))]
    split_documents(twice, 0.5, seed=0)


def test_rows_that_are_taken_are_those_rows():
  rows = pack([np.arange(1, 40), np.arange(50, 61)], 8)
  some = rows.take(np.array([1, 4, 6]))
  again = some.take(np.array([2, 0]))
  assert len(some) == 3 and len(again) == 2
  for name, whole in rows[:].items():
    np.testing.assert_array_equal(some[:][name], whole[[1, 4, 6]])
    np.testing.assert_array_equal(again[:][name], whole[[6, 1]])
  weights, labels = some.weights, some.labels
  assert some.num_labels == int(weights.sum()) < rows.num_labels
  counts = np.bincount(labels[weights > 0], minlength=64)
  np.testing.assert_array_equal(some.label_counts(64), counts)


# --- packing and mixtures -----------------------------------------------------


def test_rows_are_almost_all_text():
  """At least 98 % from 50 rows on: the last one alone has padding."""
  for lengths, length in ([[300] * 40, 128], [[1] * 999, 20], [[9999], 128]):
    rows = pack(numbered(lengths), length)
    real = float((rows.segment_ids > 0).mean())
    assert rows.use == pytest.approx(real) and real >= 0.98


@hypothesis.given(
  st.lists(
    st.tuples(st.sampled_from([0, 0.1, 1, 7]), st.sampled_from([0.1, 2, 30])),
    min_size=2,
    max_size=4,
  ).filter(lambda w: sum(a for a, _ in w) > 0),
  st.integers(1, 9),
)
def test_every_step_has_its_rows_and_every_text_its_share(weights, size):
  steps = 30
  quotas = mixture.Quotas([mixture.Weight(*w) for w in weights], steps, size)
  owed, before = np.zeros(len(weights)), quotas.before(0)
  assert not before.any()
  for step in range(steps):
    shares = quotas.shares(step)
    assert shares.sum() == pytest.approx(1)
    owed += size * shares
    after = quotas.before(step + 1)
    assert (after >= before).all() and (after - before).sum() == size
    assert np.abs(after - owed).max() < len(weights)
    before = after
  first, last = np.array(weights).T
  np.testing.assert_allclose(quotas.shares(0), first / first.sum())
  np.testing.assert_allclose(quotas.shares(steps - 1), last / last.sum())


def test_a_batch_of_a_mixture_is_a_function_of_its_step():
  texts = [pack([np.arange(a, a + 1000)], 10) for a in (1, 5001)]
  weights = [mixture.Weight(3, 1), mixture.Weight(1, 3)]

  def batches(mine=None):
    quotas = mixture.Quotas(weights, 50, 4)
    return mixture.mixed_batches(texts, quotas, 3, mine)

  one, later, mine = batches(), batches(), batches(np.array([1, 2]))
  seen = [0, 0]
  firsts: list[list[int]] = [[], []]
  wanted = later(49)  # out of order
  for step in range(50):
    batch = one(step)
    if step == 49:
      np.testing.assert_array_equal(batch["tokens"], wanted["tokens"])
    assert batch["tokens"].shape == (4, 10)
    for row in batch["tokens"]:
      text = int(row[0] > 5000)
      seen[text] += 1
      firsts[text].append(int(row[0]))
    part = mine(step)
    for name, value in batch.items():
      np.testing.assert_array_equal(part[name], value[[1, 2]])
  assert seen == [100, 100]
  # Each row once in a pass, and not in the order of the text.
  for rows in firsts:
    assert len({*rows}) == 100 and rows != sorted(rows)
  empty = pack([np.arange(1, 9)], 10).take(np.arange(0))
  with pytest.raises(UserError, match="mix: text 2 of 2 has no row"):
    mixture.mixed_batches([texts[0], empty], mixture.Quotas(weights, 9, 4), 0)
