"""The command line: quick, and one line for every mistake of the user's."""

import ast
import importlib
import inspect
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import types
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from pallas_gemma import gemma
from pallas_gemma.gemma import main

pytestmark = pytest.mark.no_interpreter

HERE = pathlib.Path(__file__)
TINY = (
  "--batch-size 2 --sequence-length 8 --model.vocab-size 400 "
  "--model.num-layers 1 --model.width 8 --model.hidden-size 16 "
  "--model.num-heads 1 --model.head-size 8 --model.context-length 32"
).split()


@pytest.fixture(autouse=True)
def compilation_cache():
  """Commands choose one for the process; other tests have none."""
  yield
  reset_cache()
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def run(capfd, *arguments) -> tuple[Any, str, str]:
  """Exit code, standard output, standard error."""
  with pytest.raises(SystemExit) as end:
    main([str(a) for a in arguments])
  out, err = capfd.readouterr()
  return end.value.code, out, err


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
  """Of a short run, by the command."""
  directory = tmp_path_factory.mktemp("runs") / "short"
  with pytest.raises(SystemExit) as end:
    main(
      ["train", "--data", str(HERE), "--work-dir", str(directory)]
      + ["--steps", "3", *TINY]
    )
  assert end.value.code == 0
  return directory


def test_train_ends_with_perplexities_and_a_sample(work_dir, capfd):
  code, out, err = run(
    capfd, "train", "--data", HERE, "--work-dir", work_dir, "--steps", 3, *TINY
  )
  assert (code, err) == (0, "")
  assert out.startswith("training is complete: 3 of 3 steps")
  assert "held-out perplexity" in out and "(unigram)" in out
  _, sample = out.split(f"a sample from {work_dir}:\n\n")
  assert len(sample.splitlines()) > 1


def test_sample_continues_prompts(work_dir, capfd):
  arguments = ("sample", "--checkpoint", work_dir, "--prompt", "def", "import")
  code, out, err = run(capfd, *arguments, "--max-new-tokens", 9)
  assert (code, err) == (0, "")
  first, second = out.split("---\n")
  assert first.startswith("def") and second.startswith("import")
  assert run(capfd, *arguments, "--max-new-tokens", 9)[1] == out
  other = run(capfd, *arguments, "--max-new-tokens", 9, "--seed", 1)[1]
  assert other != out


def test_sample_hands_every_setting_to_the_sampler(
  work_dir, monkeypatch, capfd
):
  asked, call = {}, gemma.Sampler.__call__

  def record(sampler, prompts, *, stream, **settings):
    asked.update(settings, prompts=prompts, batch_size=sampler.batch_size)
    return [gemma.Completion("text", (), (), "stop")] * len(prompts)

  monkeypatch.setattr(gemma.Sampler, "__call__", record)
  wanted = dict(
    max_new_tokens=6,
    temperature=0.9,
    top_k=50,
    top_p=0.5,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.1,
    frequency_penalty=0.2,
    logit_bias={0: -3.5, 3: -math.inf},
    seed=3,
    stop=(".", "\n\n"),
    speculate=2,
    batch_size=2,
  )
  arguments = ["sample", "--checkpoint", work_dir, "--prompt", "def", "for"]
  for name, value in wanted.items():
    match value:
      case dict():
        values = [n for pair in value.items() for n in pair]
      case tuple():
        values = [*value]
      case _:
        values = [value]
    arguments += [f"--{name.replace('_', '-')}", *values]
  assert run(capfd, *arguments) == (0, "def\n---\nfortext\n", "")
  assert asked == wanted | dict(prompts=["def", "for"])
  names = {*inspect.signature(call).parameters}
  unasked = {"self", "stream", "stop_tokens"}
  assert names - unasked == {*asked} - {"batch_size"}, "a setting without flag"


def test_a_reader_that_leaves_ends_the_command(work_dir, monkeypatch):
  """As `| head` does: without a traceback, with the code of SIGPIPE."""
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, "w") as pipe:
    monkeypatch.setattr(sys, "stdout", pipe)
    with pytest.raises(SystemExit) as end:
      main(["sample", "--checkpoint", str(work_dir), "--prompt", "def"])
    assert end.value.code == 141


def test_ctrl_c_between_tokens_ends_the_command(work_dir, monkeypatch, capfd):
  text = importlib.import_module("pallas_gemma.gemma._sample.text")
  added = []

  def add(row, token, logprob):
    added.append(token)
    if len(added) == 3:
      signal.raise_signal(signal.SIGINT)

  monkeypatch.setattr(text.Row, "add", add)
  code, out, err = run(
    capfd, "sample", "--checkpoint", work_dir, "--prompt", "def"
  )
  assert (code, out) == (130, "def") and len(added) == 3
  assert err == "\npallas-gemma: interrupted\n"


def test_compiled_programs_stay_with_the_run(work_dir):
  assert (work_dir / "compiled").is_dir()


# --- mistakes ---


def write(path: pathlib.Path, content: bytes) -> pathlib.Path:
  path.write_bytes(content)
  return path


MISTAKES = {
  "no such command": (lambda d: ["tarin"], "unknown command 'tarin'"),
  "no such option": (
    lambda d: ["train", "--stepz", 3],
    "Unrecognized options: --stepz, 3",
  ),
  "no number": (lambda d: ["train", "--steps", "x"], "Error parsing --steps"),
  "wrong number": (
    lambda d: ["train", "--steps", 0],
    "steps: wanted 1 or more, got 0",
  ),
  "wrong model": (
    lambda d: ["train", "--model.head-size", 3],
    "head_size must be even",
  ),
  "missing data": (
    lambda d: ["train", "--data", d / "none.txt"],
    "none.txt: no such file or folder; check --data",
  ),
  "binary data": (
    lambda d: ["train", "--data", write(d / "b.txt", b"a\0b")],
    "b.txt: binary, not text; give UTF-8 text files",
  ),
  "empty data": (
    lambda d: ["train", "--data", write(d / "e.txt", b"")],
    "e.txt: no text in it",
  ),
  "large vocabulary": (
    lambda d: ["train", "--data", write(d / "s.txt", b"few words\n" * 9)],
    "vocab_size 2048: too large for this text, which supports at most ",
  ),
  "long rows": (
    lambda d: (
      ["train", "--data", HERE, *TINY]
      + ["--model.context-length", 99999, "--sequence-length", 99999]
    ),
    "sequence_length 99999: longer than the training text",
  ),
  "work directory is a file": (
    lambda d: ["train", "--work-dir", write(d / "w", b"")],
    "w: is a file; give --work-dir another place",
  ),
  "unwritable work directory": (
    lambda d: ["train", "--work-dir", "/dev/null/w"],
    "/dev/null/w: cannot write",
  ),
  "no tokenizer": (
    lambda d: ["train", "--tokenizer", HERE],
    "not a SentencePiece model",
  ),
  "no checkpoint": (
    lambda d: ["sample", "--checkpoint", d],
    "no config.json",
  ),
  "no pair": (
    lambda d: ["sample", "--checkpoint", d, "--logit-bias", 5],
    "--logit-bias",
  ),
  "no checkpoint given": (
    lambda d: ["sample"],
    "--checkpoint",
  ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
  mistake, tmp_path, monkeypatch, capfd
):
  arguments, message = MISTAKES[mistake]
  monkeypatch.chdir(tmp_path)  # where runs/ would go by default
  code, out, err = run(capfd, *arguments(tmp_path))
  assert (code, out) == (2, "")
  assert err.startswith("pallas-gemma: ") and message in err
  assert err.count("\n") == 1 and err.endswith("\n")


def test_a_damaged_checkpoint_is_one_line_and_nothing_is_lost(work_dir, capfd):
  path = max(
    (work_dir / "checkpoints").rglob("d/*"), key=lambda p: p.stat().st_size
  )
  content = path.read_bytes()
  for command in (
    ("sample", "--checkpoint", work_dir),
    (
      *("train", "--data", HERE, "--work-dir", work_dir, "--steps", 4, *TINY),
      "--allow-change",
    ),
  ):
    path.write_bytes(content[:-1])
    code, _, err = run(capfd, *command)
    assert code == 2 and err.count("\n") == 1
    assert f"{path}: cut, {len(content) - 1:,} of {len(content):,}" in err
    path.write_bytes(content)
  assert run(capfd, "sample", "--checkpoint", work_dir)[0] == 0


def test_a_run_of_another_config_is_one_line(work_dir, capfd):
  code, _, err = run(
    capfd,
    *("train", "--data", HERE, "--work-dir", work_dir, *TINY),
    *("--seed", 5),
  )
  assert code == 2 and err.count("\n") == 1
  assert "training.seed = 0, and now training.seed = 5" in err


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
  def broken(config):
    raise KeyError("a bug")

  monkeypatch.setattr("pallas_gemma.gemma._train.trainer.train", broken)
  with pytest.raises(KeyError, match="a bug"):
    main(["train", "--work-dir", str(tmp_path)])


# --- importing ---


def python(code: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-P", "-c", code], capture_output=True, text=True
  )


def test_help_does_not_wait_for_jax():
  done = python(
    "import sys\n"
    "from pallas_gemma.gemma import main\n"
    "try: main(['--help'])\n"
    "finally: assert not {'jax', 'flax', 'tyro'} & {*sys.modules}"
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("usage: pallas-gemma COMMAND")


@pytest.mark.parametrize("command", ["train", "sample"])
def test_help_of_a_command_lists_options_with_defaults(command, capfd):
  code, out, err = run(capfd, command, "--help")
  assert (code, err) == (0, "")
  assert "(default: " in out and "--help" in out


def test_version(capfd):
  code, out, err = run(capfd, "--version")
  jax_too = re.escape(f"jax {jax.__version__}, ")
  wanted = rf"pallas-gemma \d[\w.]* \(Python 3\S+, {jax_too}.*\)\n"
  assert (code, err) == (0, "") and re.fullmatch(wanted, out)


def test_a_missing_package_is_said_with_the_remedy():
  for package in ("flax", "lazy_loader"):
    done = python(
      f"import sys; sys.modules['{package}'] = None\n"
      "from pallas_gemma import gemma\n"
      "gemma.Gemma"
    )
    assert f"needs '{package}', which is not installed" in done.stderr
    assert "pip install 'pallas-gemma[gemma]'" in done.stderr


def test_every_public_name_is_declared_and_imported_alike():
  """Type checkers and Python both read the imports of __init__.pyi."""
  stub = pathlib.Path(gemma.__file__).with_suffix(".pyi")
  declared = {
    alias.name: node.module
    for node in ast.parse(stub.read_text()).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
  }
  assert dir(gemma) == sorted(declared)
  for name, module in declared.items():
    value = getattr(gemma, name)
    assert value is not None and not isinstance(value, types.ModuleType)
    home = importlib.import_module(f"pallas_gemma.gemma.{module}")
    assert value is getattr(home, name)
  with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
    getattr(gemma, "nonsense")  # noqa: B009 (type checkers know it is not)
