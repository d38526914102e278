"""The kernels' calls, meshes, the public function, and what is registered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._frame import switches
from .._frame.check import Implementation
from .._frame.kernel import kernel_op
from .._frame.op import Case, Cost, Integers, Op, nbytes
from .._frame.sharding import Axes, Split
from .._gated.activation import Activation, ClampedSwiGLU, as_activation
from .._gated.backward import backward
from .._gated.config import FeedForwardConfig
from .._gated.door import Given
from .._gated.forward import forward as gated_forward
from .._gated.layout import Layout
from .._gated.spec import Arrays, Kept, Outs, Problem, of_layer
from .._gated.stack import (
  PORTS,
  apart,
  kept_in_room,
  whose_gradients_leave_by_ports,
)
from .._gated.tiles import where_present
from .._layers import LayerOf
from .door import arranged, run
from .spec import (
  ExpertBiases,
  bias_of_rows,
  expert_of_row,
  plain_backward,
  plain_forward,
  reference,
)

# --- the op -------------------------------------------------------------------


def _as_it_is(x: jax.Array) -> jax.Array:
  return x


def _forward(p: Problem, a: Arrays, *, keep: bool) -> tuple[Outs, Kept | None]:
  """h of geglu's kernel, and y by the same one without gate or activation."""
  up = a._replace(w_down=None, b_down=None)
  h, kept = gated_forward(p, up, keep=keep)
  down = Arrays(
    x=h.y,
    w_gate=a.w_down,
    w_up=None,
    w_down=None,
    scale=None,
    b_gate=a.b_down,
    layer=a.layer,
    group_sizes=a.group_sizes,
  )
  own = FeedForwardConfig(residuals="none")
  product = Problem(
    _as_it_is, None, False, p.implementation, own, Layout("ungated")
  )
  y = gated_forward(product, down, keep=False, suffix="_down")[0].y
  return h._replace(y=y), kept


def _split(p: Problem, a: Arrays) -> Split:
  """Rows and F may be split; D, and the experts, where weights are stored so.

  Each device of a split F has the part of y that its own columns give.
  """
  # Weights of all layers' stack come here only where nothing is split.
  stack = "E" if a.layer is None else "LE"
  gate, up, down = (
    None if w is None else stack + w for w in p.layout.letters()
  )
  letters = Arrays(
    x="BD",
    w_gate=gate,
    w_up=up,
    w_down=down,
    scale=None,
    b_gate="EF",
    b_up="EF",
    b_down="Ed",
    layer="",
    group_sizes="-",
    port_gate=gate,
    port_up=up,
    port_down=down,
    store_gate="L-F",
    store_up="L-F",
  )
  letters = where_present(a, letters)
  outs = Outs("BD", *letters[-6:])
  return Split(letters, outs, over="BF", gathers="DdE")


def _on_device(
  op: Any, p: Problem, a: Arrays, axes: Mapping[str, Axes]
) -> Outs:
  """The op on a device's own rows, and with its own columns of F."""
  if axes.get("B"):
    rows = a.x.shape[0]
    start = jax.lax.axis_index(axes["B"]) * rows
    ends = jnp.cumsum(a.group_sizes)
    own = [jnp.clip(n - start, 0, rows) for n in (ends - a.group_sizes, ends)]
    a = a._replace(group_sizes=own[1] - own[0])
  if not axes.get("F"):
    return op(p, a)
  part = op(p, a._replace(b_down=None)).y
  y = jax.lax.psum(part, axes["F"])
  if a.b_down is not None:
    expert = expert_of_row(a.group_sizes, y.shape[0])
    y += bias_of_rows(a.b_down, expert, y.dtype)
  return Outs(y)


_expert_feed_forward = kernel_op(
  "expert_feed_forward",
  reference=reference,
  forward=_forward,
  backward=backward,
  saves=(
    *("x", "w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down"),
    *("layer", "group_sizes"),
  ),
  names=("gate", "up", "y"),
  keeps=True,
  split=_split,
  # Which tiles there are depends on values.
  vmap=("loop", "loop"),
  around=_on_device,
  plain_forward=plain_forward,
  plain_backward=plain_backward,
  constants=whose_gradients_leave_by_ports,
  passes=PORTS,
  apart=apart,
  stores=kept_in_room,
)

# --- public -------------------------------------------------------------------


@switches.plain
def expert_feed_forward(
  x: jax.Array,
  w_gate: jax.Array | LayerOf | None,
  w_up: jax.Array | LayerOf | None,
  w_down: jax.Array | LayerOf,
  group_sizes: jax.Array,
  *,
  biases: ExpertBiases | None = None,
  layer: jax.Array | int | None = None,
  activation: Activation = "silu",
  implementation: Implementation = None,
  config: FeedForwardConfig | None = None,
) -> jax.Array:
  """Each row through the feed-forward of its expert; rows sorted by expert.

  Which expert a row goes to, with which weight its result comes back, and the
  sorting are the caller's.

  Args:
    x: [T, D] float32, bfloat16 or float16, the dtype of the products: first the
      rows of expert 0, then those of expert 1, and so on.
    w_gate: [E, D, F] float32 or bfloat16, computed with in x's dtype.  With
      w_up None it has both branches, [E, D, 2F], gate first.  None for experts
      without a gate.
    w_up: [E, D, F].
    w_down: [E, F, D].
    group_sizes: [E] integers, not negative, how many rows are each expert's.
      Rows past their sum are no expert's, and give 0.  (What a sum above T
      gives is not defined.)
    biases: added in float32; None for none.
    layer: None, or an integer, traced or not: then the weights are [L, E, D, F]
      or [L, E, D, 2F], and [L, E, F, D], stacked over the layers of a model,
      and this is the layer to use; biases are [L, E, F] and [L, E, D].  The
      kernel reads it where it lies, as in `feed_forward`; of [L, E, D, 2F] it
      is copied where F is no multiple of 128.
      The gradient is that of the stack.  In a scan use `scan_layers`, whose
      `LayerOf` takes the place of a weight and of `layer`: there the gradient
      is written once.  Over a mesh that splits them, the layer is taken first.
    activation: as in `feed_forward`: a name, an elementwise function, or
      gpt-oss's `ClampedSwiGLU`.
    implementation: "pallas", "xla" (the reference, ragged products), or None
      for the kernel where the computation is lowered for TPU and the reference
      elsewhere.
    config: what is kept for the backward pass, and tile sizes; None keeps gate
      and up, under the names "expert_feed_forward_gate" and
      "expert_feed_forward_up" for remat policies.  Of the tiles for the forward
      pass, `forward` are those of gate and up.

  Returns:
    [T, D] of x's dtype; sums and activation in float32.

  Raises:
    ValueError: on a wrong shape or dtype, or an unknown activation; on "pallas"
      where `jax.export` leaves T open.
  """
  config = FeedForwardConfig() if config is None else config
  problem = Problem(activation, None, False, implementation, config)
  given = Given(w_gate, w_up, w_down, layer)
  return run(_expert_feed_forward, problem, x, given, group_sizes, biases)


@switches.plain
def expert_feed_forward_reference(
  x: jax.Array,
  w_gate: jax.Array | LayerOf | None,
  w_up: jax.Array | LayerOf | None,
  w_down: jax.Array | LayerOf,
  group_sizes: jax.Array,
  *,
  biases: ExpertBiases | None = None,
  layer: jax.Array | int | None = None,
  activation: Activation = "silu",
) -> jax.Array:
  """Each row through the feed-forward of its expert.  The specification."""
  activation = as_activation("expert_feed_forward", activation)
  problem = Problem(activation, None, False, "xla", FeedForwardConfig())
  given = (w_gate, w_up, w_down), biases or ExpertBiases()
  weights, own = jax.tree.map(lambda w: of_layer(w, layer), given)
  return reference(*arranged(x, weights, group_sizes, own, problem)).y


# --- registration -------------------------------------------------------------


def _cost(x, w_gate, w_up, w_down, group_sizes, **_) -> tuple[Cost, Cost]:
  """Of a case in which every row is some expert's."""
  products = (w_gate is not None) + (w_up is not None) + 1
  one = 2 * x.size * w_down.shape[1]
  weights = [w for w in (w_gate, w_up, w_down) if w is not None]
  moved = nbytes(x, x, *weights, group_sizes)
  return Cost(products * one, moved), Cost(2 * products * one, 2 * moved)


def _case(
  name: str,
  x: tuple[tuple[int, int], Any],
  experts: int,
  f: int,
  *,
  share: float = 1.0,
  gated: bool = True,
  **kwargs: Any,
) -> Case:
  """A problem of x's shape and dtype, of whose rows a share is for experts."""
  (rows, d), dtype = x

  def draw(rng: np.random.Generator) -> Any:
    return rng.multinomial(int(share * rows), np.full(experts, 1 / experts))

  def weight(*shape: int) -> Any:
    return jax.ShapeDtypeStruct((experts, *shape), dtype)

  gate = weight(d, f) if gated else None
  sizes = Integers((experts,), draw)
  args = jax.ShapeDtypeStruct(*x), gate, weight(d, f), weight(f, d), sizes
  return Case(name, args, kwargs)


def _some(*shape: int) -> Any:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


_F32, _BF16 = jnp.float32, jnp.bfloat16
EXPERT_FEED_FORWARD = Op(
  name="expert_feed_forward",
  function=expert_feed_forward,
  reference=expert_feed_forward_reference,
  cost=_cost,
  tests=(
    _case("even", ((128, 128), _F32), 2, 128),
    _case("ragged", ((75, 100), _F32), 4, 200, share=0.9),
    _case("bf16", ((64, 128), _BF16), 3, 256),
    _case("ungated", ((40, 64), _F32), 3, 128, gated=False, activation="relu2"),
    _case(
      "gpt_oss",
      ((40, 64), _F32),
      2,
      128,
      activation=ClampedSwiGLU(limit=1.0),
      biases=ExpertBiases(_some(2, 128), _some(2, 128), _some(2, 64)),
    ),
  ),
  benches=(
    # Two experts of each of 4096 tokens.
    _case("mixtral_8x7b_4k", ((8192, 4096), _BF16), 8, 14336),
    # Eight of 128, of each of 2048 tokens.
    _case("qwen3_30b_2k", ((16384, 2048), _BF16), 128, 768),
  ),
  modes={
    "residuals-none": lambda *_, **__: FeedForwardConfig(residuals="none")
  },
  baselines=("experts",),
)
