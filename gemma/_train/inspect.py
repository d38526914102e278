"""What `pallas-gemma inspect` shows: a model's arrays, and where they lie."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import tyro

from .._config import GemmaConfig

_GIB = 2**30
# What a step of training makes, by the letters of its dimensions: B rows, T
# tokens, D width, N query heads, K key/value heads, H head size, F feed-forward
# columns, V vocabulary.
_ACTIVATIONS = {
  "tokens, labels": "BT",
  "residual stream": "BTD",
  "queries": "BTNH",
  "keys, values": "BTKH",
  "gate, up": "BTF",
  "logits": "BTV",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig:
  """Show a model's parameters, and where they lie on a mesh of devices.

  No device is needed: a mesh of 256 chips can be looked at on a laptop.

  Attributes:
    checkpoint: work directory of `train`, or directory of `save_checkpoint`,
      whose model is shown.  Default: that of --model.
    model: Gemma 1 of 2 or 7 billion parameters, or the smallest.
    mesh: as `train` takes it, such as v5e-8, report-7b or fsdp=4,model=2.
    batch_size: rows in one pass.  Default: one for each part that the mesh
      splits them into.
    sequence_length: tokens per row.
  """

  checkpoint: tyro.conf.Positional[pathlib.Path | None] = None
  model: Literal["2b", "7b", "tiny"] = "2b"
  mesh: str = "v5e-1"
  batch_size: int | None = None
  sequence_length: int = 8192


def described(config: InspectConfig) -> Iterator[str]:
  """The lines to print.

  Raises:
    UserError: if there is no such checkpoint or mesh, or the mesh does not
      divide what it splits, by name.
  """
  from . import layout as layouts
  from .config import TrainConfig
  from .mesh import MeshConfig, chosen, parse
  from .step import abstract_state

  sizes = _sizes(config)
  mesh = parse(config.mesh) or MeshConfig()
  rows = mesh.rows if config.batch_size is None else config.batch_size
  length = min(config.sequence_length, sizes.context_length)
  mesh = chosen(mesh, mesh.devices, rows, sizes, length)
  settings = TrainConfig(model=sizes, batch_size=rows, sequence_length=length)
  layout = layouts.Layout(layouts.abstract_mesh(mesh), mesh)
  params, optimizer = abstract_state(settings)
  yield f"mesh       {mesh}: {_plural(mesh.devices, 'device')}"
  yield ""
  yield "parameters, float32; how each dimension is split; a device's part"
  yield from (f"  {line}" for line in layouts.describe(layout, params))
  yield ""
  yield "memory of a device"
  of_params = layout.part_bytes(params)
  of_moments = layout.part_bytes(optimizer)
  for name, nbytes in (
    ("parameters", of_params),
    ("optimizer state, split as they are", of_moments),
    ("gradients, split as they are", of_params),
  ):
    yield f"  {name:36} {nbytes / _GIB:9.3f} GiB"
  yield ""
  tokens = f"{_plural(rows, 'row')} of {length:,} tokens"
  yield f"activations of {tokens}, {sizes.dtype}"
  yield from _activations(sizes, rows, length, layout.rules, mesh)


def _sizes(config: InspectConfig) -> GemmaConfig:
  if config.checkpoint is None:
    named = {
      "2b": GemmaConfig.gemma_2b,
      "7b": GemmaConfig.gemma_7b,
      "tiny": GemmaConfig.tiny,
    }
    return named[config.model]()
  from .._checkpoint import load_config

  return load_config(config.checkpoint)


def _activations(
  sizes: GemmaConfig,
  rows: int,
  length: int,
  rules: Mapping[str, Any],
  mesh: Any,
) -> Iterator[str]:
  dims = {
    "B": rows,
    "T": length,
    "D": sizes.width,
    "N": sizes.num_heads,
    "K": sizes.num_kv_heads,
    "H": sizes.head_size,
    "F": sizes.hidden_size,
    "V": sizes.vocab_size,
  }
  # Keys and values are split as the queries' heads are, as far as they go.
  rules = {**rules, **({"K": rules["N"]} if "N" in rules else {})}
  counts = dataclasses.asdict(mesh)
  for name, letters in _ACTIVATIONS.items():
    split, part = [], []
    for letter in letters:
      axes = _axes(rules.get(letter))
      used = [axis for axis in axes if counts[axis] > 1]
      parts = math.gcd(math.prod(counts[axis] for axis in used), dims[letter])
      split.append("+".join(used) if parts > 1 else "-")
      part.append(dims[letter] // parts)
    shape = [dims[letter] for letter in letters]
    yield (
      f"  {name:18} {letters:5} {shape!s:26} [{', '.join(split)}]  {part} each"
    )


def _axes(entry: str | Iterable[str] | None) -> tuple[str, ...]:
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def _plural(count: int, what: str) -> str:
  return f"{count:,} {what}{'s' * (count != 1)}"
