"""Training steps on this machine's CPU, beside Hugging Face's GemmaForCausalLM.

    python -P tools/beside_torch.py --torch-python ~/torch/bin/python

Both train the same Gemma in float32: forward, backward, clipping, AdamW.  Ours
is the trainer's own step, with its segment ids and all that it measures.  Each
is a process of its own, and they take turns, for what else the machine does to
slow both.  Printed is the median of the rounds, and that of the ratios.

torch and transformers may be in an environment of their own, to be named; a
build of torch for CPUs will do.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Size:
  """A Gemma and its batch."""

  vocabulary: int
  layers: int
  width: int
  hidden: int
  heads: int
  head_size: int
  rows: int
  tokens: int  # of a row


SIZES = {
  "tiny": Size(2048, 4, 128, 512, 4, 32, rows=8, tokens=128),
  "small": Size(4096, 6, 256, 1024, 4, 64, rows=8, tokens=256),
}
_SECONDS = 2.0  # of a turn, about
_WARM_UP = 3  # steps: the first compiles


def main() -> None:
  """A line for each size, or one side of it."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("sizes", nargs="*", help=f"of {', '.join(SIZES)}")
  parser.add_argument("--torch-python", default=sys.executable)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--side", choices=_SIDES, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  for name in arguments.sizes or SIZES:
    if name not in SIZES:
      parser.error(f"size must be one of {', '.join(SIZES)}, got {name!r}")
    if arguments.side:
      _answer(_SIDES[arguments.side](SIZES[name]))
    else:
      print(_compared(name, arguments.torch_python, arguments.rounds))


# --- from outside -------------------------------------------------------------


def _compared(name: str, torch_python: str, rounds: int) -> str:
  pythons = {"ours": sys.executable, "torch": torch_python}
  sides = [
    subprocess.Popen(
      [python, "-P", __file__, name, "--side", side],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    for side, python in pythons.items()
  ]
  try:
    counts = [max(2, round(_SECONDS / _ask(side, 2))) for side in sides]
    times = [
      [_ask(side, n) for side, n in zip(sides, counts, strict=True)]
      for _ in range(rounds)
    ]
  finally:
    for side in sides:
      side.kill()
      side.communicate()
  ours, theirs = (
    statistics.median(column) for column in zip(*times, strict=True)
  )
  ratio = statistics.median(theirs / ours for ours, theirs in times)
  return (
    f"{name}: ours {1e3 * ours:.1f} ms a step, torch {1e3 * theirs:.1f} ms, "
    f"{ratio:.2f} times its speed"
  )


def _ask(side: subprocess.Popen[str], steps: int) -> float:
  """Seconds a step."""
  assert side.stdin is not None and side.stdout is not None
  side.stdin.write(f"{steps}\n")
  side.stdin.flush()
  answer = side.stdout.readline()
  if not answer:
    sys.exit("a side has ended; what it said is above")
  return float(answer)


# --- one side -----------------------------------------------------------------


def _answer(step: Callable[[], float]) -> None:
  """Takes as many steps as it is told, line by line."""
  for _ in range(_WARM_UP):
    step()
  for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
      step()
    print((time.perf_counter() - start) / int(line), flush=True)


def _ours(size: Size) -> Callable[[], float]:
  import jax.numpy as jnp
  import numpy as np
  from pallas_gemma.gemma import GemmaConfig, TrainConfig

  steps = importlib.import_module("pallas_gemma.gemma._train.step")
  config = TrainConfig(
    work_dir=pathlib.Path("unused"),
    model=GemmaConfig(
      vocab_size=size.vocabulary,
      num_layers=size.layers,
      width=size.width,
      hidden_size=size.hidden,
      num_heads=size.heads,
      num_kv_heads=1,
      head_size=size.head_size,
      context_length=size.tokens,
      dtype="float32",
    ),
    batch_size=size.rows,
    sequence_length=size.tokens,
    head="recompute",
  )
  train_step, _ = steps.make_steps(config, size.vocabulary, None)
  state = list(steps.initial_state(config, None))
  shape, rng = (size.rows, size.tokens), np.random.default_rng(0)
  ids = [rng.integers(0, size.vocabulary, shape, np.int32) for _ in range(2)]
  batch: dict[str, Any] = {
    "tokens": jnp.asarray(ids[0]),
    "labels": jnp.asarray(ids[1]),
    "segment_ids": jnp.ones(shape, jnp.int32),
    "weights": jnp.ones(shape, jnp.float32),
  }

  def step() -> float:
    *state[:], measured = train_step(*state, batch)
    return float(measured["loss"])

  return step


def _torch(size: Size) -> Callable[[], float]:
  torch: Any = importlib.import_module("torch")
  transformers: Any = importlib.import_module("transformers")
  model = transformers.GemmaForCausalLM(
    transformers.GemmaConfig(
      vocab_size=size.vocabulary,
      num_hidden_layers=size.layers,
      hidden_size=size.width,
      intermediate_size=size.hidden,
      num_attention_heads=size.heads,
      num_key_value_heads=1,
      head_dim=size.head_size,
      max_position_embeddings=size.tokens,
      hidden_act="gelu_pytorch_tanh",
      attn_implementation="sdpa",
      use_cache=False,
    )
  ).train()
  optimizer = torch.optim.AdamW(model.parameters(), fused=True)
  ids = torch.randint(0, size.vocabulary, (size.rows, size.tokens))

  def step() -> float:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()

  return step


_SIDES = {"ours": _ours, "torch": _torch}

if __name__ == "__main__":
  main()
