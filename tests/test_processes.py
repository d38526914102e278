"""Several processes train as one does."""

import importlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
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

processes = importlib.import_module("pallas_gemma.gemma._processes")
pytestmark = pytest.mark.no_interpreter

STEPS = 8
SETTINGS: dict[str, Any] = dict(
  data=(pathlib.Path(__file__),),
  steps=STEPS,
  batch_size=2,
  sequence_length=8,
  evaluate_every=4,
  eval_batches=3,
  save_every=100,
  optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
  model=MODEL,
)

# Process 1 is told to end before its fourth step.
CHILD = """
import importlib, os, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
from pallas_gemma.gemma import TrainConfig, train
from test_processes import SETTINGS
loop = importlib.import_module("pallas_gemma.gemma._train.loop").Loop
take_step = loop.take_step

def told(self):
  if self.step == 3 and os.environ["JAX_PROCESS_ID"] == "1":
    os.kill(os.getpid(), signal.SIGTERM)
  take_step(self)

loop.take_step = told
result = train(TrainConfig(work_dir=pathlib.Path(sys.argv[2]), **SETTINGS))
print("ended", result.step, int(result.interrupted_by))
"""


def start(directory: pathlib.Path, index: int, port: int) -> subprocess.Popen:
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
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
  printed = [child.communicate()[0] for child in children]
  assert all(not child.returncode for child in children), printed
  ended = [text.splitlines()[-1].split() for text in printed]
  step = int(ended[0][1])
  assert ended[0] == ended[1] and int(ended[0][2]) == signal.SIGTERM
  assert step in (4, 5)
  assert "mesh      fsdp=2, 2 devices of 2 processes" in printed[0]
  assert "loss" in printed[0] and "loss" not in printed[1]
  assert f"{step} done" in run(TrainConfig(work_dir=directory, **SETTINGS))
  records = [read_metrics(d) for d in (alone.directory, directory)]
  for one, two in zip(*records, strict=True):
    for name in ("step", "loss", "gradient_norm", "parameter_norm"):
      assert two[name] == pytest.approx(one[name], rel=1e-5), name
    held_out = one.get("held_out_loss", 0.0), two.get("held_out_loss", 0.0)
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)
  assert records[1][-1]["step"] == STEPS


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
