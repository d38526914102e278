"""A step of training: loss, gradient, clipping and AdamW, its state donated.

The trainer's own step, `make_steps`, and what of it lies where, `Layout`, on a
slice of v5e chips, or several: one chip's part.  Weights, moments and gradients
are float32 and stored in shards (ZeRO-3), rows of tokens are split over the
chips too.  So a layer's weights are gathered before they are used, and their
gradients summed and split again.

A step's bound is its model FLOPs, those of `flops_per_token`: nothing that is
computed a second time counts.  The model-FLOPs utilisation is

    MFU = FLOPs per token * tokens of a chip / seconds / 197 TFLOP/s

Each case is compiled twice.  As `pallas` with the collectives apart, for the
cycles of what is computed: else the compiler takes products apart to hide
collectives behind the pieces, or makes one instruction of both, whose cycles
could not be told apart.  As `pallas-overlapped` as a user's program is, for the
collectives: which there are, and which of them the core waits for.

A step of L layers costs about what two depths say by a straight line, if all
layers keep the same, as those of these two do:

    cycles(L) = cycles(4) + (L - 4) / 2 * (cycles(4) - cycles(2))
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pallas_gemma.gemma import GemmaConfig, TrainConfig, flops_per_token
from pallas_gemma.gemma._train import layout as layouts
from pallas_gemma.gemma._train import mesh as meshes
from pallas_gemma.gemma._train import step as trainer
from pallas_gemma.kernels import Cost

from ..v5e import Placement
from .program import APART, OVERLAPPED, Built, Program

_SENTENCEPIECE = 256_000  # pieces of Gemma's tokenizer
_DEPTHS = (2, 4)
_COLLECTIVES_APART = (("xla_tpu_enable_async_collective_fusion", "false"),)


@dataclasses.dataclass(frozen=True)
class Case:
  """A training run on a slice.

  Attributes:
    name: of the case.
    model: its sizes, and what it keeps for its backward pass.
    topology: the slice.
    length: of a row of tokens; each part of the rows is one.
    mesh: the axes over its chips.
    head: what the loss keeps; see `TrainConfig.head`.
    vocabulary: pieces of the tokenizer.
  """

  name: str
  model: GemmaConfig
  topology: str
  length: int
  mesh: meshes.MeshConfig
  head: trainer.Head = "chunked"
  vocabulary: int = _SENTENCEPIECE

  @property
  def config(self) -> TrainConfig:
    """What the trainer is told."""
    return TrainConfig(
      batch_size=self.mesh.rows,
      mesh=str(self.mesh),
      sequence_length=self.length,
      head=self.head,
      model=self.model,
    )

  @property
  def layout(self) -> layouts.Layout:
    """What lies where, on chips of no matter which name."""
    return layouts.Layout(layouts.abstract_mesh(self.mesh), self.mesh)


_TOPOLOGIES = {1: "v5e:1x1", 4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4"}
# What 15.25 GiB of a chip's memory hold.
_REMAT = {
  ("2b", "v5e-8"): "unrolled:4,attention",
  ("2b", "v5e-16"): "attention",
  ("2b", "v5e-256"): "unrolled:8,attention",
  ("2b", "report-2b"): "unrolled:7,attention",
  ("7b", "v5e-16"): "attention",
  ("7b", "v5e-256"): "unrolled:5,attention",
  ("7b", "report-7b"): "attention",
}
_LENGTHS = {"2b": 8192, "7b": 4096}
_MODELS = {"2b": GemmaConfig.gemma_2b, "7b": GemmaConfig.gemma_7b}


def case_of(preset: str, model: str, layers: int | None = None) -> Case:
  """A model on the mesh of a preset, one row of tokens for each part of them.

  Args:
    preset: of `pallas_gemma.gemma`'s meshes, such as "v5e-8".
    model: "2b" or "7b".
    layers: how many, all by default.

  Raises:
    ValueError: if there is no such preset.
  """
  if preset not in meshes.PRESETS:
    raise ValueError(
      f"train-step: wanted one of {', '.join(meshes.PRESETS)}, got {preset!r}"
    )
  mesh, sizes = meshes.PRESETS[preset], _MODELS[model]()
  remat = _REMAT.get((model, preset), "full")
  depth = ""
  if layers is not None:
    sizes = dataclasses.replace(sizes, num_layers=layers)
    remat = remat.rpartition(",")[2]  # all alike, for the straight line
    depth = f"_{layers}_layers"
  name = f"gemma_{model}{depth}_{preset.replace('-', '_')}"
  chips = mesh.devices // mesh.pods
  return Case(
    name,
    dataclasses.replace(sizes, remat=remat),
    _TOPOLOGIES.get(chips, "v5e:16x16"),
    _LENGTHS[model],
    mesh,
  )


def _cases() -> Iterator[Case]:
  for preset in meshes.PRESETS:
    for model in _MODELS:
      yield case_of(preset, model)
  for depth in _DEPTHS:
    yield case_of("v5e-8", "2b", depth)
    yield case_of("v5e-16", "7b", depth)
    yield case_of("v5e-256", "7b", depth)


def programs() -> Iterator[Program]:
  """One chip's part of a step, for every case."""
  for case in _cases():
    tokens = case.length * case.mesh.rows // case.mesh.devices
    flops = round(flops_per_token(case.model, case.length) * tokens)
    for implementation in (APART, OVERLAPPED):
      yield Program(
        op="gemma_train_step",
        case=case.name,
        which="step",
        implementation=implementation,
        build=functools.partial(step, case, implementation == APART),
        costs=(Cost(flops, _state_bytes(case)),),
        model_flops=flops,
        default=False,
      )


def step(case: Case, collectives_apart: bool = True) -> Built:
  """The trainer's step, of weights, optimizer state and a batch, all flat.

  Args:
    case: which.
    collectives_apart: whether the compiler must not fuse them with products.
  """
  train_step, _ = trainer.make_steps(case.config, case.vocabulary)
  layout = case.layout
  state = jax.eval_shape(lambda: trainer.fresh_state(case.config))
  rows = (case.mesh.rows, case.length)
  numbers = jax.ShapeDtypeStruct(rows, jnp.int32)
  batch = {
    "tokens": numbers,
    "labels": numbers,
    "segment_ids": numbers,
    "weights": jax.ShapeDtypeStruct(rows, jnp.float32),
  }
  leaves, treedef = jax.tree.flatten((state, batch))

  def train(*arrays: jax.Array) -> Any:
    (params, optimizer), batch = jax.tree.unflatten(treedef, arrays)
    # The mesh that is compiled for knows what its chips are.
    mesh: Any = jax.sharding.get_abstract_mesh()
    run = dataclasses.replace(layout, mesh=mesh).splits(train_step)
    params, optimizer, measured = run(params, optimizer, batch)
    return (params, optimizer), measured

  one_document = np.ones(rows, np.int32)
  is_document = jax.tree.leaves(
    (
      jax.tree.map(lambda _: False, state),
      {name: name == "segment_ids" for name in batch},
    )
  )
  options = tuple(layout.compiler_options.items())
  where = layout.state(state), dict.fromkeys(batch, layout.batch)
  partitions = jax.tree.map(lambda sharding: sharding.spec, where)
  return Built(
    train,
    tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves),
    tuple(one_document if known else None for known in is_document),
    Placement(
      topology=case.topology,
      arguments=tuple(s.spec for s in jax.tree.leaves(where)),
      results=(partitions[0], layout.everywhere.spec),
      donated=tuple(range(len(jax.tree.leaves(state)))),
      options=options + (_COLLECTIVES_APART if collectives_apart else ()),
      slices=case.mesh.pods,
      arrange=functools.partial(layouts.make_mesh, case.mesh),
    ),
  )


def _state_bytes(case: Case) -> int:
  """A chip's shards of weights and moments, read once and written once."""
  state = jax.eval_shape(lambda: trainer.fresh_state(case.config))
  return 2 * case.layout.part_bytes(state)
