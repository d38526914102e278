"""What the public function is given: checked, and brought to the op."""

from __future__ import annotations

import dataclasses

from .._frame.check import (
  as_floats,
  as_integers,
  as_number,
  as_whole_number,
  check_positive,
  check_shape,
)
from .spec import Arrays, Problem


def as_problem(op: str, p: Problem, given: Arrays) -> tuple[Problem, Arrays]:
  """The problem and its arrays, of what the caller said."""
  arrays = _arrays(op, given, p.transposed)
  p = dataclasses.replace(
    p, valid_vocab_size=_valid(op, p, p.vocab(arrays.embedding))
  )
  cap, part = p.logits_soft_cap, p.label_smoothing
  cap = None if cap is None else as_number(op, "logits_soft_cap", cap)
  check_positive(op, logits_soft_cap=cap)
  part = as_number(op, "label_smoothing", part)
  if not 0 <= part < 1:
    raise ValueError(
      f"{op}: label_smoothing must be from 0 to below 1, got {part}"
    )
  if part and cap is not None and p.keeps_exponentials:
    raise ValueError(
      f"{op}: config.mode must be 'recompute' for label_smoothing with a soft "
      f"cap, whose slope is not kept, got 'chunked'"
    )
  z_loss = as_number(op, "z_loss", p.z_loss)
  return dataclasses.replace(
    p, logits_soft_cap=cap, z_loss=z_loss, label_smoothing=part
  ), arrays


def _arrays(op: str, given: Arrays, transposed: bool) -> Arrays:
  x, embedding = as_floats(op, x=given.x, embedding=given.embedding)
  if x.ndim == 0:
    raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
  of_d = 0 if transposed else 1
  if embedding.ndim != 2 or embedding.shape[of_d] != x.shape[-1]:
    letters = "[D, V]" if transposed else "[V, D]"
    raise ValueError(
      f"{op}: embedding must be {letters} with D = {x.shape[-1]}, the last "
      f"dimension of x, got {embedding.shape}"
    )
  labels = as_integers(op, "labels", given.labels)
  shape = x.shape[:-1]
  check_shape(op, "labels", labels, shape, "x without its last dimension")
  weights, bias = given.weights, given.bias
  if weights is not None:
    (weights,) = as_floats(op, weights=weights)
    check_shape(op, "weights", weights, shape, "the shape of labels")
  if bias is not None:
    (bias,) = as_floats(op, bias=bias)
    check_shape(op, "bias", bias, (embedding.shape[1 - of_d],), "V")
  return Arrays(x, embedding, labels, weights, bias=bias)


def _valid(op: str, p: Problem, vocab: int) -> int:
  """How many rows of the table are vocabulary."""
  if p.valid_vocab_size is None:
    return vocab
  valid = as_whole_number(op, "valid_vocab_size", p.valid_vocab_size)
  if not 0 < valid <= vocab:
    raise ValueError(
      f"{op}: valid_vocab_size must be from 1 to V = {vocab}, got {valid}"
    )
  return valid
