"""There is always a complete checkpoint, and nothing is lost in silence."""

import dataclasses
import errno
import importlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import rich.console
from flax import nnx
from pallas_gemma.gemma import (
  Checkpoints,
  OptimizerConfig,
  Tokenizer,
  TrainConfig,
  UserError,
  best_step,
  load_checkpoint,
  main,
  plot_runs,
  read_metrics,
  read_record,
  save_checkpoint,
  train,
)
from random_gemma import random_gemma
from small_gemma import ONE_LAYER as CONFIG

storage = importlib.import_module("pallas_gemma.gemma._checkpoint")
complete_steps, read_identity = storage.complete_steps, storage.read_identity

pytestmark = pytest.mark.no_interpreter


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer.train([pathlib.Path(__file__).read_text()], 400)


@pytest.fixture(scope="module")
def models():
  return [random_gemma(CONFIG, seed=seed) for seed in (1, 2)]


def same(one, two) -> bool:
  leaves = (jax.tree.leaves(nnx.state(x, nnx.Param)) for x in (one, two))
  return all(map(np.array_equal, *leaves))


def state(number: int) -> dict[str, jax.Array]:
  """What a step holds, told from the number alone."""
  return {
    "x": jnp.arange(6, dtype=jnp.float32) + number,
    "n": jnp.int32(number),
  }


def assert_holds(directory: pathlib.Path, step: int, numbers: set[int]) -> None:
  """That a step is, bit by bit, `state` of one of the numbers."""
  abstract = jax.eval_shape(lambda: state(0))
  with Checkpoints(directory, keep=None) as checkpoints:
    got = checkpoints.restore(step, params=abstract)["params"]
  number = int(got["n"])
  assert number in numbers
  np.testing.assert_array_equal(got["x"], state(number)["x"])


# --- killed ---

SAVES = {
  "a first step": (lambda c: c.save(1, params=state(10)), {1: {10}}),
  "the next, of which one is kept": (
    lambda c: c.save(2, params=state(20), record={"a": 1}, loss=3.0),
    {1: {1}, 2: {20}},
  ),
  "the same again": (lambda c: c.save(1, params=state(10)), {1: {1, 10}}),
  "a loss": (lambda c: c.note_loss(1, 2.0), {1: {1}}),
}


class Killed(BaseException):
  pass


@pytest.mark.parametrize("name", SAVES)
def test_killed_between_any_two_steps_of_a_save(name, tmp_path, monkeypatch):
  """After the nth change of a name nothing happens any more, no cleaning up
  either; then a new process opens the directory.
  """
  save, allowed = SAVES[name]
  calls = 0

  def dies_after(limit: int, function: Callable) -> Callable:
    def call(*args, **kwargs):
      nonlocal calls
      if not any(f"{tmp_path}" in str(a) for a in args):
        return function(*args, **kwargs)  # not of ours
      calls += 1
      if calls > limit:
        raise Killed
      return function(*args, **kwargs)

    return call

  done, limit = False, -1
  while not done:
    limit += 1
    directory = tmp_path / str(limit)
    directory.mkdir()
    with Checkpoints(directory, keep=1) as checkpoints:
      if name != "a first step":
        checkpoints.save(1, params=state(1))
      calls = 0
      for module, function in (
        (os, "rename"),
        (os, "replace"),
        (os, "rmdir"),
        (os, "unlink"),
        (shutil, "rmtree"),
        (pathlib.Path, "mkdir"),
        (pathlib.Path, "rmdir"),
      ):
        original = getattr(module, function)
        monkeypatch.setattr(module, function, dies_after(limit, original))
      try:
        save(checkpoints)
        done = True
      except Killed:
        done = False
      monkeypatch.undo()
    steps: list[int] = []
    for _ in range(2):  # as it was left, and as a new process leaves it
      steps = complete_steps(directory)
      assert steps or (name == "a first step" and not done)
      abstract = jax.eval_shape(lambda: state(0))
      with Checkpoints(directory, keep=1) as checkpoints:
        for step in steps:
          checkpoints.restore(step, params=abstract)
    for step in steps:
      numbers = allowed[step]
      assert_holds(directory, step, {max(numbers)} if done else numbers)
    with Checkpoints(directory, keep=1) as checkpoints:
      checkpoints.save(3, params=state(3))
    assert_holds(directory, 3, {3})
    names = {p.name for p in (directory / "checkpoints").iterdir()}
    assert all(map(str.isdecimal, names)), names
  assert limit >= 1


CHILD = """
import sys, pathlib
import jax.numpy as jnp
from pallas_gemma.gemma import Checkpoints

def state(number):
  x = jnp.arange(6, dtype=jnp.float32) + number
  return {"x": x, "n": jnp.int32(number)}

directory, first = pathlib.Path(sys.argv[1]), int(sys.argv[2])
with Checkpoints(directory, keep=1) as checkpoints:
  for number in range(first, first + 100_000):
    # Now the next step, now the same one again.
    step = number if number % 3 else max(number - 1, 0)
    checkpoints.save(step, record={"n": number}, params=state(number))
    checkpoints.note_loss(step, 1 / (1 + number))
"""


def test_killed_at_random_points_a_step_is_always_there(tmp_path):
  chance = random.Random(0)
  first = 1
  for _ in range(2):
    child = subprocess.Popen(
      [sys.executable, "-P", "-c", CHILD, str(tmp_path), str(first)],
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
    )
    before = complete_steps(tmp_path)
    while complete_steps(tmp_path) == before and child.poll() is None:
      time.sleep(0.01)
    end = time.monotonic() + chance.uniform(0.3, 1.0)
    while time.monotonic() < end and child.poll() is None:
      assert complete_steps(tmp_path), "at an instant there was none"
    child.send_signal(signal.SIGKILL)
    _, errors = child.communicate()
    assert child.returncode == -signal.SIGKILL, errors.decode()
    newest = complete_steps(tmp_path)[-1]
    number = read_record(tmp_path, newest)["n"]
    assert number in (newest, newest + 1) and number > first
    assert_holds(tmp_path, newest, {number})
    first = newest + 2


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
  with Checkpoints(tmp_path / "made", keep=1) as checkpoints:
    checkpoints.save(1, params=state(1))
    (tmp_path / "made" / "checkpoints" / ".working").write_text("in the way")
    with pytest.raises(UserError, match="cannot write a checkpoint: .* intact"):
      checkpoints.save(2, params=state(2))
  (tmp_path / "made" / "checkpoints" / ".working").unlink()
  assert_holds(tmp_path / "made", 1, {1})


def test_what_is_read_back_must_be_what_was_written(tmp_path, monkeypatch):
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, params=state(1))
    write = ocp.Checkpointer.save

    def faulty(self, path, args):
      item = args.item | {"x": args.item["x"].at[3].set(0.5)}
      write(self, path, args=ocp.args.StandardSave(item))

    monkeypatch.setattr(ocp.Checkpointer, "save", faulty)
    with pytest.raises(UserError, match="read back is not what was written"):
      checkpoints.save(2, params=state(2))
  monkeypatch.undo()
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
  assert_holds(tmp_path, 1, {1})


@pytest.mark.parametrize("value", [np.nan, -0.0, np.inf, 5e-324])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_values_that_differ_from_themselves_are_saved(value, dtype, tmp_path):
  with np.errstate(invalid="ignore"):
    x = jnp.array(np.array([value, 1.0]).astype(dtype))
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, params={"x": x})
    got = checkpoints.restore(1, params=jax.eval_shape(lambda: {"x": x}))
  assert np.asarray(got["params"]["x"]).tobytes() == np.asarray(x).tobytes()


# --- whose directory it is ---


@pytest.fixture(scope="module")
def saved(models, tokenizer, tmp_path_factory):
  directory = tmp_path_factory.mktemp("saved")
  save_checkpoint(directory, models[0], tokenizer, step=3)
  return directory


@pytest.fixture
def copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def test_no_bit_of_config_json_makes_it_another(copy):
  path = copy / "config.json"
  content, identity = path.read_bytes(), read_identity(copy)
  refused = 0
  for i in range(len(content)):
    for bit in (i % 8, (i + 3) % 8):
      changed = bytearray(content)
      changed[i] ^= 1 << bit
      path.write_bytes(changed)
      try:
        there = read_identity(copy)
      except UserError as error:
        refused += 1
        assert "config.json" in str(error) and str(copy) in str(error)
      else:
        # White space, or the name "checksum": the model is the same.
        assert {name: there[name] for name in identity} == identity
  assert refused > 1.5 * len(content)


@pytest.mark.parametrize(
  "before, after",
  [
    ('"norm_epsilon": 1e-06', '"norm_epsilon": 1e-02'),
    ('"rope_base_frequency": 10000.0', '"rope_base_frequency": 50000.0'),
    ('"dtype": "float32"', '"dtype": "bfloat16"'),
  ],
)
def test_another_model_of_the_same_shapes_is_refused(copy, before, after):
  path = copy / "config.json"
  text = path.read_text()
  assert before in text
  path.write_text(text.replace(before, after))
  with pytest.raises(UserError, match='remove its entry "checksum"'):
    load_checkpoint(copy)


@pytest.mark.parametrize(
  "content",
  [
    '{"../x": [1, 0]}',
    '{"a/../../x": [1, 0]}',
    '{"/x": [1, 0]}',
    '{"x": [1e999, 0]}',
    '{"x": 1}',
    "[" * 100_000,
  ],
)
def test_checksums_are_of_files_of_the_step(content, copy):
  """A checkpoint from elsewhere is to write nothing but itself."""
  (copy / "checkpoints" / "3" / "checksums.json").write_text(content)
  with pytest.raises(UserError, match="checksums.json: damaged; delete"):
    load_checkpoint(copy)


def test_a_flipped_bit_of_the_tokenizer_is_named(copy):
  path = copy / "tokenizer.model"
  content = bytearray(path.read_bytes())
  for i in (0, len(content) // 2, len(content) - 1):
    content[i] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.model is not the file"):
      load_checkpoint(copy)
    content[i] ^= 4
  path.unlink()
  with pytest.raises(UserError, match="no tokenizer.model"):
    load_checkpoint(copy)


def as_earlier_versions_wrote(directory: pathlib.Path) -> None:
  """No checksum in config.json, and no file of Orbax beside the arrays."""
  identity = read_identity(directory)
  (directory / "config.json").write_text(json.dumps(identity, indent=2))
  for checksums in directory.glob("checkpoints/*/checksums.json"):
    listed = json.loads(checksums.read_text())
    for name in [n for n in listed if n.endswith("/_CHECKPOINT_METADATA")]:
      (checksums.parent / name).unlink()
      del listed[name]
    checksums.write_text(json.dumps(listed))


def test_directories_of_earlier_versions_load_without_a_word(
  copy, models, tokenizer, caplog, capfd
):
  as_earlier_versions_wrote(copy)
  assert same(load_checkpoint(copy)[0], models[0])
  assert read_record(copy, 3) == {} and best_step(copy) is None
  save_checkpoint(copy, models[1], tokenizer, step=4)
  assert same(load_checkpoint(copy)[0], models[1])
  assert "checksum" in json.loads((copy / "config.json").read_text())
  assert not caplog.records and capfd.readouterr() == ("", "")


# --- saving a second time ---


def test_the_same_step_is_replaced(copy, models, tokenizer):
  for model in (models[1], models[0], models[1]):
    save_checkpoint(copy, model, tokenizer, step=3)
    assert same(load_checkpoint(copy)[0], model)
  assert [p.name for p in (copy / "checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize("when", ["before", "amid", "after"])
def test_what_a_writer_takes_away_while_it_is_read_is_read_anew(
  when, copy, models, tokenizer, monkeypatch
):
  """A step that is removed or replaced, and what Orbax makes of that."""
  module = importlib.import_module("pallas_gemma.gemma._checkpoint.model")
  restore, calls = module.restore, []

  def restoring(directory, step, **abstract):
    calls.append(step)
    if len(calls) > 1:
      return restore(directory, step, **abstract)
    found = restore(directory, step, **abstract) if when == "after" else None
    if when == "before":
      save_checkpoint(copy, models[1], tokenizer, step=4)
      shutil.rmtree(copy / "checkpoints" / "3")
    else:
      save_checkpoint(copy, models[1], tokenizer, step=3)
    if found is None:
      raise Exception("Encountered error while reading array index")
    return found

  monkeypatch.setattr(module, "restore", restoring)
  assert same(load_checkpoint(copy)[0], models[1])
  assert calls == ([3, 4] if when == "before" else [3, 3])


def test_without_a_step_the_newest_call_is_what_is_loaded(
  models, tokenizer, tmp_path
):
  for model in models:
    save_checkpoint(tmp_path, model, tokenizer)
    assert same(load_checkpoint(tmp_path)[0], model)


def test_a_lower_step_is_saved_and_the_highest_is_the_default(
  copy, models, tokenizer
):
  save_checkpoint(copy, models[1], tokenizer, step=1)
  assert same(load_checkpoint(copy, step=1)[0], models[1])
  assert same(load_checkpoint(copy)[0], models[0])
  with Checkpoints(copy, keep=1) as checkpoints:
    checkpoints.save(2, params=state(2))
  assert complete_steps(copy) == [2, 3]


@pytest.mark.parametrize("step", [-1, 1.5, "3", None, True])
def test_a_step_that_is_no_number_is_refused(step, copy, models, tokenizer):
  with pytest.raises(UserError, match="step: wanted a whole number, 0 or more"):
    save_checkpoint(copy, models[0], tokenizer, step=step)


def test_a_step_without_an_optimizer_is_said(copy):
  with Checkpoints(copy, keep=1) as checkpoints:
    with pytest.raises(UserError, match="checkpoints/3: it has no optimizer"):
      checkpoints.restore(3, optimizer={})


# --- the record and the best ---


def test_the_record_comes_back_and_is_covered(tmp_path):
  record = {"config": {"steps": 3, "data": ["a", "ä"]}, "rate": 1e-3, "x": None}
  with Checkpoints(tmp_path, keep=None) as checkpoints:
    checkpoints.save(1, record=record, params=state(1))
    checkpoints.save(2, params=state(2))
    with pytest.raises(TypeError):
      checkpoints.save(3, record={"path": tmp_path}, params=state(3))
  assert read_record(tmp_path, 1) == record and read_record(tmp_path, 2) == {}
  with pytest.raises(UserError, match="no complete step 3; it has 1, 2"):
    read_record(tmp_path, 3)
  path = tmp_path / "checkpoints" / "1" / "record.json"
  path.write_text(path.read_text().replace("3", "2"))
  with pytest.raises(UserError, match=f"{path}: damaged, its checksum differs"):
    read_record(tmp_path, 1)
  path.unlink()
  with pytest.raises(UserError, match=f"{path}: missing"):
    read_record(tmp_path, 1)


def test_the_best_stays_whenever_its_loss_is_known(tmp_path):
  def go(steps: dict[int, float | None], late: bool) -> list[int]:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
      for step, loss in steps.items():
        checkpoints.save(step, loss=None if late else loss, params=state(step))
        if late and loss is not None:
          checkpoints.note_loss(step, loss)
    return complete_steps(tmp_path)

  assert go({1: 3.0, 2: 2.0, 3: 2.5}, late=True) == [2, 3]
  assert best_step(tmp_path) == 2
  # In another process, and without losses for a while.
  assert go({4: None, 5: 2.25, 6: None}, late=False) == [2, 6]
  assert go({7: 1.5, 8: float("nan"), 9: float("inf")}, late=True) == [7, 9]
  assert storage.read_losses(tmp_path) == {7: 1.5}
  assert go({10: 1.5}, late=False) == [10]  # of equal ones the newest
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.note_loss(11, 0.0)  # of which there is no checkpoint
  assert best_step(tmp_path) == 10
  # Replaced, it is another model, of unknown loss.
  assert go({10: None}, late=False) == [10] and best_step(tmp_path) is None


def test_losses_of_other_text_do_not_compare(tmp_path):
  """As after another `eval_batches`."""
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    for step, loss, rows in (
      (1, 1.0, 8),
      (2, 1.5, 8),
      (3, 2.0, 4),
      (4, 2.5, 4),
    ):
      checkpoints.save(step, params=state(step))
      checkpoints.note_loss(step, storage.HeldOutLoss(loss, rows))
  assert complete_steps(tmp_path) == [1, 3, 4] and best_step(tmp_path) == 3
  folder = tmp_path / "checkpoints" / "3"
  path = next(folder.glob("loss.json"))
  path.write_text(path.read_text().replace('"rows": 4', '"rows": 8'))
  with pytest.raises(UserError, match="loss.json: damaged"):
    best_step(tmp_path)


def test_the_best_is_loaded_by_that_name(copy, models, tokenizer):
  with pytest.raises(UserError, match="no step has a held-out loss"):
    load_checkpoint(copy, step="best")
  save_checkpoint(copy, models[1], tokenizer, step=8)
  with Checkpoints(copy, keep=None) as checkpoints:
    checkpoints.note_loss(8, 2.0)
    assert same(load_checkpoint(copy, step="best")[0], models[1])
    checkpoints.note_loss(3, 1.0)
  assert same(load_checkpoint(copy, step="best")[0], models[0])
  with pytest.raises(UserError, match='wanted a number or "best", got'):
    load_checkpoint(copy, step="newest")  # type: ignore[arg-type]
  # What was the best may not be another one in silence.
  path = copy / "checkpoints" / "3" / "loss.json"
  content = path.read_text()
  path.write_text(content.replace("1", "3", 1))
  with pytest.raises(UserError, match=f"{path}: damaged; delete it"):
    load_checkpoint(copy, step="best")
  path.write_text(content)
  (path.parent / "checksums.json").unlink()
  with pytest.raises(UserError, match="missing: step 3 is unfinished"):
    load_checkpoint(copy, step="best")


def test_a_step_of_unreadable_loss_is_not_removed(tmp_path):
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, loss=1.0, params=state(1))
    (tmp_path / "checkpoints" / "1" / "loss.json").write_text("{")
    checkpoints.save(2, loss=2.0, params=state(2))
    checkpoints.save(3, loss=3.0, params=state(3))
  assert complete_steps(tmp_path) == [1, 2, 3]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, compiled_once):
  """A run that gets worse again, and what it printed."""
  settings = TrainConfig(
    data=(pathlib.Path(__file__),),
    work_dir=tmp_path_factory.mktemp("run"),
    steps=8,
    batch_size=2,
    sequence_length=16,
    evaluate_every=2,
    save_every=2,
    keep=1,
    # Which rises, to a rate with which nothing is learnt.
    optimizer=OptimizerConfig(
      learning_rate=1e-2, final_learning_rate=3.0, warmup_steps=0
    ),
    model=CONFIG,
  )
  return settings, printed(settings)


def printed(settings: TrainConfig) -> str:
  out = io.StringIO()
  train(settings, console=rich.console.Console(file=out, width=300))
  return out.getvalue()


def test_training_keeps_its_best_and_says_which(trained, capfd):
  settings, text = trained
  directory = settings.directory
  losses = {
    r["step"]: r["held_out_loss"]
    for r in read_metrics(directory)
    if "held_out_loss" in r
  }
  best = min(losses, key=lambda step: losses[step])
  assert best < 8, "the run was to get worse"
  assert best_step(directory) == best
  assert storage.read_losses(directory)[best] == losses[best]
  assert complete_steps(directory) == [best, 8]
  assert (
    f"best checkpoint: step {best}, held-out loss {losses[best]:.3f}" in text
  )
  load_checkpoint(directory, step="best")
  with pytest.raises(SystemExit) as end:
    main(
      ["sample", "--checkpoint", str(directory), "--step", "best"]
      + ["--max-new-tokens", "1", "--temperature", "0"]
    )
  assert end.value.code == 0


def test_resuming_says_which_step_is_ignored(trained, tmp_path):
  settings, _ = trained
  shutil.copytree(settings.directory, tmp_path / "run")
  settings = dataclasses.replace(settings, work_dir=tmp_path / "run")
  best = best_step(settings.directory)
  step = tmp_path / "run" / "checkpoints" / "8"
  (step / "checksums.json").unlink()
  text = printed(settings)
  aside = step.with_name("8.unfinished")
  assert "step 8 is unfinished" in text and f"{aside}" in text
  assert f"{best} done" in text and (aside / "params").is_dir()
  assert complete_steps(settings.directory) == [best, 8]
  assert best_step(settings.directory) == best


# --- in the background ---


def test_a_step_may_be_written_in_the_background(tmp_path, monkeypatch):
  """The caller goes on, and may change what it gave; errors come later."""
  store = importlib.import_module("pallas_gemma.gemma._checkpoint.store")
  write, may_go = store.write_arrays, threading.Event()

  def slow(folder, tree):
    assert may_go.wait(60)
    write(folder, tree)

  monkeypatch.setattr(store, "write_arrays", slow)
  array = np.arange(4, dtype=np.float32)
  abstract = {"x": jax.ShapeDtypeStruct((4,), np.float32)}
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    may_go.set()
    checkpoints.save(1, p={"x": array})
    may_go.clear()
    checkpoints.save(2, p={"x": array}, background=True)
    array[:] = -1
    checkpoints.check()
    checkpoints.note_loss(2, 1.5)  # does not wait either
    assert complete_steps(tmp_path) == [1] and not storage.read_losses(tmp_path)
    may_go.set()
    checkpoints.finish()
    assert complete_steps(tmp_path) == [2] and storage.read_losses(
      tmp_path
    ) == {2: 1.5}
    checkpoints.note_loss(2, 1.25)
    assert storage.read_losses(tmp_path) == {2: 1.25}
    found = checkpoints.restore(2, p=abstract)["p"]["x"]
    np.testing.assert_array_equal(found, [0, 1, 2, 3])
    checkpoints.save(3, p={"x": array}, background=True)
  assert complete_steps(tmp_path) == [2, 3]  # the best, and the newest

  def full(folder, tree):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(store, "write_arrays", full)
  for then in (
    lambda c: c.finish(),
    lambda c: c.save(5, p={"x": array}),
    lambda c: None,  # the end waits, too
  ):
    with pytest.raises(UserError, match="no space left on its disk"):
      with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, p={"x": array}, background=True)
        then(checkpoints)
  assert complete_steps(tmp_path) == [2, 3]


@pytest.mark.parametrize(
  "error, message",
  [
    (ValueError("x [os_error_code='28']"), "no space left on its disk"),
    (ValueError("x [os_error_code='5']"), "checkpoint: Input/output error; ea"),
    (OSError(errno.EROFS, "Read-only"), "cannot write a checkpoint: .*Read-on"),
  ],
)
def test_a_disk_that_fails_is_said(error, message, tmp_path, monkeypatch):
  """As TensorStore tells it, and as Python does."""

  def fails(folder, tree):
    raise error

  store = importlib.import_module("pallas_gemma.gemma._checkpoint.store")
  monkeypatch.setattr(store, "write_arrays", fails)
  with pytest.raises(UserError, match=message):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
      checkpoints.save(4, p={"x": np.zeros(3)}, background=True)


# --- paths of another machine ---

REMOTE = (
  *("gs://bucket/run", "s3://bucket/a b", "hf://x/y", "file:///tmp/x"),
  "gs://",
)


@pytest.mark.parametrize("as_path", [str, pathlib.Path])
@pytest.mark.parametrize("remote", REMOTE)
def test_what_is_written_here_alone_refuses_a_remote_path(
  remote, as_path, models, tokenizer, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  path = as_path(remote)
  doors: list[Callable[[], object]] = [
    lambda: save_checkpoint(path, models[0], tokenizer),
    lambda: Checkpoints(path, keep=1),
    lambda: tokenizer.save(path),
    lambda: TrainConfig(cache_dir=pathlib.Path(path)),
    lambda: plot_runs([tmp_path], path),
  ]
  for door in doors:
    with pytest.raises(UserError, match="wanted a path of this machine"):
      door()
  assert not list(tmp_path.iterdir()), "a local folder was made"


NAMES = ["a:b", "C:/x", "gs", "x:y/z", "1://x"]
# What Orbax and TensorStore would take for something else.
NAMES += ["exp[1]", "**/x", "a\\b", "gs:/x", os.fsdecode(b"\xff")]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_local_path_may_have_any_name(name, models, tokenizer, tmp_path):
  save_checkpoint(tmp_path / name, models[0], tokenizer)
  assert same(load_checkpoint(tmp_path / name)[0], models[0])


def test_so_may_one_of_several_processes(tmp_path):
  parts = importlib.import_module("pallas_gemma.gemma._checkpoint.parts")
  parts.write_parts(tmp_path / "exp[1]", {"a": {"b": np.arange(4.0)}})
  assert [*(tmp_path / "exp[1]" / "a").iterdir()]
