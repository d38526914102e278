"""A run loses nothing: whatever ends it, in whatever state its output is, and
whoever else wants its directory."""

import contextlib
import dataclasses
import errno
import importlib
import io
import json
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest
import rich.console
from heard import heard
from pallas_gemma.gemma import (
  OptimizerConfig,
  TrainConfig,
  UserError,
  evaluation_batches,
  load_checkpoint,
  main,
  pack,
  read_metrics,
  save_checkpoint,
  train,
)
from small_gemma import ONE_LAYER as MODEL
from small_gemma import printed as run

pytestmark = [
  pytest.mark.no_interpreter,
  pytest.mark.usefixtures("compiled_once", "traced_once"),
]


def room(name: str) -> Any:
  """A module of the package."""
  return importlib.import_module(f"pallas_gemma.gemma.{name}")


STEPS = 12
TEXT = pathlib.Path(room("_cli").__file__)  # one text, of the package


def config(work_dir: pathlib.Path, **changes) -> TrainConfig:
  fixed: dict[str, Any] = dict(
    data=(TEXT,),
    work_dir=work_dir,
    steps=STEPS,
    batch_size=2,
    sequence_length=8,
    evaluate_every=4,
    eval_batches=3,
    save_every=4,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
    model=MODEL,
  )
  return TrainConfig(**fixed | changes)


def steps(directory: pathlib.Path) -> list[int]:
  """Those with a complete checkpoint."""
  written = directory.glob("checkpoints/*/checksums.json")
  return sorted(int(path.parent.name) for path in written)


def numbers(directory: pathlib.Path) -> dict[int, tuple[float | None, ...]]:
  """What is the same in two runs, by step."""
  lines = (directory / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert len({r["step"] for r in records}) == len(records)
  keys = ("loss", "gradient_norm", "held_out_loss", "unigram_loss")
  return {r["step"]: tuple(r.get(k) for k in keys) for r in records}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The directory of an undisturbed run."""
  directory = tmp_path_factory.mktemp("runs") / "finished"
  printed = run(config(directory))
  # Of 3 x 2 x 8, those but that may be the end of the text.
  assert re.search(
    r"evaluates 4\d held-out tokens, 3 batches, every 4", printed
  )
  return directory


@pytest.fixture
def copy(finished, tmp_path):
  """The same, to be changed."""
  return shutil.copytree(finished, tmp_path / "copy")


# --- the command, its output and its signals ---


@pytest.fixture
def command(compiled_once):
  """Starts `pallas-gemma train`, long enough to be stopped by what follows."""
  started = []

  def start(work_dir, *options, data=TEXT, **streams) -> subprocess.Popen:
    settings = config(work_dir)
    arguments = ["train", "--data", data, "--work-dir", work_dir]
    arguments += ["--steps", 10**6, "--batch-size", 2, "--sequence-length", 8]
    for field in dataclasses.fields(MODEL):
      name = field.name.replace("_", "-")
      arguments += [f"--model.{name}", getattr(settings.model, field.name)]
    # A session's first process takes a terminal that it opens for its own.
    code = "import os; os.isatty(0) and os.open(os.ttyname(0), os.O_RDWR); "
    code += "from pallas_gemma.gemma import main; main()"
    environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": compiled_once,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    child = subprocess.Popen(
      [sys.executable, "-P", "-c", code, *map(str, (*arguments, *options))],
      env=environment,
      **streams,
    )
    started.append(child)
    return child

  yield start
  for child in started:
    with child:  # closes its pipes
      child.kill()


def wait_for(condition, child: subprocess.Popen) -> None:
  while not condition():
    assert child.poll() is None, child.communicate()
    time.sleep(0.01)


def has_records(directory: pathlib.Path, count: int = 1) -> bool:
  with contextlib.suppress(OSError):
    return (directory / "metrics.jsonl").read_bytes().count(b"\n") >= count
  return False


def test_one_process_writes_others_read_and_who_reads_the_output_may_end_first(
  command, tmp_path
):
  """The latter as when `train | tee log` gets a Ctrl-C."""
  directory = tmp_path / "run"
  pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  child = command(directory, "--save-every", 50, **pipe)
  wait_for(lambda: steps(directory), child)
  model, tokenizer = load_checkpoint(directory)
  named = f"in use by process {child.pid} on .*, since 2.*; wait for it or stop"
  with pytest.raises(UserError, match=named):
    run(config(directory, steps=10**6))
  with pytest.raises(UserError, match=named):
    save_checkpoint(directory, model, tokenizer, step=10**7)

  child.stdout.close()
  child.send_signal(signal.SIGINT)
  errors = child.stderr.read().decode()
  assert child.wait() == 128 + signal.SIGINT
  step = steps(directory)[-1]
  assert errors.splitlines() == [
    "",
    "finishing the step and saving; Ctrl-C again to stop at once",
    f"pallas-gemma: stopped after step {step}, which is saved; give the same "
    "command to go on",
  ]
  assert [*numbers(directory)] == [*range(1, step + 1)]
  save_checkpoint(directory, model, tokenizer, step=10**7)
  assert steps(directory)[-1] == 10**7


def test_who_reads_the_output_may_have_stopped_to_read(command, tmp_path):
  """As a pager does, or Ctrl-S; and `timeout` sends its signal twice."""
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  with pytest.raises(BlockingIOError):
    while True:
      os.write(writer, b"x")
  os.set_blocking(writer, True)
  child = command(tmp_path / "run", stdout=writer, stderr=writer)
  wait_for(lambda: has_records(tmp_path / "run"), child)
  for _ in range(2):
    child.send_signal(signal.SIGTERM)
    time.sleep(0.3)
  assert child.wait(60) == 128 + signal.SIGTERM
  assert steps(tmp_path / "run")
  os.close(reader)
  os.close(writer)


def test_the_terminal_may_go(command, tmp_path):
  here, there = pty.openpty()
  child = command(
    tmp_path / "run",
    stdin=there,
    stdout=there,
    stderr=there,
    start_new_session=True,
  )
  os.close(there)

  def read() -> None:
    with contextlib.suppress(OSError):
      while not has_records(tmp_path / "run"):
        if select.select([here], [], [], 0.1)[0]:  # it may print no more
          os.read(here, 4096)
    os.close(here)  # the terminal is gone

  threading.Thread(target=read, daemon=True).start()
  assert child.wait(120) == 128 + signal.SIGHUP
  assert steps(tmp_path / "run")


def test_before_the_first_step_a_signal_ends_at_once(command, tmp_path):
  text = tmp_path / "large.txt"
  text.write_text("\n\n".join(f"{i} {i * i} {i**3}" for i in range(400_000)))
  pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  child = command(tmp_path / "run", data=text, **pipe)
  wait_for((tmp_path / "run" / ".lock.holder").exists, child)
  started = time.monotonic()
  child.send_signal(signal.SIGTERM)
  out, errors = child.communicate()
  assert child.returncode == 128 + signal.SIGTERM
  assert errors == "\npallas-gemma: ended by SIGTERM\n"
  assert out in ("", "reading text: 0%\n")  # by how fast the machine is
  assert time.monotonic() - started < 5
  # Whose process is gone has no lock, whatever it left behind.
  assert (tmp_path / "run" / ".lock.holder").exists()
  with room("_lock").locked(tmp_path / "run"):
    pass
  assert not (tmp_path / "run" / ".lock.holder").exists()


def test_a_signal_that_is_ignored_stays_so():
  """As SIGHUP is under `nohup`."""
  interrupt = room("_train.interrupt")
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with interrupt.ended_at_once(), interrupt.deferred_interrupts() as asked:
      os.kill(os.getpid(), signal.SIGHUP)
      assert asked.signal is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM"])
def test_signals_of_tests_are_heard_where_they_were_ignored(name):
  """Else `nohup make test` would wait for what it ends by SIGHUP."""
  number = signal.Signals[name]
  before = signal.signal(number, signal.SIG_IGN)
  try:
    heard()
    assert signal.getsignal(number) != signal.SIG_IGN
    code = f"import signal; assert signal.getsignal({int(number)}) != 1"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
  finally:
    signal.signal(number, before)


def test_only_a_late_ctrl_c_does_not_wait_for_the_save():
  interrupt = room("_train.interrupt")
  asked = interrupt.Interruption()
  assert asked.is_final(signal.SIGTERM)  # nothing is to be saved
  asked.holds = True
  assert not asked.is_final(signal.SIGINT)
  asked.note(signal.SIGTERM)
  assert not asked.is_final(signal.SIGINT)  # told twice
  asked._since -= 2 * interrupt._REPEATED
  assert asked.is_final(signal.SIGINT)
  assert not asked.is_final(signal.SIGTERM)
  assert not asked.is_final(signal.SIGHUP)
  asked.note(signal.SIGINT)
  assert asked.signal == signal.SIGTERM


# --- where text goes ---


def broken_pipe() -> Any:
  reader, writer = os.pipe()
  os.close(reader)
  return open(writer, "w")


def test_training_for_no_reader_saves_and_ends(finished, tmp_path):
  with broken_pipe() as pipe:
    console = rich.console.Console(file=pipe)
    result = train(config(tmp_path / "run"), console=console)
    assert console.file is pipe
    assert result.interrupted_by == signal.SIGPIPE and result.step < STEPS
  run(config(tmp_path / "run"))
  assert numbers(tmp_path / "run") == numbers(finished)


@pytest.mark.parametrize("where", ["full", "none"])
def test_training_goes_on_where_nothing_can_be_written(
  where, tmp_path, monkeypatch
):
  stream: Any = open("/dev/full", "w") if where == "full" else None
  monkeypatch.setattr(sys, "stdout", stream)
  result = train(config(tmp_path / "run"))
  assert result.interrupted_by is None and steps(tmp_path / "run")[-1] == STEPS
  if stream is not None:
    stream.close()


def test_output_neither_fails_nor_waits():
  output = room("_output").Output
  reader, writer = os.pipe()
  with open(writer, "w") as stream:
    full = output(stream)
    started = time.monotonic()
    for _ in range(20_000):
      full.write(10 * "text ")
    full.drain(0.1)
    assert time.monotonic() - started < 10 and not full.gone
    os.close(reader)
    full.drain(10)
    assert full.gone


def test_output_keeps_the_order_and_writes_what_the_encoding_has():
  output = room("_output").Output
  reader, writer = os.pipe()
  with open(writer, "w", encoding="ascii") as stream:
    stream.write("first, ")
    second = output(stream)
    second.write("second \u20ac")
    second.drain(10)
    assert os.read(reader, 99) == b"first, second \\u20ac"
  os.close(reader)
  direct = io.StringIO()
  third = output(direct)
  third.write("third")
  third.drain()
  assert direct.getvalue() == "third" and not third.isatty()
  direct.close()
  assert third.write("fourth") == 6 and not third.isatty()


COMMANDS = [["--help"], ["sample", "--help"], ["train", "--help"], ["sample"]]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
  "stream, code", [("pipe", 141), ("full", 2), ("none", 0)]
)
def test_a_command_for_nobody_ends_without_traceback(
  finished, arguments, stream, code, monkeypatch, capfd
):
  if arguments == ["sample"]:
    arguments = ["sample", "--checkpoint", str(finished)]
    arguments += ["--max-new-tokens", "2", "--prompt", "def"]
  file: Any = {"pipe": broken_pipe, "none": lambda: None}.get(
    stream, lambda: open("/dev/full", "w")
  )()
  monkeypatch.setattr(sys, "stdout", file)
  with pytest.raises(SystemExit) as end:
    main(arguments)
  assert end.value.code == code
  if file is not None:
    file.close()  # and what Python does at its end meets no error
  said = "pallas-gemma: standard output: No space left on device\n"
  assert capfd.readouterr().err == (said if code == 2 else "")


def test_a_mistake_has_its_code_if_nobody_reads_it(monkeypatch):
  with broken_pipe() as pipe:
    monkeypatch.setattr(sys, "stderr", pipe)
    with pytest.raises(SystemExit) as end:
      main(["nonsense"])
    assert end.value.code == 2
    with contextlib.suppress(OSError):
      pipe.close()


def test_descriptors_that_are_closed_are_not_those_of_files():
  code = (
    "import os; from pallas_gemma.gemma import main\n"
    "try: main(['--help'])\n"
    "except SystemExit: os._exit(os.open(os.devnull, os.O_RDONLY))"
  )
  shell = f'exec "{sys.executable}" -P -c "$0" >&- 2>&-'
  assert subprocess.run(["sh", "-c", shell, code]).returncode > 2


def test_records_that_cannot_be_written_cost_no_step(
  finished, tmp_path, monkeypatch
):
  metrics = room("_train.metrics").Metrics
  write = metrics._write

  def full(self):
    if b'"step": 6' in self._unwritten:
      raise OSError(errno.ENOSPC, "No space left on device")
    write(self)

  monkeypatch.setattr(metrics, "_write", full)
  with pytest.raises(UserError, match="metrics.jsonl: No space .* make room"):
    run(config(tmp_path / "run"))
  assert steps(tmp_path / "run") == [4, 8]


# --- steps that are not taken ---


def not_a_number(*steps: int) -> Any:
  """Training batches, those of some steps with weights that are none."""
  make = room("_data.batches").training_batches

  def batches(*arguments: Any) -> Any:
    of = make(*arguments)

    def batch(step: int) -> Any:
      made = dict(of(step))
      if step in steps:
        made["weights"] = made["weights"] * np.float32("nan")
      return made

    return batch

  return batches


def test_a_step_without_a_gradient_changes_nothing():
  """Not a bit of the state; the next one is as if it had not been."""
  step, guard = room("_train.step"), room("_train.guard")
  settings = config(pathlib.Path(), skip_spikes=3.0, head="recompute")
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, 400, (2, 8), np.int32)
  ones = np.ones_like(tokens)
  batch = {"tokens": tokens, "labels": tokens[::-1], "segment_ids": ones}
  good = {**batch, "weights": np.ones((2, 8), np.float32)}
  bad = {**batch, "weights": np.full((2, 8), np.nan, np.float32)}
  train_step, _ = step.make_steps(settings, 400)

  def after(*batches: Any) -> Any:
    params, state = jax.jit(lambda: step.fresh_state(settings))()
    measured: Any = None
    for each in batches:
      params, state, measured = train_step(params, state, each)
    return jax.device_get((params, state.adamw, state.guard, measured))

  plain, skipped = after(good, good), after(good, bad, bad, good)
  for one, two in zip(
    *map(jax.tree.leaves, (plain[:2], skipped[:2])), strict=True
  ):
    np.testing.assert_array_equal(one, two)
  assert skipped[2] == plain[2]._replace(skipped=2)
  assert after(bad)[3]["skipped_in_a_row"] == 1
  # A spike is one after enough norms are known, and is not in their mean.
  state = guard.fresh_guard()
  for norm in [2.0] * 9 + [90.0] + [1.0] * 60:
    taken, state = guard.judge(state, np.float32(1), np.float32(norm), 3.0)
    assert taken
  mean = float(state.mean_norm)
  for norm, wanted in ((3.1 * mean, False), (np.inf, False), (1.0, True)):
    taken, state = guard.judge(state, np.float32(1), np.float32(norm), 3.0)
    assert bool(taken) == wanted and float(state.mean_norm) <= mean
  assert (int(state.skipped), int(state.in_a_row)) == (2, 0)
  told = json.loads(json.dumps(guard.to_record(state)))
  assert guard.from_record(told) == state
  for wrong in (1.0, 0.0, float("inf")):
    with pytest.raises(UserError, match="skip_spikes: wanted more than 1"):
      config(pathlib.Path(), skip_spikes=wrong)


def test_steps_are_skipped_counted_and_too_many_end_the_run(
  tmp_path, monkeypatch
):
  loop = room("_train.loop")
  monkeypatch.setattr(loop, "training_batches", not_a_number(2, *range(6, 99)))
  settings = config(tmp_path / "run", max_skipped=3, profile="3:5")
  with pytest.raises(UserError, match="step 9; 3 steps in a row"):
    run(settings)
  records = read_metrics(settings.directory)
  assert [r["skipped"] for r in records] == [0, 0, 1, 1, 1, 1, 2, 3, 4, 5]
  in_a_row = {r["step"]: r.get("skipped_in_a_row") for r in records}
  assert {k: v for k, v in in_a_row.items() if v} == (
    {3: 1, 7: 1, 8: 2, 9: 3, 10: 4}
  )
  assert np.isnan(records[2]["loss"]) and "NaN" not in (
    (settings.directory / "metrics.jsonl").read_text()
  )
  # The schedule waits for the steps that are taken.
  rates = [r["learning_rate"] for r in records]
  assert rates[2] == rates[3] and len({*rates[3:7]}) == 4
  assert steps(settings.directory)[-1] == 10
  left = np.load(settings.directory / "skipped-9.npz")
  assert list(left["step"]) == [7, 8, 9] and left["tokens"].shape == (3, 2, 8)
  assert np.isnan(left["weights"]).any()
  assert list((settings.directory / "profile").rglob("*.xplane.pb"))
  # Where the time went: all of it is in one part or another.
  parts = [sum(v for k, v in r.items() if k in PARTS) for r in records]
  between = records[-1]["seconds"] - records[0]["seconds"]
  assert sum(parts[1:]) == pytest.approx(between, abs=0.3)
  useful = [r["step_seconds"] for r in records if not in_a_row[r["step"]]]
  wanted = sum(useful) / records[-1]["wall_seconds"]
  assert records[-1]["goodput"] == pytest.approx(wanted)
  # Once the cause is gone, the same command goes on.
  monkeypatch.undo()
  assert "10 done" in run(settings)
  last = read_metrics(settings.directory)[-1]
  assert (last["step"], last["skipped"]) == (STEPS, 5)
  assert "skipped_in_a_row" not in last
  assert last["wall_seconds"] >= last["seconds"]


PARTS = [
  f"{part}_seconds"
  for part in ("input", "compile", "step", "log", "save", "evaluate", "other")
]


@pytest.mark.parametrize(
  "wrong", ["5", "5:5", "6:5", "a:b", "12:13", "1:" + "9" * 5000]
)
def test_what_is_no_window_of_steps_is_refused(wrong):
  with pytest.raises(UserError, match="profile: wanted"):
    config(pathlib.Path(), profile=wrong)


# --- saving while training goes on ---


def test_steps_are_taken_while_a_checkpoint_is_written(
  finished, tmp_path, monkeypatch
):
  store, loop = room("_checkpoint.store"), room("_train.loop").Loop
  write, take_step, waited = store.write_arrays, loop.take_step, []
  may_go = threading.Event()

  def slow(folder, tree):
    waited.append(may_go.wait(60))
    write(folder, tree)

  def step(self):
    if self.step == 7:
      assert steps(tmp_path / "run") == []
      may_go.set()
    take_step(self)

  monkeypatch.setattr(store, "write_arrays", slow)
  monkeypatch.setattr(loop, "take_step", step)
  run(config(tmp_path / "run"))
  monkeypatch.undo()
  assert waited and all(waited)
  assert numbers(tmp_path / "run") == numbers(finished)
  assert steps(tmp_path / "run") == steps(finished) == [4, 8, 12]
  losses = room("_checkpoint").read_losses
  assert losses(tmp_path / "run") == losses(finished)


# --- mixtures ---


def test_texts_are_mixed_as_asked_for(tmp_path):
  other = TEXT.with_name("_output.py")
  settings = config(
    tmp_path / "run", data=(TEXT, other), mix=("3:1", "1:3"), steps=6
  )
  printed = run(settings)
  assert f"mix       {TEXT}: 75.0% of the first step, 25.0% of" in printed
  assert "packed: 99" in printed or "packed: 100" in printed
  # Each text's rows are its own, but for one at the border.
  opened = room("_train.run").open_run(settings, settings.directory)
  one, two = opened.train_rows.parts()
  assert len(one) + len(two) == len(opened.train_rows)
  decode = opened.tokenizer.decode
  for rows, path in ((one, TEXT), (two, other)):
    text = path.read_text()
    found = [decode(row.tolist()) in text for row in rows.tokens[1:-1]]
    assert sum(found) > 0.8 * len(found)  # others have a copy or an end in them
  with pytest.raises(UserError, match="other settings .* mix 3:1 1:3 -> 1 1"):
    run(dataclasses.replace(settings, mix=("1", "1"), steps=7))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("content", [None, "", "short"])
def test_a_text_of_a_mixture_without_rows_is_named(content, last, tmp_path):
  """A folder without files, a file without text, and one that is held out."""
  empty = tmp_path / "empty"
  empty.mkdir() if content is None else empty.write_text(content)
  data = (TEXT, empty) if last else (empty, TEXT)
  settings = config(tmp_path / "run", data=data, mix=("1", "1"))
  with pytest.raises(UserError, match=f"mix: {empty} has no row of training"):
    run(settings)
  assert not (tmp_path / "run").exists()


def test_a_file_that_goes_to_another_text_of_a_mixture_is_noticed(tmp_path):
  """The text stays what it is, and how often each part is drawn does not."""
  data = tmp_path / "1", tmp_path / "2"
  for folder, name in zip((0, 0, 1), "abc", strict=True):
    data[folder].mkdir(exist_ok=True)
    shutil.copy(TEXT.with_name("_output.py"), data[folder] / f"{name}.py")
  settings = config(tmp_path / "run", data=data, mix=("3", "1"))
  run(settings)
  assert "complete" in run(settings)
  (data[0] / "b.py").rename(data[1] / "b.py")
  with pytest.raises(UserError, match=r"texts.bytes (\d+) (\d+) -> \2 \1;"):
    run(settings)
  allowed = dataclasses.replace(settings, allow_change=True)
  opened = room("_train.run").open_run(allowed, settings.directory)
  assert [change.name for change in opened.changes] == ["texts.bytes"]


@pytest.mark.parametrize(
  "mix, message",
  [
    (("1",), "a weight for each of several --data, got 1 weights for 2"),
    (("1", "x"), "wanted weights such as 2, or 1:3 .* got 'x'"),
    (("1", "-1"), "wanted weights"),
    (("0", "0:1"), "of which one is more than 0"),
    (("1", "1:2:3"), "wanted weights"),
    (("1", "nan"), "wanted weights"),
  ],
)
def test_weights_that_are_none_are_refused(mix, message):
  with pytest.raises(UserError, match=f"mix: .*{message}"):
    config(pathlib.Path(), data=(TEXT, TEXT), mix=mix)


# --- evaluation ---


def test_a_signal_ends_an_evaluation_and_the_step_is_saved(
  finished, tmp_path, monkeypatch
):
  loop, seen = room("_train.loop"), []

  def batches(rows, size, mine):
    for batch in evaluation_batches(rows, size, mine):
      yield batch
      seen.append(len(rows))
      if len(seen) == 2:  # after one to compile, the first of step 4
        os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(loop, "evaluation_batches", batches)
  settings = config(tmp_path / "run", save_every=100)
  result = train(settings, console=rich.console.Console(file=io.StringIO()))
  monkeypatch.undo()
  assert result.interrupted_by == signal.SIGTERM and result.step == 4
  assert steps(tmp_path / "run") == [4] and len(seen) == 2
  assert numbers(tmp_path / "run")[4][2] is None
  # It is evaluated when the run goes on.
  run(settings)
  assert numbers(tmp_path / "run") == numbers(finished)


@pytest.mark.parametrize("step", [4, STEPS])
def test_a_checkpoint_comes_before_its_evaluation(
  finished, step, tmp_path, monkeypatch
):
  loop = room("_train.loop").Loop
  evaluate = loop._evaluate

  def die(self):
    if self.step == step:
      raise RuntimeError("killed")
    evaluate(self)

  monkeypatch.setattr(loop, "_evaluate", die)
  with pytest.raises(RuntimeError, match="killed"):
    run(config(tmp_path / "run"))
  monkeypatch.undo()
  assert steps(tmp_path / "run")[-1] == step
  assert step not in numbers(tmp_path / "run")
  run(config(tmp_path / "run"))
  assert numbers(tmp_path / "run") == numbers(finished)


def test_evaluations_take_a_twentieth_of_the_time():
  """If a batch takes a third of a step."""
  evaluate = room("_train.evaluate")
  for steps, every, wanted in (
    (320, 40, 6),
    (1000, 100, 15),
    (50, 40, 3),  # twice
    (100, 1, 1),  # as asked for
    (3, 40, 1),
  ):
    settings = TrainConfig(steps=steps, evaluate_every=every)
    count = evaluate.num_batches(settings)
    assert count == wanted
    evaluations = -(-steps // every)
    if count > 1:
      assert evaluations * count / 3 <= 0.05 * steps
  assert evaluate.num_batches(TrainConfig(eval_batches="all")) is None
  assert evaluate.num_batches(TrainConfig(eval_batches=7)) == 7
  too_few = 'wanted 1 or more, "auto" or "all"'
  no_count = "wanted a whole number or 'auto' or 'all'"
  for wrong in (0, -1, "some", True):
    message = too_few if type(wrong) is int else no_count
    with pytest.raises(UserError, match=f"eval_batches: {message}, got"):
      TrainConfig(eval_batches=wrong)  # type: ignore[arg-type]


def test_every_evaluation_has_the_same_rows_drawn_by_the_seed():
  evaluate = room("_train.evaluate")
  rows = pack([np.arange(1, 1001)], 10)

  def drawn(count, seed=0) -> list[int]:
    settings = config(pathlib.Path(), eval_batches=count, seed=seed)
    return list(evaluate.evaluation_rows(rows, settings).tokens[:, 0])

  assert len(drawn(5)) == 10 and drawn(5) == drawn(5) == sorted(drawn(5))
  assert {*drawn(5)} < {*drawn(6)} < {*drawn("all")}
  assert drawn(5) != drawn(5, seed=1) != drawn(5, seed=2**63 - 1)
  assert drawn("all") == drawn(50) == drawn(1000) == list(rows.tokens[:, 0])
  # One token each: most rows are the only one with a label.
  short = pack([np.arange(1, 3)] * 40, 1)
  settings = config(pathlib.Path(), eval_batches=1, sequence_length=1)
  for seed in range(8):
    chosen = evaluate.evaluation_rows(
      short, dataclasses.replace(settings, seed=seed)
    )
    assert chosen.num_labels > 0


# --- what a run was made with ---


def test_a_checkpoint_records_what_it_was_made_with(finished):
  path = finished / "checkpoints" / str(STEPS)
  record = json.loads((path / "record.json").read_text())
  settings = config(finished)
  assert record["config"]["optimizer"] == dataclasses.asdict(settings.optimizer)
  assert record["config"]["data"] == [str(TEXT)]
  assert {*record["config"]} == {f.name for f in dataclasses.fields(settings)}
  identity = json.loads((finished / "config.json").read_text())
  assert record["data"] == identity["data"]
  assert record["tokenizer"] == identity["tokenizer"]
  assert record["versions"]["jax"] == jax.__version__
  wanted = {"python", "pallas-gemma", "jaxlib", "flax", "optax"}
  assert wanted < {*record["versions"]}
  kind, count = jax.devices()[0].device_kind, jax.device_count()
  assert record["device"] == {"kind": kind, "count": count}
  metrics = read_metrics(finished)[-1]
  assert record["metrics"]["loss"] == metrics["loss"]
  assert "record.json" in json.loads((path / "checksums.json").read_text())


def adam(**changes) -> dict[str, Any]:
  return dict(optimizer=dataclasses.replace(config(TEXT).optimizer, **changes))


ALTERING = {
  "optimizer.learning_rate 0.01 -> 0.005": adam(learning_rate=0.005),
  "optimizer.final_learning_rate 0.0004 -> 0.0": adam(final_learning_rate=0.0),
  "optimizer.warmup_steps 4 -> 5": adam(warmup_steps=5),
  "optimizer.beta1 0.9 -> 0.8": adam(beta1=0.8),
  "optimizer.beta2 0.95 -> 0.9": adam(beta2=0.9),
  "optimizer.epsilon 1e-08 -> 1e-06": adam(epsilon=1e-6),
  "optimizer.weight_decay 0.1 -> 0.0": adam(weight_decay=0.0),
  "optimizer.clip_norm 1.0 -> 2.0": adam(clip_norm=2.0),
  "z_loss 0.0 -> 0.0001": dict(z_loss=1e-4),
  "steps 12 -> 13 (the learning rate falls over all steps": dict(steps=13),
}


@pytest.mark.parametrize("message", ALTERING)
def test_what_alters_training_is_refused_by_name(finished, message):
  before = (finished / "metrics.jsonl").read_bytes()
  with pytest.raises(UserError) as error:
    run(config(finished, **ALTERING[message]))
  assert message in str(error.value) and "--allow-change" in str(error.value)
  assert (finished / "metrics.jsonl").read_bytes() == before


def test_fewer_steps_than_are_done_are_done(copy):
  assert "training is complete" in run(config(copy, steps=11))
  with pytest.raises(UserError, match="steps 12 -> 11, .*beta1 0.9 -> 0.8"):
    run(config(copy, steps=11, **adam(beta1=0.8)))


def test_all_changes_are_named_and_with_the_flag_made_and_said(copy):
  changed = config(copy, steps=14, evaluate_every=7, **adam(beta1=0.8))
  with pytest.raises(UserError) as error:
    run(changed)
  assert "steps 12 -> 14, optimizer.beta1 0.9 -> 0.8 (" in str(error.value)
  assert "evaluate_every" not in str(error.value)
  printed = run(dataclasses.replace(changed, allow_change=True))
  for line in (
    "changed   steps 12 -> 14",
    "changed   evaluate_every 4 -> 7",
    "changed   optimizer.beta1 0.9 -> 0.8",
  ):
    assert f"{line}\n" in printed
  assert "allow_change" not in printed and "work_dir" not in printed
  # They are those of the run from now on.
  assert "complete" in run(changed)


FREE: dict[str, dict[str, Any]] = {
  "remat": dict(model=dataclasses.replace(MODEL, remat="full")),
  "head": dict(head="recompute"),
  "context_length": dict(model=dataclasses.replace(MODEL, context_length=64)),
  "accumulation": dict(accumulation=2),
  "eval_batches": dict(eval_batches=4),
  "others": dict(evaluate_every=6, save_every=6, keep=1),
}


@pytest.mark.parametrize("name", FREE)
def test_what_alters_nothing_is_free(copy, name):
  assert "training is complete" in run(config(copy, **FREE[name]))


def test_a_longer_context_is_that_of_the_model_from_then_on(copy):
  longer = config(copy, **FREE["context_length"])
  run(longer)
  assert load_checkpoint(copy)[0].config.context_length == 64
  with pytest.raises(UserError, match="context_length = 64, and now .* = 32"):
    run(config(copy))


def test_versions_paths_and_devices_that_differ_are_said(copy, tmp_path):
  record = copy / "checkpoints" / str(STEPS) / "record.json"
  there = json.loads(record.read_text())
  there["versions"]["jax"] = "0.0.1"
  there["device"]["count"] = 512
  other = shutil.copy(TEXT, tmp_path / "same.txt")
  changes = room("_train.record")
  now = changes.settings(config(copy, data=(pathlib.Path(other),)))
  assert [*map(str, changes.changes(there, now))] == [
    f"data {TEXT} -> {other}",
    f"versions.jax 0.0.1 -> {jax.__version__}",
    f"device.count 512 -> {jax.device_count()}",
  ]
  assert all(change.is_free for change in changes.changes(there, now))
  assert changes.changes({}, now) == []  # of an older version
  for name, nothing in (("data", "Python's documentation"), ("mix", "none")):
    assert str(changes.Change(name, ["a"], [])) == f"{name} a -> {nothing}"


def test_steps_whose_config_is_gone_are_nobodys(copy):
  (copy / "config.json").unlink()
  with pytest.raises(UserError, match="step 12, and no config.json that says"):
    run(config(copy, seed=1))  # would be trained on what is held out
  assert not (copy / "config.json").exists()


def test_a_picture_that_cannot_be_drawn_costs_no_run(copy):
  (copy / "loss.png").unlink()
  (copy / "loss.png").mkdir()
  records = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
  (copy / "metrics.jsonl").write_text("".join(records[:-1]))  # to be completed
  printed = run(config(copy))
  assert "losses not drawn: picture" in printed
  assert read_metrics(copy)[-1]["step"] == STEPS


@pytest.mark.parametrize(
  "damage", ["tine", "[1]", '"1.0"', "true", "1" + "0" * 400]
)
def test_a_damaged_record_costs_no_run(copy, damage):
  """A flipped bit of "time", and numbers that are none any more."""
  path = copy / "metrics.jsonl"
  first, *rest = path.read_text().splitlines(keepends=True)
  rest += ['{"step": true}\n', "[" * 100_000 + "\n"]
  if damage == "tine":
    first = first.replace('"time"', '"tine"')
  else:
    first = re.sub(r'"seconds": [^,]*', f'"seconds": {damage}', first)
  path.write_text("".join([first, *rest]))
  metrics = room("_train.metrics")
  with metrics.Metrics(copy, step=STEPS) as there:
    there.write({"step": STEPS + 1})
  one, *_, last = read_metrics(copy)
  assert one["step"] == 1 and last["step"] == STEPS + 1
  room("_train.plot").plot_losses(copy)
  assert all(isinstance(x, int | float) for x in one.values())


@pytest.mark.parametrize("instead", [None, "of an editor"])
def test_records_that_are_deleted_during_a_run_come_back(tmp_path, instead):
  metrics, path = room("_train.metrics"), tmp_path / "metrics.jsonl"
  with metrics.Metrics(tmp_path, step=0) as there:
    there.write({"step": 1})
    there.flush()
    path.unlink()
    if instead:
      path.write_text(instead)
    there.write({"step": 2})
    there.flush()
    there.write({"step": 3})
  assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("end", ["deleted, moved", "taken over by process"])
def test_a_run_whose_directory_is_gone_writes_nothing_there(
  end, tmp_path, monkeypatch
):
  """`rm -r` of a run that was forgotten, and another one in its place."""
  locked, loop = room("_lock").locked, room("_train.loop").Loop
  take_step, directory = loop.take_step, tmp_path / "run"
  with contextlib.ExitStack() as stack:

    def take(self) -> None:
      take_step(self)
      if self.step == 2:
        shutil.rmtree(directory)
        if end.startswith("taken"):
          directory.mkdir()
          stack.enter_context(locked(directory))

    monkeypatch.setattr(loop, "take_step", take)
    with pytest.raises(UserError, match=f"it was {end}.* nothing more is"):
      run(config(directory))
    left = {path.name for path in tmp_path.rglob("*")} - {"run"}
    taken = end.startswith("taken")
    assert left == ({".lock", ".lock.holder"} if taken else set())


def test_a_mistake_leaves_no_directory(tmp_path):
  wrong = config(tmp_path / "run", data=(tmp_path / "none.txt",))
  with pytest.raises(UserError, match="no such file"):
    run(wrong)
  assert [*tmp_path.iterdir()] == []
  (tmp_path / "run").mkdir()
  with pytest.raises(UserError, match="no such file"):
    run(wrong)
  assert [*(tmp_path / "run").iterdir()] == []
