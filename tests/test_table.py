"""The token table in parts: its rows, its copies and their one gradient."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

PARTS, TABLE = (
  importlib.import_module(f"pallas_gemma.gemma.{name}")
  for name in ("_parts", "_table")
)
pytestmark = pytest.mark.no_interpreter
AXES = "data", "fsdp", "context", "model"


@given(
  ids=st.lists(st.integers(0, 6), min_size=1, max_size=40),
  dtype=st.sampled_from(["bfloat16", "float32"]),
)
def test_rows_of_an_id_are_summed_before_they_are_added(ids, dtype):
  rng = np.random.default_rng(len(ids))
  table = jnp.asarray(rng.normal(size=(7, 8)), dtype)
  rows = jnp.asarray(rng.normal(size=(len(ids), 8)), dtype)
  got = TABLE._added(table, jnp.array(ids), rows)
  want, added = np.asarray(table, float), np.zeros((7, 8))
  np.add.at(added, ids, np.asarray(rows, float))
  # The sum is rounded once, and what it is added to once more.
  half = float(jnp.finfo(dtype).eps) / 2
  most = half * (np.abs(added) + np.abs(want + added)) * 1.01
  sums = 1e-6 * np.sqrt(len(ids))  # of float32
  assert got.dtype == table.dtype
  assert (np.abs(np.asarray(got, float) - want - added) <= most + sums).all()


def test_an_id_that_no_row_has_keeps_its_bits():
  table = jnp.array([[jnp.nan], [-0.0], [3.0]])
  got = TABLE._added(table, jnp.array([2, 2]), jnp.ones((2, 1)))
  np.testing.assert_array_equal(got, [[jnp.nan], [-0.0], [5.0]])
  assert math.copysign(1, got[1, 0]) == -1


def _loss(table, tokens, factor):
  """Of the rows, and of products of all words with them."""
  both = TABLE.rows_and_copies(table, tokens, jnp.float32)
  rows, copies = both or (
    TABLE.embedding_rows(table, tokens, jnp.float32),
    None,
  )

  def of_all(table, rows, factor, split=(1, 1)):
    assert table.shape[0] % split[1] == 0
    return jnp.cos(rows @ table.T).sum(-1) * factor

  losses = (
    TABLE.on_vocabulary(table, jnp.float32, rows, factor)(of_all)
    if copies is None
    else TABLE.with_copies(of_all, copies, (rows, factor))
  )
  return losses.sum() + (rows**2 * factor[..., None]).sum()


# Of 12 words there are fewer than of tokens, of 56 more.
@pytest.mark.parametrize("few, words", [(1, 12), (8, 12), (8, 56)])
@pytest.mark.parametrize(
  "sizes", [(1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 1, 4), (8, 1, 1, 1)]
)
def test_loss_and_gradient_are_those_of_one_device(
  sizes, few, words, monkeypatch
):
  monkeypatch.setattr(PARTS, "_FEW", few)
  rng = np.random.default_rng(0)
  table = jnp.asarray(rng.normal(size=(words, 16)), jnp.float32)
  tokens = jnp.asarray(rng.integers(0, words, (8, 6)), jnp.int32)
  factor = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
  want = jax.value_and_grad(_loss)(table, tokens, factor)
  mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4)
  size = dict(zip(AXES, sizes, strict=True))
  stored = tuple(a for a in ("fsdp", "context") if size[a] > 1)

  def loss(*arrays):
    with PARTS.stored_in_parts(
      mesh,
      rows=("data", "fsdp"),
      length=("context",) if size["context"] > 1 else (),
      stored=stored,
      vocabulary="model" if size["model"] > 1 else None,
    ):
      return jax.value_and_grad(_loss)(*arrays)

  of_tokens = NamedSharding(mesh, P(("data", "fsdp"), None))
  where = NamedSharding(mesh, P(None, stored))
  got = jax.jit(loss, in_shardings=(where, of_tokens, of_tokens))(
    table, tokens, factor
  )
  # Both are float32, and devices sum in another order.
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)
