"""Each format gives its documents, or is refused with words."""

import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import os
import pathlib
import sys
from typing import Any

import fsspec
import hypothesis
import pytest
from faulty import Faulty
from hypothesis import strategies as st
from pallas_gemma.gemma import TrainConfig, UserError, read_corpus
from pallas_gemma.gemma._data import formats

remote = importlib.import_module("pallas_gemma.gemma._data.remote")
pytestmark = pytest.mark.no_interpreter

TEXTS = ["one, two\nthree", 'f\u00fcrst "quoted"', "\u8a9e \U0001f600"]
RECORDS = [{"id": i, "text": t} for i, t in enumerate(TEXTS)]


def table(delimiter: str, newline: str) -> str:
  out = io.StringIO()
  writer = csv.writer(out, delimiter=delimiter, lineterminator=newline)
  writer.writerow(["id", "text"])
  writer.writerows([r["id"], r["text"]] for r in RECORDS)
  return out.getvalue()


LINES = "\n".join(map(json.dumps, RECORDS))
GOOD = {
  "a.jsonl": LINES,
  "crlf.jsonl": LINES.replace("\n", "\r\n") + "\r\n\r\n",
  "bom.jsonl": "\ufeff" + LINES,
  "strings.ndjson": "\n".join(map(json.dumps, TEXTS)),
  "a.json": json.dumps(RECORDS),
  "indented.json": "\n " + json.dumps(RECORDS, indent=2) + "\n",
  "strings.json": json.dumps(TEXTS, ensure_ascii=False),
  "a.csv": table(",", "\n"),
  "crlf.csv": table(",", "\r\n"),
  "bom.csv": "\ufeff" + table(",", "\n"),
  "semicolon.csv": table(";", "\n"),
  "a.tsv": table("\t", "\n"),
  "UPPER.JSONL": LINES,
}


def texts_of(path: pathlib.Path, **options) -> list[str]:
  return [d.text for d in read_corpus([path], **options).documents]


@pytest.mark.parametrize("block", [1 << 20, 7])
@pytest.mark.parametrize("name", GOOD)
def test_records_are_documents(name, block, tmp_path, monkeypatch):
  monkeypatch.setattr(formats, "_BLOCK", block)
  path = tmp_path / name
  path.write_bytes(GOOD[name].encode())
  assert texts_of(path) == TEXTS
  assert texts_of(tmp_path) == TEXTS  # in a folder too
  for suffix, compress in (
    (".gz", gzip.compress),
    (".bz2", bz2.compress),
    (".xz", lzma.compress),
  ):
    packed = tmp_path / f"{name}{suffix}"
    packed.write_bytes(compress(GOOD[name].encode()))
    assert texts_of(packed) == TEXTS


def test_another_field_and_none(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"body": "b", "text": "t"}\n')
  assert texts_of(path) == ["t"]
  assert texts_of(path, text_field="body") == ["b"]
  assert texts_of(path, text_field=None) == [path.read_text()]


@hypothesis.settings(max_examples=30)
@hypothesis.given(
  st.lists(st.text(max_size=9), min_size=1, max_size=4),
  st.integers(1, 9),
  st.booleans(),
)
def test_json_is_read_in_pieces(texts, size, ascii):
  whole = json.dumps(
    [{"n": 1.5e3, "text": t} for t in texts], ensure_ascii=ascii
  )
  values = formats._Values(
    whole[i : i + size] for i in range(0, len(whole), size)
  )
  assert values.peek() == "["
  values.skip()
  for text in texts:
    assert values.take() == {"n": 1500, "text": text}
    assert values.peek() in ",]"
    values.skip()
  assert values.peek() == ""


NOTEBOOK = {
  "cells": [
    {"cell_type": "markdown", "source": ["# Title\n", "words"]},
    {"cell_type": "code", "source": "x = 1", "outputs": [{"text": "no"}]},
    {"cell_type": "code", "source": []},
  ],
  "nbformat": 4,
}
PAGE = """<!DOCTYPE html><html><head><title>A &amp; B</title>
<style>p { color: red }</style><script>var no = "<p>no</p>";</script></head>
<body><h1>Head</h1><p>One <b>bold</b>
 line.<br/>Next&nbsp;one</p><pre>  kept
    as is</pre><ul><li>a</li><li>b</li></ul><!-- no --></body></html>"""


def test_notebooks_and_pages(tmp_path):
  path = tmp_path / "a.ipynb"
  path.write_text(json.dumps(NOTEBOOK))
  assert texts_of(path) == ["# Title\nwords\n\nx = 1"]
  old = {"worksheets": [{"cells": [{"cell_type": "code", "input": "y"}]}]}
  path.write_text(json.dumps(old))
  assert texts_of(path) == ["y"]
  path = tmp_path / "a.html"
  path.write_text(PAGE)
  assert texts_of(path) == [
    "A & B\nHead\nOne bold line.\nNext\u00a0one\n  kept\n    as is\na\nb"
  ]
  assert texts_of(path, text_field=None) == [PAGE]


BAD = {
  "no field": (
    "a.jsonl",
    b'{"text": "a"}\n\n{"body": "b", "id": 1}\n',
    r"no field 'text' in line 3 \(it has: body, id\); give --text-field",
  ),
  "not a string": (
    "a.jsonl",
    b'{"text": ["a"]}',
    r"field 'text' is not text in line 1 \(but list\)",
  ),
  "a number": (
    "a.jsonl",
    b"7",
    r"no field 'text' in line 1 \(it has: a JSON int",
  ),
  "half a line": ("a.jsonl", b'{"text": "a"}\n{"te', "not JSON in line 2"),
  "invalid UTF-8 in a line": (
    "a.jsonl",
    b'{"text": "a"}\n{"text": "\xe9"}',
    r"not UTF-8 text \(byte 24\), line 2",
  ),
  "a NUL": ("a.jsonl", b'{"text": "a\0"}', "binary, not text"),
  "a JSON object": (
    "a.json",
    b'{"name": "x", "version": 1}',
    r"neither an array of records nor .* \(its fields: name, version\)",
  ),
  "half an array": ("a.json", b'[{"text": "a"}, {"te', "not JSON"),
  "no commas": ("a.json", b'["a" "b"]', "not JSON after record 1"),
  "two values": ("a.json", b'["a"] ["b"]', "something follows its end"),
  "deep": ("a.json", b"[" * 100_000, "not JSON"),
  "no column": (
    "a.csv",
    b"id,body\n1,b\n",
    r"no column 'text' in line 1 \(it has: id, body\); give --text-field",
  ),
  "an open quote": ("a.csv", b'text\n"a\n', "not a table in line 2"),
  "no notebook": ("a.ipynb", b"[]", "not a notebook"),
  "damaged": ("a.txt.gz", gzip.compress(b"text" * 99)[:-9], "damaged archive"),
  "not gzip": ("a.txt.gz", b"text", "damaged archive"),
  "damaged bz2": ("a.txt.bz2", b"BZh9text", "damaged archive"),
  "zstd": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "Zstandard, .* zstd -d"),
  "parquet": ("a.parquet", b"PAR1", "not Parquet .* get it anew"),
  "array record": ("a.arrayrecord", b"x" * 99, "not ArrayRecord, or without"),
  "tar": ("a.tar.gz", b"x", "a tar archive, .* unpack it"),
  "PDF": ("a.pdf", b"%PDF", "PDF, .* convert it"),
  "UTF-16": ("a.txt", "text".encode("utf-16"), "UTF-16, not UTF-8 text"),
  "UTF-16 lines": ("a.jsonl", '"text"\n'.encode("utf-16"), "UTF-16, not UTF-8"),
  "cut UTF-8": ("a.txt", b"caf\xc3", r"not UTF-8 text \(byte 3\)"),
  "after a mark": (
    "a.txt",
    b"\xef\xbb\xbfcaf\xe9",
    r"not UTF-8 text \(byte 6\)",
  ),
}


@pytest.mark.parametrize("block", [1 << 20, 3])
@pytest.mark.parametrize("case", BAD)
def test_what_is_not_text_is_refused_by_name(
  case, block, tmp_path, monkeypatch
):
  monkeypatch.setattr(formats, "_BLOCK", block)
  name, content, message = BAD[case]
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    read_corpus([path])
  assert str(error.value).startswith(f"data {path}: ")
  # In a folder it is left out, and named with the reason.
  (tmp_path / "z.txt").write_text("good")
  corpus = read_corpus([tmp_path])
  assert [d.text for d in corpus.documents] == ["good"]
  ((reason, (where,)),) = corpus.skipped.items()
  assert where.startswith(str(path)) and reason in str(error.value)


@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("order", ["LE", "BE"])
@pytest.mark.parametrize("width", ["UTF-16", "UTF-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.jsonl"])
def test_other_encodings_of_unicode_are_named(
  name, width, order, mark, tmp_path
):
  """Databases export UTF-16 without a mark; its zeros are no binary file."""
  text = ("\ufeff" if mark else "") + 'text\n"caf\xe9, \u65e5"\r\n' * 400
  path = tmp_path / name
  path.write_bytes(text.encode(f"{width}-{order}"))
  with pytest.raises(UserError, match=f"{width}, not UTF-8 text; convert it"):
    read_corpus([path])


@pytest.mark.parametrize(
  "content",
  [b"\1\0\2\0" * 99, b"\0" * 99, b"a\0\0\0\1\2\3\4" * 99, b"a\0b"],
)
def test_numbers_are_no_encoding(content, tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes(content)
  with pytest.raises(UserError, match="binary, not text"):
    read_corpus([path])


def test_what_text_may_hold(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text(r'{"text": "\u0000 \ud83d\ude00 \ud800 x"}')
  assert texts_of(path) == ["\0 \U0001f600 \ufffd x"]
  path = tmp_path / "a.txt"
  path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
  assert texts_of(path) == ["a\r\nb\rc\n"]


def test_records_without_text_are_counted(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"text": ""}\n{"text": null}\n{"text": "a"}\n')
  corpus = read_corpus([path])
  assert [d.text for d in corpus.documents] == ["a"]
  assert corpus.skipped == {"empty": [f"{path} (2 of 3 records)"]}


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "a.txt")
  (tmp_path / "b.txt").write_text("b")
  assert texts_of(tmp_path) == ["b"]


# --- what a library reads -----------------------------------------------------


def write_records(folder: pathlib.Path, records: list[bytes]) -> pathlib.Path:
  name = "array_record.python.array_record_module"  # it ships no types
  path = folder / "a.arrayrecord"
  writer = importlib.import_module(name).ArrayRecordWriter(
    str(path), "group_size:2"
  )
  for record in records:
    writer.write(record)
  writer.close()
  return path


def write_table(folder: pathlib.Path, **columns: list) -> pathlib.Path:
  import pyarrow
  import pyarrow.parquet

  path = folder / "a.parquet"
  pyarrow.parquet.write_table(pyarrow.table(columns), path)
  return path


def test_records_of_libraries_are_documents(tmp_path):
  assert texts_of(write_table(tmp_path, text=[*TEXTS, None], id=[*"1234"])) == (
    TEXTS
  )
  many = [f"text {i}" for i in range(3000)]  # of several blocks
  assert texts_of(write_table(tmp_path, body=many), text_field="body") == many
  as_json = json.dumps({"text": TEXTS[1]})
  records = [TEXTS[0], as_json, TEXTS[2], "{no JSON"]
  path = write_records(tmp_path, [r.encode() for r in records])
  assert texts_of(path) == [*TEXTS, "{no JSON"]
  assert texts_of(path, text_field=None) == records
  corpus = read_corpus([tmp_path], text_field="text")  # a folder of both
  assert len(corpus.documents) == 4 and "no column 'text'" in corpus.skipped


def test_records_that_are_no_text_are_refused(tmp_path):
  table = write_table(tmp_path, n=[1, 2])
  for field, message in (
    ("text", r"no column 'text' \(it has: n\); give --text-field"),
    ("n", r"field 'n' is not text in a row \(but int\)"),
    (None, "Parquet is no text as it stands; give --text-field"),
  ):
    with pytest.raises(UserError, match=message):
      read_corpus([table], text_field=field)
  for record, message in (
    (b"\xff", r"not UTF-8 text \(byte 0\) in record 2"),
    (b"a\0", "binary, not text in record 2"),
    (b'{"a": 1}', r"no field 'text' in record 2 \(it has: a\)"),
  ):
    with pytest.raises(UserError, match=message):
      read_corpus([write_records(tmp_path, [b"text", record])])


def test_a_folder_without_files_is_said(tmp_path):
  (tmp_path / "none" / "inner").mkdir(parents=True)
  (tmp_path / "a.txt").write_text("text")
  corpus = read_corpus([tmp_path / "none", tmp_path / "a.txt"])
  assert corpus.skipped == {"a folder without files": [str(tmp_path / "none")]}
  with pytest.raises(UserError, match="a folder without files: .*none; give"):
    read_corpus([tmp_path / "none"])


def test_damage_inside_of_a_table_is_said_in_words(tmp_path):
  whole = write_table(tmp_path, text=["caf\u00e9 " * 40, *TEXTS]).read_bytes()
  at = whole.index("\u00e9".encode())
  for start, message in (
    (at, r"not UTF-8 text \(byte \d+\); give UTF-8"),
    (4, r"not Parquet \([^\n]+\); get it anew$"),  # the page's own header
  ):
    path = tmp_path / "b.parquet"
    path.write_bytes(whole[:start] + b"\xff" * 2 + whole[start + 2 :])
    with pytest.raises(UserError, match=message):
      read_corpus([path])


@pytest.mark.parametrize(
  "module, name, extra",
  [
    ("pyarrow", "a.parquet", "parquet"),
    ("array_record", "a.arrayrecord", "arrayrecord"),
  ],
)
def test_a_library_that_is_not_there_is_named(
  module, name, extra, tmp_path, monkeypatch
):
  (tmp_path / name).write_bytes(b"PAR1")
  for known in [m for m in sys.modules if m.partition(".")[0] == module]:
    monkeypatch.delitem(sys.modules, known)
  monkeypatch.setitem(sys.modules, module, None)
  message = f"needs {module}; pip install 'pallas-gemma.{extra}.'"
  with pytest.raises(UserError, match=message):
    read_corpus([tmp_path / name])


# --- other machines -----------------------------------------------------------


def test_text_is_read_where_fsspec_finds_it(tmp_path):
  """Files and folders, packed ones and records; as on this machine."""
  here = tmp_path / "all"
  here.mkdir()
  (here / "a.jsonl").write_text(LINES)
  (here / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
  write_records(here, [b"a record"])
  write_table(here, text=["a row"])
  for hidden in (".c.txt", "d.png"):
    (here / hidden).write_text("no")
  memory = fsspec.filesystem("memory")
  memory.put(str(here), "/bucket/all", recursive=True)
  want = read_corpus([here])
  for path in ("memory://bucket/all", pathlib.Path("memory://bucket/all")):
    got = read_corpus([path])
    assert {d.text for d in got.documents} == {d.text for d in want.documents}
    assert len(got.documents) == len(want.documents) == len(TEXTS) + 3
    assert got.skipped == {"no text suffix": ["memory:///bucket/all/d.png"]}
  assert texts_of(pathlib.Path("memory://bucket/all/a.jsonl")) == TEXTS
  for path in (f"file://{here}/a.jsonl", f"file:/{here}/a.jsonl"):
    assert texts_of(pathlib.Path(path)) == TEXTS
  with pytest.raises(UserError, match="memory://bucket/x: no such file"):
    read_corpus(["memory://bucket/x"])
  # It is known again, and known to be another.
  file = remote.Remote("memory://bucket/all/b.txt.gz")
  before = file.state()
  assert before == file.state() and before[0] > 0 and before[1]
  memory.pipe("/bucket/all/b.txt.gz", gzip.compress(b"other"))
  assert file.state() != before


class OutOfReach(Faulty):
  """A place of which a file, a folder or all cannot be read."""

  protocol = "outofreach"
  refused: tuple[str, ...] = ()
  find = fsspec.AbstractFileSystem.find  # a memory's own walks no folders

  @classmethod
  def _strip_protocol(cls, path):
    return Faulty._strip_protocol(path.replace("outofreach://", "memory://"))

  def _ask(self, path):
    if any(name in path for name in self.refused):
      raise PermissionError("no credentials")

  def ls(self, path, detail=True, **kwargs):
    self._ask(f"list {path}")
    return super().ls(path, detail, **kwargs)

  def info(self, path, **kwargs):
    self._ask(f"info {path}")
    return super().info(path, **kwargs)

  def open(self, path: Any, *args: Any, **kwargs: Any) -> Any:
    file: Any = super().open(path, *args, **kwargs)
    if "break.txt" in path:
      file = Breaking(file.read())
    return file


class Breaking(io.BytesIO):
  """Of which the network breaks after a part."""

  def read(self, size: Any = -1, /) -> bytes:
    if self.tell():
      raise OSError("connection lost")  # without an error number
    return super().read(min(size, 4))


fsspec.register_implementation("outofreach", OutOfReach, clobber=True)


def test_what_fails_on_the_way_is_neither_absence_nor_damage(monkeypatch):
  """Else its text would be missing in silence, or all of it be none."""
  Faulty.reset()
  files = fsspec.filesystem("outofreach")
  for name in ("a.txt", "inner/b.txt", "broken/break.txt"):
    files.pipe(f"/place/{name}", b"some text")
  assert len(read_corpus(["outofreach://place/inner"]).documents) == 1
  for path, refused, why in (
    ("place", ("info",), "no credentials"),
    ("place", ("list",), "no credentials"),
    ("place", ("list /place/inner",), "no credentials"),
    ("place/broken", (), "connection lost"),
    ("place/broken/break.txt", (), "connection lost"),
  ):
    monkeypatch.setattr(OutOfReach, "refused", refused)
    message = f"data outofreach://.*: cannot be reached: {why}"
    with pytest.raises(UserError, match=message):
      read_corpus([f"outofreach://{path}"])
  Faulty.reset()


def test_what_reads_another_machine_is_named_where_it_is_missing(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  for path in ("gs://bucket/x", pathlib.Path("gs://bucket/x")):
    with pytest.raises(UserError, match="data gs://bucket/x: .*gcsfs"):
      read_corpus([path])
    with pytest.raises(UserError, match="data gs://bucket/x: .*gcsfs"):
      TrainConfig(data=(pathlib.Path(path),))
  with pytest.raises(
    UserError, match="data nowhere://x: cannot be reached: Proto"
  ):
    read_corpus(["nowhere://x"])
  monkeypatch.setitem(sys.modules, "fsspec", None)
  with pytest.raises(UserError, match=r"needs fsspec; .*gemma\[remote\]"):
    read_corpus(["memory://x"])
  assert not list(tmp_path.iterdir()), "a local folder was made"
