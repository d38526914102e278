"""Functions without a kernel hold where the ops with one do.

`tests/test_holds.py` goes over the registry, which has the ops alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pallas_gemma.kernels import (
  Teacher,
  expert_feed_forward,
  linear_soft_cross_entropy,
)

pytestmark = pytest.mark.no_interpreter
SIZES = np.asarray([3, 5, 0, 6], np.int32)  # two rows are no expert's


def experts(x, gate, up, down):
  return expert_feed_forward(x, gate, up, down, jnp.asarray(SIZES))


def soft_targets(x, table, logits):
  return linear_soft_cross_entropy(x, table, jax.nn.softmax(logits))


def teacher(x, table, logits):
  taught = Teacher(jax.lax.stop_gradient(logits[..., :8]), table[:, :8])
  return linear_soft_cross_entropy(x, table, taught)


TOKENS, TABLE = (4, 8, 16), (64, 16)
LAST = (*TOKENS[:2], TABLE[0])
MODELS = (16, 8), (4, 8, 16), (4, 8, 16), (4, 16, 8)
CASES = {
  "by experts": (experts, MODELS, (P("a"), P("b"), P("b"), P("b"))),
  "inside of experts": (
    experts,
    MODELS,
    (P("a"), P(None, "a", "b"), P(None, None, "b"), P(None, "b")),
  ),
  "soft targets": (
    soft_targets,
    (TOKENS, TABLE, LAST),
    (P("a", "b"), P("b", "a"), P("a", None, "b")),
  ),
  "teacher": (
    teacher,
    (TOKENS, TABLE, LAST),
    (P("a", "b"), P("b", "a"), P("a", "b")),
  ),
}


@pytest.fixture(params=CASES)
def case(request):
  """The function with its gradients, its arrays, and how they are split."""
  function, shapes, specs = CASES[request.param]
  rng = np.random.default_rng(0)
  arrays = [jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes]

  def run(*arrays):
    out, vjp = jax.vjp(function, *arrays)
    return out, *vjp(jnp.tanh(out))

  return run, arrays, specs


def assert_alike(got, want):
  """Two programs of the same float32 sums, in any order."""
  for g, w in zip(got, want, strict=True):
    bound = 1e-5 * max(1.0, np.abs(w).max())
    np.testing.assert_allclose(g, w, rtol=0, atol=bound)


def test_meshes(case):
  run, arrays, specs = case
  want = jax.jit(run)(*arrays)
  for kind in AxisType.Explicit, AxisType.Auto:
    mesh = jax.make_mesh(
      (2, 2), ("a", "b"), (kind, kind), devices=jax.devices()[:4]
    )
    with jax.set_mesh(mesh):
      split = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arrays, specs, strict=True)
      ]
      out, *gradients = jax.jit(run)(*split)
    assert_alike([out, *gradients], want)
    if kind == AxisType.Explicit:
      # The result is split as the tokens are, a gradient as its array.
      assert out.sharding.spec[0] == "a"
      for x, gradient in zip(split, gradients, strict=True):
        assert jax.typeof(gradient) == jax.typeof(x)


def test_vmap_x64_and_export(case):
  run, arrays, _ = case
  want = jax.jit(run)(*arrays)
  other = [x[::-1] for x in arrays]
  both = [jnp.stack(pair) for pair in zip(other, arrays, strict=True)]
  mapped = jax.jit(jax.vmap(run))(*both)
  assert_alike([x[1] for x in mapped], want)
  assert_alike([x[0] for x in mapped], jax.jit(run)(*other))
  with jax.enable_x64(True):
    wide = jax.jit(run)(*arrays)
  assert [x.dtype for x in wide] == [x.dtype for x in want]
  assert_alike(wide, want)
  (batch,) = jax.export.symbolic_shape("batch")
  tokens = arrays[0].shape
  shapes = [
    jax.ShapeDtypeStruct(
      (batch, *x.shape[1:]) if x.shape[:-1] == tokens[:-1] else x.shape, x.dtype
    )
    for x in arrays
  ]
  open_batch = jax.export.export(jax.jit(run))(*shapes)
  assert_alike(open_batch.call(*arrays), want)
