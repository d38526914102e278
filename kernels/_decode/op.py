"""Page 10: the op, its public function, its problems."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._attention.spec import Window
from .._frame import switches
from .._frame.check import (
  Implementation,
  as_switch,
  check_config,
  check_implementation,
)
from .._frame.debug import checked
from .._frame.kernel import Saved, kernel_op
from .._frame.op import Case, Cost, Integers, Op, nbytes
from .._frame.sharding import Axes, Split
from .._rope import Rope
from .cache import Cache, CacheArray, quantized_shapes
from .devices import check_groups, merged_over, shifted, with_own_kv_heads
from .door import Given, checked_arguments, problem_of, results_of
from .forward import forward
from .spec import (
  Arrays,
  Outs,
  Problem,
  reference,
  rotated,
  unflattened,
  with_new_keys,
)
from .tiles import DecodeAttentionConfig

# --- the op -------------------------------------------------------------------


def _split(p: Problem, a: Arrays) -> Split:
  in_pages, is_quantized = a.table is not None, a.k_scale is not None
  stack = "" if a.layer is None else "-"
  cache = stack + ("--KH" if in_pages else "BSKH")
  # S K in one dimension: the heads of a token side by side, in G groups.
  scale = (stack + ("-K--" if in_pages else "BK-S")) if is_quantized else None
  letters = Arrays(
    q="BTNH",
    k=cache,
    v=cache,
    k_scale=scale,
    v_scale=scale,
    lengths="B",
    shift="B",
    new_k="BTKH",
    new_v="BTKH",
    layer="",
    table="B-",
    sin="BT-",
    cos="BT-",
    scale="B",
    left="B",
  )
  given = a._asdict()
  letters = Arrays(
    **{
      name: None if given[name] is None else value
      for name, value in letters._asdict().items()
    }
  )
  appends = a.new_k is not None
  # Rows that share pages stay together.
  over = "N" if in_pages and appends else "BN"
  over += "" if in_pages else "S"
  outs = Outs("BTNH", "BNT" if p.return_lse else None)
  if appends:
    outs = outs._replace(k=cache, v=cache, k_scale=scale, v_scale=scale)
  return Split(letters, outs, over=over, fewer="K", follows=("K", "N"))


def _on_device(
  op: Any, p: Problem, a: Arrays, axes: Mapping[str, Axes]
) -> Outs:
  """One device's rows, heads and keys."""
  check_groups(a, axes)
  given, cache = a, {}
  if axes.get("S"):
    a = shifted(a, axes["S"])
  if a.new_k is not None and axes.get("N", ()) != axes.get("K", ()):
    # All devices that share the query heads have these kv heads, and write the
    # same to them, as only XLA can say.
    a, outs = with_new_keys(rotated(a))
    cache = Cache.of(outs)._asdict()
  a = with_own_kv_heads(a, axes)
  sign = 1.0
  if not p.scale > 0:  # the kernel takes a maximum before it scales
    sign = float(np.sign(p.scale))
    p = dataclasses.replace(p, scale=abs(p.scale) or 1.0)
    a = a._replace(q=a.q * np.asarray(sign, a.q.dtype))
  return_lse = p.return_lse
  p = dataclasses.replace(p, return_lse=return_lse or bool(axes.get("S")))
  outs = op(p, a)
  if axes.get("S"):
    outs = merged_over(outs, axes["S"])
  if not return_lse:
    outs = outs._replace(lse=None)
  return unflattened(outs, given)._replace(**cache)


def _gradient(p: Problem, saved: Saved, d: Outs) -> Arrays:
  """By JAX, of the reference: who decodes does not train."""
  return _decode.reference_vjp(p, saved, d)


_op = functools.partial(
  kernel_op,
  "decode_attention",
  reference=reference,
  forward=forward,
  backward=_gradient,
  saves=Arrays._fields,
  split=_split,
  around=_on_device,
)
_decode = _op(vmap=("batch", "batch"))
# Of a stack or of pages, the first dimension is not the batch's.
_decode_in_table = _op(vmap=("loop", "loop"))


# --- public -------------------------------------------------------------------


@switches.plain
def decode_attention_reference(
  q: jax.Array,
  k_cache: CacheArray,
  v_cache: CacheArray,
  lengths: jax.Array,
  *,
  new: tuple[jax.Array, jax.Array] | None = None,
  layer: jax.Array | int | None = None,
  page_table: jax.Array | None = None,
  rope: Rope | None = None,
  scale: float | None = None,
  local_window_size: Window = None,
  logits_soft_cap: float | None = None,
  return_lse: bool = False,
) -> Any:
  """The maths of the room's docstring in plain jnp.  The specification."""
  given = Given(
    q,
    k_cache,
    v_cache,
    lengths,
    new=new,
    layer=layer,
    page_table=page_table,
    rope=rope,
    scale=scale,
    local_window_size=local_window_size,
    logits_soft_cap=logits_soft_cap,
  )
  problem, arrays = problem_of(given, return_lse=return_lse)
  return results_of(reference(problem, arrays), return_lse, new is not None)


@switches.plain
def decode_attention(
  q: jax.Array,
  k_cache: CacheArray,
  v_cache: CacheArray,
  lengths: jax.Array,
  *,
  new: tuple[jax.Array, jax.Array] | None = None,
  layer: jax.Array | int | None = None,
  page_table: jax.Array | None = None,
  rope: Rope | None = None,
  scale: float | None = None,
  local_window_size: Window = None,
  logits_soft_cap: float | None = None,
  return_lse: bool = False,
  implementation: Implementation = None,
  config: DecodeAttentionConfig | None = None,
) -> Any:
  """Attention of each row's T newest tokens over its part of a KV cache.

  Blocks of the cache past a row's length, or before its window, are neither
  read nor computed with.

  Args:
    q: [B, T, N, H] float32 or bfloat16.  T is 1, a few for speculation, or
      hundreds for a prompt that is read in chunks.
    k_cache: [B, S, K, H] of q's dtype, or a `QuantizedCache` in int8; entries
      at or beyond a row's length are not read and may hold anything.  The
      kernel reads it where it lies if S is a multiple of 16, or of 128 where it
      is int8 or H is no multiple of 128; else XLA copies it to such a length.
      So it does with a layer's keys and values where T N > 256, H is a multiple
      of 128, and K is 2, 4 or one of 8; and with pages of another length.
    v_cache: likewise, of the same shape.
    lengths: [B] integers: valid keys of each row, the T newest included.  At
      most S, else `checkify` finds an error, and only S keys are seen.  Where a
      length is less than T, the first queries come before their row's first
      key.
    new: (k, v), each [B, T, K, H]: the T newest keys and values, which are not
      in the cache yet.  They are written to their places in it, at lengths - T
      and on, and the cache is a result: the same memory if it is donated, or
      carried by a loop.  Without it they must be in place.
    layer: index of a layer, in a cache [L, B, S, K, H] of all layers, which is
      neither sliced nor copied.
    page_table: [B, P] integers: the cache is [pages, page, K, H] (or [L,
      pages, page, K, H]), and the tokens p page to (p + 1) page - 1 of row b
      are those of page page_table[b, p].  Of entries past a row's length any
      value will do; of the others one that is no page is an error that
      `checkify` finds, and another page else.  Pages of 128 tokens or more are
      copied at the speed of HBM.
    rope: rotates q, and the new keys, by their positions first.  The kernel
      rotates q if T is 1 or the heads that it takes together, N or N / K, are a
      multiple of 8; else that is done before, as are rotations of neighbours
      or of a part of each head.  In a scan over layers, pass `phases`: XLA
      makes them once, and not in each layer.
    scale: multiplies the logits; None is 1 / sqrt(H).
    local_window_size: (left, right): a query also sees no key more than left
      before it; right does not matter here.
    logits_soft_cap: cap in cap * tanh(logits / cap), after the scale.
    return_lse: also return the log of the sum of exponentials.
    implementation: "pallas", "xla" (the reference), or None for the kernel
      where the computation is lowered for TPU and the reference elsewhere.
    config: tile sizes; None picks them from the shape.

  Returns:
    out [B, T, N, H] of q's dtype; 0 for a query before its row's first key.
    With `return_lse` or `new`, a tuple of it, lse [B, N, T] float32 if asked
    for, and the two caches if there were new keys.

  Raises:
    ValueError: on wrong shapes, dtypes or values.
  """
  check_implementation("decode_attention", implementation)
  check_config("decode_attention", config, DecodeAttentionConfig)
  given = checked_arguments(
    Given(
      q,
      k_cache,
      v_cache,
      lengths,
      new=new,
      layer=layer,
      page_table=page_table,
      rope=rope,
      scale=scale,
      local_window_size=local_window_size,
      logits_soft_cap=logits_soft_cap,
    )
  )
  problem, arrays = problem_of(
    given,
    return_lse=as_switch("decode_attention", "return_lse", return_lse),
    implementation=implementation,
    config=config,
  )
  arrays = _checked(arrays, given.lengths)
  in_table = arrays.layer is not None or arrays.table is not None
  outs = (_decode_in_table if in_table else _decode)(problem, arrays)
  return results_of(outs, return_lse, new is not None)


def _checked(a: Arrays, lengths: jax.Array) -> Arrays:
  """The arrays; for `checkify`, errors of what kernels cannot refuse."""
  size, given = a.k.shape[-3], lengths
  if a.table is not None:
    pages = a.k.shape[-4]
    used = jnp.arange(a.table.shape[1]) * size < a.lengths[:, None]
    good = ~used | ((a.table >= 0) & (a.table < pages))
    wanted = f"decode_attention: page_table must be from 0 to {pages - 1}"
    lengths = checked(a.lengths, good, a.table, f"{wanted}, got {{found}}")
    a, size = a._replace(lengths=lengths), size * a.table.shape[1]
  wanted = f"decode_attention: lengths must be at most S = {size}"
  good = given <= size
  lengths = checked(a.lengths, good, given, f"{wanted}, got {{found}}")
  return a._replace(lengths=lengths)


# --- registration -------------------------------------------------------------


def _cost(q, k_cache, v_cache, lengths, **kwargs) -> tuple[Cost, None]:
  (_, t, n, h), caches = q.shape, (k_cache, v_cache)
  values = jax.tree.leaves(k_cache)[0]
  rows = np.asarray(lengths.draw(np.random.default_rng(0)))
  if kwargs.get("local_window_size") is not None:
    rows = np.minimum(rows, kwargs["local_window_size"][0] + t)
  per_token = sum(
    leaf.dtype.itemsize * int(np.prod(leaf.shape))
    for leaf in jax.tree.leaves(caches)
  ) / (int(np.prod(values.shape)) // (values.shape[-2] * h))
  pairs = float((rows * t - t * (t - 1) // 2).sum())
  new = kwargs.get("new") or ()
  traffic = nbytes(q, q, *new) + int(rows.sum() * per_token)
  return Cost(int(4 * pairs * n * h), traffic), None


def _case(name, b, t, s, n, k, h, dtype=jnp.bfloat16, **kwargs) -> Case:
  """With random lengths, or those given; `page`, `layers`, and flags."""
  lengths = kwargs.pop("lengths", None)

  def draw(rng: np.random.Generator) -> Any:
    if lengths is not None:
      return np.asarray(lengths, np.int32)
    return rng.integers(t, s + 1, (b,), np.int32)

  shape: tuple[int, ...] = (b, s, k, h)
  page = kwargs.pop("page", None)
  if page is not None:
    pages = b * s // page
    table = Integers(
      (b, s // page),
      lambda rng: rng.permutation(pages).astype(np.int32).reshape(b, -1),
    )
    shape, kwargs["page_table"] = (pages, page, k, h), table
  if "layers" in kwargs:
    layers = kwargs.pop("layers")
    shape = (layers, *shape)
    kwargs["layer"] = Integers((), lambda rng: rng.integers(0, layers))
  cache: Any = jax.ShapeDtypeStruct(shape, dtype)
  if kwargs.pop("quantized", False):
    cache = quantized_shapes(shape)
  if kwargs.pop("appends", False):
    new = jax.ShapeDtypeStruct((b, t, k, h), dtype)
    kwargs["new"] = (new, new)
  if kwargs.pop("rotated", False):

    def positions(rng: np.random.Generator) -> Any:
      return draw(rng)[:, None] - t + np.arange(t, dtype=np.int32)

    kwargs["rope"] = Rope(Integers((b, t), positions))
  q = jax.ShapeDtypeStruct((b, t, n, h), dtype)
  caches = range(1, 1 + 2 * len(jax.tree.leaves(cache)))
  donated = tuple(caches) if "new" in kwargs else ()
  return Case(name, (q, cache, cache, Integers((b,), draw)), kwargs, donated)


_bench = functools.partial(_case, appends=True)
_mixed = functools.partial(np.linspace, dtype=np.int32)
_FULL, _MIXED = np.full(32, 8192), _mixed(256, 8192, 32)
_GEMMA_2B = (32, 1, 8192, 8, 1, 256)

DECODE_ATTENTION = Op(
  name="decode_attention",
  function=decode_attention,
  reference=decode_attention_reference,
  cost=_cost,
  tests=(
    _case("mqa", 2, 1, 64, 8, 1, 128, jnp.float32, rotated=True),
    _case("several", 3, 4, 50, 4, 2, 64, jnp.float32, local_window_size=(8, 0)),
    _case("bf16", 2, 1, 64, 4, 4, 128, logits_soft_cap=30.0),
    _case("appended", 3, 2, 64, 4, 2, 64, jnp.float32, appends=True, layers=2),
    _case("int8", 2, 1, 128, 4, 2, 128, quantized=True, appends=True),
    _case("pages", 2, 3, 96, 2, 1, 128, page=32, appends=True),
  ),
  benches=(
    _bench("gemma_2b_32x8k", *_GEMMA_2B, lengths=_FULL),
    _bench("gemma_2b_32x8k_mixed", *_GEMMA_2B, lengths=_MIXED),
    _bench("gemma_2b_1x8k", 1, *_GEMMA_2B[1:], lengths=[8192]),
    *(
      _bench(f"{model}_32x8k_mixed", 32, 1, 8192, *sizes, lengths=_MIXED)
      for model, *sizes in (
        ("llama_gqa", 32, 8, 128),
        ("llama_1b", 32, 8, 64),
        ("phi4", 40, 10, 128),
      )
    ),
    _bench("gemma_7b_8x2k", 8, 1, 2048, 16, 16, 256, lengths=np.full(8, 2048)),
    _bench(
      "gemma_2b_32x8k_mixed_int8", *_GEMMA_2B, quantized=True, lengths=_MIXED
    ),
    _bench("gemma_2b_32x8k_mixed_pages", *_GEMMA_2B, page=128, lengths=_MIXED),
    _bench("gemma_2b_32x8k_t4", 32, 4, *_GEMMA_2B[2:], lengths=_MIXED),
    *(
      _bench(f"gemma_2b_1x8k_t{t}", 1, t, *_GEMMA_2B[2:], lengths=[8192])
      for t in (256, 512)
    ),
    _bench(
      "gemma_2b_32x8k_mixed_rope", *_GEMMA_2B, rotated=True, lengths=_MIXED
    ),
    _bench(
      "gemma_2b_1x8k_t512_rope",
      *(1, 512, *_GEMMA_2B[2:]),
      rotated=True,
      lengths=[8192],
    ),
  ),
  through_softmax=True,
)
