"""Forms of attention's arguments: what users expect to work, works."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_gemma.kernels import Rope, decode_attention, flash_attention

pytestmark = pytest.mark.no_interpreter
T = 12


def draw(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.standard_normal((2, T, heads, 8)), dtype)
    for heads in (4, 2, 2)
  )
  return q, k, v


def attend(**kwargs):
  return np.asarray(flash_attention(*draw(), **kwargs))


POSITIONS = jnp.broadcast_to(jnp.arange(T), (2, T))
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 7, [3] * 4 + [0] * 8])


@pytest.mark.parametrize(
  "form, same",
  [
    ({"local_window_size": 3}, {"local_window_size": (3, 3)}),
    ({"local_window_size": [3, 1]}, {"local_window_size": (3, 1)}),
    ({"local_window_size": np.int64(3)}, {"local_window_size": (3, 3)}),
    ({"local_window_size": (3, None)}, {"local_window_size": (3, T)}),
    ({"local_window_size": (None, 0)}, {"is_causal": True}),
    ({"local_window_size": (None, None)}, {}),
    ({"local_window_size": (2**31 - 1, 2**63)}, {}),
    (
      {"query_offset": np.asarray(2**40), "is_causal": True},
      {"query_offset": jnp.asarray(T), "is_causal": True},
    ),
    ({"chunk_size": 2**40}, {"chunk_size": T}),
    ({"rope": POSITIONS}, {"rope": Rope(POSITIONS)}),
    ({"rope": np.asarray(POSITIONS)}, {"rope": Rope(POSITIONS)}),
    (
      {"segment_ids": [SEGMENTS, SEGMENTS]},
      {"segment_ids": (SEGMENTS, SEGMENTS)},
    ),
    ({"segment_ids": np.asarray(SEGMENTS)}, {"segment_ids": SEGMENTS}),
    ({"segment_ids": SEGMENTS > 0}, {"segment_ids": (SEGMENTS > 0) + 0}),
    ({"scale": jnp.float32(0.5)}, {"scale": 0.5}),
    ({"logits_soft_cap": 5}, {"logits_soft_cap": 5.0}),
  ],
)
def test_forms_that_mean_the_same(form, same):
  np.testing.assert_array_equal(attend(**form), attend(**same))


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"local_window_size": -1}, r"must be \(left, right\), both >= 0"),
    ({"local_window_size": (1, 2, 3)}, r"one integer or \(left, right\)"),
    ({"local_window_size": 1.5}, "must be an integer, got 1.5"),
    ({"local_window_size": True}, "must be an integer, got True"),
    ({"segment_ids": (SEGMENTS,) * 3}, "one array or a pair, got 3"),
    ({"segment_ids": SEGMENTS * 1.0}, "segment_ids must be integers"),
    ({"rope": "positions"}, "rope must be an array, got str"),
    ({"rope": Rope(POSITIONS * 1.0)}, "positions must be integers"),
    ({"rope": Rope(POSITIONS, -1.0)}, "base_frequency must be positive"),
    ({"query_offset": 2**31 - 1}, "query_offset must be from -2.30 to 2.30"),
    ({"return_lse": "no"}, "return_lse must be True or False, got 'no'"),
    ({"segment_ids": np.asarray(SEGMENTS, object)}, "segment_ids must be an"),
    ({"segment_ids": np.asarray(SEGMENTS, float)}, "segment_ids must be int"),
    ({"scale": "one"}, "scale must be a number, got 'one'"),
    ({"scale": float("nan")}, "scale must be a number"),
  ],
)
def test_the_rest_is_refused_in_words(kwargs, message):
  with pytest.raises(ValueError, match=f"flash_attention: .*{message}"):
    attend(**kwargs)


def hashes():
  """Of documents: 64 bits, equal in the lower 32, and 0 in those of one."""
  ids = np.asarray(SEGMENTS, np.int64)
  return np.where(ids == 0, 0, (ids << 40) + (1 << 62))


def test_hashes_of_documents_are_told_apart():
  want = attend(segment_ids=SEGMENTS)
  np.testing.assert_array_equal(attend(segment_ids=hashes()), want)
  unsigned = hashes().astype(np.uint64)
  np.testing.assert_array_equal(attend(segment_ids=unsigned), want)
  with jax.enable_x64(True):
    ids = jnp.asarray(hashes())
    traced = jax.jit(lambda ids: flash_attention(*draw(), segment_ids=ids))
    np.testing.assert_allclose(traced(ids), want, rtol=1e-4, atol=1e-5)
    pair = flash_attention(*draw(), segment_ids=(ids, ids + 0))
    np.testing.assert_array_equal(pair, want)


def test_unsigned_ids_are_told_apart():
  ids = jnp.asarray(SEGMENTS, jnp.uint32)
  high = jnp.where(ids == 0, 0, ids + jnp.uint32(2**31))
  want = attend(segment_ids=SEGMENTS)
  np.testing.assert_array_equal(attend(segment_ids=high), want)


def test_padding_may_see_the_real_keys():
  """(ones, mask) hides padding's keys alone; the mask alone its queries too."""
  mask = SEGMENTS > 0
  both = attend(segment_ids=mask)
  keys = attend(segment_ids=(jnp.ones_like(mask), mask))
  real = np.asarray(mask)
  np.testing.assert_array_equal(both[real], keys[real])
  assert (both[~real] == 0).all() and (keys[~real] != 0).any()


def test_of_several_dtypes_the_widest_is_computed_with():
  q, k, v = draw()
  narrow = q.astype(jnp.bfloat16)
  for implementation in (None, "xla"):
    out = flash_attention(narrow, k, v, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    want = flash_attention(narrow.astype(jnp.float32), k, v)
    np.testing.assert_allclose(
      out.astype(jnp.float32), want, rtol=0.01, atol=0.01
    )


def test_decode_takes_the_same_forms():
  q, k, v = draw()
  lengths: Any = np.asarray([9, 12], np.int64)
  want = decode_attention(
    q[:, :1], k, v, jnp.asarray([9, 12]), local_window_size=(4, 4)
  )
  for window in (4, (4, None), (jnp.int32(4), 0)):
    got = decode_attention(q[:, :1], k, v, lengths, local_window_size=window)
    np.testing.assert_array_equal(got, want)
  for dtype in (jnp.uint8, jnp.uint16):
    got = decode_attention(
      q[:, :1], k, v, jnp.asarray(lengths, dtype), local_window_size=4
    )
    np.testing.assert_array_equal(got, want)
