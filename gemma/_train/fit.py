"""What the backward pass keeps, so that a step of training fits the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax

from .. import _remat
from .._errors import UserError
from .config import TrainConfig

Head = Literal["recompute", "chunked"]
Compile = Callable[[TrainConfig], Any]
"""Compiles a step of training; raises what XLA raises if it does not fit."""


def fitting(
  config: TrainConfig,
  memory: int | None,
  head: Head,
  compile_step: Compile,
  over_devices: bool = False,
) -> TrainConfig:
  """The config, with "auto" resolved for what layers and loss keep.

  Layers come first: what is kept for one of Gemma 2B saves more than twice the
  arithmetic that the same bytes save in the loss.

  Args:
    config: of the run.
    memory: bytes that the device has for arrays; None if that is not known.
    head: what the loss keeps, if what layers keep is given.
    compile_step: of a config without "auto".
    over_devices: whether it is for several.

  Raises:
    UserError: if nothing fits.
  """

  def with_choice(remat: str, head: Head) -> TrainConfig:
    model = dataclasses.replace(config.model, remat=remat)
    return dataclasses.replace(config, model=model, head=head)

  if config.model.remat != _remat.AUTO:
    return with_choice(config.model.remat, head)
  if memory is None:
    return with_choice("none", head)
  first: Head = "recompute" if config.head == "auto" else config.head

  def fits(remat: str, head: Head = first) -> bool:
    return _bytes(compile_step, with_choice(remat, head)) <= memory

  remat = _remat.fastest_that(fits, config.model.num_layers, over_devices)
  if remat is None:
    raise UserError(
      f"remat auto: even with each layer's input alone kept, a step takes more "
      f"than the device's {memory:,} bytes; give a smaller --batch-size or "
      f"--sequence-length, or more --accumulation"
    )
  has_room = config.head == "auto" and fits(remat, "chunked")
  return with_choice(remat, "chunked" if has_room else first)


def _bytes(compile_step: Compile, config: TrainConfig) -> float:
  """Memory that a step takes at its peak."""
  try:
    memory = compile_step(config).memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return float("inf")
  added = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )
  # Of a TPU's program the temporaries have the gaps of their heap twice; the
  # sum, which JAX gives from 0.12 on, has them once.
  return min(added, getattr(memory, "total_allocation_bytes", 0) or added)
