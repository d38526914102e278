"""Others replace a model's products from outside; a kernel's they cannot."""

import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from pallas_gemma.kernels import (
  feed_forward,
  flash_attention,
  geglu,
  linear_cross_entropy,
)

pytestmark = pytest.mark.no_interpreter


@pytest.fixture
def qwix_rule(monkeypatch):
  """Qwix, with this rule for the module that is running."""
  rule = types.SimpleNamespace(rank=None, weight_qtype=None, act_qtype=None)
  module = types.ModuleType("qwix._src.qconfig")
  module.get_current_rule = lambda product: rule  # type: ignore[attr-defined]
  monkeypatch.setitem(sys.modules, "qwix._src.qconfig", module)
  return rule


def calls(implementation):
  x, w = jnp.ones((4, 8)), jnp.ones((8, 16))
  labels, given = jnp.zeros(4, jnp.int32), {"implementation": implementation}
  yield lambda: geglu(x, w, w, **given)
  yield lambda: feed_forward(x, w, w, w.T, **given)
  yield lambda: linear_cross_entropy(x, w.T, labels, **given)


@pytest.mark.parametrize("wanted", ["rank", "weight_qtype", "act_qtype"])
def test_adapters_are_not_lost_in_silence(qwix_rule, wanted):
  for call in calls(None):
    call()  # no rule for this module
  setattr(qwix_rule, wanted, 4)
  for call in calls(None):
    with pytest.raises(
      ValueError, match="a qwix rule wants to replace the pro"
    ):
      call()
  for call in calls("xla"):
    call()  # products that qwix sees


def test_outside_of_a_module_there_is_no_rule(qwix_rule, monkeypatch):
  def unknown(product):
    raise ValueError("Current module is not known.")

  module = sys.modules["qwix._src.qconfig"]
  monkeypatch.setattr(module, "get_current_rule", unknown)
  for call in calls(None):
    call()


def test_a_mask_of_linens_is_not_lost_in_silence():
  """linen leaves out what the signature of an `attention_fn` lacks."""
  layer = linen.MultiHeadDotProductAttention(
    num_heads=2, attention_fn=flash_attention
  )
  x = jnp.ones((1, 8, 16))
  variables = layer.init(nnx.Rngs(0).params(), x)
  out: Any = layer.apply(variables, x)
  assert out.shape == x.shape
  with pytest.raises(ValueError, match="mask must be booleans, .* float32"):
    layer.apply(variables, x, mask=linen.make_causal_mask(x[..., 0]))


def test_a_bias_is_added():
  q = jnp.ones((1, 8, 2, 16))
  bias = jnp.arange(128.0).reshape(1, 2, 8, 8)
  np.testing.assert_allclose(
    flash_attention(q, q, q, bias=bias),
    jax.nn.dot_product_attention(q, q, q, bias=bias),
    atol=1e-5,
  )
