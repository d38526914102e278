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
MUTANTS = {
  "quarters in the wrong order": (
    "jnp.where(odd, cos, sin), jnp.where(odd, sin, cos)",
    "jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)",
  ),
  "sine's sign a quarter late": ("(quarter & 2)", "((quarter + 3) & 2)"),
  "cosine's sign a quarter late": ("((quarter + 1) & 2)", "(quarter & 2)"),
  "low parts forgotten": ("low += digit * low_part", "pass"),
  "a digit too few": ("(1 << 20, 2**-12), ", ""),
  "the high parts have too many bits": ("(1 << 9, 2**-14)", "(1 << 9, 2**-24)"),
  "a term of the sine's series lost": (", -0.00019515296", ""),
  "a term of the cosine's series lost": (", 2.4433157e-05", ""),
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
def test_mutants_die(name):
  copy = mutation.mutant(MODULE, *MUTANTS[name])
  mutation.assert_killed(agrees, copy.sin_cos, spread())
