"""Text of any size: read once, in little memory, whatever happens meanwhile."""

import dataclasses
import errno
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import hypothesis
import numpy as np
import pytest
import rich.console
from hypothesis import strategies as st
from pallas_gemma.gemma import (
  Document,
  GemmaConfig,
  Tokenizer,
  TrainConfig,
  UserError,
  pack,
  read_corpus,
  split_documents,
  tokenize,
  training_batches,
  unigram_loss,
)
from pallas_gemma.gemma._data import cache as cache_module
from pallas_gemma.gemma._data import (
  encode,
  formats,
  rows,
  spans,
  texts,
  windows,
)
from pallas_gemma.gemma._data import prepare as prepare_module
from pallas_gemma.gemma._train import run as run_module

Cache = cache_module.Cache

pytestmark = pytest.mark.no_interpreter

WORDS = [f"w{i:x}" for i in range(3000)]


def words(seed: int, count: int) -> str:
  return " ".join(random.Random(seed).choices(WORDS, k=count))


def other_tokenizer() -> Tokenizer:
  letters = random.Random(0).choices("abcdefghij  ", k=20_000)
  return Tokenizer.train(["".join(letters)], 380)


def write_files(folder: pathlib.Path) -> pathlib.Path:
  """Text in several formats, with copies, and a document of every length."""
  folder.mkdir()
  lines = [words(i % 40, 60 + i) for i in range(60)]
  (folder / "a.txt").write_text("\n\n".join(words(i, 30) for i in range(400)))
  (folder / "b.jsonl").write_text(
    "\n".join(json.dumps({"text": line}) for line in lines)
  )
  (folder / "c.md").write_bytes("\u8a9e f\u00fcrst\r\n".encode() * 300)
  (folder / "empty.txt").write_text(" ")
  age(folder)
  return folder


def age(folder: pathlib.Path) -> None:
  """Lets the files be older than those that might still be written to."""
  for path in folder.iterdir():
    os.utime(path, (1e9, 1e9))


@pytest.fixture(autouse=True)
def files_are_old_at_once(monkeypatch):
  """The time since a change of a file cannot be set: it is not waited for."""
  monkeypatch.setattr(prepare_module, "_CLOCK_STEP", -1.0)


def prepare(paths, cache, tokenizer=None, vocab=400) -> prepare_module.Prepared:
  with prepare_module.text_files(paths, "text", 0, cache) as text:
    return text.prepare(tokenizer, vocab, 0.1)


def same(one: prepare_module.Prepared, two: prepare_module.Prepared) -> None:
  assert one.tokenizer.model == two.tokenizer.model
  assert one.report == two.report
  for a, b in ((one.train, two.train), (one.held_out, two.held_out)):
    assert a.documents == b.documents
    np.testing.assert_array_equal(a.label_counts, b.label_counts)
    for x, y in zip(a.read(0, a.size), b.read(0, b.size), strict=True):
      np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  return write_files(tmp_path_factory.mktemp("files") / "text")


@pytest.fixture(scope="module")
def kept(files, tmp_path_factory):
  """A cache that holds the files' tokens, and these; nobody may change it."""
  cache = Cache(tmp_path_factory.mktemp("kept"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prepare_module, "_CLOCK_STEP", -1.0)
    return cache, prepare([files], cache)


@pytest.fixture
def cache(kept, tmp_path):
  """A copy of it."""
  shutil.copytree(kept[0].directory, tmp_path / "cache")
  return Cache(tmp_path / "cache")


# --- it is the text ---


@pytest.mark.parametrize("small", [False, True])
def test_rows_are_those_of_text_in_memory(small, files, tmp_path, monkeypatch):
  if small:  # every document is many blocks and parts
    monkeypatch.setattr(formats, "_BLOCK", 100)
    monkeypatch.setattr(windows, "_BLOCK", 5000)
    monkeypatch.setattr(encode, "_LONGEST", 300)
    monkeypatch.setattr(encode, "_TOGETHER", 400)
  found = prepare([files], Cache(tmp_path))
  corpus = read_corpus([files])
  split = split_documents(corpus.documents, 0.1, 0)
  tokenizer = Tokenizer.train((d.text for d in split.train), 400)
  assert found.tokenizer.model == tokenizer.model
  pairs = []
  for stored, documents in (
    (found.train, split.train),
    (found.held_out, split.held_out),
  ):
    assert stored.documents == len(documents)
    wanted = pack(tokenize(documents, tokenizer), 32, tokenizer.pad_id)
    packed = rows.Rows(stored, 32, tokenizer.pad_id)
    pairs.append((packed, wanted))
    for name, array in packed[:].items():
      np.testing.assert_array_equal(array, wanted[:][name])
    assert packed.num_labels == wanted.num_labels == packed.weights.sum()
    batch, other = (training_batches(r, 4, 3)(5) for r in (packed, wanted))
    for name, array in batch.items():
      np.testing.assert_array_equal(array, other[name])
  one, two = (
    unigram_loss(train, held_out, 400)
    for train, held_out in zip(*pairs, strict=True)
  )
  assert one == two
  # (How much is measured does not depend on blocks either.)
  assert found.report == split.report


def test_rows_of_a_large_vocabulary_are_the_same_ids(files, tmp_path):
  tokenizer = other_tokenizer()

  more = Tokenizer(tokenizer.model)
  more.vocab_size = 40_000  # as if it had so many pieces
  small = prepare([files], Cache(tmp_path / "1"), tokenizer)
  large = prepare([files], Cache(tmp_path / "2"), more)
  assert (small.train.dtype.itemsize, large.train.dtype.itemsize) == (2, 4)
  for a, b in zip(
    small.train.read(0, 10**9), large.train.read(0, 10**9), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@hypothesis.settings(max_examples=30)
@hypothesis.given(
  st.text("ab \n\u8a9e\u2581.,1", min_size=1, max_size=300), st.integers(8, 40)
)
def test_parts_of_a_document_have_its_tokens(text, longest):
  tokenizer = LEARNT
  hypothesis.assume(text.strip())
  whole = texts.texts_in_memory([Document("x", text)], 0)
  whole_span = spans.Spans.of_one(0, 0, len(text.encode()))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(encode, "_LONGEST", longest)
    # Not where it must cut within a piece, for want of another place.
    inside = tokenizer.pairs()
    parts = list(encode._in_parts(whole, [(0, whole_span.size)], inside))
    content = text.encode()
    for (*_, (_, at)), _ in zip(parts, parts[1:], strict=False):
      left, right = content[:at].decode(), content[at:].decode()
      hypothesis.assume(left[-1] + right[0] not in inside)
    found = [ids for ids, _ in encode.encoded(whole, whole_span, tokenizer)]
  ids = np.concatenate(found)
  assert ids[0] == tokenizer.bos_id + (1 << 15)
  wanted = tokenizer.encode(text, add_bos=True, add_eos=True)
  assert ids[1:].tolist() == wanted[1:]


LEARNT = Tokenizer.train(["ab a. b, ba\n11 a\u8a9e b.\n\n" * 30], 275)


def test_rows_can_go_to_another_process(kept):
  one = rows.Rows(kept[1].train, 16)
  copy = pickle.loads(pickle.dumps(one))
  np.testing.assert_array_equal(copy[3]["tokens"], one[3]["tokens"])


def test_a_tokenizer_learns_from_passages_of_much_text(monkeypatch):
  monkeypatch.setattr(encode, "_LEARNT", 20_000)
  monkeypatch.setattr(encode, "_PASSAGE", 500)
  documents = [Document("x", f"{i} {words(i, 50)}\n" * 20) for i in range(40)]
  whole = texts.texts_in_memory(documents, 0)
  every = spans.Spans.of_documents(whole, np.arange(40))
  one, two = (list(encode.learning_texts(whole, every, 7)) for _ in range(2))
  assert one == two and 5_000 < sum(map(len, one)) <= 20_000
  assert len({text.split()[0] for text in one}) > 15
  assert all(any(t in d.text for d in documents) for t in one)


# --- once ---


def test_a_second_start_reads_no_text(files, cache, kept, monkeypatch):
  def refuse(*_):
    raise AssertionError("read again")

  monkeypatch.setattr(formats, "documents", refuse)
  same(prepare([files], cache), kept[1])


@pytest.mark.parametrize("change", ["content", "same size", "new", "gone"])
def test_a_change_of_the_files_is_seen(change, cache, kept, tmp_path):
  files = write_files(tmp_path / "text")
  path = files / "a.txt"
  before = prepare([files], cache)
  stat = path.stat()
  if change == "content":
    path.write_text(path.read_text() + "more")
  elif change == "same size":
    path.write_text("x" + path.read_text()[1:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  elif change == "new":
    (files / "d.txt").write_text(words(99, 99))
  else:
    path.unlink()
  assert prepare([files], cache).directory != before.directory


def test_files_that_were_just_written_are_not_trusted(
  cache, tmp_path, monkeypatch
):
  monkeypatch.undo()
  files = write_files(tmp_path / "text")
  before = {*(cache.directory / "files").iterdir()}
  prepare([files], cache)
  assert {*(cache.directory / "files").iterdir()} == before


def test_names_do_not_matter_but_tokenizer_and_split_do(
  files, cache, kept, tmp_path
):
  moved = shutil.copytree(files, tmp_path / "elsewhere")
  assert prepare([moved], cache).directory.name == kept[1].directory.name
  other = other_tokenizer()
  names = {
    kept[1].directory.name,
    prepare([files], cache, other).directory.name,
  }
  for seed, fraction in ((1, 0.1), (0, 0.2)):
    with prepare_module.text_files([files], "text", seed, cache) as text:
      names.add(text.prepare(None, 400, fraction).directory.name)
  assert len(names) == 4


# --- damage ---


def cut(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-1])


def flip(path: pathlib.Path) -> None:
  stat, content = path.stat(), bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("damage", [cut, flip, pathlib.Path.unlink])
@pytest.mark.parametrize(
  "name",
  ["train.bin", "held_out.bin", "counts.npy", "meta.json"]
  + ["files/*.json", "tokenizers/*.model"],
)
def test_a_damaged_cache_is_made_again(name, damage, files, cache, kept):
  pattern = name if "/" in name else f"tokens/*/{name}"
  (path,) = cache.directory.glob(pattern)
  damage(path)
  same(prepare([files], cache), kept[1])
  same(prepare([files], cache), kept[1])
  assert not [*cache.directory.glob(".part-*")]


def test_a_copied_cache_is_checked_and_good(kept, files, cache, monkeypatch):
  checked = []
  real = cache_module._file_checksum
  monkeypatch.setattr(
    cache_module, "_file_checksum", lambda p: checked.append(p) or real(p)
  )
  same(prepare([files], cache), kept[1])
  assert len(checked) == 3  # the times of a copy are others
  checked.clear()
  prepare([files], kept[0])
  assert not checked


CHILD = """
import pathlib, sys, time
from pallas_gemma.gemma._data import encode
from pallas_gemma.gemma._data.cache import Cache
from pallas_gemma.gemma._data.prepare import text_files
files, cache, slow = sys.argv[1:]
real = encode.marked
def marked(*a):
  print("encoding", flush=True)
  time.sleep(float(slow))
  return real(*a)
encode.marked = marked
encode._TOGETHER = 1000
cache = Cache(pathlib.Path(cache))
with text_files([pathlib.Path(files)], "text", 0, cache) as t:
  found = t.prepare(None, 400, 0.1)
print(found.directory)
"""


def child(files, cache, slow) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-P", "-c", CHILD, str(files), str(cache), str(slow)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_two_at_once_make_one_entry(files, kept, tmp_path):
  both = [child(files, tmp_path, 0.01) for _ in range(2)]
  outcomes = [one.communicate() for one in both]
  assert [one.returncode for one in both] == [0, 0], outcomes
  last = {out.splitlines()[-1] for out, _ in outcomes}
  assert len(last) == 1 and len([*(tmp_path / "tokens").iterdir()]) == 1
  assert not [*tmp_path.glob(".part-*")]
  same(prepare([files], Cache(tmp_path)), kept[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_one_that_was_stopped_leaves_nothing_behind(
  number, files, kept, tmp_path
):
  one = child(files, tmp_path, 0.3)
  assert one.stdout is not None
  assert one.stdout.readline().startswith("encoding")
  begun = time.monotonic()
  one.send_signal(number)
  _, errors = one.communicate()
  assert time.monotonic() - begun < 5
  assert one.returncode == -number
  assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
  assert len([*tmp_path.glob(".part-*")]) == (number == signal.SIGKILL) * 2
  assert not [*(tmp_path / "tokens").iterdir()]
  same(prepare([files], Cache(tmp_path)), kept[1])
  assert not [*tmp_path.glob(".part-*")]


def test_no_thread_is_left(files, tmp_path, monkeypatch):
  before = threading.active_count()

  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(encode, "marked", interrupted)
  with pytest.raises(KeyboardInterrupt):
    prepare([files], Cache(tmp_path))
  assert threading.active_count() == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO])
def test_a_full_disk_is_said(files, tmp_path, monkeypatch, number):
  def full(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(encode, "marked", full)
  with pytest.raises(
    UserError, match=f"{os.strerror(number)}.* give --cache-dir"
  ):
    prepare([files], Cache(tmp_path))
  assert not [*tmp_path.glob(".part-*")]


def test_a_cache_that_can_only_be_read_is_read(files, tmp_path, monkeypatch):
  """As on a disk that is shared; what is new goes to the run's own."""
  shared, own = tmp_path / "shared", tmp_path / "run"
  first = prepare([files], cache_module.open_cache(shared, own))
  make = tempfile.mkdtemp

  def refuses(*args, dir, **kwargs):
    if pathlib.Path(dir) == shared:
      raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    return make(*args, dir=dir, **kwargs)

  monkeypatch.setattr(tempfile, "mkdtemp", refuses)
  before = {path: path.stat().st_mtime_ns for path in shared.rglob("*")}
  with monkeypatch.context() as patch:
    patch.setattr(encode, "marked", None)  # nothing is encoded again
    again = prepare([files], cache_module.open_cache(shared, own))
  assert again.directory == first.directory
  other = shutil.copytree(files, tmp_path / "other")
  (other / "more.txt").write_text("More of it.\n")
  added = prepare([other], cache_module.open_cache(shared, own))
  assert added.directory.is_relative_to(own / "cache")
  assert before == {path: path.stat().st_mtime_ns for path in shared.rglob("*")}
  shutil.rmtree(shared)
  shared.mkdir()
  with pytest.raises(UserError, match="cannot write: .*--cache-dir another"):
    cache_module.open_cache(shared, own)


def test_where_the_cache_is(tmp_path, monkeypatch):
  blocked = tmp_path / "file"
  blocked.write_text("")
  with pytest.raises(UserError, match="cannot write: .*--cache-dir another"):
    cache_module.open_cache(blocked / "cache", tmp_path)
  monkeypatch.setenv("PALLAS_GEMMA_CACHE", str(blocked / "cache"))
  assert cache_module.open_cache(None, tmp_path).directory == tmp_path / "cache"
  monkeypatch.delenv("PALLAS_GEMMA_CACHE")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  found = cache_module.open_cache(None, tmp_path).directory
  assert found == tmp_path / "xdg" / "pallas-gemma"


# --- a run ---


def test_a_run_says_what_it_found(files, kept, tmp_path):
  config = TrainConfig(
    data=(files,),
    work_dir=tmp_path / "run",
    cache_dir=kept[0].directory,
    model=dataclasses.replace(GemmaConfig.tiny(), vocab_size=400),
  )
  out = io.StringIO()
  console = rich.console.Console(file=out, width=200)
  directory = tmp_path / "run"
  directory.mkdir()
  run = run_module.open_run(config, directory, console)
  assert out.getvalue() == ""  # so short a text takes no time
  said = "\n".join(run_module.describe_data(run))
  assert "skipped   1, empty: " in said
  assert f"of {run.data.train.documents:,} documents" in said
  assert "left out  " in said and "that are copies of held-out text" in said
  assert "copies    0.00% of the held-out text's 50-character stretches" in said
  assert f"in {run.data.directory}" in said


MEMORY = """
import pathlib, resource, sys
import numpy as np
from pallas_gemma.gemma import GemmaConfig, TrainConfig, training_batches
from pallas_gemma.gemma._train.run import open_run
import grain, sentencepiece
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
directory = pathlib.Path(sys.argv[2])
directory.mkdir()
run = open_run(TrainConfig(data=(pathlib.Path(sys.argv[1]),),
  work_dir=directory, cache_dir=directory,
  model=GemmaConfig.tiny(vocab_size=400)), directory)
batch = training_batches(run.train_rows, 8, 0)
for step in range(500): batch(step)
print((peak() - before) // 1024)
"""


@pytest.mark.parametrize("kind", ["one document", "a document a line"])
def test_memory_does_not_grow_with_the_text(kind, tmp_path):
  """It is read piece by piece: of 10 MB, in a process of its own."""
  one = kind == "one document"
  path = tmp_path / ("a.txt" if one else "a.jsonl")
  with open(path, "w") as file:
    for i in range(50):
      line = words(i, 50_000)
      file.write(line + "\n" if one else json.dumps({"text": line}) + "\n")
  assert path.stat().st_size > 1e7
  done = subprocess.run(
    [sys.executable, "-P", "-c", MEMORY, str(path), str(tmp_path / "run")],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) < 350
