"""Activations of gated units: the specification's, and the kernels' own.

A kernel's backward needs value and derivative of the same argument, from one
evaluation of the transcendental they share:

    gelu_tanh  a = g (1 + t) / 2,   t = tanh(c g (1 + k g^2)),  c = sqrt(2 / pi)
               a' = (1 + t) / 2 + g (1 - t^2) c (1 + 3 k g^2) / 2,  k = 0.044715
    gelu       a = g P,   a' = P + g exp(-g^2 / 2) / sqrt(2 pi)
               where P = (1 + erf(g / sqrt 2)) / 2
    silu       a = g s,   a' = s + a (1 - s),   s = 1 / (1 + exp(-g))
    relu       a = max(g, 0),   a' = 1 where g > 0, else 0
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

Activation = Literal["gelu_tanh", "gelu", "silu", "relu"]

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
}

_C = math.sqrt(2 / math.pi)
_K = 0.044715


def _gelu_tanh(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  square = g * g
  t = jnp.tanh(_C * g * (1 + _K * square))
  half = 0.5 * (1 + t)
  slope = 0.5 * _C * g * (1 - t * t) * (1 + 3 * _K * square)
  return g * half, half + slope


def _gelu(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  p = 0.5 * (1 + jax.lax.erf(g * math.sqrt(0.5)))
  density = jnp.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
  return g * p, p + g * density


def _silu(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  s = jax.nn.sigmoid(g)
  a = g * s
  return a, s + a * (1 - s)


def _relu(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jnp.maximum(g, 0), jnp.where(g > 0, 1.0, 0.0)


_VALUE_AND_DERIVATIVE = {
  "gelu_tanh": _gelu_tanh,
  "gelu": _gelu,
  "silu": _silu,
  "relu": _relu,
}


def activate(activation: Activation, gate: jax.Array) -> jax.Array:
  """The activation of a float32 tile, inside a kernel."""
  return _VALUE_AND_DERIVATIVE[activation](gate)[0]


def activate_and_derive(
  activation: Activation, gate: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The activation of a float32 tile and its derivative, inside a kernel."""
  return _VALUE_AND_DERIVATIVE[activation](gate)
