"""The tables of XLA's ragged products, as its own kernel makes them."""

import importlib

import numpy as np
import pytest

ragged = importlib.import_module("pallas_gemma.bench.v5e.ragged")
TEXT = (
  'custom-call(...), custom_call_target="tpu_custom_call", '
  "operand_layout_constraints={s32[1]{0}, s32[5]{0}, s32[7]{0}, s32[7]{0}, "
  "s32[1]{0}, bf16[512,64]{1,0}, bf16[4,64,128]{2,1,0}}, "
  'frontend_attributes={ragged_dot_tiling="128,64,128"}'
)


def test_a_tile_is_visited_by_each_group_in_it():
  sizes = np.array([130, 0, 126, 200])
  count, starts, groups, tiles, again = (
    ragged.operands_of(TEXT, sizes)[i] for i in range(5)
  )
  assert count == again == [5]
  np.testing.assert_array_equal(starts, [0, 130, 130, 256, 456])
  np.testing.assert_array_equal(groups, [0, 0, 2, 3, 3, 3, 3])
  np.testing.assert_array_equal(tiles, [0, 1, 1, 2, 3, 3, 3])


@pytest.mark.parametrize("missing", ["ragged_dot_tiling", "s32[7]"])
def test_another_kernel_has_no_tables(missing):
  assert ragged.operands_of(TEXT.replace(missing, "x"), np.ones(4)) is None
