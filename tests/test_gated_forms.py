"""Gated units as other models have them: activations, layouts, biases."""

import functools
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
import v5e
from pallas_gemma import kernels
from pallas_gemma.kernels import (
  ClampedSwiGLU,
  FeedForwardConfig,
  FeedForwardTiles,
  QuantizedWeight,
  feed_forward,
  feed_forward_reference,
  geglu,
  geglu_reference,
)

# Two row tiles and two F tiles, the last of each ragged.
N, D, F = 24, 40, 200


def small(residuals: Any = "gate_up"):
  tiles = FeedForwardTiles(16, 128)
  return FeedForwardConfig(residuals=residuals, forward=tiles, backward=tiles)


def draw(f=F, dtype=jnp.float32):
  """x, three weights, and three biases."""
  rng = np.random.default_rng(0)
  shapes = (N, D), (D, f), (D, f), (f, D), (f,), (f,), (D,)
  scales = 1, D**-0.5, D**-0.5, f**-0.5, 1, 1, 1
  return [
    jnp.asarray(s * rng.standard_normal(shape), dtype)
    for shape, s in zip(shapes, scales, strict=True)
  ]


def biased(function, x, gate, up, down, b_gate, b_up, b_down, **kwargs):
  return function(
    x, gate, up, down, b_gate=b_gate, b_up=b_up, b_down=b_down, **kwargs
  )


def fused(function, x, gate_up, down, b_gate, **kwargs):
  return function(x, gate_up, None, down, b_gate=b_gate, **kwargs)


def ungated(function, x, up, down, b_up, b_down, **kwargs):
  return function(x, None, up, down, b_up=b_up, b_down=b_down, **kwargs)


def transposed(case):
  """The case with every weight transposed, of one layer or of two branches."""
  call, args, kwargs = case
  turned = [
    a if i == 0 or a.ndim == 1 or a.shape == (2, F) else a.swapaxes(-1, -2)
    for i, a in enumerate(args)
  ]
  return call, turned, {**kwargs, "transposed": True}


def cases(dtype=jnp.float32):
  """By name: how the op is called, with which arrays and keywords."""
  x, gate, up, down, b_gate, b_up, b_down = draw(dtype=dtype)
  both, of_both = jnp.stack([gate, up]), jnp.stack([b_gate, b_up])
  columns = jnp.concatenate([gate, up], axis=1)
  wide = draw(256, dtype)
  whole = jnp.concatenate(wide[1:3], axis=1)
  norm = kernels.Norm(0.3 * b_down, scale_offset=1.0)
  own = {
    "biases": (biased, [x, gate, up, down, b_gate, b_up, b_down], {}),
    "fused": (fused, [x, both, down, of_both], {"norm": norm}),
    "ungated": (ungated, [x, up, down, b_up, b_down], {"residual": True}),
  }
  more = {f"{name} transposed": transposed(case) for name, case in own.items()}
  flat = of_both.reshape(-1)
  return {
    **own,
    **more,
    "columns": (
      fused,
      [wide[0], whole, wide[3], jnp.concatenate(wide[4:6])],
      {},
    ),
    "columns that are cut": (fused, [x, columns, down, flat], {}),
    "rows": (fused, [x, columns.T, down.T, flat], {"transposed": True}),
    "clamped": (*own["biases"][:2], {"activation": ClampedSwiGLU(1.0)}),
    "a function": (*own["biases"][:2], {"activation": jax.nn.softplus}),
  }


@pytest.mark.parametrize("name", cases())
def test_form_meets_the_bar(name):
  call, args, kwargs = cases()[name]
  # With what is kept and without, by turns.
  config = small("gate_up" if len(name) % 2 else "none")
  kernel = functools.partial(
    feed_forward, implementation="pallas", config=config
  )
  numerics.assert_agrees(
    functools.partial(call, kernel, **kwargs),
    functools.partial(call, feed_forward_reference, **kwargs),
    args,
  )


def test_forms_in_bfloat16_and_of_geglu():
  call, args, kwargs = cases(jnp.bfloat16)["biases transposed"]
  kernel = functools.partial(
    feed_forward, implementation="pallas", config=small()
  )
  numerics.assert_agrees(
    functools.partial(call, kernel, **kwargs),
    functools.partial(call, feed_forward_reference, **kwargs),
    args,
  )

  def run(function, x, both, b_gate):
    return function(x, both, b_gate=b_gate, activation="silu")

  _, (x, both, _, b_gate), _ = cases()["fused"]
  kernel = functools.partial(geglu, implementation="pallas", config=small())
  numerics.assert_agrees(
    functools.partial(run, kernel),
    functools.partial(run, geglu_reference),
    [x, both, b_gate],
  )


def test_a_layer_of_a_stack():
  """Biases too are stacked, and the gradient is that of the stack."""
  for name in ("fused transposed", "columns", "ungated"):
    call, (x, *args), kwargs = cases()[name]
    stacks = [jnp.stack([a, 2 * a, -a]) for a in args]
    kernel = functools.partial(
      feed_forward, implementation="pallas", config=small(), layer=1
    )

    def both(function, args, call=call, x=x, kwargs=kwargs):
      y, vjp = jax.vjp(functools.partial(call, function, x, **kwargs), *args)
      return y, *vjp(y)

    y, *got = both(kernel, stacks)
    want_y, *want = both(feed_forward_reference, [s[1] for s in stacks])
    np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-5)
    for g, w in zip(got, want, strict=True):
      assert not g[0].any() and not g[2].any()
      np.testing.assert_allclose(g[1], w, atol=3e-5 * np.abs(w).max())


def loss(call, kwargs, *args):
  kernel = functools.partial(feed_forward, implementation="pallas")
  return (call(kernel, *args, **kwargs) ** 2).sum()


@pytest.mark.parametrize("name", ["biases transposed", "columns"])
def test_split_over_a_mesh(name):
  """Rows and F are split by the rules; b_down is added once."""
  mesh = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  call, args, kwargs = cases()[name]
  gradient = jax.grad(
    functools.partial(loss, call, kwargs), tuple(range(len(args)))
  )
  want = gradient(*args)
  with jax.set_mesh(mesh), kernels.sharding(mesh, {"B": "data", "F": "model"}):
    got = jax.jit(gradient)(*args)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5 * np.abs(w).max())


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.no_interpreter
def test_weights_are_read_where_they_lie():
  """No copy of a weight or its gradient, but for the gradient of [D, 2F]."""
  n, d, f = 64, 128, 256

  def described(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  def both(*args):
    x, flat, stack, columns, down, turned = args
    x = feed_forward(x, flat, None, turned, transposed=True)
    x = feed_forward(x, stack, None, down)
    return feed_forward(x, columns, None, down)

  def gradients(*args):
    y, vjp = jax.vjp(both, *args)
    return vjp(y)

  shapes = (n, d), (2 * f, d), (2, d, f), (d, 2 * f), (f, d), (d, f)
  compiled = v5e.compile(gradients, *(described(*s) for s in shapes))
  text = compiled.as_text() or ""
  moves = re.findall(r" = (\S+) (?:copy|transpose|slice|concatenate)\(", text)
  assert not [move for move in moves if str(f) in move]
  assert text.count("feed_forward_bwd") >= 3


# --- activations --------------------------------------------------------------


def test_usual_names_and_functions_are_one_activation():
  args = draw()[:3]
  run = functools.partial(geglu, *args, implementation="xla")
  for names in (
    ("gelu_tanh", "gelu_pytorch_tanh", "gelu_new", jax.nn.gelu),
    ("gelu", "gelu_exact", functools.partial(jax.nn.gelu, approximate=False)),
    ("silu", "swish", jax.nn.silu),
    ("relu2", "relu_squared", lambda g: jnp.maximum(g, 0) ** 2),
    ("quick_gelu", lambda g: g * jax.nn.sigmoid(1.702 * g)),
  ):
    first, *others = (run(activation=a) for a in names)
    for other in others:
      np.testing.assert_allclose(other, first, atol=1e-6)


def of_gpt_oss(gate, up, alpha=1.702, limit=7.0):
  """As OpenAI's own program has it, in NumPy."""
  gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
  return gate / (1 + np.exp(-alpha * gate)) * (up + 1)


def test_clamped_swiglu_is_that_of_gpt_oss():
  gate, up = 10 * np.random.default_rng(0).standard_normal((2, 8, 128))
  x, one = jnp.asarray(np.hstack([gate, up]), jnp.float32), jnp.eye(256)
  h = geglu(x, one[:, :128], one[:, 128:], activation=ClampedSwiGLU())
  np.testing.assert_allclose(h, of_gpt_oss(gate, up), rtol=1e-5)


def test_int8_weights_in_every_form():
  x, gate, up, down, *_ = draw()
  want = feed_forward_reference(x, gate, up, down)
  both = jnp.concatenate([gate, up], axis=1)
  as_is, turned = (
    functools.partial(QuantizedWeight.quantize, contracted=axis)
    for axis in (-2, -1)
  )
  for weights, is_turned in (
    ([as_is(both), None, as_is(down)], False),
    ([as_is(jnp.stack([gate, up])), None, as_is(down)], False),
    ([turned(both.T), None, turned(down.T)], True),
    ([turned(w.T) for w in (gate, up, down)], True),
  ):
    got = feed_forward(x, *weights, transposed=is_turned)
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


X, GATE, UP, DOWN, B_GATE, B_UP, B_DOWN = (jnp.zeros_like(a) for a in draw())


@pytest.mark.parametrize(
  "args, kwargs, message",
  [
    ([GATE, UP], {"activation": jax.nn.softmax}, "which has a reduce_max"),
    ([GATE, UP], {"activation": lambda g: jnp.cumsum(g, 1)}, "has a cumsum"),
    ([GATE, UP], {"activation": lambda g: g.T}, r"which makes .*128, 8"),
    ([GATE, UP], {"activation": lambda g: g * B_UP[:128]}, "another array"),
    ([GATE, UP], {"activation": lambda g, h: g}, "which cannot be traced"),
    ([GATE, UP], {"activation": 3}, "must be one of gelu_tanh, .* got 3"),
    ([None, UP], {"activation": ClampedSwiGLU()}, "w_gate must be given"),
    ([None, None], {}, "w_gate or w_up must be given"),
    ([None, UP], {"b_gate": B_GATE}, "b_gate must be None where w_gate is"),
    ([GATE.T, None], {}, r"w_gate must be \[D, 2F\] with D = 40"),
    ([jnp.zeros((3, D, F)), None], {}, r"\[2, D, F\] with D = 40.*\(3, 40"),
    ([GATE.T, UP.T], {}, r"w_gate must be \[D, F\] with D = 40"),
    ([GATE, UP], {"b_up": B_DOWN}, r"b_up must be \(200,\) \(F\), got \(40,\)"),
    ([GATE, UP], {"b_down": B_UP}, r"b_down must be \(40,\) \(D\)"),
    (
      [jnp.stack([GATE, UP]), None],
      {"b_gate": jnp.zeros((3, F))},
      r"b_gate must be \(2, 200\) or \(400,\)",
    ),
  ],
)
def test_bad_input_is_refused(args, kwargs, message):
  with pytest.raises(ValueError, match=f"feed_forward: .*{message}"):
    feed_forward(X, args[0], args[1], DOWN, **kwargs)


def test_tiles_that_do_not_divide_columns_are_refused():
  x, columns, down = (
    jnp.zeros((16, 8)),
    jnp.zeros((8, 768)),
    jnp.zeros((384, 8)),
  )
  tiles = FeedForwardTiles(16, 256)
  config = FeedForwardConfig(forward=tiles, backward=tiles)
  with pytest.raises(ValueError, match="cols of tiles must divide F"):
    feed_forward(x, columns, None, down, config=config, implementation="pallas")


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), "7"])
def test_a_limit_is_a_positive_number(limit):
  with pytest.raises(ValueError, match="ClampedSwiGLU: limit must be"):
    ClampedSwiGLU(limit=cast(Any, limit if limit != "7" else "seven"))
