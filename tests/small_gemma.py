"""Models so small that what is done with them is all that takes time."""

import dataclasses
import io

import rich.console
from pallas_gemma.gemma import GemmaConfig, TrainConfig, train

TWO_LAYERS = dataclasses.replace(
  GemmaConfig.tiny(vocab_size=400),
  num_layers=2,
  width=16,
  hidden_size=32,
  num_heads=2,
  head_size=8,
  context_length=32,
)
ONE_LAYER = dataclasses.replace(
  TWO_LAYERS, num_layers=1, width=8, hidden_size=16, num_heads=1
)


def printed(settings: TrainConfig, width: int = 200) -> str:
  """Trains, and returns what is printed."""
  out = io.StringIO()
  train(settings, console=rich.console.Console(file=out, width=width))
  return out.getvalue()
