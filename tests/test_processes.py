"""Several processes train as one does."""

import errno
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from lockstep import Lockstep
from pallas_gemma.gemma import (
  OptimizerConfig,
  TrainConfig,
  UserError,
  pack,
  read_metrics,
  training_batches,
)
from small_gemma import ONE_LAYER as MODEL
from small_gemma import printed as run

complete_steps = importlib.import_module(
  "pallas_gemma.gemma._checkpoint"
).complete_steps
processes = importlib.import_module("pallas_gemma.gemma._processes")
pytestmark = [
  pytest.mark.no_interpreter,
  pytest.mark.usefixtures("compiled_once", "traced_once"),
]

STEPS = 8
SETTINGS: dict[str, Any] = dict(
  data=(pathlib.Path(__file__),),
  steps=STEPS,
  batch_size=2,
  sequence_length=8,
  evaluate_every=4,
  eval_batches=3,
  save_every=2,
  optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
  model=MODEL,
)

# A checkpoint is written once another step is begun, and process 1 is told to
# end meanwhile.  Then both begin a run on another machine, with caches of their
# own, and process 1 is killed while it writes the second checkpoint.
CHILD = """
import importlib, os, pathlib, signal, sys, threading
sys.path.insert(0, sys.argv[1])
from pallas_gemma.gemma import TrainConfig, train
from test_processes import SETTINGS
room = lambda name: importlib.import_module("pallas_gemma.gemma." + name)
loop, store = room("_train.loop").Loop, room("_checkpoint.store")
take_step, write_parts = loop.take_step, store.write_parts
mine = os.environ["JAX_PROCESS_ID"]
may_write, remote = threading.Event(), False

def told(self):
  if self.step == 3 and not remote:
    assert not list(self._run.directory.glob("checkpoints/2"))
    if mine == "1":
      os.kill(os.getpid(), signal.SIGTERM)
    may_write.set()
  take_step(self)

def slow(folder, items):
  assert may_write.wait(60)
  if remote and mine == "1" and folder.parent.name == "4.part":
    os.kill(os.getpid(), signal.SIGKILL)
  write_parts(folder, items)

loop.take_step, store.write_parts = told, slow
result = train(TrainConfig(work_dir=pathlib.Path(sys.argv[2]), **SETTINGS))
print("ended", result.step, int(result.interrupted_by), flush=True)
remote, cache = True, pathlib.Path(sys.argv[2] + "-cache" + mine)
place = pathlib.Path("file://" + sys.argv[2] + "-remote")
train(TrainConfig(work_dir=place, cache_dir=cache, **SETTINGS))
"""


def start(directory: pathlib.Path, index: int, port: int) -> subprocess.Popen:
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": f"{directory}-compiled",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1"),
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": str(index),
  }
  here = str(pathlib.Path(__file__).parent)
  return subprocess.Popen(
    [sys.executable, "-P", "-c", CHILD, here, str(directory)],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_two_processes_take_the_steps_of_one_and_one_goes_on(tmp_path):
  """The same rows at each step, a signal to one of them ends both at the same
  step, and what they saved together is whole for a single device.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  directory = tmp_path / "two"
  children = [start(directory, index, port) for index in range(2)]
  alone = TrainConfig(work_dir=tmp_path / "one", **SETTINGS)
  run(alone)
  (first, second), printed = children, ["", ""]
  printed[1] = second.communicate()[0]
  first.kill()  # it would wait a while for the other one
  printed[0] = first.communicate()[0]
  assert second.returncode == -signal.SIGKILL, printed
  ended = [re.search(r"^ended (.*)$", text, re.M) for text in printed]
  assert ended[0] and ended[1] and ended[0][1] == ended[1][1], printed
  step, number = map(int, ended[0][1].split())
  assert step in (4, 5) and number == signal.SIGTERM
  assert "mesh      fsdp=2, 2 devices of 2 processes" in printed[0]
  assert "loss" in printed[0] and "loss" not in printed[1]
  assert f"{step} done" in run(TrainConfig(work_dir=directory, **SETTINGS))
  assert_same_records(alone.directory, directory)
  # What they had uploaded together is whole, too.
  place = pathlib.Path(f"file://{directory}-remote")
  shutil.copytree(f"{directory}-remote", tmp_path / "copy")
  assert complete_steps(tmp_path / "copy") == [2]
  (tmp_path / "two-remote" / "lease.json").unlink()  # it is old by then
  text = run(TrainConfig(work_dir=place, cache_dir=tmp_path / "c", **SETTINGS))
  assert "2 done" in text
  assert_same_records(alone.directory, tmp_path / "two-remote")


def assert_same_records(one: pathlib.Path, two: pathlib.Path) -> None:
  """That two runs have taken the same steps, but for rounding."""
  for x, y in zip(read_metrics(one), read_metrics(two), strict=True):
    for name in ("step", "loss", "gradient_norm", "parameter_norm"):
      assert y[name] == pytest.approx(x[name], rel=1e-5), name
    held_out = x.get("held_out_loss", 0.0), y.get("held_out_loss", 0.0)
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)
  assert read_metrics(two)[-1]["step"] == STEPS


def test_what_goes_wrong_in_one_process_is_raised_in_all(tmp_path, monkeypatch):
  """By the next `save` or `finish`, whenever one of them knows it."""
  store: Any = importlib.import_module("pallas_gemma.gemma._checkpoint.store")
  threads, full = Lockstep(), False
  threads.replace(monkeypatch, store)

  class Background(store._Background):
    """Is of the process that it was made by."""

    def __init__(self, *args):
      super().__init__(*args)
      self.index = threads.own.index

    def run(self):
      threads.own.index = self.index
      super().run()

  def write_parts(folder, items):
    if full and threads.own.index == 1:
      raise OSError(errno.ENOSPC, "No space left on device")
    folder.mkdir()
    (folder / f"part-{threads.own.index}").write_text(str(items))

  monkeypatch.setattr(store, "_Background", Background)
  monkeypatch.setattr(store, "write_parts", write_parts)
  monkeypatch.setattr(store, "host_copies", lambda items: items)
  made: list[Any] = [None, None]
  directories = [tmp_path / "0", tmp_path / "1"]

  def make(i: int) -> None:
    made[i] = store.Checkpoints(directories[i], keep=1, own=True)

  def save(i: int, step: int) -> None:
    made[i].save(step, record={"n": step}, x=np.zeros(1), background=True)

  def check(i: int) -> None:
    made[i]._writing.join()
    made[i].check()

  assert threads.run(make) == ["", ""]
  for step in (1, 2):
    assert threads.run(lambda i: save(i, step)) == ["", ""]  # noqa: B023
  assert threads.run(lambda i: made[i].finish()) == ["", ""]
  for i, directory in enumerate(directories):
    assert complete_steps(directory) == [2]
    folder = directory / "checkpoints" / "2"
    assert (folder / f"part-{i}").exists()
    known = json.loads((folder / "checksums.json").read_text())
    assert set(known) == {"part-0", "part-1", "record.json"}
  full = True
  assert threads.run(lambda i: save(i, 3)) == ["", ""]
  assert threads.run(check) == ["", ""]
  errors = threads.run(lambda i: save(i, 4))
  assert "process 1 failed: work directory" in errors[0]
  assert "no space left on its disk" in errors[0]
  assert errors[1].startswith(f"work directory {directories[1]}: no space left")
  assert complete_steps(directories[0]) == complete_steps(directories[1]) == [2]


def test_a_process_makes_its_own_rows_of_each_batch():
  rows = pack([np.arange(1, 700)], 10)
  whole = training_batches(rows, 6, 3)
  for mine in ([0, 1, 2], [3, 4, 5], [1, 4]):
    part = training_batches(rows, 6, 3, np.array(mine))
    for step in (0, 7, 40):  # of several passes
      for name, value in whole(step).items():
        np.testing.assert_array_equal(part(step)[name], value[mine])


def test_half_an_address_is_refused():
  there = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_PROCESS_ID": "0"}
  with pytest.raises(UserError, match="JAX_NUM_PROCESSES and .* got none and"):
    processes.start(False, there)
  assert processes.count() == 1 and processes.is_first()
