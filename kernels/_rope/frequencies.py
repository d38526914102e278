"""Page 1: the angular frequencies of a rotation, and how models scale them.

A token at position p turns pair i of its head by the angle p f_i.  Plain RoPE
has f_i = base^(-2 i / H); models that were stretched to longer contexts change
the f_i, and some the length of the rotated vector:

    linear        f / factor                       positions interpolated
    ntk           the base grows, so that the lowest frequency is f / factor
    llama3        low frequencies / factor, high ones as they were, a ramp
    yarn          the same with another ramp; sines and cosines times a factor
    longrope      f_i / factor_i, searched for each pair; likewise a factor
    proportional  of H / 2 frequencies the first part, zero for the others

All is computed in float64 from numbers, and rounded to float32 once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._frame.check import (
  as_number,
  as_scalar,
  as_switch,
  as_whole_number,
  is_traced,
  register_with_numbers,
)
from .numbers import (
  OP,
  at_least,
  factors,
  fraction,
  geometric,
  like,
  number,
  positive,
  rotated_size,
  yarn_scale,
)


@dataclasses.dataclass(frozen=True, eq=False)
class RopeFrequencies:
  """Frequencies of a rotation that `base_frequency` alone cannot say.

  For `Rope(positions, frequencies=)` and `apply_rope(..., frequencies=)`.  A
  pytree whose leaf is `values`; stacks of them, for a `lax.scan` over local and
  global layers, come of `jax.tree.map(lambda *x: jnp.stack(x), a, b)`.

  Attributes:
    values: [F] float32, radians per token of each pair.  Pairs are made of the
      first 2 F elements of a head; the others are not rotated.
    attention_scale: multiplies what is rotated (YaRN's and LongRoPE's attention
      factor, which grows the logits by its square).
    streams: for each pair the stream of positions that it goes by, if there are
      several, as in Qwen2-VL; None for one.

  Raises:
    ValueError: on values that are no vector of numbers, on an attention scale
      that is not positive, or on streams of another length.
  """

  values: Any
  attention_scale: float = 1.0
  streams: tuple[int, ...] | None = None

  def __post_init__(self):
    values = self.values
    if not isinstance(values, jax.Array):
      try:
        values = np.asarray(values, np.float32)
      except (TypeError, ValueError) as error:
        raise ValueError(
          f"{OP}: values must be an array [F], got {values!r}"
        ) from error
    if values.ndim != 1 or not jnp.issubdtype(values.dtype, jnp.floating):
      raise ValueError(
        f"{OP}: values must be floats [F], got {values.dtype}{values.shape}"
      )
    scale = as_number(OP, "attention_scale", self.attention_scale)
    if not scale > 0:
      raise ValueError(f"{OP}: attention_scale must be positive, got {scale}")
    streams = self.streams
    if streams is not None:
      streams = tuple(as_whole_number(OP, "streams", s) for s in streams)
      if len(streams) != values.shape[0] or min(streams, default=0) < 0:
        raise ValueError(
          f"{OP}: streams must be one index for each of the "
          f"{values.shape[0]} frequencies, got {streams}"
        )
    object.__setattr__(self, "values", values)
    object.__setattr__(self, "attention_scale", scale)
    object.__setattr__(self, "streams", streams)

  # --- by name ----------------------------------------------------------------

  @classmethod
  def plain(
    cls, base: float | jax.Array, head_size: int, *, rotated: float = 1.0
  ) -> RopeFrequencies:
    """base^(-2 i / R), as RoFormer has it (arXiv 2104.09864).

    Args:
      base: of the geometric series; it may be traced.
      head_size: H.
      rotated: the part of each head that is rotated, its first R = H rotated
        elements, as in GPT-NeoX and Phi ("partial rotary").
    """
    return cls(geometric(base, rotated_size(head_size, rotated)))

  @classmethod
  def linear(
    cls,
    base: float | jax.Array,
    head_size: int,
    *,
    factor: float,
    rotated: float = 1.0,
  ) -> RopeFrequencies:
    """Positions over a factor (arXiv 2306.15595); Gemma 3's global layers."""
    factor = positive("factor", factor)
    return cls(
      geometric(base, rotated_size(head_size, rotated)) / like(base, factor)
    )

  @classmethod
  def ntk(
    cls,
    base: float | jax.Array,
    head_size: int,
    *,
    factor: float,
    rotated: float = 1.0,
    original_length: float | None = None,
    length: Any = None,
  ) -> RopeFrequencies:
    """A base that grows, so that high frequencies stay ("NTK-aware").

    base (k)^(R / (R - 2)), where k is the factor, or if lengths are given
    ("dynamic") factor length / original_length - (factor - 1), which is 1 up to
    the original length.

    Args:
      base: as in `plain`.
      head_size: H, of which R must be more than 2.
      factor: k, or how k grows with the length.
      rotated: as in `plain`.
      original_length: tokens that the model was trained with.
      length: tokens of the sequence, a number or traced.
    """
    size = rotated_size(head_size, rotated)
    if size <= 2:
      raise ValueError(f"{OP}: ntk needs more than one pair, got R = {size}")
    base, k = as_scalar(OP, "base", base), positive("factor", factor)
    if (length is None) != (original_length is None):
      raise ValueError(
        f"{OP}: ntk needs length and original_length, or neither, got length "
        f"{length} and original_length {original_length}"
      )
    if length is not None:
      known = positive("original_length", original_length)
      k = k * at_least(length, known) / known - (k - 1)
    return cls(geometric(base * k ** (size / (size - 2)), size))

  @classmethod
  def llama3(
    cls,
    base: float,
    head_size: int,
    *,
    factor: float,
    original_length: float,
    low_frequency_factor: float = 1.0,
    high_frequency_factor: float = 4.0,
    rotated: float = 1.0,
  ) -> RopeFrequencies:
    """Frequencies by parts, as in Llama 3.1.

    Those that turn less than `low_frequency_factor` times in the original
    length are divided by the factor, those that turn more than
    `high_frequency_factor` times stay, and in between is a ramp in the number
    of turns.
    """
    plain = geometric(number("base", base), rotated_size(head_size, rotated))
    factor = positive("factor", factor)
    low = positive("low_frequency_factor", low_frequency_factor)
    high = positive("high_frequency_factor", high_frequency_factor)
    if not low < high:
      raise ValueError(
        f"{OP}: low_frequency_factor must be less than "
        f"high_frequency_factor, got {low} and {high}"
      )
    turns = plain * positive("original_length", original_length) / math.tau
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return cls(plain * (kept + (1.0 - kept) / factor))

  @classmethod
  def yarn(
    cls,
    base: float,
    head_size: int,
    *,
    factor: float,
    original_length: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_scale: float | None = None,
    truncate: bool = True,
    rotated: float = 1.0,
  ) -> RopeFrequencies:
    """YaRN (arXiv 2309.00071, equations 17 to 22).

    Args:
      base: as in `plain`, a number.
      head_size: H.
      factor: of the original length to the new one.
      original_length: tokens that the model was trained with.
      beta_fast: pairs that turn more often than this in the original length
        keep their frequency.
      beta_slow: those that turn less often have it divided by the factor;
        between them the ramp is linear in the pair's index.
      attention_scale: None is 0.1 ln(factor) + 1.
      truncate: the ramp's ends are whole indices, as in the paper's code.
      rotated: as in `plain`.
    """
    base, size = number("base", base), rotated_size(head_size, rotated)
    factor = positive("factor", factor)
    length = positive("original_length", original_length)

    def pair_that_turns(times: float) -> float:
      tokens = length / (times * math.tau)
      return size * math.log(tokens) / (2 * math.log(base))

    low = pair_that_turns(positive("beta_fast", beta_fast))
    high = pair_that_turns(positive("beta_slow", beta_slow))
    if as_switch(OP, "truncate", truncate):
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 * (low == high)  # a step, where the ramp has no length
    ramp = np.clip((np.arange(size // 2) - low) / (high - low), 0.0, 1.0)
    values = geometric(base, size) * (1.0 - ramp + ramp / factor)
    if attention_scale is None:
      attention_scale = yarn_scale(factor)
    return cls(values, attention_scale)

  @classmethod
  def longrope(
    cls,
    base: float,
    head_size: int,
    *,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    original_length: float,
    factor: float,
    length: Any = None,
    attention_scale: float | None = None,
    rotated: float = 1.0,
  ) -> RopeFrequencies:
    """LongRoPE (arXiv 2402.13753), as in Phi-3: a factor for each pair.

    Args:
      base: as in `plain`.
      head_size: H.
      short_factor: F numbers, divisors of the frequencies of sequences up to
        the original length.
      long_factor: those of longer ones.
      original_length: tokens that the model was trained with.
      factor: of the original length to the longest.
      length: tokens of the sequence, a number or traced; None is a short one.
      attention_scale: None is sqrt(1 + ln(factor) / ln(original_length)).
      rotated: as in `plain`.
    """
    size = rotated_size(head_size, rotated)
    original = positive("original_length", original_length)
    factor = positive("factor", factor)
    short, long = (
      factors(name, value, size // 2)
      for name, value in (("short", short_factor), ("long", long_factor))
    )
    if attention_scale is None:
      ratio = math.log(factor) / math.log(original) if factor > 1 else 0.0
      attention_scale = math.sqrt(1.0 + ratio)
    values = geometric(base, size)
    if not is_traced(length):
      is_long = length is not None and number("length", length) > original
      divisors: Any = like(base, long if is_long else short)
    else:
      divisors = jnp.where(length > original, *map(jnp.float32, (long, short)))
    return cls(values / divisors, attention_scale)

  @classmethod
  def proportional(
    cls,
    base: float | jax.Array,
    head_size: int,
    *,
    rotated: float,
    factor: float = 1.0,
  ) -> RopeFrequencies:
    """Of the whole head's plain frequencies the highest, and zero for the rest.

    Gemma 4's global layers: elements i and i + H / 2 are a pair for every i,
    of which the first H rotated / 2 turn.  (In `plain` with `rotated` the pairs
    are made of the first elements alone, and have the frequencies of a smaller
    head.)
    """
    whole = rotated_size(head_size, 1.0)
    turning = int(fraction(rotated) * head_size // 2)
    is_turning = np.arange(whole // 2) < turning
    factor = positive("factor", factor)
    return cls(geometric(base, whole) * like(base, is_turning / factor))

  @classmethod
  def from_hugging_face(
    cls,
    config: Any,
    *,
    head_size: int | None = None,
    base: float | None = None,
    layer_type: str | None = None,
    length: Any = None,
  ) -> RopeFrequencies:
    """From a model's `config.json`, or its `rope_parameters` alone.

    Args:
      config: a dictionary, or what has `to_dict()`: a whole configuration, or
        its `rope_scaling` or `rope_parameters`, with the type under "rope_type"
        or, in older ones, "type".
      head_size: H; None is the configuration's.
      base: None is the configuration's `rope_theta`.
      layer_type: which layers, "full_attention" or "sliding_attention", where a
        model has several kinds.
      length: tokens of the sequence, for the types whose frequencies depend on
        it, "dynamic" and "longrope"; None is a short one.

    Returns:
      The frequencies, with `streams` of an `mrope_section`.

    Raises:
      ValueError: on a type that is not known, on a number that is missing, or
        on kinds of layers of which `layer_type` names none.
    """
    from .hugging_face import frequencies_of

    return frequencies_of(config, head_size, base, layer_type, length)

  # --- changed ----------------------------------------------------------------

  def by_sections(
    self, sections: Sequence[int], *, interleaved: bool = False
  ) -> RopeFrequencies:
    """These, of which each section goes by its own stream of positions.

    Args:
      sections: how many pairs belong to each stream, such as (16, 24, 24) for
        time, height and width in Qwen2-VL (arXiv 2409.12191).
      interleaved: as in Qwen3-VL, where the streams take turns over the pairs
        until a section is used up, and what is left goes by the first.

    Raises:
      ValueError: if the sections are not those of all frequencies.
    """
    counts = [as_whole_number(OP, "sections", n) for n in sections]
    pairs = self.values.shape[0]
    if sum(counts) != pairs or min(counts, default=0) < 0:
      raise ValueError(
        f"{OP}: sections must sum to the {pairs} frequencies, got {counts}"
      )
    streams = [s for s, n in enumerate(counts) for _ in range(n)]
    if as_switch(OP, "interleaved", interleaved):
      turns = [i % len(counts) for i in range(pairs)]
      streams = [
        s if i < counts[s] * len(counts) else 0 for i, s in enumerate(turns)
      ]
    return dataclasses.replace(self, streams=tuple(streams))


register_with_numbers(
  RopeFrequencies, ["values"], ["attention_scale", "streams"]
)
