"""The parameters of a model as a pytree of their own."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx

from ._config import GemmaConfig
from ._model import Gemma
from .ops import Ops

Params = dict[str, Any]
"""A model's parameters: nested dicts of arrays, by the names in `_model`."""


def model_params(model: Gemma) -> Params:
  """The parameters of a model, real or abstract."""
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def with_params(model: Gemma, params: Params) -> Gemma:
  """A model of the same config and ops with other parameters."""
  return nnx.merge(nnx.graphdef(model), nnx.State(params))


def abstract_gemma(config: GemmaConfig, ops: Ops) -> Gemma:
  """A model with `jax.ShapeDtypeStruct`s in place of its parameters."""
  return nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0), ops=ops))


def num_parameters(model: Gemma) -> int:
  """How many numbers the parameters of a model are, real or abstract."""
  return sum(math.prod(p.shape) for p in jax.tree.leaves(model))
