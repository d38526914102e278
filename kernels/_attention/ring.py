"""Page 16: attention over devices that share a sequence.

Ring attention (Liu et al., arXiv 2310.01889): each device has its part of the
queries, keys and values.  The keys and values go round, from each device to the
next; every device attends to those that it has, and merges what it finds by
lse.  In the backward pass dk and dv travel with the keys that they are of.
While a device computes, the next keys are on their way:

    step            0      1      2      3
    device 0   k    0      3      2      1
    device 1   k    1      0      3      2
    device 2   k    2      1      0      3

What a device's rows see of the keys that came s devices far depends on where
it is, but not what it takes: a causal mask leaves, with the tokens in the order
of `ring_order`, half of the pairs of every step.  From the device before, all
rows see the first chunk of the keys; from the one after, the second chunk of
the rows sees all of them.  No pair is computed that nobody sees, and after step
0 no mask is needed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._frame.kernel import Saved, kernel_op
from .._frame.sharding import Axes, Split
from . import ring_parts, spans
from .reference import attention, may_see_nothing
from .spec import Arrays, Dropout, Outs, Problem, Segments, has_window


@dataclasses.dataclass(frozen=True)
class RingProblem(Problem):
  """A problem of which each device has a part of the queries and of the keys.

  Attributes:
    axes: of the mesh, that split them.
    devices: how many there are along these.
  """

  axes: Axes = ()
  devices: int = 1


class Keys(NamedTuple):
  """What goes round."""

  k: Any  # [B, S, K, H]
  v: Any  # [B, S, K, H]
  ids: Any  # [B, S]; or None
  words: Any  # [B, S] of dropout; or None


# --- who meets whom -----------------------------------------------------------


class Meeting(NamedTuple):
  """Rows and keys that meet.

  Attributes:
    problem: of this part of the whole.
    rows: the part of a device's rows, a slice.
    keys: the part of the keys that it has, a slice.
    window: [B, 2], counted from the first row and the first key; or None.
    apart: by how much the first row is after the first key, if that matters.
  """

  problem: Problem
  rows: slice
  keys: slice
  window: Any = None
  apart: Any = None

  def arrays(self, a: Arrays, keys: Keys) -> Arrays:
    """Its part of them."""
    segments = None
    if a.segments is not None:
      segments = Segments(a.segments.q[:, self.rows], keys.ids[:, self.keys])
    words, first = None, None
    if a.dropout is not None:
      words = Dropout(a.dropout.rows[:, self.rows], keys.words[:, self.keys])
    if a.alibi is not None:
      first = jnp.broadcast_to(self.apart, a.q.shape[:1])
    return a._replace(
      q=a.q[:, self.rows],
      k=keys.k[:, self.keys],
      v=keys.v[:, self.keys],
      segments=segments,
      window=self.window,
      dropout=words,
      first_position=first,
    )


Meet = Callable[[Meeting, Any], Any]
"""Adds to a state what a meeting gives."""


def _walk(p: RingProblem, a: Arrays, step: Any, meet: Meet, state: Any) -> Any:
  """The state after all meetings with the keys that came `step` devices far.

  Args:
    p: the problem.
    a: the device's arrays.
    step: 0, of its own keys; or a scalar.
    meet: what is done at each.
    state: before.
  """
  of_part = _of_part(p)
  everything = Meeting(of_part, slice(None), slice(None))
  if _goes_by_chunks(p, a):
    return _walk_chunks(p, a, step, meet, state)
  if not p.is_causal:
    return meet(everything, state)
  if isinstance(step, int):
    causal = dataclasses.replace(of_part, is_causal=True)
    return meet(everything._replace(problem=causal), state)
  came_from_before = jax.lax.axis_index(p.axes) >= step
  if p.context_parts == 1:
    full = functools.partial(meet, everything)
    return jax.lax.cond(came_from_before, full, lambda state: state, state)
  half = a.q.shape[1] // 2
  first = everything._replace(keys=slice(0, half))
  second = everything._replace(rows=slice(half, 2 * half))
  before, after = (functools.partial(meet, x) for x in (first, second))
  return jax.lax.cond(came_from_before, before, after, state)


def _of_part(p: RingProblem) -> Problem:
  """The problem of rows and keys all of which meet."""
  names = [field.name for field in dataclasses.fields(Problem)]
  whole = Problem(**{name: getattr(p, name) for name in names})
  return dataclasses.replace(
    whole,
    is_causal=False,
    window=None,
    context_parts=1,
    is_partial=True,
    gives_mean=False,
  )


def _goes_by_chunks(p: Problem, a: Arrays) -> bool:
  """Whether it matters how far rows and keys are apart."""
  return has_window(p, a) or a.alibi is not None


def _walk_chunks(
  p: RingProblem, a: Arrays, step: Any, meet: Meet, state: Any
) -> Any:
  """The same with a local window or ALiBi, chunk by chunk.

  Between rows and keys that lie `apart` tokens from each other a window is one
  of other sides, and so is a causal mask.
  """
  here = jax.lax.axis_index(p.axes)
  there = (here - step) % p.devices
  zigzag = p.context_parts > 1
  size = a.q.shape[1] // (2 if zigzag else 1)
  if a.window is None:
    everything = (a.q.shape[1] * p.devices,) * 2
    sides = jnp.array(p.window or everything, jnp.int32)
    window = jnp.broadcast_to(sides, (a.q.shape[0], 2))
  else:
    window = a.window
  left, right = window[:, 0], window[:, 1]
  if p.is_causal:
    right = jnp.minimum(right, 0)

  def chunks(device: Any) -> list[Any]:
    last = 2 * p.devices - 1
    return [device, last - device] if zigzag else [device]

  def part(n: int) -> slice:
    return slice(n * size, (n + 1) * size)

  for row, q_chunk in enumerate(chunks(here)):
    for key, k_chunk in enumerate(chunks(there)):
      apart = (q_chunk - k_chunk) * size
      sides = jnp.stack([left - apart, right + apart], axis=1)
      meeting = Meeting(_of_part(p), part(row), part(key), sides, apart)
      sees = (sides > -size).all(axis=1).any()
      some = functools.partial(meet, meeting)
      state = jax.lax.cond(sees, some, lambda state: state, state)
  return state


# --- around the ring ----------------------------------------------------------


def _on(p: RingProblem, tree: Any) -> Any:
  """What the device before sends, for what this one sends to the next."""
  ring = [(i, (i + 1) % p.devices) for i in range(p.devices)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, p.axes, ring), tree)


def _own_keys(a: Arrays) -> Keys:
  return Keys(
    *(a.k, a.v),
    ids=None if a.segments is None else a.segments.k,
    words=None if a.dropout is None else a.dropout.keys,
  )


def _forward(attend: Any, p: RingProblem, a: Arrays) -> Outs:
  """out, and lse [B, N, T] in units of `Problem.unit`.

  Args:
    attend: a forward pass of a part; see `ring_parts`.
    p: the problem.
    a: the device's part of the arrays.
  """

  def visit(step: Any, keys: Keys, outs: Outs) -> Outs:
    def meet(meeting: Meeting, old: Any) -> Outs:
      part, rows = meeting.arrays(a, keys), meeting.rows
      new = attend(meeting.problem, part)
      if old is None:
        return ring_parts.wide(new)
      both = spans.joined(p, Outs(old.out[:, rows], old.lse[:, :, rows]), new)
      out = old.out.at[:, rows].set(both.out)
      return Outs(out, old.lse.at[:, :, rows].set(both.lse))

    return _walk(p, a, step, meet, outs)

  def one(step: Any, state: tuple[Keys, Outs]) -> tuple[Keys, Outs]:
    keys, outs = state
    coming = _on(p, keys)
    return coming, visit(step, keys, outs)

  start: Any = ring_parts.nothing(a) if _goes_by_chunks(p, a) else None
  state = one(0, (_own_keys(a), start))
  keys, outs = jax.lax.fori_loop(1, p.devices - 1, one, state)
  if p.devices > 1:
    outs = visit(jnp.int32(p.devices - 1), keys, outs)
  return outs._replace(out=outs.out.astype(a.q.dtype))


class _Sums(NamedTuple):
  """Gradients so far, in float32; those of keys are of the keys at hand."""

  q: Any
  k: Any
  v: Any
  scale: Any


def _backward(attend: Any, p: RingProblem, saved: Saved, d: Outs) -> Arrays:
  """dq, dk and dv.

  Args:
    attend: a backward pass of a part; see `ring_parts`.
    p: the problem.
    saved: the device's part of the arrays, and of the results.
    d: the cotangents of these.
  """
  a, outs = saved.arrays, saved.outs

  def visit(step: Any, keys: Keys, sums: _Sums) -> _Sums:
    def meet(meeting: Meeting, old: Any) -> _Sums:
      rows, keys_of = meeting.rows, meeting.keys
      of_rows = [Outs(x.out[:, rows], x.lse[:, :, rows]) for x in (outs, d)]
      new = attend(meeting.problem, meeting.arrays(a, keys), *of_rows)
      if old is None:
        return _Sums(*ring_parts.wide((new.q, new.k, new.v, new.scale)))
      return _Sums(
        old.q.at[:, rows].add(new.q),
        old.k.at[:, keys_of].add(new.k),
        old.v.at[:, keys_of].add(new.v),
        None if old.scale is None else old.scale + new.scale,
      )

    return _walk(p, a, step, meet, sums)

  def one(step: Any, state: tuple[Keys, _Sums]) -> tuple[Keys, _Sums]:
    keys, sums = state
    # What was found of these keys before is not waited for.
    coming = _on(p, keys)
    found = _on(p, (sums.k, sums.v))
    nothing = sums._replace(**_zeros(k=sums.k, v=sums.v))
    new = visit(step, keys, nothing)
    k, v = (x + y for x, y in zip(found, (new.k, new.v), strict=True))
    return coming, new._replace(k=k, v=v)

  start: Any = None
  if _goes_by_chunks(p, a):
    arrays = a.q, a.k, a.v, a.scale
    start = _Sums(*jax.tree.map(ring_parts.wide_zeros, arrays))
  keys = _own_keys(a)
  coming = _on(p, keys)
  state = coming, visit(0, keys, start)
  _, sums = jax.lax.fori_loop(1, p.devices, one, state)
  home = _on(p, (sums.k, sums.v))
  dq, dk, dv = (
    x.astype(y.dtype)
    for x, y in zip((sums.q, *home), (a.q, a.k, a.v), strict=True)
  )
  return Arrays(dq, dk, dv, scale=sums.scale)


def _zeros(**arrays: jax.Array) -> dict[str, jax.Array]:
  return {name: jnp.zeros_like(x) for name, x in arrays.items()}


# --- the op -------------------------------------------------------------------


def _not_split(p: RingProblem, a: Arrays) -> Split:
  raise AssertionError("a ring is one device's part of what was split")


_ring = kernel_op(
  "flash_attention",
  reference=attention,
  forward=functools.partial(_forward, ring_parts.forward_kernel),
  backward=functools.partial(_backward, ring_parts.backward_kernel),
  saves=(*Arrays._fields, *Outs._fields),
  names=("out", "lse"),
  vmap=("batch", "batch"),
  split=_not_split,
  plain_forward=functools.partial(_forward, ring_parts.forward_plain),
  plain_backward=functools.partial(_backward, ring_parts.backward_plain),
)


def check(p: Problem, a: Arrays, axes: Axes) -> None:
  """Refuses what no ring goes with: it would be of rows and keys of all."""
  given = {"mask": a.mask, "bias": a.bias}
  names = [name for name, x in given.items() if x is not None]
  if names or p.query_offset:
    raise ValueError(
      f"flash_attention: with T split over {axes}, {' and '.join(given)} must "
      f"be None and query_offset 0, got {names} and {p.query_offset}"
    )


def attend(p: Problem, a: Arrays, axes: Axes) -> Outs:
  """One device's part of attention over a mesh whose `axes` split T and S.

  Args:
    p: the problem of all devices, with a positive scale.
    a: the device's part of the arrays, rotated.
    axes: of the mesh.

  Raises:
    ValueError: if queries and keys are not the same tokens but the mask goes by
      position, or the tokens are in an order for other devices.
  """
  devices = jax.lax.axis_size(axes)
  if p.gives_mean and may_see_nothing(p, a):
    raise ValueError(
      f"dot_product_attention: with T split over {axes}, there is no mean of "
      "all values for a query that sees no key; use flash_attention"
    )
  by_position = p.is_causal or _goes_by_chunks(p, a)
  if by_position and a.q.shape[1] != a.k.shape[1]:
    raise ValueError(
      f"flash_attention: with T split over {axes}, is_causal, alibi_slopes and "
      f"local_window_size need T = S, got {a.q.shape[1] * devices} and "
      f"{a.k.shape[1] * devices}"
    )
  if p.context_parts not in (1, devices):
    raise ValueError(
      f"flash_attention: context_parts must be 1 or the {devices} devices "
      f"along {axes} that split T, got {p.context_parts}"
    )
  values = {f.name: getattr(p, f.name) for f in dataclasses.fields(p)}
  return _ring.on_device(RingProblem(**values, axes=axes, devices=devices), a)
