"""The scan over layers, in one part or several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._frame.check import as_switch, as_whole_number
from .._frame.room import room_of
from .turns import open_stores, turn
from .weight import LayerOf

Body = Callable[[Any, Any], tuple[Any, Any]]
Checkpoint = Callable[[Body], Body]


class ScanPart(NamedTuple):
  """Some layers of a scan that are run in their own way.

  Attributes:
    f: as for `scan_layers`.
    layers: how many.
    checkpoint: as for `scan_layers`.
  """

  f: Body
  layers: int
  checkpoint: Checkpoint | None = None


def scan_layers(
  f: Body | Sequence[ScanPart],
  init: Any,
  xs: Any,
  *,
  in_place: Collection[str],
  checkpoint: Checkpoint | None = None,
  reverse: bool = False,
  unroll: int | bool = 1,
) -> tuple[Any, Any]:
  """`jax.lax.scan(f, init, xs)` over layers, without copies of some weights.

  Args:
    f: maps the carry and one layer's part of xs to the carry and a result, as
      for `jax.lax.scan`.  For weights that stay in place it gets a `LayerOf`,
      which `feed_forward`, `geglu` and `expert_feed_forward` take as they take
      an array.  Or several `ScanPart`s, one after the other.
    init: the first carry.
    xs: a pytree of arrays [L, ...], the parameters of all layers.
    in_place: names of the weights that stay in their stacks: a leaf of xs does
      if one of them is a key or an attribute on its path.
    checkpoint: wraps f, as `jax.checkpoint` or a `functools.partial` of it
      does.  (Inside of f a `LayerOf` cannot pass it.)
    reverse: whether the last layer comes first.
    unroll: as for `jax.lax.scan`.

  Returns:
    The last carry, and the results of all layers, stacked.

  Raises:
    ValueError: if a name is on no leaf's path, lengths differ, or parts are not
      as many layers as there are.
  """
  reverse = as_switch("scan_layers", "reverse", reverse)
  leaves, tree = jax.tree_util.tree_flatten_with_path(xs)
  _check_names(in_place, [path for path, _ in leaves])
  length = _length([x for _, x in leaves])
  parts = _parts(f, length, checkpoint)
  if not length:  # nothing to copy, and no layer to open stores for
    return jax.lax.scan(
      parts[0].f, init, xs, length, reverse=reverse, unroll=unroll
    )
  stays = [_is_named(path, in_place) for path, _ in leaves]
  stacks = [w for (_, w), stay in zip(leaves, stays, strict=True) if stay]
  others = [x for (_, x), stay in zip(leaves, stays, strict=True) if not stay]
  scan = _Scan(stacks, others, stays, tree)
  options = dict(reverse=reverse, unroll=unroll)
  carry, ports, results = init, stacks, []
  starts = [sum(part.layers for part in parts[:i]) for i in range(len(parts))]
  pairs = list(zip(starts, parts, strict=True))
  for start, part in reversed(pairs) if reverse else pairs:
    carry, ports, ys = scan.run(part, start, carry, ports, **options)
    results.append(ys)
  results = results[::-1] if reverse else results
  ys = jax.tree.map(lambda *ys: jnp.concatenate(ys), *results)
  return turn((carry, ys), ports, [])


class _Scan(NamedTuple):
  """What the parts of a scan have in common."""

  stacks: list[Any]  # of the weights that stay in place
  others: list[Any]  # that are sliced
  stays: list[bool]  # of each leaf of xs, whether it stays
  tree: Any  # of xs

  def run(
    self, part: ScanPart, start: int, carry: Any, ports: Any, **options: Any
  ) -> tuple[Any, Any, Any]:
    """The carry and the ports after a part's layers, and their results."""
    asked: list[list[jax.ShapeDtypeStruct]] = []
    checkpoint = part.checkpoint

    def layer(state: Any, xs: Any, /) -> Any:
      (carry, ports, (*stores, others)), (index, own) = state, xs
      at = [index] * len(ports)
      weights = list(map(LayerOf, self.stacks, ports, at, stores))
      in_stack, apart = iter(weights), iter(own)
      x = [next(in_stack) if stay else next(apart) for stay in self.stays]
      x = jax.tree.unflatten(self.tree, x)
      with (
        room_of(index, others)
        if checkpoint is None
        else contextlib.nullcontext() as room
      ):
        carry, y = part.f(carry, x)
      asked[:] = [w.asked for w in weights] + [room.asked if room else []]
      closed = [w.closed() for w in weights]
      stores = [c[1] for c in closed] + [room.stores if room else []]
      return (carry, [c[0] for c in closed], stores), y

    stop = start + part.layers
    xs = (
      jnp.arange(start, stop, dtype=jnp.int32),
      [x[start:stop] for x in self.others],
    )
    stores: list[Any] = [[] for _ in self.stacks] + [[]]
    if checkpoint is None:
      jax.eval_shape(
        lambda state, xs: layer(state, jax.tree.map(lambda x: x[0], xs)),
        (carry, ports, stores),
        xs,
      )
      # By a layer's index, so those of the parts before have room too.
      carry, stores = open_stores(carry, stop, asked)
    else:
      layer = checkpoint(layer)
    (carry, ports, stores), ys = jax.lax.scan(
      layer, (carry, ports, stores), xs, **options
    )
    carry, ys = turn((carry, ys), [], stores)
    return carry, ports, ys


def _is_named(path: Any, names: Collection[str]) -> bool:
  keys = [getattr(k, "key", getattr(k, "name", None)) for k in path]
  return any(key in names for key in keys)


def _check_names(in_place: Any, paths: Any) -> None:
  if isinstance(in_place, str) or not isinstance(in_place, Collection):
    raise ValueError(
      f"scan_layers: in_place must be a collection of names, got {in_place!r}"
    )
  for name in in_place:
    if not any(_is_named(path, (name,)) for path in paths):
      raise ValueError(
        f"scan_layers: in_place must name leaves of xs, got {name!r}, which is "
        f"on no path"
      )


def _parts(
  f: Any, length: int, checkpoint: Checkpoint | None
) -> Sequence[ScanPart]:
  """What the layers are run by, as many as there are."""
  if checkpoint is not None and not callable(checkpoint):
    raise ValueError(
      f"scan_layers: checkpoint must wrap f, as jax.checkpoint does, got "
      f"{checkpoint!r}"
    )
  if callable(f):
    body: Any = f
    return [ScanPart(body, length, checkpoint)]
  if not isinstance(f, Sequence) or not all(
    isinstance(part, ScanPart) for part in f
  ):
    raise ValueError(
      f"scan_layers: f must be a function or a sequence of ScanPart, got {f!r}"
    )
  counts = [as_whole_number("scan_layers", "layers", p.layers) for p in f]
  all_some = all(count > 0 for count in counts)
  if not counts or sum(counts) != length or not all_some:
    raise ValueError(
      f"scan_layers: the parts must be {length} layers, as xs has, got {counts}"
    )
  if checkpoint is not None and f[0].checkpoint is not checkpoint:
    raise ValueError(
      "scan_layers: each part has its own checkpoint, got another beside them"
    )
  return f


def _length(arrays: Any) -> int:
  lengths = {x.shape[0] for x in arrays if jnp.ndim(x)}
  if len(lengths) != 1 or not all(map(jnp.ndim, arrays)):
    raise ValueError(
      f"scan_layers: the leaves of xs must be [L, ...] of one L, got "
      f"{[jnp.shape(x) for x in arrays]}"
    )
  return lengths.pop()
