"""How a run is spread over devices: the axes of its mesh.

    axis    what is split over it
    pods    rows of tokens, between slices that are joined by the data centre's
            network; weights are copied to each
    data    rows of tokens; weights are copied
    fsdp    rows of tokens, and weights, moments and gradients (ZeRO-3): a
            layer's weights are gathered before they are used
    context tokens of each row, for attention in zig-zag order: keys and values
            go round (ring attention); and weights, moments and gradients too
    model   heads, feed-forward columns and the vocabulary (tensor parallelism)

`layout` says what of a model lies where on it.
"""

from __future__ import annotations

import dataclasses
import math

from .._config import GemmaConfig
from .._errors import UserError

ROWS = ("pods", "data", "fsdp")
"""The axes that split rows of tokens."""

STORED = ("fsdp", "context")
"""The axes over which weights, moments and gradients are stored in parts."""

_MOST = 1 << 20  # devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each axis; their product is the number of devices.

  Attributes:
    pods: slices, each with a copy of the weights, that take different rows.
    data: groups of a slice that do so too.
    fsdp: devices of a group that take different rows and share the weights.
    context: devices that share each row by its tokens, and the weights.
    model: devices that share each row: heads and feed-forward columns.

  Raises:
    UserError: if one is not positive, or their product is no number of devices.
  """

  pods: int = 1
  data: int = 1
  fsdp: int = 1
  context: int = 1
  model: int = 1

  def __post_init__(self) -> None:
    """Checks the values."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if type(value) is not int or value < 1:
        raise UserError(f"mesh.{field.name}: wanted 1 or more, got {value}")
    if self.devices > _MOST:
      raise UserError(f"mesh: wanted {_MOST:,} devices or fewer, got more")

  @property
  def shape(self) -> tuple[int, ...]:
    """Sizes of the axes, in order."""
    return dataclasses.astuple(self)

  @property
  def devices(self) -> int:
    """How many there must be."""
    return math.prod(self.shape)

  @property
  def rows(self) -> int:
    """Into how many parts rows of tokens are split."""
    return self.pods * self.data * self.fsdp

  @property
  def stored(self) -> tuple[str, ...]:
    """The axes of more than one device over which weights are in parts."""
    return tuple(axis for axis in STORED if getattr(self, axis) > 1)

  def __str__(self) -> str:
    """Such as "fsdp=4,model=2", as `parse` reads it."""
    parts = [f"{k}={v}" for k, v in dataclasses.asdict(self).items() if v > 1]
    return ",".join(parts) or "fsdp=1"


AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))
"""The names of all axes, in order."""

PRESETS = {
  "v5e-1": MeshConfig(),
  "v5e-4": MeshConfig(fsdp=4),
  "v5e-8": MeshConfig(fsdp=8),
  "v5e-16": MeshConfig(fsdp=16),
  "v5e-256": MeshConfig(fsdp=256),
  # As the report trained them (arXiv 2403.08295 §3): 2B on 2 pods of 256 chips
  # that hold copies, 7B on 16 pods, each 16-way model by 16-way data, with its
  # state split over both.
  "report-2b": MeshConfig(pods=2, fsdp=256),
  "report-7b": MeshConfig(pods=16, fsdp=16, model=16),
}


def parse(text: str) -> MeshConfig | None:
  """The mesh that a user means; None for "auto".

  Args:
    text: "auto", the name of a preset, or axes such as "fsdp=4,model=2".

  Raises:
    UserError: if it is neither, naming what there is.
  """
  if text == "auto":
    return None
  if text in PRESETS:
    return PRESETS[text]
  sizes: dict[str, int] = {}
  for part in text.split(","):
    name, equals, size = (p.strip() for p in part.partition("="))
    if name not in AXES or not equals or not size.isdecimal() or name in sizes:
      raise UserError(
        f"mesh {text!r}: wanted auto, {', '.join(PRESETS)}, or sizes of the "
        f"axes {', '.join(AXES)}, such as fsdp=4,model=2"
      )
    # Python reads no number of thousands of digits; 20 are too many devices.
    sizes[name] = int(size[:20])
  return MeshConfig(**sizes)


def chosen(
  asked: MeshConfig | None,
  devices: int,
  rows: int,
  model: GemmaConfig,
  length: int | None = None,
) -> MeshConfig:
  """The mesh of a run, checked against the devices, the rows and the model.

  By itself it splits rows and weights over all devices (fsdp), as far as the
  rows of a pass go round; over what is left, heads and feed-forward columns.

  Args:
    asked: by the user; None for a mesh of all devices that fits.
    devices: that there are; a mesh may be of fewer.
    rows: of tokens in one pass.
    model: its sizes.
    length: tokens of a row; None if it does not matter.

  Raises:
    UserError: if an axis does not divide what it splits, by name.
  """
  if asked is None:
    fsdp = math.gcd(devices, rows)
    asked = MeshConfig(fsdp=fsdp, model=devices // fsdp)
    try:
      return chosen(asked, devices, rows, model, length)
    except UserError as error:
      raise UserError(
        f"mesh auto: {devices} devices and {rows} rows in a pass would be "
        f"{asked}, but {error}; give a --batch-size that {devices} divides, or "
        "--mesh"
      ) from error
  if asked.devices > devices:
    raise UserError(
      f"mesh {asked}: wants {asked.devices} devices, and there are {devices}"
    )
  if rows % asked.rows:
    raise UserError(
      f"mesh {asked}: splits rows {asked.rows} ways (pods x data x fsdp), "
      f"which does not divide the {rows} rows of a pass (batch_size / "
      "accumulation)"
    )
  chunks = 2 * asked.context
  if asked.context > 1 and length is not None and length % chunks:
    raise UserError(
      f"mesh {asked}: context={asked.context} wants a sequence_length that is "
      f"a multiple of {chunks}, two chunks for each device, and it is {length}"
    )
  for name, size in (
    ("heads", model.num_heads),
    ("hidden_size", model.hidden_size),
    ("vocab_size", model.vocab_size),
  ):
    if size % asked.model:
      raise UserError(
        f"mesh {asked}: model={asked.model} does not divide the model's "
        f"{name}, {size}"
      )
  kv_heads = model.num_kv_heads
  if kv_heads % asked.model and asked.model % kv_heads:
    raise UserError(
      f"mesh {asked}: model={asked.model} is neither a divisor nor a multiple "
      f"of the model's key/value heads, {kv_heads}"
    )
  return asked
