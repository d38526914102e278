"""What attention keeps in a scan over layers, and how it lies there.

The backward kernel finds q, k, v and out in stacks of all layers, of which it
reads a layer's blocks.  XLA writes them there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._frame.room import Form, Places, block_of_layer
from . import memory, rotation, spans, tiles
from .spec import Arrays, Problem


def stored(p: Problem, a: Arrays) -> Mapping[str, Form]:
  """The form of each as the kernels take it; none if there are to be no stores.

  Only where each pass is one call, of keys without padding and as they are
  saved.
  """
  rotated_before = a.positions is not None and not rotation.is_inside(p, a)
  if a.scale is not None or rotated_before:
    return {}
  x = memory.Sizes.of_problem(p, a)
  forward, backward = tiles.forward_call(p, x), tiles.backward_call(p, x)
  passes = (
    (forward, tiles.forward_keys(forward, x)),
    (backward, tiles.backward_keys(backward, x)),
  )
  for call, held in passes:
    # Pairs of heads are copied by the kernel itself, of arrays alone.
    is_whole = spans.of_call(call, held) == [call]
    if not is_whole or call.s % call.key_unit or call.layout.kind == "pairs":
      return {}
  layout, of_q, of_k = forward.layout, a.q.shape, a.k.shape
  queries = Form(layout.of_queries, lambda x: layout.to_queries(x, of_q))
  of_kv = Form(layout.of_keys, lambda x: layout.to_keys(x, of_k))
  return {"q": queries, "k": of_kv, "v": of_kv, "out": queries}


def read(places: Places | None, inputs: Any, specs: Any) -> tuple[Any, ...]:
  """Operands and block specs, of stacks where there are any, and the layer."""
  if places is None:
    return inputs, specs, None
  of_stacks = {f: block_of_layer(getattr(specs, f)) for f in places.stacks}
  operands = inputs._replace(**places.stacks)
  return operands, specs._replace(**of_stacks), places.layer
