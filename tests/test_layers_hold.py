"""`scan_layers` holds wherever `jax.lax.scan` does.

Each row of the table is a way of use, tried on every op that can read a layer's
weights in their stack, against the same body in a `jax.lax.scan` with the
reference.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_experts_layers
import test_layers
import test_layers_attention
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pallas_gemma import kernels
from test_layers import assert_agree

pytestmark = [pytest.mark.no_interpreter, pytest.mark.unoptimised]
LAYERS, SIZES = 3, jnp.asarray([3, 5, 0, 6])


def feed_forward(x, w, **kwargs):
  weights = w["gate"], w["up"], w["down"]
  norm = kernels.Norm(w["scale"])
  return kernels.feed_forward(x, *weights, b_up=w["b"], norm=norm, **kwargs)


def geglu(x, w, **kwargs):
  h = kernels.geglu(x, w["gate"], w["up"], b_gate=w["b"], **kwargs)
  return kernels.layer_einsum("TF,FD->TD", h, w["down"])


def experts(x, w, **kwargs):
  weights = w["gate"], w["up"], w["down"]
  biases = kernels.ExpertBiases(up=w["b"])
  return kernels.expert_feed_forward(
    x, *weights, SIZES, biases=biases, **kwargs
  )


def attention(x, w, **kwargs):
  return test_layers_attention.block(x, w, **kwargs)[0] - x


def drawn(op):
  """x, and the weights of all layers."""
  if op is attention:
    sizes = dict(layers=LAYERS, b=4, t=8, d=8, n=2, k=2, h=8)
    return test_layers_attention.arrays(**sizes)
  sizes = dict(layers=LAYERS, rows=16, d=8, f=16)
  module = test_experts_layers if op is experts else test_layers
  x, weights = module.arrays(**sizes)
  own = {name: weights[name] for name in ("gate", "up", "down")}
  if op is experts:
    return x, own | {"b": weights["b_up"]}
  scale = {"scale": weights["scale"]} if op is feed_forward else {}
  return x, own | scale | {"b": weights["up"][:, 0]}


def in_place(op, **kwargs):
  names = {"q", "kv", "out"} if op is attention else {"gate", "up", "down"}
  return functools.partial(kernels.scan_layers, in_place=names, **kwargs)


def loss_of(op, scan, implementation=None, body=None, read=lambda y: y):
  """Of x and the weights."""

  def layer(x, w):
    return x + op(x, w, implementation=implementation), jnp.mean(x)

  def loss(x, w):
    return jnp.sum(jnp.sin(read(scan(body or layer, x, w))[0]) ** 2)

  return loss


def same(op, use, args=None, tolerance=1e-5, **options):
  """`use` of the loss, of either scan; options are of `scan_layers`."""
  args = drawn(op) if args is None else args
  plain = {k: v for k, v in options.items() if k != "checkpoint"}
  scan = functools.partial(jax.lax.scan, **plain)
  want = jax.jit(use(loss_of(op, scan, "xla")))(*args)
  got = jax.jit(use(loss_of(op, in_place(op, **options))))(*args)
  assert_agree(got, want, tolerance)


def gradient(loss):
  return jax.value_and_grad(loss, (0, 1))


def two(tree):
  return jax.tree.map(lambda a: jnp.stack([a, a / 2]), tree)


# --- the rows -----------------------------------------------------------------


def with_options(op):
  same(op, gradient, reverse=True, unroll=2)


def with_a_policy(op):
  policy = jax.checkpoint_policies.dots_saveable
  same(
    op, gradient, checkpoint=functools.partial(jax.checkpoint, policy=policy)
  )


def of_one_layer(op):
  x, weights = drawn(op)
  same(op, gradient, (x, jax.tree.map(lambda w: w[:1], weights)))


def whatever_the_loss_reads(op):
  """Results alone, or a part of the carry that is not its first."""
  args = drawn(op)

  def body(implementation, carry, w):
    idle, x = carry
    return (idle, x + op(x, w, implementation=implementation)), jnp.sin(x)

  def loss(scan, implementation, part):
    def of(x, w):
      layer = functools.partial(body, implementation)
      (_, y), ys = scan(layer, (jnp.float32(0), x), w)
      return jnp.sum(jnp.sin(y if part == "carry" else ys))

    return jax.jit(gradient(of))

  for part in ("carry", "results"):
    got = loss(in_place(op), None, part)(*args)
    assert_agree(got, loss(jax.lax.scan, "xla", part)(*args))


def forward_mode(op):
  same(op, lambda loss: lambda *a: jax.linearize(loss, *a)[1](*a))


def second_derivatives(op):
  def reverse(loss):
    def squares(x, w):
      return sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient(loss)(x, w)))

    return jax.grad(squares, (0, 1))

  same(op, reverse, tolerance=1e-4)
  same(op, lambda loss: lambda *a: jax.jvp(gradient(loss), a, a), None, 1e-4)


def gradient_of_vmap(op):
  x, w = drawn(op)

  def outside(*axes):
    def use(loss):
      for a in axes:
        loss = jax.vmap(loss, a)
      return gradient(lambda x, w: jnp.sum(loss(x, w)))

    return use

  same(op, outside((0, None)), (two(x), w))
  same(op, outside((0, None), (None, 0)), (two(x), two(w)))


def vmap_of_gradient(op):
  x, w = drawn(op)
  same(op, lambda loss: jax.vmap(gradient(loss), (None, 0)), (x, two(w)))


def on_explicit_axes(op):
  """Weights whole, or split over F, or over D; JAX splits no reference so."""
  x, weights = drawn(op)
  loss = gradient(loss_of(op, in_place(op)))
  want = jax.jit(gradient(loss_of(op, jax.lax.scan, "xla")))(x, weights)
  mesh = jax.make_mesh(
    (2, 2),
    ("data", "model"),
    (AxisType.Explicit,) * 2,
    devices=jax.devices()[:4],
  )
  rows = P(None, "model", None), P(None, None, "model")
  splits = [dict.fromkeys(weights, P())]
  if op in (feed_forward, experts):
    of_expert = (None,) if op is experts else ()
    for up, down in (rows, rows[::-1]):
      up, down = (P(None, *of_expert, *spec[1:]) for spec in (up, down))
      splits.append(splits[0] | dict(gate=up, up=up, down=down))
  with jax.set_mesh(mesh):
    for specs in splits:
      where = {n: NamedSharding(mesh, spec) for n, spec in specs.items()}
      given = jax.device_put((x, weights), (NamedSharding(mesh, P()), where))
      got = jax.jit(loss)(*given)
      assert_agree(got, want)
      for g, w in zip(*map(jax.tree.leaves, (got[1], given)), strict=True):
        assert jax.typeof(g) == jax.typeof(w)


def in_a_shard_map(op):
  """Over an axis over which weights vary, or do not."""
  if op is experts:  # whose rows are of a device, the caller would have to say
    return
  x, weights = drawn(op)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))

  def loss(x, w, scan, implementation, vary):
    def of_device(x, w):
      if vary:
        w = jax.lax.pcast(w, ("data",), to="varying")
      own = loss_of(op, scan, implementation)(x, w)
      return jax.lax.psum(own, "data")

    specs = P("data"), P()
    return jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=P())(
      x, w
    )

  for vary in (False, True):
    got, want = (
      jax.jit(gradient(functools.partial(loss, **how, vary=vary)))(x, weights)
      for how in (
        dict(scan=in_place(op), implementation=None),
        dict(scan=jax.lax.scan, implementation="xla"),
      )
    )
    assert_agree(got, want)


def with_rules(op):
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model")
  )
  with kernels.sharding(mesh, {"B": "data", "F": "model", "N": "model"}):
    same(op, gradient)


def with_x64(op):
  with jax.enable_x64(True):
    same(op, gradient)


def of_no_layers(op):
  x, w = drawn(op)
  same(op, gradient, args=(x, jax.tree.map(lambda stack: stack[:0], w)))


def without_jit(op):
  args = drawn(op)
  loss = gradient(loss_of(op, in_place(op)))
  want = jax.jit(loss)(*args)
  with jax.disable_jit():
    assert_agree(loss(*args), want)


def exported(op):
  args, loss = drawn(op), gradient(loss_of(op, in_place(op)))
  program = jax.export.export(jax.jit(loss))(*args)
  assert_agree(program.call(*args), jax.jit(loss)(*args))
  jax.export.export(jax.jit(loss), platforms=["tpu"])(*args)


ROWS = [
  with_options,
  with_a_policy,
  of_one_layer,
  whatever_the_loss_reads,
  forward_mode,
  second_derivatives,
  gradient_of_vmap,
  vmap_of_gradient,
  on_explicit_axes,
  in_a_shard_map,
  with_rules,
  with_x64,
  of_no_layers,
  without_jit,
  exported,
]


@pytest.mark.parametrize("op", [feed_forward, geglu, experts, attention])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_layers_hold(row, op):
  row(op)


@pytest.mark.parametrize("op", [feed_forward, geglu])
@pytest.mark.parametrize("stays", [False, True])
def test_what_comes_beside_weights(op, stays):
  """Biases, and a norm's scale: a layer's own, or in their stacks too."""
  args = drawn(op)
  names = set(args[1]) if stays else {"gate", "up", "down"}
  scan = functools.partial(kernels.scan_layers, in_place=names)
  got = jax.jit(gradient(loss_of(op, scan)))(*args)
  want = jax.jit(gradient(loss_of(op, jax.lax.scan, "xla")))(*args)
  assert_agree(got, want)
