"""What the commands and the library are given that they cannot take."""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from pallas_gemma import gemma
from pallas_gemma.gemma import (
  KERNELS,
  REFERENCE,
  Gemma,
  OptimizerConfig,
  Sampler,
  Tokenizer,
  TrainConfig,
  UserError,
  main,
  save_checkpoint,
)
from small_gemma import ONE_LAYER

_console, key_of = (
  importlib.import_module("pallas_gemma.gemma._console"),
  importlib.import_module("pallas_gemma.gemma._seeds").key_of,
)
pytestmark = pytest.mark.no_interpreter

CONFIG = dataclasses.replace(ONE_LAYER, vocab_size=300)
LONE = "a\udcffb"  # what Python makes of the bytes "a\xffb" in an argument


def tokenizer() -> Tokenizer:
  return Tokenizer.train(["The quick brown fox, again and again. " * 9], 300)


@pytest.fixture(scope="module")
def model():
  return Gemma(CONFIG, rngs=nnx.Rngs(0), ops=REFERENCE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
  directory = tmp_path_factory.mktemp("checkpoint")
  save_checkpoint(directory, model, tokenizer())
  return directory


@pytest.fixture(autouse=True)
def compilation_cache():
  """Commands choose one for the process; other tests have none."""
  yield
  reset_cache()
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def run(capfd, *arguments):
  """Exit code, standard output, standard error."""
  with pytest.raises(SystemExit) as end:
    main([str(argument) for argument in arguments])
  out, err = capfd.readouterr()
  return end.value.code, out, err


# --- options ------------------------------------------------------------------

SAMPLE = {
  "--prompt": "--prompt: nothing follows it",
  "--stop": "--stop: nothing follows it",
  "--prompt -a": "a value that begins with a dash is given as --option=VALUE",
  "--logit-bias": "--logit-bias: nothing follows it",
  "--prompt a --prompt b": "--prompt: given twice; give all its values",
  "--stop a --seed 1 --stop b": "--stop: given twice",
  "--logit-bias 5 1 5 2": "--logit-bias: 5 is given twice",
  f"--prompt {LONE}": "its character 1, U+DCFF (byte 0xff), is no character",
  f"--prompt The {LONE}": "is no character",
  "--prompt " + "0" * 40: "prompt 0 has 41 tokens",
  f"--prompt The {'0' * 40}": "prompt 1 has 41 tokens",
  "--prompt The --max-new-tokens 31": "31 more than the 32 there is room for",
  "--max-new-tokens 0": "max_new_tokens must be at least 1, got 0",
  "--max-new-tokens -1": "max_new_tokens must be at least 1, got -1",
  "--max-new-tokens 999999999999999999999": "there is room for",
  "--seed -1": "seed must be a whole number from 0 to 2^63 - 1, got -1",
  f"--seed {2**63}": "seed must be a whole number from 0 to 2^63 - 1",
  "--seed 1.5": "Error parsing --seed",
  "--temperature nan": "temperature must be 0 or more, and finite, got nan",
  "--temperature 1e300": "temperature must be 0 or more, and finite",
  "--repetition-penalty 1e-300": "repetition_penalty must be above 0",
  "--repetition-penalty 1e300": "repetition_penalty must be",
  "--presence-penalty 1e39": "presence_penalty must be a finite number",
  "--frequency-penalty=-1e39": "frequency_penalty must be a finite number",
  "--logit-bias 5 1e39": "logit_bias must be finite",
  "--top-k 0": "top_k must be at least 1",
  "--batch-size 0": "batch_size must be at least 1",
  "--speculate 32": "speculate must be from 0 to 31",
  "--step 77": "no complete step 77",
}


@pytest.mark.parametrize("options", SAMPLE)
def test_sample_refuses_before_it_prints(options, checkpoint, capfd):
  """One line, and not a prompt before it."""
  code, out, err = run(
    capfd, "sample", "--checkpoint", checkpoint, *options.split()
  )
  assert (code, out) == (2, "")
  assert err.startswith("pallas-gemma: ") and SAMPLE[options] in err
  assert err.count("\n") == 1


def test_sample_refuses_an_empty_stop_string_and_path(checkpoint, capfd):
  arguments = ("sample", "--checkpoint", checkpoint)
  _, out, err = run(capfd, *arguments, "--stop", ".", "")
  assert out == "" and "stop must be texts that are not empty" in err
  _, _, err = run(capfd, "sample", "--checkpoint", "")
  assert "--checkpoint: an empty path" in err
  _, _, err = run(capfd, *arguments, "--stop", LONE)
  assert "stop: its character 1, U+DCFF (byte 0xff), is no character" in err
  for command in (["inspect"], ["plot"], ["plot", "--out", "x.png"]):
    assert ": an empty path; give one" in run(capfd, *command, "")[2]


TRAIN = {
  "--data": "--data: nothing follows it",
  "--data --steps 1": "--data: nothing follows it",
  "--data a --data b": "--data: given twice; give all its values",
  "--data a ./a": "/a is given twice; give it once",
  "--data=": "--data: an empty path",
  "--work-dir=": "--work-dir: an empty path",
  "--work_dir=": "--work-dir: an empty path",
  "--tokenizer=": "--tokenizer: an empty path",
  "--seed -1": "seed: wanted a whole number from 0 to 2^63 - 1, got -1",
  f"--seed {2**63}": "seed: wanted a whole number from 0 to 2^63 - 1",
  f"--steps {10**30}": "steps: wanted less than 2^31",
  f"--batch-size {2**31}": "batch_size: wanted less than 2^31",
  "--z-loss inf": "z_loss: wanted 0 or more, and finite",
  "--z-loss nan": "z_loss: wanted 0 or more, and finite",
  "--held-out nan": "held_out: wanted between 0 and 1",
  "--optimizer.learning-rate inf": "learning_rate: wanted more than 0, and",
  "--optimizer.learning-rate nan": "learning_rate: wanted more than 0, and",
  "--optimizer.weight-decay inf": "weight_decay: wanted 0 or more, and finite",
  "--optimizer.epsilon inf": "epsilon: wanted more than 0, and finite",
  "--optimizer.epsilon 1e300": "epsilon: wanted more than 0, and finite",
  "--optimizer.clip-norm 1e300": "clip_norm: wanted more than 0, or inf",
  "--optimizer.clip-norm nan": "clip_norm: wanted more than 0",
  "--model.norm-epsilon nan": "norm_epsilon must be a positive number",
  "--model.rope-base-frequency 1e300": "must be a positive number of float32",
  f"--model.vocab-size {10**12}": "vocab_size must be less than 2^31",
  f"--model.num-layers {2**31}": "num_layers must be less than 2^31",
  "--model.num-layers -1": "num_layers must be a positive integer",
}


@pytest.mark.parametrize("options", TRAIN)
def test_train_refuses_before_it_begins(options, tmp_path, monkeypatch, capfd):
  monkeypatch.chdir(tmp_path)
  code, out, err = run(capfd, "train", *options.split())
  assert (code, out) == (2, "")
  assert err.startswith("pallas-gemma: ") and TRAIN[options] in err
  assert err.count("\n") == 1
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("width", ["1", "20"])
def test_help_can_be_read_in_a_narrow_terminal(width):
  """It never ended, or had a letter in each of 5,000 lines."""
  code = "from pallas_gemma.gemma import main; main(['plot', '--help'])"
  done = subprocess.run(
    [sys.executable, "-P", "-c", code],
    env={**os.environ, "COLUMNS": width},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert "what the curves are drawn over" in done.stdout


def test_a_message_is_the_same_where_no_box_can_be_drawn(monkeypatch, capfd):
  """tyro draws its messages with other characters there."""
  mistake = ("sample", "--checkpoint", "c", "--seed", "x")
  wanted = run(capfd, *mistake)[2]
  assert wanted.startswith("pallas-gemma: Error parsing --seed")
  assert "--help lists" in wanted and "---" not in wanted
  ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  monkeypatch.setattr(sys, "stdout", ascii_only)
  assert run(capfd, *mistake)[2] == wanted


def test_later_values_of_a_single_option_count(monkeypatch):
  """As of any command: an alias can be overridden."""
  options = importlib.import_module("pallas_gemma.gemma._options")
  parsed = options.parse(TrainConfig, "train", ["--steps=3", "--steps", "5"])
  assert parsed.steps == 5


# --- the console --------------------------------------------------------------


def echo(monkeypatch, text):
  def call(sampler, prompts, *, stream, **settings):
    stream(0, text)
    return [gemma.Completion(text, (), (), "stop")] * len(prompts)

  monkeypatch.setattr(Sampler, "__call__", call)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_a_console_takes_any_text(encoding, checkpoint, monkeypatch):
  echo(monkeypatch, " né€😀")
  raw = io.BytesIO()
  console = io.TextIOWrapper(raw, encoding=encoding)
  monkeypatch.setattr(sys, "stdout", console)
  with pytest.raises(SystemExit) as end:
    main(["sample", "--checkpoint", str(checkpoint), "--prompt", "日", "€"])
  console.flush()
  shown = raw.getvalue().decode(encoding)
  e = "\\xe9" if encoding == "ascii" else "é"
  tail = f" n{e}\\u20ac\\U0001f600\n"
  assert shown == f"\\u65e5{tail}---\n\\u20ac{tail}"
  assert end.value.code == 0


def test_a_closed_output_is_no_crash(checkpoint, monkeypatch):
  echo(monkeypatch, " value")
  monkeypatch.setattr(sys, "stdout", None)
  with pytest.raises(SystemExit) as end:
    main(["sample", "--checkpoint", str(checkpoint)])
  assert end.value.code == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's")
def test_a_full_disk_is_one_line(checkpoint, monkeypatch, capfd):
  echo(monkeypatch, " value")
  with open("/dev/full", "w") as full:
    monkeypatch.setattr(sys, "stdout", full)
    code, _, err = run(capfd, "sample", "--checkpoint", checkpoint)
  assert code == 2
  assert err == "pallas-gemma: standard output: No space left on device\n"


def test_a_prompt_is_utf8_in_every_locale(checkpoint, monkeypatch, capfd):
  """Python makes surrogates of what is not ASCII in the locale C."""
  echo(monkeypatch, " value")
  prompt = "日".encode().decode("ascii", "surrogateescape")
  code, out, _ = run(
    capfd, "sample", "--checkpoint", checkpoint, "--prompt", prompt
  )
  assert (code, out) == (0, "日 value\n")


def test_a_terminal_says_what_is_waited_for(checkpoint, monkeypatch):
  """On standard error, and not into the text."""
  echo(monkeypatch, " value")

  class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
      return True

  out, err = io.StringIO(), Terminal()
  monkeypatch.setattr(sys, "stdout", out)
  monkeypatch.setattr(sys, "stderr", err)
  monkeypatch.setenv("TERM", "xterm")
  with pytest.raises(SystemExit):
    main(["sample", "--checkpoint", str(checkpoint), "--prompt", "The"])
  assert out.getvalue() == "The value\n"
  assert "compiling" in err.getvalue() and "value" not in err.getvalue()


# --- libtpu without a TPU -----------------------------------------------------


@pytest.fixture
def no_device(monkeypatch):
  """libtpu is installed, and this machine has neither TPU nor GPU."""
  for name in _console._CHOICES:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.delitem(sys.modules, "jax")
  found = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name: object() if name == "libtpu" else found(name),
  )
  monkeypatch.setattr(_console, "has_tpu", lambda: False)
  monkeypatch.setattr(_console.glob, "glob", lambda pattern: [])
  monkeypatch.setattr(
    _console.importlib.metadata, "entry_points", lambda group: ()
  )


def chosen() -> str | None:
  _console.spare_the_search_for_a_tpu()
  return os.environ.get("JAX_PLATFORMS")


def test_without_a_tpu_none_is_looked_for(no_device):
  assert chosen() == "cpu"


@pytest.mark.parametrize("there", ["a TPU", "a GPU", "a plugin", "a choice"])
def test_what_there_is_is_left_alone(there, no_device, monkeypatch):
  match there:
    case "a TPU":
      monkeypatch.setattr(_console, "has_tpu", lambda: True)
    case "a GPU":
      monkeypatch.setattr(_console.glob, "glob", lambda pattern: [pattern])
    case "a plugin":
      plugins = _console.importlib.metadata
      monkeypatch.setattr(plugins, "entry_points", lambda group: ["metal"])
    case "a choice":
      monkeypatch.setenv("TPU_NAME", "far-away")
  assert chosen() is None


def test_a_tpu_is_known_by_its_files(monkeypatch, tmp_path):
  files: dict[str, list[str]] = {}
  monkeypatch.setattr(_console.glob, "glob", lambda p: files.get(p, []))
  assert not _console.has_tpu()
  for pattern in ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*"):
    files[pattern] = ["x"]
    assert _console.has_tpu()
    files.clear()
  files["/sys/bus/pci/devices/*"] = [str(tmp_path)]
  for vendor, kind, want in (
    ("0x1ae0", "0x088000", True),
    ("0x1ae0", "0x020000", False),  # the network card of Google's cloud
    ("0x8086", "0x088000", False),
  ):
    (tmp_path / "vendor").write_text(f"{vendor}\n")
    (tmp_path / "class").write_text(f"{kind}\n")
    assert _console.has_tpu() is want
  (tmp_path / "vendor").unlink()
  assert not _console.has_tpu()


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None or _console.has_tpu(),
  reason="libtpu without a TPU",
)
def test_libtpu_says_nothing_without_a_tpu():
  environment = {
    name: value
    for name, value in os.environ.items()
    if name not in _console._CHOICES
  }
  done = subprocess.run(
    [sys.executable, "-P", "-c"]
    + [
      "from pallas_gemma.gemma import _console\n"
      "_console.spare_the_search_for_a_tpu()\n"
      "import jax; print(jax.default_backend())"
    ],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert (done.stdout, done.stderr, done.returncode) == ("cpu\n", "", 0)


# --- seeds --------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "1", None])
def test_seeds_are_whole_numbers_of_63_bits(seed):
  with pytest.raises(UserError, match="wanted a whole number from 0 to 2"):
    TrainConfig(seed=seed)
  sample = Sampler(Gemma(CONFIG, rngs=nnx.Rngs(0)), tokenizer())
  for each in (seed, [seed]):
    with pytest.raises(UserError, match="seed must be"):
      sample.check(["The"], max_new_tokens=1, seed=each)


def test_all_bits_of_a_seed_count():
  seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62, 2**63 - 1]
  keys = {tuple(np.asarray(jax.random.key_data(key_of(s)))) for s in seeds}
  assert len(keys) == len(seeds)
  for seed in seeds[:4]:
    assert key_of(seed) == jax.random.key(seed)
  assert TrainConfig(seed=2**63 - 1).seed == 2**63 - 1
  sample = Sampler(Gemma(CONFIG, rngs=nnx.Rngs(0)), tokenizer())
  for seed in (np.int64(5), np.uint32(5), [5], np.array([5])):
    sample.check(["The"], max_new_tokens=1, seed=seed)


def test_what_ends_the_texts_ends_the_training_of_a_tokenizer():
  def texts():
    yield "fox " * 99
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    Tokenizer.train(texts(), 300)


def test_what_keeps_all_is_left_out_exactly():
  """A cut at 1 would drop what float32 rounds away; that at None does not."""
  settings = importlib.import_module("pallas_gemma.gemma._sample.settings")
  for keeps_all in (
    dict(),
    dict(top_p=1.0),
    dict(top_p=1),
    dict(top_p=float(np.nextafter(1.0, 0.0))),  # 1 in float32
    dict(min_p=0.0),
    dict(min_p=1e-300),  # 0 in float32
    dict(top_k=300),
    dict(top_k=2**40),
  ):
    asked = settings.Request(
      max_new_tokens=1, stop_tokens=(), logit_bias={}, **keeps_all
    )
    assert asked.settings(300, 300).cut == (None, None, None), keeps_all
  below = settings.Request(
    max_new_tokens=1, stop_tokens=(), logit_bias={}, top_p=0.9999
  )
  assert below.settings(300, 300).cut.top_p == np.float32(0.9999)


def test_a_bound_that_is_none_is_allowed():
  assert math.isinf(OptimizerConfig(clip_norm=math.inf).clip_norm)


# --- texts --------------------------------------------------------------------


@pytest.mark.parametrize(
  "text", [LONE, "\ud800", "é" * 99 + "\udfff"], ids=["byte", "one", "late"]
)
def test_text_that_is_none_is_refused(text):
  message = rf"its character {len(text.rstrip('b')) - 1}, U\+D[8CF]"
  with pytest.raises(UserError, match=message):
    tokenizer().encode(text)
  with pytest.raises(UserError, match=message):
    Tokenizer.train(["fox " * 99, text], 300)


@pytest.mark.parametrize("prompt", [5, None, b"The", ["The"]])
def test_a_prompt_that_is_no_text_is_refused(prompt, model):
  with pytest.raises(UserError, match="prompt 1 must be a text, got a"):
    Sampler(model, tokenizer()).check(["The", prompt], max_new_tokens=1)


# --- names --------------------------------------------------------------------


@pytest.mark.parametrize("package", ["gemma", "kernels", "bench"])
def test_a_star_brings_every_public_name(package):
  module = importlib.import_module(f"pallas_gemma.{package}")
  brought: dict[str, object] = {}
  exec(f"from pallas_gemma.{package} import *", brought)
  brought.pop("__builtins__")
  stub = pathlib.Path(str(module.__file__)).with_suffix(".pyi")
  source = stub if stub.exists() else pathlib.Path(str(module.__file__))
  declared = {
    line.rsplit(" as ")[-1].strip()
    for line in source.read_text().splitlines()
    if " as " in line and line.startswith("from ")
  }
  public = {name for name in declared if not name.startswith("_")}
  assert len(public) > 20 and public <= {*brought} <= {*dir(module)}
  assert not any(name.startswith("_") for name in brought)
  for name, value in brought.items():
    assert value is getattr(module, name)


def test_models_and_ops_can_be_pickled(model):
  for ops in (KERNELS, REFERENCE):
    assert pickle.loads(pickle.dumps(ops)) is ops
  again = pickle.loads(pickle.dumps(model))
  assert again.ops is model.ops and again.config == model.config
  np.testing.assert_array_equal(
    again.embedder.embedding[...], model.embedder.embedding[...]
  )
  config = TrainConfig(seed=2**40)
  assert pickle.loads(pickle.dumps(config)) == config
  words = tokenizer()
  assert pickle.loads(pickle.dumps(words)).encode("fox") == words.encode("fox")


# --- arguments of a wrong kind ------------------------------------------------


@pytest.mark.parametrize(
  "wrong, message",
  [
    (dict(steps="10"), "steps: wanted a whole number, got '10'"),
    (dict(steps=2.5), "steps: wanted a whole number, got 2.5"),
    (dict(keep=True), "keep: wanted a whole number, got True"),
    (dict(data="a.txt"), "data: wanted a list of paths, got 'a.txt'"),
    (dict(data=(None,)), "data: wanted a list of paths"),
    (dict(data=("a", "b"), mix=(1, 2)), "mix: wanted a list of texts"),
    (dict(work_dir=""), "work_dir: wanted a path or None, got ''"),
    (dict(tokenizer=b"x"), "tokenizer: wanted a path or None"),
    (dict(text_field=5), "text_field: wanted a text or None, got 5"),
    (dict(mesh=8), "mesh: wanted a text, got 8"),
    (dict(head="none"), "head: wanted 'auto' or 'recompute' or 'chunked'"),
    (dict(held_out="0.1"), "held_out: wanted a number, got '0.1'"),
    (dict(eval_batches="some"), "whole number or 'auto' or 'all', got 'some'"),
    (dict(allow_change="no"), "allow_change: wanted True or False, got 'no'"),
    (dict(optimizer={}), "optimizer: wanted an OptimizerConfig, got {}"),
    (dict(model="2b"), "model: wanted a GemmaConfig, got '2b'"),
  ],
)
def test_a_setting_of_another_kind_is_named(wrong, message):
  with pytest.raises(UserError) as error:
    TrainConfig(**wrong)
  assert message in str(error.value)


def test_settings_become_what_their_types_say():
  config = TrainConfig(
    data=["a.txt"],  # type: ignore[arg-type]
    work_dir="run",
    steps=np.int64(4),  # type: ignore[arg-type]
    held_out=np.float32(0.5),  # type: ignore[arg-type]
    save_in_background=np.True_,  # type: ignore[arg-type]
    optimizer=OptimizerConfig(learning_rate=1),
  )
  assert config.data == (pathlib.Path("a.txt"),)
  assert config.work_dir == pathlib.Path("run")
  json.dumps([config.steps, config.held_out, config.save_in_background])


A_MODEL = "wanted a Gemma, got"
A_PATH = "wanted a path, got None"


@pytest.mark.parametrize(
  "name, arguments, message",
  [
    ("train", ({"steps": 3},), "config: wanted a TrainConfig"),
    ("load_checkpoint", (None,), f"checkpoint: {A_PATH}"),
    ("save_checkpoint", (None, "model", "text"), f"directory: {A_PATH}"),
    ("save_checkpoint", ("x", None, "text"), f"model: {A_MODEL} None"),
    ("save_checkpoint", ("x", "model", None), "tokenizer: wanted a Tokenizer"),
    ("best_step", (None,), f"checkpoint: {A_PATH}"),
    ("read_record", ("x", "4"), "step: wanted a whole number"),
    ("read_metrics", (None,), f"run: {A_PATH}"),
    ("plot_runs", ("run", "x.png"), "runs: wanted a list of work directories"),
    ("plot_runs", (["run"], "x.png", "foo"), "axis: wanted step or tokens or"),
    ("read_corpus", ("a.txt",), "data: wanted a list of paths, got 'a.txt'"),
    ("read_corpus", ([5],), "data: wanted a path, got 5"),
    ("split_documents", (["abc"], 0.1, 0), "documents: wanted a Document"),
    ("split_documents", ([], 0.1, 0), "documents: none has text"),
    ("tokenize", ([], "tokens"), "tokenizer: wanted a Tokenizer"),
    ("pack", ([], 0), "sequence_length: wanted a whole number from 1"),
    ("training_batches", (None, 2.5, 0), "batch_size: wanted a whole number"),
    ("make_optimizer", ({}, 3), "config: wanted an OptimizerConfig, got {}"),
    ("flops_per_token", ({}, 3), "config: wanted a GemmaConfig"),
    ("Tokenizer", ("path",), "(Tokenizer.load takes a path), got 'path'"),
    ("Sampler", (None, "text"), "model must be a Gemma"),
    ("Sampler", ("model", None), "tokenizer must be a Tokenizer"),
  ],
)
def test_an_argument_of_another_kind_is_named(name, arguments, message, model):
  known = {"model": model, "text": tokenizer()}
  with pytest.raises(UserError) as error:
    getattr(gemma, name)(*[known.get(str(x), x) for x in arguments])
  assert message in str(error.value)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(prompts=5), "prompts: wanted a list of texts, got 5"),
    (dict(temperature="hot"), "temperature must be a number, got 'hot'"),
    (dict(top_p=None, min_p="x"), "min_p must be a number or None, got 'x'"),
    (dict(logit_bias=[1, 2]), "logit_bias must be a dict, got [1, 2]"),
    (dict(logit_bias={1: "a"}), "logit_bias must be of numbers, got 'a'"),
    (dict(stop_tokens=5), "stop_tokens must be a list, got 5"),
    (dict(stop=5), "stop must be a list of texts, got 5"),
    (dict(stream=5), "stream must be a function, or None, got 5"),
  ],
)
def test_an_argument_of_a_sampler_of_another_kind_is_named(
  arguments, message, model
):
  settings = dict(prompts=["The"], max_new_tokens=1) | arguments
  with pytest.raises(UserError) as error:
    Sampler(model, tokenizer())(settings.pop("prompts"), **settings)
  assert message in str(error.value)


@pytest.mark.parametrize(
  "name, value",
  [("encode", None), ("encode", b"a"), ("decode", "ab"), ("decode", [1.5])],
)
def test_a_tokenizer_names_what_it_cannot_take(name, value):
  with pytest.raises(UserError) as error:
    getattr(tokenizer(), name)(value)
  assert str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize(
  "texts, size, message",
  [
    ("one text", 300, "texts: wanted several texts, got 'one text'"),
    ([5], 300, "text: wanted a text, got 5"),
    (["text"], 0, "vocab_size: wanted a whole number from 1"),
  ],
)
def test_a_tokenizer_is_not_learnt_from_anything(texts, size, message):
  with pytest.raises(UserError, match=message):
    Tokenizer.train(texts, size)
