"""Checkpoints come back bit by bit, or say which file is to blame."""

import collections
import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pallas_gemma.gemma import (
  Checkpoints,
  Tokenizer,
  UserError,
  load_checkpoint,
  save_checkpoint,
)
from random_gemma import random_gemma
from small_gemma import TWO_LAYERS as CONFIG

# The model is not what is tested here: no kernel need be interpreted.
pytestmark = pytest.mark.no_interpreter


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer.train([pathlib.Path(__file__).read_text()], 400)


@pytest.fixture(scope="module")
def model():
  return random_gemma(CONFIG, seed=1)


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
  directory = tmp_path_factory.mktemp("saved")
  save_checkpoint(directory, model, tokenizer, step=3)
  save_checkpoint(directory, model, tokenizer, step=5)
  return directory


@pytest.fixture
def copy(saved, tmp_path):
  """To be damaged."""
  return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def leaves(model):
  return jax.tree.leaves(nnx.state(model, nnx.Param))


def test_it_comes_back_bit_by_bit(model, tokenizer, saved):
  loaded, loaded_tokenizer = load_checkpoint(saved)
  assert loaded.config == CONFIG
  assert loaded_tokenizer.model == tokenizer.model
  for one, two in zip(leaves(model), leaves(loaded), strict=True):
    np.testing.assert_array_equal(one, two)
  tokens = jnp.arange(8)[None]
  logits = jax.jit(lambda model: model(tokens))
  np.testing.assert_array_equal(logits(model), logits(loaded))


def files(saved: pathlib.Path) -> dict[str, pathlib.Path]:
  """One file of each kind, by a short name."""
  step = saved / "checkpoints" / "5"
  inside = [p for p in step.rglob("*") if p.is_file() and p.stat().st_size]
  return {
    "data": max(inside, key=lambda p: p.stat().st_size),
    "metadata": step / "params" / "_METADATA",
    "checksums": step / "checksums.json",
    "tokenizer": saved / "tokenizer.model",
    "config": saved / "config.json",
  }


def flip(content: bytes) -> bytes:
  middle = len(content) // 2
  changed = bytes([content[middle] ^ 1])
  return content[:middle] + changed + content[middle + 1 :]


DAMAGE = {
  "emptied": lambda content: b"",
  "cut": lambda content: content[: len(content) // 2],
  "flipped": flip,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["data", "metadata"])
def test_a_damaged_file_is_named_with_the_way_out(copy, file, damage):
  path = files(copy)[file]
  path.write_bytes(DAMAGE[damage](path.read_bytes()))
  with pytest.raises(UserError) as error:
    load_checkpoint(copy)
  message = str(error.value)
  assert message.startswith(f"checkpoint {path}: ") and "\n" not in message
  step = copy / "checkpoints" / "5"
  assert message.endswith(f"delete {step} to go back to step 3")
  shutil.rmtree(step)
  load_checkpoint(copy)


def test_a_missing_file_is_named(copy):
  path = files(copy)["data"]
  path.unlink()
  with pytest.raises(UserError, match=re.escape(f"{path}: missing; delete")):
    load_checkpoint(copy)


@pytest.mark.parametrize("damage", ["emptied", "cut"])
@pytest.mark.parametrize("file", ["checksums", "tokenizer", "config"])
def test_damage_beside_the_arrays_is_named(copy, file, damage):
  path = files(copy)[file]
  path.write_bytes(DAMAGE[damage](path.read_bytes()))
  with pytest.raises(UserError, match=re.escape(path.name)) as error:
    load_checkpoint(copy)
  assert str(copy) in str(error.value) and "\n" not in str(error.value)


def test_arrays_of_another_config_are_refused(copy):
  path = files(copy)["config"]
  there = json.loads(path.read_text())
  del there["checksum"]  # as who changes it by hand is told to
  there["model"]["hidden_size"] = 64
  path.write_text(json.dumps(there))
  with pytest.raises(
    UserError, match=r"blocks.\w+ is \(2, .*\) there, and \(2, .*\) by config"
  ):
    load_checkpoint(copy)
  there["model"] = {"vocab_size": 400}
  path.write_text(json.dumps(there))
  with pytest.raises(UserError, match="missing fields"):
    load_checkpoint(copy)


def test_another_model_does_not_overwrite(saved, tokenizer):
  wider = dataclasses.replace(CONFIG, width=32)
  with pytest.raises(UserError, match="model.width = 16, and now .* = 32"):
    save_checkpoint(saved, random_gemma(wider), tokenizer)


def test_a_missing_step_or_directory_is_refused(saved, tmp_path):
  with pytest.raises(UserError, match="no complete step 4; it has 3, 5"):
    load_checkpoint(saved, step=4)
  with pytest.raises(UserError, match="no config.json"):
    load_checkpoint(tmp_path)
  with pytest.raises(UserError, match="no such directory"):
    load_checkpoint(tmp_path / "nothing")


def test_an_unfinished_step_is_said_and_can_be_written_again(
  copy, model, tokenizer
):
  """As an earlier version left it, or when its checksums were lost."""
  checksums = files(copy)["checksums"]
  checksums.unlink()
  with pytest.raises(UserError, match="no complete step 5; it has 3"):
    load_checkpoint(copy, step=5)
  with pytest.raises(UserError, match="missing: step 5 is unfinished") as error:
    load_checkpoint(copy)
  assert str(checksums) in str(error.value)
  assert str(error.value).endswith("to go back to step 3")
  load_checkpoint(copy, step=3)
  save_checkpoint(copy, model, tokenizer, step=5)
  load_checkpoint(copy, step=5)


def test_the_newest_are_kept(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3, 4):
      checkpoints.save(step, numbers={"x": jnp.arange(step)})
  left = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert left == {"3", "4"}


def test_tuples_of_optimizer_states_come_back(tmp_path):
  state = (jnp.arange(3), {"m": (jnp.ones(2), jnp.zeros((), jnp.int32))})
  with Checkpoints(tmp_path, keep=None) as checkpoints:
    checkpoints.save(1, optimizer=state)
    abstract = jax.eval_shape(lambda: state)
    restored = checkpoints.restore(1, optimizer=abstract)["optimizer"]
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_full_disk_is_said_before_anything_is_written(
  copy, model, tokenizer, monkeypatch
):
  usage = collections.namedtuple("usage", "total used free")(9, 8, 1)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(UserError, match="no space left on its disk .* 1 free"):
    save_checkpoint(copy, model, tokenizer, step=6)
  monkeypatch.undo()
  load_checkpoint(copy, step=5)


@pytest.mark.parametrize("below", ["a file", "/dev/null"])
def test_a_directory_that_cannot_be_written_is_refused(
  below, tmp_path, model, tokenizer
):
  path = tmp_path / "a file"
  path.write_text("")
  path = path if below == "a file" else pathlib.Path(below, "x")
  with pytest.raises(UserError, match=f"work directory {path}: "):
    save_checkpoint(path, model, tokenizer)
