"""A step of training: loss, gradient, clipping and AdamW, its state donated.

The trainer's own step, `make_steps`, on a slice of v5e chips.  Weights, moments
and gradients are float32 and stored in shards, each array split over all chips
along its longest dimension that divides (ZeRO-3); rows of tokens are split over
the chips too.  So a layer's weights are gathered before they are used, and
their gradients summed and split again: these collectives stand beside the
estimate, not in it.

A step's bound is its model FLOPs, those of `flops_per_token`: nothing that is
computed a second time counts.  The model-FLOPs utilisation is

    MFU = FLOPs per token * tokens of a chip / seconds / 197 TFLOP/s

A step of L layers costs about what two depths say by a straight line:

    cycles(L) = cycles(4) + (L - 4) / 2 * (cycles(4) - cycles(2))

For 2B on v5e-8 the table has 2, 4 and all 18 layers, for 7B on v5e-16 and
v5e-256 the two depths alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from pallas_gemma.gemma import GemmaConfig, TrainConfig, flops_per_token
from pallas_gemma.gemma._train import step as trainer
from pallas_gemma.kernels import Cost, sharding

from ..v5e import AXIS, Placement
from .program import Built, Program

_SENTENCEPIECE = 256_000  # pieces of Gemma's tokenizer
# Of all layers, what 15.25 GiB of a chip's memory hold.
_2B = dataclasses.replace(GemmaConfig.gemma_2b(), remat="attention:14,names")
_7B = GemmaConfig.gemma_7b()
_SLICES = {"v5e_16": ("v5e:4x4", "full"), "v5e_256": ("v5e:16x16", "attention")}
_DEPTHS = (2, 4)
# Else the compiler takes products apart to hide collectives behind the pieces,
# or makes one instruction of both, and their cycles could not be told apart.
_COLLECTIVES_APART = (
  ("xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000"),
  ("xla_tpu_enable_async_collective_fusion", "false"),
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A training run on a slice.

  Attributes:
    name: of the case.
    model: its sizes, and what it keeps for its backward pass.
    topology: the slice.
    length: of a row of tokens; each chip has one.
    head: what the loss keeps; see `TrainConfig.head`.
    vocabulary: pieces of the tokenizer.
  """

  name: str
  model: GemmaConfig
  topology: str
  length: int
  head: trainer.Head = "chunked"
  vocabulary: int = _SENTENCEPIECE

  @property
  def chips(self) -> int:
    """Of the slice."""
    rows, columns = self.topology.partition(":")[2].split("x")
    return int(rows) * int(columns)

  @property
  def config(self) -> TrainConfig:
    """What the trainer is told."""
    return TrainConfig(
      batch_size=self.chips,
      sequence_length=self.length,
      head=self.head,
      model=self.model,
    )


_CASES = (
  *(
    Case(
      f"gemma_2b_{depth}_layers_v5e_8",
      dataclasses.replace(_2B, num_layers=depth, remat="attention"),
      "v5e:2x4",
      8192,
    )
    for depth in _DEPTHS
  ),
  Case("gemma_2b_v5e_8", _2B, "v5e:2x4", 8192),
  *(
    Case(
      f"gemma_7b_{depth}_layers_{name}",
      dataclasses.replace(_7B, num_layers=depth, remat=remat),
      topology,
      4096,
    )
    for name, (topology, remat) in _SLICES.items()
    for depth in _DEPTHS
  ),
)


def programs() -> Iterator[Program]:
  """One chip's part of a step, for every case."""
  for case in _CASES:
    flops = round(flops_per_token(case.model, case.length) * case.length)
    yield Program(
      op="gemma_train_step",
      case=case.name,
      which="step",
      implementation="pallas",
      build=functools.partial(step, case),
      costs=(Cost(flops, _state_bytes(case)),),
      model_flops=flops,
      default=False,
    )


def step(case: Case) -> Built:
  """The trainer's step, of weights, optimizer state and a batch, all flat."""
  train_step, _ = trainer.make_steps(case.config, case.vocabulary)
  state = jax.eval_shape(lambda: trainer.fresh_state(case.config))
  rows = (case.chips, case.length)
  numbers = jax.ShapeDtypeStruct(rows, jnp.int32)
  batch = {
    "tokens": numbers,
    "labels": numbers,
    "segment_ids": numbers,
    "weights": jax.ShapeDtypeStruct(rows, jnp.float32),
  }
  leaves, treedef = jax.tree.flatten((state, batch))
  split = functools.partial(_split, case=case)
  partitions = (
    jax.tree.map(split, state),
    {name: PartitionSpec(AXIS) for name in batch},
  )

  def train(*arrays: jax.Array) -> Any:
    (params, optimizer), batch = jax.tree.unflatten(treedef, arrays)
    mesh: Any = jax.sharding.get_abstract_mesh()
    with sharding(mesh, {"B": AXIS}):
      params, optimizer, measured = train_step(params, optimizer, batch)
    return (params, optimizer), measured

  one_document = np.ones(rows, np.int32)
  is_document = jax.tree.leaves(
    (
      jax.tree.map(lambda _: False, state),
      {name: name == "segment_ids" for name in batch},
    )
  )
  return Built(
    train,
    tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves),
    tuple(one_document if known else None for known in is_document),
    Placement(
      topology=case.topology,
      arguments=tuple(
        jax.tree.leaves(
          partitions, is_leaf=lambda x: isinstance(x, PartitionSpec)
        )
      ),
      results=(partitions[0], PartitionSpec()),
      donated=tuple(range(len(jax.tree.leaves(state)))),
      options=_COLLECTIVES_APART,
    ),
  )


def _split(array: jax.ShapeDtypeStruct, case: Case) -> PartitionSpec:
  """How an array of the state is stored.

  Over its longest dimension that divides, the vocabulary apart: a table split
  over D is read and updated by each chip for its part of every row, where one
  that is split over V would be read by all for all tokens.
  """
  words, chips = case.model.vocab_size, case.chips
  dims = [
    i
    for i, size in enumerate(array.shape)
    if size != words and size and size % chips == 0
  ]
  if not dims:
    return PartitionSpec()
  longest = max(dims, key=lambda i: array.shape[i])
  return PartitionSpec(*(None,) * longest, AXIS)


def _state_bytes(case: Case) -> int:
  """A chip's shards of weights and moments, read once and written once."""
  state = jax.eval_shape(lambda: trainer.fresh_state(case.config))
  sizes = (x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  return 2 * sum(sizes) // case.chips
