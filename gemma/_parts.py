"""A model whose parameters are stored in parts, over axes that split tokens.

Each device holds a part of every weight (ZeRO-3), and a weight is gathered
before it is used.  Two things are said here that the compiler does not find
by itself.

The weights of the feed-forward are cast before they are gathered, not in the
kernel afterwards: half the bytes, and half of those of their gradients, which
are summed in the compute dtype, as those of the other weights are.

The compiler gathers them a layer ahead, if it is asked to
(`compiler_options`), so that attention covers it, forward and backward.  Sums
of gradients, for which the core has to wait, it takes for such cover too.  So
they come first: attention's backward pass waits for those of the feed-forward,
and is there for the gathers.

The token table is `_table`'s.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .ops import cast_here

# Devices among which an exchange takes no longer than what covers it.
_FEW = 8

# Near the end of a chip's memory the compiler would share equal code by calls;
# then it cuts the program smaller, and loops load their code at every turn.
_ANYWHERE = {"xla_tpu_enable_deduplicated_calls": "false"}


def compiler_options(mesh: Any = None) -> dict[str, str]:
  """What a TPU's compiler is told of training programs.

  Args:
    mesh: over which parameters are stored in parts; None if they are not.
  """
  if mesh is None:
    return dict(_ANYWHERE)
  options = _ANYWHERE | {
    # Gathers of a loop begin one turn ahead.
    "xla_tpu_enable_ici_ag_pipelining": "true",
    # Attention's products stay whole, for other collectives to go on behind
    # them.  In pieces between which their own weights move they wait for these.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
  }
  if mesh.size <= _FEW:  # larger slices cannot: the compiler refuses
    options["xla_tpu_enable_async_all_to_all"] = "true"
  else:
    # Small parts are gathered as such, not by an all-reduce of zeros around
    # them: half the bytes, and the core need not wait.
    options["xla_tpu_prefer_async_allgather_to_allreduce"] = "true"
  return options


class Parts(NamedTuple):
  """Where the parts are, as jit's caches see it."""

  mesh: Any
  rows: tuple[str, ...]  # axes that split rows of tokens
  length: tuple[str, ...]  # that split their length
  stored: tuple[str, ...]  # those of both over which weights are stored
  vocabulary: str | None  # the axis that splits the table's rows

  @property
  def devices(self) -> tuple[str, ...]:
    """The axes that split tokens."""
    return *self.rows, *self.length

  @property
  def apart(self) -> tuple[str, ...]:
    """Those of them along which weights are stored again, not split."""
    return tuple(a for a in self.devices if a not in self.stored)

  @property
  def are_few(self) -> bool:
    """Whether each device can reach all others in time."""
    return self.mesh.size <= _FEW

  @property
  def of_tokens(self) -> PartitionSpec:
    """How an array [B, T, ...] is split."""
    return PartitionSpec(self.rows, self.length)

  def count(self, axes: Sequence[str]) -> int:
    """How many devices there are along axes."""
    return math.prod(self.mesh.shape[axis] for axis in axes)

  def each(self, own: jax.Array) -> jax.Array:
    """A part, in a `shard_map`, as each device's own where others have it too.

    So its gradient is summed over the stored axes first, where it shrinks.
    """
    varying: Any = jax.lax.pcast(own, self.apart, to="varying")
    return varying

  def divide(self, weights: Sequence[Any], dim: int = 0) -> bool:
    """Whether weights are parts of one dimension, and split no more."""
    sizes = dict(self.mesh.shape)
    others = set(sizes) - set(self.devices)
    return all(sizes[axis] == 1 for axis in others) and all(
      w.shape[dim] % self.count(self.stored) == 0 for w in weights
    )


_PARTS = jax.make_user_context(None)


def current() -> Parts | None:
  """Where the parts are of the model that is traced; None if it is whole."""
  return _PARTS.value


@contextlib.contextmanager
def stored_in_parts(
  mesh: Any,
  *,
  rows: Sequence[str],
  length: Sequence[str] = (),
  stored: Sequence[str],
  vocabulary: str | None,
) -> Iterator[None]:
  """Says so of the models that are traced inside.

  Args:
    mesh: of Auto axes.
    rows: its axes that split rows of tokens.
    length: those that split tokens of a row.
    stored: the axes of both over which weights are stored, the table by its
      columns.
    vocabulary: the axis over which the table is split by its rows too.
  """
  of_tokens = tuple(rows), tuple(length)
  with _PARTS(Parts(mesh, *of_tokens, tuple(stored), vocabulary)):
    yield


def on_gathered(
  op: Callable[..., jax.Array], x: jax.Array, scale: Any, weights: Sequence[Any]
) -> jax.Array:
  """op(x, scale, *weights), the weights gathered if they are in parts.

  Args:
    op: of rows, to rows.
    x: [B, T, D].
    scale: [D], of the norm.
    weights: one layer's, float32.
  """
  parts = _PARTS.value
  if parts is None:
    return op(x, scale, *weights)
  own = [jnp.asarray(w) for w in weights]
  if not parts.divide(own):
    return op(x, scale, *(cast_here(w, x.dtype) for w in own))

  def run(x: jax.Array, scale: jax.Array, *own: jax.Array) -> jax.Array:
    each = tuple(map(parts.each, own))
    both: Any = _with_gathered(x, each, parts.stored)
    x, whole = both
    return op(x, scale, *whole)

  in_parts = (PartitionSpec(parts.stored),) * len(own)
  return jax.shard_map(
    run,
    mesh=parts.mesh,
    in_specs=(parts.of_tokens, PartitionSpec(), *in_parts),
    out_specs=parts.of_tokens,
  )(x, scale, *own)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(own: jax.Array, axes: Any, dtype: Any, dim: int = 0) -> jax.Array:
  """All parts of a weight, cast, inside a `shard_map`.

  Its gradient is the sum of all devices' of the own part, in float32.

  Args:
    own: this device's part.
    axes: over which the weight is stored.
    dtype: of the result.
    dim: that is split.
  """
  return jax.lax.all_gather(cast_here(own, dtype), axes, axis=dim, tiled=True)


def _gathered_fwd(own: jax.Array, axes: Any, dtype: Any, dim: int) -> Any:
  return gathered(own, axes, dtype, dim), ()


def _gathered_bwd(axes: Any, dtype: Any, dim: int, _: Any, d: jax.Array) -> Any:
  del dtype
  return (_sum_of_own(d, axes, dim).astype(jnp.float32),)


gathered.defvjp(_gathered_fwd, _gathered_bwd)


def _sum_of_own(d: jax.Array, axes: Any, dim: int) -> jax.Array:
  return jax.lax.psum_scatter(d, axes, scatter_dimension=dim, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _with_gathered(
  x: jax.Array, own: tuple[jax.Array, ...], axes: Any
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """x, and `gathered` of weights in its dtype.

  Backwards, nothing goes on from x before the weights' gradients are summed.
  """
  return x, tuple(gathered(w, axes, x.dtype) for w in own)


def _with_gathered_fwd(x: jax.Array, own: Any, axes: Any) -> Any:
  return _with_gathered(x, own, axes), ()


def _with_gathered_bwd(axes: Any, _: Any, d: Any) -> Any:
  dx, dws = d
  sums = [_sum_of_own(dw, axes, dim=0) for dw in dws]
  dx, sums = jax.lax.optimization_barrier((dx, sums))
  return dx, tuple(dw.astype(jnp.float32) for dw in sums)


_with_gathered.defvjp(_with_gathered_fwd, _with_gathered_bwd)
