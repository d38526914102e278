"""Which rows the kernels of experts visit, and when their weights come."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import mutation
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from pallas_gemma.kernels import (
  ExpertBiases,
  FeedForwardConfig,
  FeedForwardTiles,
  expert_feed_forward,
)

VISITS, PREFETCH, FORWARD, BACKWARD = (
  importlib.import_module(f"pallas_gemma.kernels._gated.{name}")
  for name in ("visits", "prefetch", "forward", "backward")
)
Rows: Any = VISITS.Rows
ROWS, TILE, PART = 70, 16, 8


@st.composite
def group_sizes(draw):
  """Of at most as many rows as there are; some without any."""
  left, sizes = ROWS, []
  for _ in range(draw(st.integers(1, 5))):
    sizes.append(draw(st.sampled_from((0, 1, 16, 32)) | st.integers(0, left)))
    sizes[-1] = min(sizes[-1], left)
    left -= sizes[-1]
  return sizes


# --- the visits ---------------------------------------------------------------

visits_of = jax.jit(VISITS.visits_of, static_argnums=(1, 2))


@given(group_sizes())
@settings(max_examples=200, deadline=None)
def test_every_row_is_visited_once_by_its_expert(sizes):
  visits = jax.device_get(visits_of(jnp.asarray(sizes), ROWS, TILE))
  steps = list(zip(*visits, strict=True))
  wanted = [e for e, size in enumerate(sizes) for _ in range(size)]
  got = [None] * ROWS
  for expert, tile, begin, end, *_ in steps:
    for row in range(tile * TILE + begin, tile * TILE + end):
      assert got[row] is None
      got[row] = expert
  assert got == wanted + [None] * (ROWS - len(wanted))
  tiles = [step[1] for step in steps]
  # Each once, for what is written there stays until it is left.
  assert tiles == sorted(tiles) and set(tiles) == set(range(5))
  experts = [step[0] for step in steps]
  assert experts == sorted(experts)
  # Else the weights of the next one would not be known.
  assert set(experts) == set(range(len(sizes)))


@given(group_sizes())
@settings(max_examples=50, deadline=None)
def test_flags_and_parts(sizes):
  part = VISITS.part_rows(256)
  assert part == VISITS.PART_ROWS and VISITS.part_rows(80) == 80
  visits = jax.device_get(visits_of(4 * jnp.asarray(sizes), 280, 256))
  for runs, first, last in (
    (visits.expert, visits.is_first, visits.is_last),
    (visits.tile, visits.opens, visits.closes),
  ):
    changes = np.diff(runs) != 0
    np.testing.assert_array_equal(first, [1, *changes])
    np.testing.assert_array_equal(last, [*changes, 1])
  np.testing.assert_array_equal(visits.first_part, visits.begin // part)
  np.testing.assert_array_equal(visits.end_part, -(-visits.end // part))


@given(st.lists(st.integers(-2 * ROWS, 2 * ROWS), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_what_a_visit_copies_is_there_whatever_the_sizes(sizes):
  """They are numbers of the caller's; the kernel's copies have no bounds."""
  visits = jax.device_get(visits_of(jnp.asarray(sizes), ROWS, TILE))
  assert set(visits.tile) <= set(range(5))
  assert set(visits.expert) <= set(range(len(sizes)))
  for rows in (visits.begin, visits.end):
    assert rows.min() >= 0 and rows.max() <= TILE


# --- the kernels --------------------------------------------------------------

D, F = 24, 256
CONFIG = FeedForwardConfig(
  forward=FeedForwardTiles(TILE, 128), backward=FeedForwardTiles(TILE, 128)
)
SIZES = 20, 0, 23, 9  # the first ends in a part, the second has none


@functools.cache
def arrays(experts):
  """The result's cotangent, x, weights and biases."""
  rng = np.random.default_rng(0)
  shapes = (
    *((ROWS, D), (ROWS, D)),
    *((experts, D, F), (experts, D, F), (experts, F, D)),
    *((experts, F), (experts, F), (experts, D)),
  )
  return [jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes]


def results(sizes, implementation):
  """y and the gradients of all floats."""

  def function(x, gate, up, down, *biases):
    return expert_feed_forward(
      *(x, gate, up, down, jnp.asarray(sizes)),
      biases=ExpertBiases(*biases),
      implementation=implementation,
      config=CONFIG,
    )

  dy, *given = arrays(len(sizes))
  y, vjp = jax.vjp(function, *given)
  return [np.asarray(x) for x in (y, *vjp(dy))]


@functools.cache
def plain(sizes):
  return results(sizes, "xla")


def kernels_agree(sizes=SIZES):
  for got, want in zip(results(sizes, "pallas"), plain(sizes), strict=True):
    bar = 1e-5 * np.abs(want).max(initial=1)  # sums in another order
    np.testing.assert_allclose(got, want, rtol=0, atol=bar)


@pytest.fixture
def parts(monkeypatch):
  """Two in each tile."""
  monkeypatch.setattr(VISITS, "PART_ROWS", PART)


@pytest.mark.parametrize(
  "sizes", [SIZES, (0, 0, 0), (70,), (0, 64, 6, 0), (1, 1, 1, 40, 1)]
)
def test_kernels_agree_with_the_reference(sizes, parts):
  kernels_agree(sizes)


# --- mutants ------------------------------------------------------------------


class _Writes(Rows):
  def write(self, ref, tile):
    ref[...] = tile.astype(ref.dtype)


class _NeverOpens(Rows):
  def open(self, *results):
    @pl.when(self._opens)
    def _():  # as memory that was used before
      for ref in results:
        if ref is not None:
          ref[...] = jnp.ones(ref.shape, ref.dtype)


class _DoesNotClear(Rows):
  def clear_if_none(self, *sums):
    pass


class _KeepsOthersRows(Rows):
  def inside(self, tile):
    return tile


class _FirstInEveryPart(Rows):
  def each_part(self, compute):
    def every(rows, part):
      rows.is_first = self.is_first
      compute(rows, part)

    super().each_part(every)


class _OnePartOnly(Rows):
  def each_part(self, compute):
    self._end_part = jnp.minimum(self._end_part, self._first_part + 1)
    super().each_part(compute)


def _of_the_first_buffer(scalars, inputs, buffers, rows, plan):
  """Every other expert's weights."""
  got = PREFETCH.fetched(scalars, inputs, buffers, rows, plan)
  return got._replace(w_gate=buffers.w_gate.at[0]) if buffers else got


MUTANTS = {
  "a visit overwrites others' rows": (FORWARD, "Rows", _Writes),
  "rows of none are not cleared": (FORWARD, "Rows", _NeverOpens),
  "an expert without rows has a gradient": (BACKWARD, "Rows", _DoesNotClear),
  "others' rows reach the weights": (BACKWARD, "Rows", _KeepsOthersRows),
  "a sum begins anew in every part": (BACKWARD, "Rows", _FirstInEveryPart),
  "one part of a visit, forward": (FORWARD, "Rows", _OnePartOnly),
  "one part of a visit, backward": (BACKWARD, "Rows", _OnePartOnly),
  "always the same buffer": (FORWARD, "fetched", _of_the_first_buffer),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name, parts, monkeypatch):
  plain(SIZES)
  monkeypatch.setattr(*MUTANTS[name])
  mutation.assert_killed(kernels_agree)
