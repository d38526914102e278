"""Rotary position embedding (RoPE), half-split.

Maths, for a head x in R^H at position p, with h = H / 2 and 0 <= i < h:

    angle_i  = p / base_frequency^(i / h)       float32, whatever x's dtype
    y_i      = x_i     cos(angle_i) - x_(i+h) sin(angle_i)
    y_(i+h)  = x_(i+h) cos(angle_i) + x_i     sin(angle_i)

The backward is the same rotation by -angle; nothing is saved but p.

Traffic: x read once, y written once, in both directions; positions are 4 bytes
per token.  A few flops per element: bound by HBM.  On v5e, q of Gemma 2B for 8
sequences of 8192 (256 MiB in bfloat16) takes 983,040 cycles at 819 GB/s.  The
phases are computed in the kernel, once per token for all its heads: the sine
and cosine hide behind the copies, while a table of them, float32 [T, H], would
add an eighth to the traffic at 8 heads.

Tiling: tokens, flattened over the batch, by heads.

           heads x H
        +-------------+
        |  tile 0, 0  | rows     grid = (ceil(B T / rows), ceil(N / heads))
        +-------------+          positions come as [1, rows], tokens in lanes,
        |  tile 1, 0  |          and are transposed into sublanes
        +-------------+
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ._frame import switches, tpu
from ._frame.check import (
  Implementation,
  as_floats,
  as_integers,
  as_scalar,
  check_config,
  check_implementation,
  check_shape,
  register_with_numbers,
)
from ._frame.kernel import Saved, kernel_op
from ._frame.manual import varying_like
from ._frame.op import Case, Cost, Integers, Op, nbytes
from ._frame.sharding import Split
from ._sincos import sin_cos


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding that an op applies where it reads its inputs.

  Attributes:
    positions: [B, T] integers, of queries and keys alike.
    base_frequency: the base of the geometric series of wavelengths; a traced
      one is carried through `jit` and `scan` as positions are.
  """

  positions: jax.Array
  base_frequency: Any = 10_000.0


register_with_numbers(Rope, ["positions"], ["base_frequency"])

# --- specification ------------------------------------------------------------


@switches.plain
def apply_rope_reference(
  x: jax.Array,
  positions: jax.Array,
  *,
  base_frequency: float | jax.Array = 10_000.0,
) -> jax.Array:
  """The maths of the module docstring in plain jnp.  The specification."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  half = x.shape[-1] // 2
  # Position over timescale, as the released model has it: the product with the
  # reciprocal differs in the last bit, which large positions magnify.
  timescale = rope_timescale(half, base_frequency, wide)
  angle = positions[..., None, None].astype(wide) / timescale  # [B, T, 1, h]
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def rope_timescale(half: int, base_frequency: Any, dtype) -> jax.Array:
  """Tokens per radian of each of the `half` frequencies."""
  exponent = jnp.arange(half, dtype=dtype) / half
  return jnp.asarray(base_frequency, dtype) ** exponent


# --- configuration ------------------------------------------------------------

_TILE_BYTES = 1 << 20
_VMEM_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Tile sizes.  They change speed, never results.

  Attributes:
    rows: tokens per grid step; a multiple of 128 (their positions lie in
      lanes).
    heads: heads per grid step, a multiple of 16; None is all of them.
  """

  rows: int = 256
  heads: int | None = None

  def __post_init__(self):
    if self.rows <= 0 or self.rows % tpu.LANES:
      raise ValueError(
        f"RopeConfig: rows must be a positive multiple of {tpu.LANES}, "
        f"got {self.rows}"
      )
    if self.heads is not None and (self.heads <= 0 or self.heads % 16):
      raise ValueError(
        f"RopeConfig: heads must be None or a positive multiple of 16, "
        f"got {self.heads}"
      )

  @classmethod
  def fitting(cls, heads: int, head_size: int, dtype: jnp.dtype) -> RopeConfig:
    """Tiles of a megabyte, or of 128 tokens and some of the heads."""
    head_bytes = tpu.lanes(head_size) * jnp.dtype(dtype).itemsize
    # A tile's heads lie in sublanes, which come in eights; one head alone is
    # laid out as a matrix of tokens.
    sublanes = 1 if heads == 1 else tpu.round_up(heads, tpu.SUBLANES)
    token_bytes = head_bytes * sublanes
    rows = _TILE_BYTES // token_bytes // tpu.LANES * tpu.LANES
    if token_bytes * tpu.LANES <= 4 * _TILE_BYTES:
      return cls(rows=min(max(rows, tpu.LANES), 1024))
    fit = 4 * _TILE_BYTES // (tpu.LANES * head_bytes) // 16 * 16
    return cls(rows=tpu.LANES, heads=max(fit, 16))


@dataclasses.dataclass(frozen=True)
class Problem:
  """Everything that is not an array; a traced base frequency is one."""

  base_frequency: float
  implementation: Implementation
  config: RopeConfig | None


class Arrays(NamedTuple):
  """What the op is given."""

  x: Any  # [B, T, N, H]
  positions: Any  # [B, T] int32
  base: Any = None  # [] float32, if the base frequency is traced


class Outs(NamedTuple):
  """What the op gives."""

  y: Any  # [B, T, N, H]


def _reference(p: Problem, a: Arrays) -> Outs:
  base = p.base_frequency if a.base is None else a.base
  return Outs(apply_rope_reference(a.x, a.positions, base_frequency=base))


# --- the kernel, of both passes -----------------------------------------------
# One grid step: a tile of tokens, and some or all of their heads.
#   1. angles  of every token: its position over each frequency's timescale
#   2. phases  their sine and cosine, once for all heads
#   3. rotate  both halves of each head against each other


class _Inputs(NamedTuple):
  positions: Any  # [1, rows] int32
  timescale: Any  # [1, h] float32
  x: Any  # [rows, heads, H], or [rows, H] of a single head


class _Outputs(NamedTuple):
  y: Any  # as x


def _kernel(i: _Inputs, o: _Outputs, *, sign: Literal[1, -1]):
  angle = _by_token(i.positions[...]) / i.timescale[...]  # [rows, h]
  sin, cos = sin_cos(angle)
  sin *= sign
  if i.x.ndim == 3:
    sin, cos = sin[:, None, :], cos[:, None, :]
  _rotate_tile(i.x, o.y, sin, cos)


def _by_token(positions: jax.Array) -> jax.Array:
  """[1, rows] integers in lanes to [rows, 1] float32 in sublanes."""
  return tpu.lanes_to_column(positions)[:, :1].astype(jnp.float32)


def _rotate_tile(x_ref: Any, y_ref: Any, sin: jax.Array, cos: jax.Array):
  half = x_ref.shape[-1] // 2
  x = x_ref[...].astype(jnp.float32)
  if half % tpu.LANES == 0:
    first, second = x[..., :half], x[..., half:]
    y_ref[..., :half] = (first * cos - second * sin).astype(y_ref.dtype)
    y_ref[..., half:] = (second * cos + first * sin).astype(y_ref.dtype)
  else:
    y_ref[...] = _rotate_lanes(x, sin, cos).astype(y_ref.dtype)


def _rotate_lanes(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Of halves that are not whole registers: instead of taking them apart, the
  lanes are rotated by a half."""
  half = x.shape[-1] // 2
  swapped = jnp.concatenate([x[..., half:], x[..., :half]], axis=-1)
  cos = jnp.concatenate([cos, cos], axis=-1)
  sin = jnp.concatenate([-sin, sin], axis=-1)
  return x * cos + swapped * sin


def rotated(
  p: Problem, a: Arrays, x: jax.Array, sign: Literal[1, -1]
) -> jax.Array:
  """x rotated by the positions of `a`, or back by them."""
  b, t, n, h = x.shape
  config = p.config or RopeConfig.fitting(n, h, x.dtype)
  rows, heads = config.rows, min(config.heads or n, n)
  if n == 1:
    tile = pl.BlockSpec((rows, h), lambda i, j: (i, 0))
  else:
    tile = pl.BlockSpec((rows, heads, h), lambda i, j: (i, j, 0))
  tokens = x.reshape((b * t, h) if n == 1 else (b * t, n, h))
  of_tokens = pl.BlockSpec((1, rows), _tile_of_tokens)
  whole = pl.BlockSpec((1, h // 2), lambda i, j: (0, 0))
  (outs,) = pl.pallas_call(
    functools.partial(_kernel, sign=sign),
    name="apply_rope_fwd" if sign == 1 else "apply_rope_bwd",
    grid=(pl.cdiv(b * t, rows), pl.cdiv(n, heads)),
    in_specs=[_Inputs(of_tokens, whole, tile)],
    out_specs=[_Outputs(tile)],
    out_shape=[_Outputs(varying_like(x, tokens.shape, x.dtype))],
    compiler_params=tpu.compiler_params(_vmem_bytes(x, rows, heads)),
  )(_Inputs(_in_lanes(a.positions), _timescale(p, a, h), tokens))
  return outs.y.reshape(x.shape)


def _vmem_bytes(x: jax.Array, rows: int, heads: int) -> int:
  """For x and y in two buffers each, and float32 values."""
  sublanes = 1 if x.shape[2] == 1 else tpu.round_up(heads, tpu.SUBLANES)
  tile = rows * sublanes * tpu.lanes(x.shape[3])
  needed = (2 * 2 * x.dtype.itemsize + 3 * 4) * tile
  got = f"heads of H = {x.shape[3]}"
  return tpu.vmem_to_ask("apply_rope", needed, _VMEM_BYTES, got)


def _tile_of_tokens(i: Any, j: Any) -> tuple[Any, Any]:
  """Of [1, B T]: positions are the same for all heads."""
  del j
  return 0, i


def _in_lanes(positions: jax.Array) -> jax.Array:
  return positions.reshape(1, -1).astype(jnp.int32)


def _timescale(p: Problem, a: Arrays, head_size: int) -> jax.Array:
  base = p.base_frequency if a.base is None else a.base
  return rope_timescale(head_size // 2, base, jnp.float32)[None]


def _forward(p: Problem, a: Arrays) -> Outs:
  return Outs(rotated(p, a, a.x, 1))


# A rotation's transpose is the rotation by the negative angle.


def _backward(p: Problem, saved: Saved, d: Outs) -> Arrays:
  return Arrays(rotated(p, saved.arrays, d.y, -1), None)


def _plain_backward(p: Problem, saved: Saved, d: Outs) -> Arrays:
  back = saved.arrays._replace(x=d.y, positions=-saved.arrays.positions)
  return Arrays(_reference(p, back).y, None)


# --- the op -------------------------------------------------------------------

_rope = kernel_op(
  "apply_rope",
  reference=_reference,
  forward=_forward,
  backward=_backward,
  saves=("positions", "base"),
  plain_backward=_plain_backward,
  split=lambda p, a: Split(
    Arrays("BTNH", "BT", None if a.base is None else ""),
    Outs("BTNH"),
    over="BTN",
    gathers="H",
    fewer="N",
  ),
)


def as_base(op: str, head_size: int, base_frequency: Any) -> Any:
  """The base, a number or traced; refuses what is not rotated in halves."""
  if head_size % 2:
    raise ValueError(f"{op}: RoPE needs an even head size H, got {head_size}")
  base = as_scalar(op, "base_frequency", base_frequency)
  if isinstance(base, float) and not base > 0:
    raise ValueError(f"{op}: base_frequency must be positive, got {base}")
  return base


@switches.plain
def apply_rope(
  x: jax.Array,
  positions: jax.Array,
  *,
  base_frequency: float | jax.Array = 10_000.0,
  implementation: Implementation = None,
  config: RopeConfig | None = None,
) -> jax.Array:
  """Rotates each head by its token's position (RoFormer, arXiv 2104.09864).

  The two halves of a head are rotated against each other, as in GPT-NeoX,
  Llama and Gemma; not neighbouring pairs.

  Args:
    x: [B, T, N, H] float32, bfloat16 or float16; H is even.
    positions: [B, T] integers, in tokens; any values of 32 bits, as packing
      needs.
    base_frequency: the base of the geometric series of wavelengths; it may be
      traced, but has no gradient.
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: tile sizes; None picks them from the shape.

  Returns:
    [B, T, N, H] of x's dtype.  Phases and products are float32.

  Raises:
    ValueError: on a wrong shape or dtype, an odd H, or a base that is not
      positive.
  """
  op = "apply_rope"
  check_implementation(op, implementation)
  check_config(op, config, RopeConfig)
  (x,) = as_floats(op, x=x)
  if x.ndim != 4:
    raise ValueError(f"{op}: x must be [B, T, N, H], got shape {x.shape}")
  positions = as_integers(op, "positions", positions)
  check_shape(op, "positions", positions, x.shape[:2], "[B, T] of x")
  base = as_base(op, x.shape[-1], base_frequency)
  if isinstance(base, float):
    return _rope(Problem(base, implementation, config), Arrays(x, positions)).y
  problem = Problem(0.0, implementation, config)
  return _rope(problem, Arrays(x, positions, base)).y


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
