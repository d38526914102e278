"""`pallas-gemma inspect`: what of a model lies where on a mesh."""

import importlib
import re

import pytest
from pallas_gemma.gemma import GemmaConfig, Tokenizer, UserError

INSPECT = importlib.import_module("pallas_gemma.gemma._train.inspect")
CLI = importlib.import_module("pallas_gemma.gemma._cli")
pytestmark = pytest.mark.no_interpreter


def lines(**options):
  return list(INSPECT.described(INSPECT.InspectConfig(**options)))


def found(shown, start):
  return next(line.strip() for line in shown if line.strip().startswith(start))


def test_a_device_has_its_part_of_everything():
  shown = lines(mesh="v5e-8")
  assert shown[0] == "mesh       fsdp=8: 8 devices"
  gate = found(shown, "blocks.gate ")
  assert gate.endswith("[-, fsdp, -]  [18, 256, 16384] each")
  whole = 2_506_434_560 * 4  # bytes of Gemma 2B's parameters in float32

  def gib(start):
    return float(re.findall(r"([\d.]+) GiB", found(shown, start))[0])

  assert gib("optimizer state") == pytest.approx(2 * gib("gradients"), abs=2e-3)
  assert gib("gradients") == pytest.approx(whole / 8 / 2**30, rel=3e-2)


def test_heads_and_columns_are_split_over_the_model_axis():
  shown = lines(mesh="report-7b", model="7b", sequence_length=4096)
  assert "4,096 devices" in shown[0]
  queries = found(shown, "queries")
  assert queries.endswith("[pods+fsdp, -, model, -]  [1, 4096, 1, 256] each")
  assert found(shown, "logits").endswith("[1, 4096, 16008] each")


def test_one_key_value_head_is_copied():
  shown = lines(mesh="fsdp=2,model=4")
  kv = found(shown, "blocks.kv ")
  assert kv.endswith("[-, -, -, fsdp, -]  [18, 2, 1, 1024, 256] each")
  keys = found(shown, "keys, values")
  assert keys.endswith("[fsdp, -, -, -]  [1, 8192, 1, 256] each")


def test_what_does_not_divide_is_named():
  with pytest.raises(UserError, match="does not divide the model's heads, 8"):
    lines(mesh="model=3")
  with pytest.raises(UserError, match="does not divide the 3 rows"):
    lines(mesh="fsdp=2", batch_size=3)


@pytest.mark.parametrize("size", ["1048577", "9" * 30, "9" * 5000])
def test_more_devices_than_there_can_be_are_said_so(size):
  with pytest.raises(UserError, match="wanted 1,048,576 devices or fewer"):
    lines(mesh=f"fsdp={size}")


def test_the_command_prints_it(capsys):
  with pytest.raises(SystemExit) as end:
    CLI.main(["inspect", "--model", "tiny", "--mesh", "fsdp=2"])
  assert end.value.code == 0
  assert "fsdp=2: 2 devices" in capsys.readouterr().out
  with pytest.raises(SystemExit) as end:
    CLI.main(["inspect", "--mesh", "rows=2"])
  assert end.value.code == 2
  assert "wanted auto, v5e-1" in capsys.readouterr().err


def test_no_array_of_a_checkpoint_is_read(tmp_path):
  """Sizes are asked for, which are known before the first step."""
  identity = importlib.import_module("pallas_gemma.gemma._checkpoint.identity")
  learnt = Tokenizer.train(["The quick brown fox, again. " * 9], 300)
  model = {"model": GemmaConfig.tiny().to_dict()}
  identity.write_identity(tmp_path, model, learnt)
  shown = lines(checkpoint=tmp_path)
  assert "[1, 256, 128]" in found(shown, "residual stream")
  with pytest.raises(UserError, match="none: no such directory"):
    lines(checkpoint=tmp_path / "none")
