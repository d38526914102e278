"""What shape a Gemma has, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from . import _remat

Dtype = Literal["bfloat16", "float32"]

LARGEST = float.fromhex("0x1.fffffep127")  # that a float32 can hold


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig:
  """Sizes and numerics of a Gemma 1 (arXiv 2403.08295, table 1).

  Attributes:
    vocab_size: rows V of the embedding, at least the tokenizer's vocabulary.
    num_layers: blocks L.
    width: model width D.
    hidden_size: feed-forward width F of each of the two branches, gate and up;
      the paper's table counts both.
    num_heads: query heads N.
    num_kv_heads: key/value heads K, a divisor of N; 1 is multi-query.
    head_size: H, even; N H need not be D.
    context_length: the most tokens of one sequence.
    rope_base_frequency: base of RoPE's wavelengths.
    norm_epsilon: added to the mean square in every norm.
    dtype: of the computation, "bfloat16" or "float32"; parameters are float32.
    remat: what is kept for the backward pass, the rest being computed again:
      "none" (keep all), "attention" (all but what is as wide as the
      feed-forward), "names" (keep what the attention kernel saves), "full"
      (keep each block's input) or "dots" (keep products with weights); or, to
      train over several devices, "unrolled" (keep all, each layer compiled by
      itself, where a scan over layers would copy what it keeps); or layers of
      one and the rest of another, such as "none:14,full"; or "auto", the
      fastest with which training fits the device's memory, and "none" where
      that is unknown.

  Raises:
    ValueError: at construction, naming the field, what it must be and what it
      is.
  """

  vocab_size: int
  num_layers: int
  width: int
  hidden_size: int
  num_heads: int
  num_kv_heads: int
  head_size: int
  context_length: int = 8192
  rope_base_frequency: float = 10_000.0
  norm_epsilon: float = 1e-6
  dtype: Dtype = "bfloat16"
  remat: str = "none"

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type == "int" and not (type(value) is int and value > 0):
        raise _wanted(field.name, "a positive integer", value)
      if field.type == "int" and value >= 1 << 31:
        raise _wanted(field.name, "less than 2^31", value)
      if field.type == "float" and not (
        type(value) in (int, float) and 0 < value <= LARGEST
      ):
        raise _wanted(field.name, "a positive number of float32", value)
    if self.num_heads % self.num_kv_heads:
      raise _wanted(
        "num_kv_heads",
        f"a divisor of num_heads = {self.num_heads}",
        self.num_kv_heads,
      )
    if self.head_size % 2:
      raise _wanted("head_size", "even, for RoPE's halves", self.head_size)
    if self.dtype not in get_args(Dtype):
      what = f"one of {', '.join(get_args(Dtype))}"
      raise _wanted("dtype", what, self.dtype)
    try:
      _remat.parts(self.remat, self.num_layers)
    except ValueError as error:
      raise _wanted("remat", str(error), self.remat) from None

  @classmethod
  def gemma_2b(cls) -> GemmaConfig:
    """Gemma 2B: multi-query; 2,506,434,560 parameters."""
    return cls(
      vocab_size=256_128,
      num_layers=18,
      width=2048,
      hidden_size=16_384,
      num_heads=8,
      num_kv_heads=1,
      head_size=256,
    )

  @classmethod
  def gemma_7b(cls) -> GemmaConfig:
    """Gemma 7B: multi-head, N H > D; 8,538,074,112 parameters."""
    return cls(
      vocab_size=256_128,
      num_layers=28,
      width=3072,
      hidden_size=24_576,
      num_heads=16,
      num_kv_heads=16,
      head_size=256,
    )

  @classmethod
  def tiny(cls, vocab_size: int = 2048) -> GemmaConfig:
    """A Gemma in 2B's proportions that two CPU cores train in minutes."""
    return cls(
      vocab_size=vocab_size,
      num_layers=4,
      width=128,
      hidden_size=512,
      num_heads=4,
      num_kv_heads=1,
      head_size=32,
      context_length=256,
      dtype="float32",
    )

  def to_dict(self) -> dict[str, Any]:
    """The fields, as JSON can hold them."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> GemmaConfig:
    """The inverse of `to_dict`.

    Raises:
      ValueError: on a missing, unknown or wrong field.
    """
    if not isinstance(fields, Mapping):
      raise ValueError(f"GemmaConfig: wanted a dict of fields, got {fields!r}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    needed = {
      name
      for name, field in known.items()
      if field.default is dataclasses.MISSING
    }
    if wrong := fields.keys() - known.keys():
      raise ValueError(
        f"GemmaConfig: unknown fields: {', '.join(sorted(wrong))}"
      )
    if missing := needed - fields.keys():
      raise ValueError(
        f"GemmaConfig: missing fields: {', '.join(sorted(missing))}"
      )
    return cls(**fields)


def _wanted(field: str, what: str, got: object) -> ValueError:
  return ValueError(f"GemmaConfig: {field} must be {what}, got {got!r}")
