"""Sine and cosine for kernels, against float64."""

import importlib

import hypothesis
import hypothesis.strategies as st
import jax
import mutation
import numpy as np
import pytest

MODULE = importlib.import_module("pallas_gemma.kernels._sincos")
sin_cos = MODULE.sin_cos
AFTER_QUARTERS = MODULE._after_quarters


def cosine_for_sine(quarter, sin, cos):
  """Where the number of quarters is even, not where it is odd."""
  sin, cos = AFTER_QUARTERS(quarter, sin, cos)
  return cos, sin


def sine_late(quarter, sin, cos):
  late, _ = AFTER_QUARTERS(quarter + 3, -cos, sin)
  return late, AFTER_QUARTERS(quarter, sin, cos)[1]


def cosine_late(quarter, sin, cos):
  sin_after, cos_after = AFTER_QUARTERS(quarter, sin, cos)
  late = ((quarter & 2) == 2) != (((quarter + 1) & 2) == 2)
  return sin_after, MODULE.jnp.where(late, -cos_after, cos_after)


def weights_of(*places):
  return tuple(MODULE._parts(*place) for place in places)


PLACES = MODULE._PLACES
MUTANTS = {
  "quarters in the wrong order": {"_after_quarters": cosine_for_sine},
  "sine's sign a quarter late": {"_after_quarters": sine_late},
  "cosine's sign a quarter late": {"_after_quarters": cosine_late},
  "low parts forgotten": {
    "_WEIGHTS": tuple((high, 0.0) for high, _ in MODULE._WEIGHTS)
  },
  "a digit too few": {
    "_PLACES": PLACES[1:],
    "_WEIGHTS": MODULE._WEIGHTS[1:],
  },
  "the high parts have too many bits": {
    "_WEIGHTS": weights_of(PLACES[0], (1 << 9, 2**-24), PLACES[2])
  },
  "a term of the sine's series lost": {"_SIN": MODULE._SIN[:-1]},
  "a term of the cosine's series lost": {"_COS": MODULE._COS[:-1]},
}


def agrees(function, angles) -> None:
  """Within two units of the last place of 1, of the float32 angle's values."""
  angles = np.asarray(angles, np.float32)
  exact = angles.astype(np.float64)
  for got, want in zip(
    jax.jit(function)(angles), (np.sin(exact), np.cos(exact)), strict=True
  ):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-7)


def spread() -> np.ndarray:
  """Angles of every size, both signs, and those around quarter turns."""
  rng = np.random.default_rng(0)
  sizes = 2.0 ** rng.uniform(-20, 31, 20_000)
  quarters = rng.integers(0, 1 << 22, 20_000) * (np.pi / 2)
  angles = np.concatenate([sizes, quarters])
  return np.concatenate([angles, -angles, [0.0, -(2.0**31)]])


@hypothesis.given(st.lists(st.floats(-(2**31), 2**31, width=32), min_size=1))
def test_any_angle(angles):
  agrees(sin_cos, angles)


def test_angles_of_every_size():
  agrees(sin_cos, spread())


def test_small_angles_keep_their_digits():
  angles = np.float32(2.0) ** -np.arange(4, 100, dtype=np.float32)
  sin, _ = sin_cos(angles)
  # Five roundings on the way: to turns and back, the product, and two sums.
  np.testing.assert_allclose(sin, np.sin(angles.astype(np.float64)), rtol=3e-7)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name, monkeypatch):
  for step, wrong in MUTANTS[name].items():
    monkeypatch.setattr(MODULE, step, wrong)

  def mutant(angle):  # a new one: jit's cache knows the original
    return sin_cos(angle)

  mutation.assert_killed(agrees, mutant, spread())
