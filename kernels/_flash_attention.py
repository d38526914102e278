"""Flash attention: multi-query, grouped-query and multi-head.

Maths, for one query row q of head n, with the keys k_j and values v_j of the
kv head n // (N / K), over the keys j that the masks leave visible:

    s_j = scale * q . k_j,   then  cap * tanh(s_j / cap)  with a soft cap
    lse = log(sum_j exp(s_j))
    p_j = exp(s_j - lse)
    o   = sum_j p_j v_j                        0 where no key is visible

    di   = do . o - dlse                       backward (arXiv 2205.14135)
    ds_j = p_j (do . v_j - di)                 times 1 - (s_j / cap)^2
    dq   = scale * sum_j ds_j k_j
    dk_j = scale * sum ds_j q,   dv_j = sum p_j do     over its group

Visible, from query i to key j (positions in the arrays, not `rope`'s):

    is_causal                        j <= i
    local_window_size=(left, right)  i - left <= j <= i + right, both inclusive
    segment_ids                      equal, and not 0 (padding)

Traffic: q, k, v and o once, and backward these, do, dq, dk and dv once; lse is
one float32 per row, di is recomputed.  With T^2 / 2 visible pairs of H = 256
the causal forward at T = 8192 does 4,096 flops per byte and is bound by the
MXU: 2 matmuls forward, 5 backward.

Tiling: the kernels see rows, r = t G + g, the G = N / K query heads of a kv
head side by side under their token; for multi-query attention [B, T, N, H] lies
in memory so already.  The keys of a kv head stay in VMEM while the grid,
(B K, ceil(T / block_q)), walks over its q blocks.  A causal forward, with
block_q = 2 block_kv:

            block_kv
            +---+                  d  the diagonal, first: each group of rows as
    block_q |ddd|                     far as it sees, in whole registers, masked
            |ddd|ddd               f  the keys before it: a loop without masks
            +---+---+---+
            |fff|fff|ddd|          Windows and unaligned shapes add loops with
            |fff|fff|ddd|ddd       masks at the ends.  With segment ids, blocks
            +---+---+---+---+      from the first to the last that can share an
                                   id are masked.  The rest costs nothing.

The kernels are in `_flash_attention_fwd` and `_flash_attention_bwd`, what they
share in `_flash_attention_tiles`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ._flash_attention_bwd import backward
from ._flash_attention_fwd import forward
from ._flash_attention_tiles import (
  LANES,
  VMEM_BYTES,
  Ids,
  Problem,
  Turns,
  Window,
  has_diagonal,
  lse_from_rows,
  lse_to_rows,
  to_rows,
)
from ._op import (
  Case,
  Cost,
  Implementation,
  Integers,
  Op,
  check_float,
  check_implementation,
  check_shape,
  dispatch,
  nbytes,
)
from ._rope import (
  apply_rope,
  apply_rope_reference,
  check_integers,
  check_rope,
  rope_timescale,
)
from ._sharding import per_device
from ._tuned import power_of_two, tuned_config

Positions = tuple[jax.Array, ...]  # one array, or nothing
Segments = jax.Array | tuple[jax.Array, jax.Array] | None


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding to be applied to q and k inside attention.

  Attributes:
    positions: [B, T] integers, of queries and keys alike.
    base_frequency: the base of the geometric series of wavelengths.
  """

  positions: jax.Array
  base_frequency: float = 10_000.0


jax.tree_util.register_dataclass(
  Rope, data_fields=["positions"], meta_fields=["base_frequency"]
)

# --- specification ------------------------------------------------------------


def visible_pairs(
  q_index: jax.Array,
  k_index: jax.Array,
  is_causal: bool,
  local_window_size: Window,
) -> jax.Array:
  """Which keys each query sees by position: [..., T, S] booleans.

  Six queries and keys, causal with a window of (2, 0); x marks the visible:

        k 0 1 2 3 4 5
    q 0   x
      1   x x
      2   x x x
      3     x x x
      4       x x x
      5         x x x
  """
  q, k = q_index[..., :, None], k_index[..., None, :]
  mask = jnp.broadcast_to(True, jnp.broadcast_shapes(q.shape, k.shape))
  if is_causal:
    mask &= k <= q
  if local_window_size is not None:
    left, right = local_window_size
    mask &= (k >= q - left) & (k <= q + right)
  return mask


def masked_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  scale: float | None,
  logits_soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """Attention under mask [B, T, S]: out [B, T, N, H] and lse [B, N, T]."""
  batch, t, n, h = q.shape
  kv_heads = k.shape[2]
  wide = jnp.promote_types(q.dtype, jnp.float32)
  grouped = q.reshape(batch, t, kv_heads, n // kv_heads, h)
  logits = jnp.einsum(
    "btkgh,bskh->bkgts", grouped, k, preferred_element_type=wide
  )
  logits *= h**-0.5 if scale is None else scale
  if logits_soft_cap is not None:
    logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
  logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
  lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  # A row that sees nothing has lse = -inf; its weights are 0, not exp(nan), in
  # the value and in the gradient.
  seen = lse > -jnp.inf
  weights = jnp.exp(logits - jnp.where(seen, lse, 0.0))
  out = jnp.einsum(
    "bkgts,bskh->btkgh", weights.astype(v.dtype), v, preferred_element_type=wide
  )
  return out.reshape(q.shape).astype(q.dtype), lse.reshape(batch, n, t)


def flash_attention_reference(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float | None = None,
  is_causal: bool = False,
  segment_ids: Segments = None,
  local_window_size: Window = None,
  logits_soft_cap: float | None = None,
  rope: Rope | None = None,
  return_lse: bool = False,
) -> Any:
  """The maths of the module docstring in plain jnp.  The specification."""
  if rope is not None:
    base = rope.base_frequency
    q = apply_rope_reference(q, rope.positions, base_frequency=base)
    k = apply_rope_reference(k, rope.positions, base_frequency=base)
  mask = visible_pairs(
    jnp.arange(q.shape[1]), jnp.arange(k.shape[1]), is_causal, local_window_size
  )[None]
  if segment_ids is not None:
    q_ids, k_ids = _segment_pair(segment_ids)
    same = q_ids[:, :, None] == k_ids[:, None, :]
    mask = mask & same & (k_ids[:, None, :] != 0)
  mask = jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:]))
  out, lse = masked_attention(q, k, v, mask, scale, logits_soft_cap)
  return (out, lse) if return_lse else out


def _segment_pair(segment_ids: Any) -> tuple[jax.Array, jax.Array]:
  if isinstance(segment_ids, tuple):
    return segment_ids
  return segment_ids, segment_ids


# --- configuration ------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashAttentionConfig:
  """Tile sizes.  They change speed, never results beyond rounding.

  Attributes:
    block_q: queries per grid step of the forward, each with all heads of its
      kv head; a multiple of 16.
    block_kv: keys per step of its inner loop; a power of two, at least 128.
    rows: queries times heads that go through the softmax together; those of
      one grid step are interleaved.  A multiple of 128.
    block_q_bwd: as block_q, of the backward.
    block_kv_bwd: as block_kv, of the backward.
  """

  block_q: int = 128
  block_kv: int = 256
  rows: int = 256
  block_q_bwd: int = 128
  block_kv_bwd: int = 256

  def __post_init__(self):
    for name in ("block_q", "block_q_bwd"):
      self._check(name, getattr(self, name) % 16 == 0, "a multiple of 16")
    for name in ("block_kv", "block_kv_bwd"):
      value = getattr(self, name)
      power = value & (value - 1) == 0 and value >= LANES
      self._check(name, power, f"a power of two, at least {LANES}")
    self._check("rows", self.rows % LANES == 0, f"a multiple of {LANES}")

  def _check(self, name: str, good: bool, wanted: str) -> None:
    value = getattr(self, name)
    if not good or value <= 0:
      raise ValueError(
        f"FlashAttentionConfig: {name} must be positive and {wanted}, "
        f"got {value}"
      )

  @classmethod
  def fitting(
    cls, group: int, head_size: int, dtype: Any = jnp.bfloat16
  ) -> FlashAttentionConfig:
    """Tiles of 2048 rows, whatever the number of heads among them.

    Of float32, whose products take several passes of the matrix unit and long
    to compile, 1024.  Small heads have a softmax as long as their matmuls; what
    it costs for each block of keys is spread over more of them.
    """
    rows = 1024 if dtype == jnp.float32 else 2048
    block_q = 1 << (rows // min(group, 128)).bit_length() - 1
    block_q = min(max(block_q, 16), 1024)
    wide = head_size <= LANES or group == 1
    block_kv = max(min(512 if wide else 256, block_q), LANES)
    return cls(
      block_q=block_q,
      block_kv=block_kv,
      block_q_bwd=block_q,
      block_kv_bwd=block_kv,
    )

  def _fwd_bytes(self, q: jax.Array, group: int) -> tuple[int, int]:
    """VMEM of the forward: in all but its keys, and per key."""
    width, size = _lanes(q.shape[2]), q.dtype.itemsize
    rows = self.block_q * group
    tiles = 4 * rows * width * size  # q and out, each in two buffers
    state = rows * (2 * LANES + width) * 4
    # The logits and weights of all rows, in float32.
    return tiles + state + 2 * rows * self.block_kv * 4, (
      2 * _buffers(q) * width * size
    )

  def _bwd_bytes(self, q: jax.Array, group: int) -> tuple[int, int]:
    """VMEM of the backward: in all but its keys, and per key."""
    width, size = _lanes(q.shape[2]), q.dtype.itemsize
    rows = self.block_q_bwd * group
    tiles = 10 * rows * width * size  # q, o, do, dq twice, and clean q and do
    state = 2 * rows * width * 4
    logits = 4 * rows * self.block_kv_bwd * 4
    return tiles + state + logits, (4 * _buffers(q) * size + 2 * 4) * width

  def keys_fwd(self, q, group: int, unit: int, rotated: bool = False) -> int:
    """How many keys one call of the forward holds, a multiple of unit."""
    fixed, per_key = self._fwd_bytes(q, group)
    turned = rotated * _lanes(q.shape[2]) * q.dtype.itemsize
    return _keys_that_fit("forward", fixed, per_key + turned, unit)

  def keys_bwd(self, q, group: int, unit: int, rotated: bool = False) -> int:
    """How many keys one call of the backward holds, a multiple of unit."""
    fixed, per_key = self._bwd_bytes(q, group)
    turned = rotated * _lanes(q.shape[2]) * (q.dtype.itemsize + 4)
    return _keys_that_fit("backward", fixed, per_key + turned, unit)

  def vmem_bytes(self, q: Any, k: Any) -> tuple[int, int]:
    """VMEM that one call of the forward and one of the backward take.

    An estimate, on which the number of keys to a call rests.

    Args:
      q: [B, T, N, H], or its shape and dtype.
      k: [B, S, K, H], likewise.
    """
    group = q.shape[2] // k.shape[2]
    config = self.clipped(q.shape[1], k.shape[1], group)
    rows = jax.eval_shape(functools.partial(to_rows, kv_heads=k.shape[2]), q)
    of_passes = config._fwd_bytes(rows, group), config._bwd_bytes(rows, group)
    forward, backward = (
      fixed + min(k.shape[1] * per_key, VMEM_BYTES - fixed)
      for fixed, per_key in of_passes
    )
    return forward, backward

  def clipped(self, t: int, s: int, group: int) -> FlashAttentionConfig:
    """No larger than the problem, and with rows a multiple of LANES."""
    unit = LANES // math.gcd(group, LANES)
    unit = max(unit, 16)

    def queries(block: int) -> int:
      return min(-(-block // unit), -(-t // unit)) * unit

    most_keys = max(power_of_two(s), LANES)
    return dataclasses.replace(
      self,
      block_q=queries(self.block_q),
      block_kv=min(self.block_kv, most_keys),
      block_q_bwd=queries(self.block_q_bwd),
      block_kv_bwd=min(self.block_kv_bwd, most_keys),
    )


def _lanes(head_size: int) -> int:
  return -(-head_size // LANES) * LANES


def _buffers(rows: jax.Array) -> int:
  """Of whole keys [BK, S, H]: the next are loaded ahead if there are any."""
  return 1 if rows.shape[0] == 1 else 2


def _keys_that_fit(name: str, fixed: int, per_key: int, unit: int) -> int:
  keys = (VMEM_BYTES - fixed) // per_key // unit * unit
  if keys <= 0:
    raise ValueError(
      f"flash_attention: the {name}'s tiles must fit {VMEM_BYTES} bytes of "
      f"VMEM, got {fixed + unit * per_key} with {unit} keys; use smaller blocks"
    )
  return keys


@dataclasses.dataclass(frozen=True)
class _Static:
  """The problem, how to solve it, and by what."""

  problem: Problem
  base_frequency: float
  implementation: Implementation
  config: FlashAttentionConfig


# --- differentiation ----------------------------------------------------------
# Between the passes lse is as the kernels have it: [B K, 1, T G], in units of
# `Problem.unit`.


def _turns(static: _Static, q: jax.Array, positions: Positions) -> Turns:
  if not positions:
    return ()
  half, base = q.shape[3] // 2, static.base_frequency
  return positions[0], rope_timescale(half, base, jnp.float32)


def _fwd(static: _Static, q, k, v, ids: Ids, positions: Positions):
  turns = _turns(static, q, positions)
  return forward(static.problem, static.config, q, k, v, ids, turns)


def _bwd(static: _Static, q, k, v, ids: Ids, positions: Positions, *rest):
  turns = _turns(static, q, positions)
  return backward(static.problem, static.config, q, k, v, ids, turns, *rest)


def _reference(static: _Static, q, k, v, ids: Ids, positions: Positions):
  p = static.problem
  out, lse = flash_attention_reference(
    q,
    k,
    v,
    scale=p.scale,
    is_causal=p.is_causal,
    segment_ids=(ids[0], ids[1]) if ids else None,
    local_window_size=p.window,
    logits_soft_cap=p.soft_cap,
    rope=Rope(positions[0], static.base_frequency) if positions else None,
    return_lse=True,
  )
  return out, lse_to_rows(lse / p.unit, k.shape[2])


def _reference_bwd(
  static: _Static, q, k, v, ids: Ids, positions: Positions, out, lse, dout, dlse
):
  del out, lse

  def of_floats(q, k, v):
    return _reference(static, q, k, v, ids, positions)

  _, vjp = jax.vjp(of_floats, q, k, v)
  return vjp((dout, dlse))


def _primal(static: _Static, q, k, v, ids: Ids, positions: Positions):
  return dispatch(
    static.implementation,
    functools.partial(_fwd, static),
    functools.partial(_reference, static),
    q,
    k,
    v,
    ids,
    positions,
  )


def _vjp_fwd(static: _Static, q, k, v, ids: Ids, positions: Positions):
  out, lse = _primal(static, q, k, v, ids, positions)
  out = checkpoint_name(out, "flash_attention_out")
  lse = checkpoint_name(lse, "flash_attention_lse")
  return (out, lse), (q, k, v, ids, positions, out, lse)


def _vjp_bwd(static: _Static, saved, cotangents):
  grads = dispatch(
    static.implementation,
    functools.partial(_bwd, static),
    functools.partial(_reference_bwd, static),
    *saved,
    *cotangents,
  )
  return (*grads, *jax.tree.map(lambda _: None, saved[3:5]))


_attention = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_attention.defvjp(_vjp_fwd, _vjp_bwd)


# --- public -------------------------------------------------------------------


def check_attention(op: str, q, k, v, window: Window, soft_cap) -> None:
  """What training and decoding attention ask of their common arguments."""
  for name, array in dict(q=q, k=k, v=v).items():
    if array.ndim != 4:
      letters = "[B, T, N, H]" if name == "q" else "[B, S, K, H]"
      raise ValueError(
        f"{op}: {name} must be {letters}, got shape {array.shape}"
      )
  check_float(op, q=q, k=k, v=v)
  if not q.dtype == k.dtype == v.dtype:
    raise ValueError(
      f"{op}: q, k and v must have one dtype, "
      f"got {q.dtype}, {k.dtype}, {v.dtype}"
    )
  check_shape(op, "v", v, k.shape, "the shape of k")
  batch, _, n, h = q.shape
  if (k.shape[0], k.shape[3]) != (batch, h):
    raise ValueError(
      f"{op}: k must be [B, S, K, H] with q's B = {batch} and H = {h}, "
      f"got {k.shape}"
    )
  if k.shape[2] == 0 or n % k.shape[2]:
    raise ValueError(
      f"{op}: query heads N must be a multiple of kv heads K, "
      f"got N = {n}, K = {k.shape[2]}"
    )
  if window is not None and (len(window) != 2 or min(window) < 0):
    raise ValueError(
      f"{op}: local_window_size must be (left, right), both >= 0, got {window}"
    )
  if soft_cap is not None and not soft_cap > 0:
    raise ValueError(
      f"{op}: logits_soft_cap must be positive or None, got {soft_cap}"
    )


def _check_segments(op: str, q, k, segment_ids: Segments) -> None:
  if segment_ids is None:
    return
  if isinstance(segment_ids, tuple) and len(segment_ids) != 2:
    raise ValueError(
      f"{op}: segment_ids must be one array or a pair, got {len(segment_ids)}"
    )
  q_ids, k_ids = _segment_pair(segment_ids)
  for name, ids, array in (("query", q_ids, q), ("key", k_ids, k)):
    check_shape(
      op, f"{name} segment_ids", ids, array.shape[:2], f"[B, length] of {name}s"
    )
    check_integers(op, f"{name} segment_ids", ids)


def flash_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float | None = None,
  is_causal: bool = False,
  segment_ids: Segments = None,
  local_window_size: Window = None,
  logits_soft_cap: float | None = None,
  rope: Rope | None = None,
  return_lse: bool = False,
  implementation: Implementation = None,
  config: FlashAttentionConfig | None = None,
) -> Any:
  """Softmax attention without the [T, S] matrix in memory.

  The conventions are those of `jax.nn.dot_product_attention`.  FlashAttention:
  Dao et al., arXiv 2205.14135; multi-query: Shazeer, arXiv 1911.02150.

  Args:
    q: [B, T, N, H] float32 or bfloat16.
    k: [B, S, K, H] of q's dtype; N is a multiple of K, and query head n reads
      kv head n // (N / K).  K = 1 is multi-query, K = N multi-head.
    v: [B, S, K, H].
    scale: multiplies the logits; None is 1 / sqrt(H).
    is_causal: query i sees keys 0 to i: the first query is aligned with the
      first key, also where T and S differ.
    segment_ids: [B, T] integers, or a pair ([B, T], [B, S]) for queries and
      keys.  A query sees keys of its own segment alone; 0 is padding, which
      neither sees nor is seen.
    local_window_size: (left, right), both inclusive: query i sees keys from
      i - left to i + right.
    logits_soft_cap: cap in cap * tanh(logits / cap), after the scale.
    rope: rotates q and k by their positions first; needs T = S.
    return_lse: also return the log of the sum of exponentials.
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: tile sizes; None picks them from the shape.

  Returns:
    out [B, T, N, H] of q's dtype, or (out, lse [B, N, T] float32).  A query
    that sees no key gives 0, zero gradient, and an lse of -inf.

  Raises:
    ValueError: on wrong shapes, dtypes or values.
  """
  op = "flash_attention"
  check_implementation(op, implementation)
  check_attention(op, q, k, v, local_window_size, logits_soft_cap)
  _check_segments(op, q, k, segment_ids)
  if rope is not None:
    if q.shape[1] != k.shape[1]:
      raise ValueError(
        f"{op}: rope needs as many keys as queries, "
        f"got T = {q.shape[1]}, S = {k.shape[1]}"
      )
    check_shape(op, "rope.positions", rope.positions, q.shape[:2], "[B, T]")
    check_integers(op, "rope.positions", rope.positions)
    check_rope(op, q.shape[3], rope.base_frequency)
  if implementation == "xla" or q.size == 0 or k.size == 0:
    return flash_attention_reference(
      q,
      k,
      v,
      scale=scale,
      is_causal=is_causal,
      segment_ids=segment_ids,
      local_window_size=local_window_size,
      logits_soft_cap=logits_soft_cap,
      rope=rope,
      return_lse=return_lse,
    )
  ids = () if segment_ids is None else _segment_pair(segment_ids)
  run = functools.partial(
    _per_device,
    scale=q.shape[3] ** -0.5 if scale is None else float(scale),
    is_causal=is_causal,
    window=local_window_size,
    soft_cap=logits_soft_cap,
    return_lse=return_lse,
    implementation=implementation,
    config=config,
    segmented=bool(ids),
    base_frequency=rope.base_frequency if rope else 0.0,
  )
  positions = (rope.positions,) if rope else ()
  # Split over heads, the kv heads go with their query heads; one that serves
  # them all is on every device.
  kv = ("B", "S", "N" if k.shape[2] > 1 else "1", "H")
  out, bt = ("B", "T", "N", "H"), ("B", "T")
  return per_device(
    op,
    run,
    (q, k, v, *ids, *positions),
    (out, kv, kv, *(bt, ("B", "S"))[: len(ids)], *(bt,) * len(positions)),
    (out, ("B", "N", "T")) if return_lse else out,
    splits="BN",
  )


def _per_device(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *integers: jax.Array,
  scale: float,
  is_causal: bool,
  window: Window,
  soft_cap: float | None,
  return_lse: bool,
  implementation: Implementation,
  config: FlashAttentionConfig | None,
  segmented: bool,
  base_frequency: float,
) -> Any:
  """One device's batch elements and heads."""
  t, s, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
  integers = tuple(x.astype(jnp.int32) for x in integers)
  ids, positions = integers[: 2 * segmented], integers[2 * segmented :]
  config = config or _config(q, k, is_causal, window, segmented)
  config = config.clipped(t, s, group)
  if not scale > 0:  # the kernels take a maximum before they scale
    q, scale = q * np.sign(scale).astype(q.dtype), abs(scale) or 1.0
  problem = Problem(
    t, s, group, scale, is_causal, window, soft_cap, segmented, bool(positions)
  )
  if positions and not _turns_inside(problem, config, q, k):
    q, k = (
      apply_rope(
        x,
        *positions,
        base_frequency=base_frequency,
        implementation=implementation,
      )
      for x in (q, k)
    )
    problem, positions = dataclasses.replace(problem, rotated=False), ()
  static = _Static(problem, base_frequency, implementation, config)
  out, lse = _attention(static, q, k, v, ids, positions)
  if not return_lse:
    return out
  return out, lse_from_rows(lse, q.shape) * problem.unit


def _turns_inside(p: Problem, config: FlashAttentionConfig, q, k) -> bool:
  """Whether the attention kernels do the rotation, not `apply_rope` before.

  They rotate a key with the query of its position: on a diagonal, with all the
  keys in one call, and halves and heads that are whole registers.
  """
  whole = q.shape[3] // 2 % LANES == 0 and (p.group == 1 or p.group % 8 == 0)
  diagonals = (
    has_diagonal(p, config.block_q, config.block_kv),
    has_diagonal(p, config.block_q_bwd, config.block_kv_bwd),
  )
  if not (whole and all(diagonals)):
    return False
  rows = jax.eval_shape(lambda q: to_rows(q, k.shape[2]), q)
  fit = (
    config.keys_fwd(rows, p.group, config.block_q, rotated=True),
    config.keys_bwd(rows, p.group, config.block_q_bwd, rotated=True),
  )
  return min(fit) >= p.s


def _config(q, k, is_causal, window, segmented) -> FlashAttentionConfig:
  """The tuned config of a problem, or one that fits it."""
  kind = "causal" if is_causal else "full"
  found = tuned_config(
    "flash_attention",
    heads=q.shape[2],
    kv_heads=k.shape[2],
    head_size=q.shape[3],
    length=power_of_two(max(q.shape[1], k.shape[1])),
    dtype=q.dtype.name,
    mask=kind + "_window" * (window is not None) + "_segments" * segmented,
  )
  if found is not None:
    return FlashAttentionConfig(**found)
  group = q.shape[2] // k.shape[2]
  return FlashAttentionConfig.fitting(group, q.shape[3], q.dtype)


# --- registration -------------------------------------------------------------


def _visible(t: int, s: int, is_causal: bool, window: Window) -> int:
  """Visible pairs of one head; a full causal square counts as its half."""
  if is_causal and window is None and t == s:
    return t * s // 2
  i = np.arange(t)
  low, high = np.zeros(t, int), np.full(t, s)
  if is_causal:
    high = np.minimum(high, i + 1)
  if window is not None:
    low, high = (
      np.maximum(low, i - window[0]),
      np.minimum(high, i + window[1] + 1),
    )
  return int(np.maximum(high - low, 0).sum())


def _cost(
  q, k, v, *, is_causal=False, local_window_size=None, segment_ids=None, **_
) -> tuple[Cost, Cost]:
  batch, t, n, h = q.shape
  pairs = _visible(t, k.shape[1], is_causal, local_window_size)
  if isinstance(segment_ids, Integers):
    ids = segment_ids.draw(np.random.default_rng(0))[0]
    lengths = np.bincount(ids)[1:]
    pairs = sum(
      _visible(int(x), int(x), is_causal, local_window_size) for x in lengths
    )
  one = 2 * batch * n * h * pairs
  forward = nbytes(q, q, k, v)
  return Cost(2 * one, forward), Cost(5 * one, 2 * forward)


def _packed(shape: tuple[int, int], segments: int) -> Integers:
  """Segments 1, 2, ... of equal length."""
  row = np.arange(shape[1], dtype=np.int32) * segments // shape[1] + 1
  return Integers(shape, lambda _: np.broadcast_to(row, shape))


def _case(name, b, t, n, k, h, dtype=jnp.bfloat16, s=None, **kwargs) -> Case:
  q = jax.ShapeDtypeStruct((b, t, n, h), dtype)
  kv = jax.ShapeDtypeStruct((b, s or t, k, h), dtype)
  return Case(name, (q, kv, kv), kwargs)


def _rope_at(shape: tuple[int, int]) -> Any:
  arange = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  return Rope(Integers(shape, lambda _: arange))  # type: ignore[arg-type]


OP = Op(
  name="flash_attention",
  function=flash_attention,
  reference=flash_attention_reference,
  cost=_cost,
  through_softmax=True,
  # Heads first; those of a single kv head lie so in either.
  own_layout=lambda q, k, *_, **__: k.shape[2] > 1,
  baselines=("attention",),
  tests=(
    _case("mqa_causal", 1, 128, 4, 1, 128, jnp.float32, is_causal=True),
    _case("gqa_ragged", 2, 37, 4, 2, 64, jnp.float32, s=50),
    _case(
      "window_cap",
      1,
      96,
      2,
      2,
      128,
      jnp.float32,
      is_causal=True,
      local_window_size=(16, 0),
      logits_soft_cap=20.0,
    ),
    _case(
      "packed_rope",
      2,
      64,
      2,
      1,
      128,
      jnp.float32,
      is_causal=True,
      segment_ids=_packed((2, 64), 3),
      rope=_rope_at((2, 64)),
    ),
    _case("bf16", 1, 128, 2, 1, 256, is_causal=True),
  ),
  benches=(
    _case("gemma_2b_8k", 1, 8192, 8, 1, 256, is_causal=True),
    _case("gemma_2b_4k", 1, 4096, 8, 1, 256, is_causal=True),
    _case("gemma_2b_4x2k", 4, 2048, 8, 1, 256, is_causal=True),
    _case("gemma_7b_8k", 1, 8192, 16, 16, 256, is_causal=True),
    _case("gemma_2b_32k", 1, 32768, 8, 1, 256, is_causal=True),
    _case("llama_gqa_8k", 1, 8192, 32, 8, 128, is_causal=True),
    _case(
      "window_1024",
      1,
      8192,
      8,
      1,
      256,
      is_causal=True,
      local_window_size=(1024, 0),
    ),
    _case(
      "packed_8x1024",
      1,
      8192,
      8,
      1,
      256,
      is_causal=True,
      segment_ids=_packed((1, 8192), 8),
    ),
    _case(
      "gemma_2b_8k_rope",
      1,
      8192,
      8,
      1,
      256,
      is_causal=True,
      rope=_rope_at((1, 8192)),
    ),
  ),
)
