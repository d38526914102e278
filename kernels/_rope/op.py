"""Page 7: the op, its public function, its problems."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .._frame import switches
from .._frame.check import (
  Implementation,
  as_floats,
  check_config,
  check_implementation,
)
from .._frame.kernel import Saved, kernel_op
from .._frame.op import Case, Cost, Integers, Op, nbytes
from .._frame.sharding import Split
from .door import as_rope
from .frequencies import RopeFrequencies
from .kernel import backward, forward
from .spec import (
  BASE_FREQUENCY,
  Arrays,
  Outs,
  Problem,
  Rope,
  apply_rope_reference,
  reference,
)
from .tiles import RopeConfig

# --- the op -------------------------------------------------------------------


def _plain_backward(p: Problem, saved: Saved, d: Outs) -> Arrays:
  a = saved.arrays
  if a.sin is not None:
    back = a._replace(x=d.y, sin=-a.sin)
  else:
    back = a._replace(x=d.y, positions=-a.positions)
  return Arrays(reference(p, back).y, None)


def _split(p: Problem, a: Arrays) -> Split:
  del p
  phases = None if a.sin is None else "BT-"
  positions = None
  if a.positions is not None:
    positions = "BT" if a.positions.ndim == 2 else "-BT"
  return Split(
    Arrays(
      "BTNH",
      positions,
      None if a.base is None else "",
      None if a.frequencies is None else "-",
      phases,
      phases,
    ),
    Outs("BTNH"),
    over="BTN",
    gathers="H",
    fewer="N",
  )


_rope = kernel_op(
  "apply_rope",
  reference=reference,
  forward=forward,
  backward=backward,
  saves=("positions", "base", "frequencies", "sin", "cos"),
  plain_backward=_plain_backward,
  split=_split,
)


@switches.plain
def apply_rope(
  x: jax.Array,
  positions: jax.Array | None = None,
  *,
  base_frequency: float | jax.Array = BASE_FREQUENCY,
  frequencies: RopeFrequencies | None = None,
  interleaved: bool = False,
  phases: tuple[jax.Array, jax.Array] | None = None,
  implementation: Implementation = None,
  config: RopeConfig | None = None,
) -> jax.Array:
  """Rotates each head by its token's position (RoFormer, arXiv 2104.09864).

  The two halves of a head are rotated against each other, as in GPT-NeoX,
  Gemma and Hugging Face's Llama; or neighbouring pairs, if `interleaved`.

  Args:
    x: [B, T, N, H] float32, bfloat16 or float16; H is even.
    positions: [B, T] integers, in tokens; any values of 32 bits, as packing
      needs.  Or [T], the same for the whole batch.  With frequencies of several
      streams [streams, B, T], or one of the former for all streams.
    base_frequency: the base of the geometric series of wavelengths; it may be
      traced, but has no gradient.
    frequencies: of models that were stretched to longer contexts, or rotate a
      part of each head, or go by several streams of positions; in the place of
      a base.  They may be traced, but have no gradient.
    interleaved: whether the elements 2 i and 2 i + 1 are a pair, as in GPT-J
      and the Llama of its authors.
    phases: (sin, cos), each [B, T, F] or [T, F] floats, in the place of
      positions; the first 2 F elements of a head are rotated.  The kernel reads
      them once for all heads; they have no gradient.
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: tile sizes; None picks them from the shape.

  Returns:
    [B, T, N, H] of x's dtype.  Phases and products are float32.

  Raises:
    ValueError: on a wrong shape or dtype, an odd H, a base that is not
      positive, or frequencies of more than H / 2 pairs; and if what the angles
      are is said twice.
  """
  op = "apply_rope"
  check_implementation(op, implementation)
  check_config(op, config, RopeConfig)
  (x,) = as_floats(op, x=x)
  if x.ndim != 4:
    raise ValueError(f"{op}: x must be [B, T, N, H], got shape {x.shape}")
  given = Rope(positions, base_frequency, frequencies, interleaved, phases)
  rope = as_rope(op, given, x.shape, prefix="")
  return _rope(*_problem_of(x, rope, implementation, config)).y


def _problem_of(
  x: jax.Array,
  rope: Rope,
  implementation: Implementation,
  config: RopeConfig | None,
) -> tuple[Problem, Arrays]:
  arrays = Arrays(x, rope.positions)
  base, scale, streams = rope.base_frequency, 1.0, None
  if rope.phases is not None:
    arrays = arrays._replace(sin=rope.phases[0], cos=rope.phases[1])
  elif rope.frequencies is not None:
    arrays = arrays._replace(frequencies=rope.frequencies.values)
    scale = rope.frequencies.attention_scale
    if rope.positions.ndim == 3:
      streams = rope.frequencies.streams
  elif not isinstance(base, float):
    arrays, base = arrays._replace(base=base), 0.0
  problem = Problem(
    base, implementation, config, scale, streams, rope.interleaved
  )
  return problem, arrays


# --- registration -------------------------------------------------------------


def _cost(x, positions, **_) -> tuple[Cost, Cost]:
  moved = 2 * nbytes(x) + nbytes(positions)
  return Cost(0, moved), Cost(0, moved)


def _case(name: str, shape: tuple[int, ...], dtype, top: int = 8192) -> Case:
  positions = Integers(
    shape[:2], lambda rng: rng.integers(0, top, shape[:2], np.int32)
  )
  return Case(name, (jax.ShapeDtypeStruct(shape, dtype), positions))


OP = Op(
  name="apply_rope",
  function=apply_rope,
  reference=apply_rope_reference,
  cost=_cost,
  tests=(
    _case("mqa", (2, 24, 8, 256), jnp.float32),
    _case("one_head", (1, 200, 1, 256), jnp.float32),
    _case("ragged", (1, 19, 3, 80), jnp.float32),
    _case("far", (1, 16, 2, 64), jnp.float32, top=1_000_000),
    _case("bf16", (2, 16, 4, 128), jnp.bfloat16),
  ),
  benches=(
    _case("gemma_2b_64k", (8, 8192, 8, 256), jnp.bfloat16),
    _case("gemma_2b_8k", (1, 8192, 8, 256), jnp.bfloat16),
  ),
)
