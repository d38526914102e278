"""Page 5: more keys than VMEM holds.

A call holds all its keys in VMEM.  More than fit are taken in spans, each with
the queries that see it: the forward merges the spans' results by their lse, the
backward adds up dq.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from .spec import Arrays, Dropout, Outs, Problem, Segments
from .tiles import Call

Run = Callable[..., Any]
"""A pass of one call: of the call, its part of the arrays, of the forward's
results and of their cotangents, and the dtype of out or dq."""


def of_call(whole: Call, keys: int) -> list[Call]:
  """The calls that make up one, `keys` keys at a time."""
  p, calls = whole.problem, []
  for first_k in range(0, whole.s, keys):
    end_k = min(first_k + keys, whole.s)
    first_q, end_q = 0, whole.t
    low, high = first_k - p.query_offset, end_k - p.query_offset
    if p.is_causal:
      first_q = max(low, 0)
    if p.window is not None:
      left, right = p.window
      first_q, end_q = max(first_q, low - right), min(end_q, high + left)
    if first_q < end_q:
      calls.append(
        dataclasses.replace(
          whole,
          first_q=first_q,
          t=end_q - first_q,
          first_k=first_k,
          s=end_k - first_k,
        )
      )
  return calls


def part_of(arrays: Arrays, call: Call) -> Arrays:
  """A call's part of the arrays."""
  assert arrays.positions is None, "only one call rotates its own inputs"
  segments = arrays.segments
  if segments is not None:
    segments = Segments(segments.q[:, call.queries], segments.k[:, call.keys])
  words = arrays.dropout
  if words is not None:
    words = Dropout(words.rows[:, call.queries], words.keys[:, call.keys])
  bias = arrays.bias
  if bias is not None:
    bias = bias[:, :, call.queries, call.keys]
  return arrays._replace(
    q=arrays.q[:, call.queries],
    k=arrays.k[:, call.keys],
    v=arrays.v[:, call.keys],
    segments=segments,
    dropout=words,
    bias=bias,
  )


def part_of_outs(outs: Outs, call: Call) -> Outs:
  """The same of out [B, T, N, H] and lse [B, N, T]; this, by row."""
  lse = call.layout.of_lse(outs.lse[:, :, call.queries])
  return Outs(outs.out[:, call.queries], lse)


# --- forward ---


def merged(run: Run, calls: Sequence[Call], arrays: Arrays) -> Outs:
  """Span by span; the sums are float32, and lse is [B, N, T]."""
  q = arrays.q
  b, t, n, _ = q.shape
  out = jnp.zeros(q.shape, jnp.float32)
  lse = jnp.full((b, n, t), -jnp.inf)
  for call in calls:
    part = part_of(arrays, call)
    new = run(call, part, jnp.float32)
    new = new._replace(lse=call.layout.to_lse(new.lse, part.q.shape))
    old = Outs(out[:, call.queries], lse[:, :, call.queries])
    both = joined(call.problem, old, new)
    out = out.at[:, call.queries].set(both.out)
    lse = lse.at[:, :, call.queries].set(both.lse)
  return Outs(out.astype(q.dtype), lse)


def joined(p: Problem, old: Outs, new: Outs) -> Outs:
  """Attention over two sets of keys, from that over each; lse is [B, N, T]."""
  top = jnp.maximum(old.lse, new.lse)
  top = jnp.where(top > -jnp.inf, top, 0.0)
  a, b = (jnp.exp2((o.lse - top) * p.to_base_2) for o in (old, new))
  total = a + b
  scale = 1 / jnp.where(total > 0, total, 1.0)  # else a and b are 0, or NaN
  a, b = (jnp.swapaxes(x * scale, 1, 2)[..., None] for x in (a, b))
  lse = top + jnp.log2(total) / p.to_base_2
  return Outs(old.out * a + new.out * b, lse)


# --- backward ---


def added(
  run: Run, calls: Sequence[Call], a: Arrays, outs: Outs, d: Outs
) -> Arrays:
  """As `_run`, span by span, lse [B, N, T]; dq is added up in float32."""
  dq = jnp.zeros(a.q.shape, jnp.float32)
  of_keys = calls[0].problem.gradient_type(a.k.dtype)
  dk, dv = (jnp.zeros(x.shape, of_keys) for x in (a.k, a.v))
  d_bias = None
  for call in calls:
    of_call = [part_of_outs(x, call) for x in (outs, d)]
    new = run(call, part_of(a, call), *of_call, jnp.float32)
    dq = dq.at[:, call.queries].add(new.q)
    dk = dk.at[:, call.keys].set(new.k)
    dv = dv.at[:, call.keys].set(new.v)
    if new.bias is not None:
      d_bias = jnp.zeros_like(a.bias) if d_bias is None else d_bias
      d_bias = d_bias.at[:, :, call.queries, call.keys].set(new.bias)
  return Arrays(dq, dk, dv, bias=d_bias)
