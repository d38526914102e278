"""The strongest things that a JAX user can call instead of our kernels.

Attention kernels get their arguments in the layout that suits them, queries
already scaled, so that neither a transpose nor a multiplication counts against
them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pallas_gemma.kernels import OPS, Case, Norm, rms_norm_reference

from .program import Built, Program, integer_values, passes

_BLOCKS = (  # query, key/value, key/value computed at a time
  (1024, 1024, 512),
  (1024, 1024, 1024),
  (512, 1024, 512),
  (512, 512, 512),
)


def programs() -> Iterator[Program]:
  """Baselines of every case that they can do."""
  for op in OPS:
    for i, case in enumerate(op.benches):
      fields: dict[str, Any] = dict(
        costs=op.cost(*case.args, **case.kwargs), op=op.name, case=case.name
      )
      if "feed_forward" in op.baselines:
        yield from passes(
          functools.partial(_with_barrier, case),
          implementation="xla-barrier",
          default=i == 0 or "norm" in case.kwargs,
          **fields,
        )
      if "experts" in op.baselines:
        yield from _experts(case, default=False, **fields)
      if "attention" in op.baselines and _Attention.can_do(case):
        yield from _attention(case, fields)


# --- feed-forward -------------------------------------------------------------


def feed_forward_with_barrier(
  x: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  w_down: jax.Array,
  *,
  norm: Norm | None = None,
  residual: bool = False,
  config: object = None,
) -> jax.Array:
  """XLA's, kept from computing the gated units twice: worth 3 % and memory.

  The model hands every feed-forward the config of ours; XLA has no use for it.
  """
  del config
  y = x
  if norm is not None:
    y = rms_norm_reference(
      x, norm.scale, epsilon=norm.epsilon, scale_offset=norm.scale_offset
    )
  h = jax.nn.gelu(y @ w_gate, approximate=True) * (y @ w_up)
  y = jax.lax.optimization_barrier(h) @ w_down
  return x + y if residual else y


def _with_barrier(case: Case) -> Built:
  specs = case.specs
  function = case.bind(feed_forward_with_barrier)
  return Built(function, specs, (None,) * len(specs))


# --- experts ------------------------------------------------------------------


def _experts(problem: Case, **fields: Any) -> Iterator[Program]:
  """Three products by group, in bfloat16: by XLA, and by JAX's own kernels."""
  for name, product in (
    ("jax-ragged-dot", jax.lax.ragged_dot),
    ("jax-megablox", _megablox),
  ):
    build = functools.partial(_feed_forward_of_experts, product, problem)
    yield from passes(build, implementation=name, **fields)


def _feed_forward_of_experts(product: Callable[..., Any], case: Case) -> Built:
  def function(
    x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, sizes: Any
  ) -> jax.Array:
    h = jax.nn.silu(product(x, gate, sizes)) * product(x, up, sizes)
    return product(h, down, sizes)

  return Built(case.bind(function), case.specs, integer_values(case))


def _megablox(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """In tiles of 512 x 1024 x 1024, MaxText's, or as large as the arrays."""
  from jax.experimental.pallas.ops.tpu.megablox import gmm

  tiling = tuple(map(min, (512, 1024, 1024), (x.shape[0], *w.shape[1:])))
  return gmm(x, w, sizes, preferred_element_type=x.dtype, tiling=tiling)


# --- attention ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Attention:
  """A causal attention problem; letters as in `kernels`."""

  batch: int
  length: int
  heads: int
  kv_heads: int
  size: int
  dtype: Any
  window: tuple[int, int] | None
  segments: np.ndarray | None

  @staticmethod
  def can_do(case: Case) -> bool:
    able = {"is_causal", "local_window_size", "segment_ids", "layout"}
    row_major = case.kwargs.get("layout", "BTNH") == "BTNH"
    is_known = row_major and set(case.kwargs) <= able
    return is_known and bool(case.kwargs.get("is_causal"))

  @property
  def is_plain(self) -> bool:
    """Causal and nothing else."""
    return self.window is None and self.segments is None

  @property
  def is_long(self) -> bool:
    """Whether to execute what the compiler prints takes minutes."""
    return self.length > 1 << 14

  @classmethod
  def of(cls, case: Case) -> _Attention:
    q, k = case.args[:2]
    b, t, n, h = q.shape
    window = case.kwargs.get("local_window_size")
    segments = integer_values(case)[3] if len(case.specs) > 3 else None
    return cls(b, t, n, k.shape[2], h, q.dtype, window, segments)

  @property
  def grouped_specs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """q [B, K, N / K, T, H], k and v [B, K, T, H]."""
    b, t, k, h = self.batch, self.length, self.kv_heads, self.size
    q = jax.ShapeDtypeStruct((b, k, self.heads // k, t, h), self.dtype)
    kv = jax.ShapeDtypeStruct((b, k, t, h), self.dtype)
    return q, kv, kv


def _attention(case: Case, fields: dict[str, Any]) -> Iterator[Program]:
  problem = _Attention.of(case)
  if problem.heads == problem.kv_heads and problem.is_plain:
    yield from passes(
      functools.partial(_jax_flash, problem),
      implementation="jax-flash",
      default=False,
      **fields,
    )
  for blocks in _BLOCKS:
    if problem.length % max(blocks):
      continue
    name = "x".join(map(str, blocks))
    # The others for those who ask.  Larger ones do not fit beside a window.
    best = blocks == _BLOCKS[0 if problem.window is None else -1]
    default = best and not problem.is_long
    yield from _jax_splash_passes(problem, blocks, default=default, **fields)
    if problem.is_plain:
      yield from passes(
        functools.partial(_tokamax_splash, problem, blocks),
        implementation=f"tokamax-splash-{name}",
        default=default,
        needs="tokamax",
        **fields,
      )


def _jax_splash_passes(
  problem: _Attention,
  blocks: tuple[int, int, int],
  *,
  default: bool,
  **fields: Any,
) -> Iterator[Program]:
  """The forward pass, and the gradients by two kernels and by one."""
  name = "jax-splash-" + "x".join(map(str, blocks))
  two, one = (
    passes(
      functools.partial(_jax_splash, problem, blocks, fused),
      implementation=name + ("-fused" if fused else ""),
      default=default,
      **fields,
    )
    for fused in (False, True)
  )
  for program in (*two, one[-1]):
    # One kernel is the faster way, but for a window's few keys.
    slower = program is two[-1] and problem.window is None
    yield dataclasses.replace(program, default=default and not slower)


def _jax_flash(problem: _Attention) -> Built:
  from jax.experimental.pallas.ops.tpu import flash_attention as lib

  b, t, n, h = problem.batch, problem.length, problem.heads, problem.size

  def block(name: str) -> int:
    if name == "block_b":
      return 1
    # A backward in blocks of 1024 does not fit the VMEM that it asks for.
    backward = name.endswith(("_dkv", "_dq"))
    return min(t, 512 if backward else 1024)

  sizes = lib.BlockSizes(
    **{f.name: block(f.name) for f in dataclasses.fields(lib.BlockSizes)}
  )
  spec = jax.ShapeDtypeStruct((b, n, t, h), problem.dtype)
  return Built(
    functools.partial(lib.flash_attention, causal=True, block_sizes=sizes),
    (spec,) * 3,
    (None,) * 3,
  )


def _grouped(kernel: Callable[..., Any], problem: _Attention) -> Built:
  """A kernel of q [N / K, T, H], k and v [T, H], on all batches and groups."""

  def of_example(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array):
    return jax.vmap(lambda q, k, v: kernel(q, k, v, *ids))(q, k, v)

  specs: tuple[Any, ...] = problem.grouped_specs
  values: tuple[Any, ...] = (None,) * 3
  if (ids := problem.segments) is not None:
    specs += (jax.ShapeDtypeStruct(ids.shape, ids.dtype),)
    values += (ids,)
  return Built(jax.vmap(of_example), specs, values)


def splash_kernel(
  t: int,
  heads: int,
  blocks: tuple[int, int, int] = _BLOCKS[0],
  *,
  window: tuple[int, int] | None = None,
  fused: bool = False,
) -> Callable[..., Any]:
  """JAX's splash attention of q [heads, T, H], k and v [T, H], causal.

  Args:
    t: T.
    heads: of q.
    blocks: query, key/value, and key/value computed at a time.
    window: local_window_size as in our kernel.
    fused: one kernel for all gradients, instead of two.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as lib,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  q, kv, compute = (min(block, t) for block in blocks)
  mask: Any = masks.CausalMask((t, t))
  if window is not None:
    mask = mask & masks.LocalMask((t, t), window, 0)
  sizes = lib.BlockSizes(
    **_splash_blocks(q, kv, compute),
    block_q_dq=None if fused else q,
    block_kv_dq=None if fused else kv,
    use_fused_bwd_kernel=fused,
  )
  return lib.make_splash_mqa_single_device(
    masks.MultiHeadMask([mask] * heads), block_sizes=sizes
  )


def _splash_blocks(q: int, kv: int, compute: int) -> dict[str, Any]:
  """Blocks of the forward pass and of that for keys and values, the same."""
  return {
    "block_q": q,
    "block_kv": kv,
    "block_kv_compute": compute,
    "block_q_dkv": q,
    "block_kv_dkv": kv,
    "block_kv_dkv_compute": compute,
  }


def _jax_splash(
  problem: _Attention, blocks: tuple[int, int, int], fused: bool
) -> Built:
  kernel = splash_kernel(
    problem.length,
    problem.heads // problem.kv_heads,
    blocks,
    window=problem.window,
    fused=fused,
  )
  if problem.segments is None:
    return _grouped(kernel, problem)

  def packed(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    return kernel(q, k, v, segment_ids=lib.SegmentIds(q=ids, kv=ids))

  return _grouped(packed, problem)


def _tokamax_splash(problem: _Attention, blocks: tuple[int, int, int]) -> Built:
  package = "tokamax._src.ops.experimental.tpu.splash_attention"
  lib = importlib.import_module(f"{package}.splash_attention_kernel")
  masks = importlib.import_module(f"{package}.splash_attention_mask")
  config = lib.SplashConfig(
    **_splash_blocks(*blocks), use_fused_bwd_kernel=True
  )
  t = problem.length
  kernel = lib.make_splash_mqa_single_device(
    masks.CausalMask((t, t)), config=config
  )
  return _grouped(kernel, problem)


def splash_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any
) -> jax.Array:
  """JAX's splash attention with the signature of our `flash_attention`.

  What a model does that calls it: rotate by its own means, scale the queries,
  and transpose to the layout that it wants.
  """
  from pallas_gemma.kernels import apply_rope

  if kwargs.pop("layout", "BTNH") == "BNTH":
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return splash_attention(q, k, v, **kwargs).swapaxes(1, 2)
  rope = kwargs.pop("rope", None)
  if not kwargs.pop("is_causal") or any(kwargs.values()):
    raise ValueError(f"splash_attention: wanted is_causal alone, got {kwargs}")
  if rope is not None:
    rotate = functools.partial(
      apply_rope,
      positions=rope.positions,
      base_frequency=rope.base_frequency,
      implementation="xla",
    )
    q, k = rotate(q), rotate(k)
  b, t, n, h = q.shape
  groups = k.shape[2]
  scaled = q * jnp.asarray(1 / math.sqrt(h), q.dtype)
  grouped = scaled.reshape(b, t, groups, n // groups, h)
  kernel = splash_kernel(t, n // groups)
  out = jax.vmap(jax.vmap(lambda q, k, v: kernel(q, k, v)))(
    grouped.transpose(0, 2, 3, 1, 4),
    k.transpose(0, 2, 1, 3),
    v.transpose(0, 2, 1, 3),
  )
  return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
