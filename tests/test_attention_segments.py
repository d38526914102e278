"""Segment ids: which blocks of keys are computed without a mask."""

import functools
import importlib
from typing import Any

import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from pallas_gemma.kernels import flash_attention_reference
from small_attention import KERNEL, draw

OPERANDS = importlib.import_module("pallas_gemma.kernels._attention.operands")


def ids_of(*runs):
  return jnp.asarray([np.repeat(*np.transpose(runs))], jnp.int32)


PACKED = ids_of((1, 130), (2, 420), (0, 50))
AGAIN = ids_of((3, 150), (2, 310), (3, 140))
CASES: dict[str, dict[str, Any]] = {
  "causal": dict(is_causal=True, segment_ids=PACKED),
  "ids come again, window": dict(
    segment_ids=(AGAIN, PACKED[:, ::-1]), local_window_size=(300, 140)
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_masked_and_full_blocks_together(name):
  numerics.assert_agrees(
    functools.partial(KERNEL, **CASES[name]),
    functools.partial(flash_attention_reference, **CASES[name]),
    draw(1, 600, 600, 1, 1, 64),
    softmax=True,
  )


@pytest.mark.no_interpreter
def test_a_run_of_full_blocks_is_found():
  def runs(q, k, block_q, block_kv):
    class Call:
      key_unit = block_kv

    call: Any = Call()
    call.block_q, call.block_kv = block_q, block_kv
    segments = OPERANDS.Segments(jnp.asarray([q]), jnp.asarray([k]))
    return OPERANDS.segment_bounds(call, segments).reshape(-1, 4).tolist()

  # First, first full, end of the full, end; nothing is full of two ids.
  assert runs([1] * 8, [1] * 8, 4, 2) == [[0, 0, 4, 4]] * 2
  assert runs([1, 1, 2, 2], [1, 1, 1, 2, 2, 2], 2, 2) == [
    [0, 0, 1, 2],
    [1, 2, 3, 3],
  ]
  # Of two runs the last; of padding, and of queries of two ids, none.
  assert runs([5, 5], [5, 5, 6, 5, 5, 5, 0, 0], 2, 2) == [[0, 2, 3, 3]]
  assert runs([1, 2, 0, 0], [1, 1, 0, 0], 2, 2)[0] == [0, 0, 0, 1]
