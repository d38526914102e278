"""The model, from its own code: from one block to whole steps.

    gemma_block   one block, in and out: what a layer would cost alone
    gemma_layers  several, scanned over stacked weights as the model does
    gemma_step    a step of training: loss, gradient, optimizer
    gemma_decode  a step of decoding: one more token for every row

An op's time says what it costs alone; these say what XLA puts around it.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import gemma_block, gemma_decode, gemma_layers, gemma_step
from .program import Program


def programs() -> Iterator[Program]:
  """The programs of every part."""
  for part in (gemma_block, gemma_layers, gemma_step, gemma_decode):
    yield from part.programs()
