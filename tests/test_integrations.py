"""What `integrations` promises of any library, on one made up for the test."""

import importlib
import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_gemma.kernels import integrations
from pallas_gemma.kernels.integrations import CausalMask, report

LIBRARIES = ["gemma", "keras_hub", "maxtext", "tunix"]
library = importlib.import_module("pallas_gemma.kernels.integrations._library")
log = importlib.import_module("pallas_gemma.kernels.integrations._log")


class Scaled:
  """A class of the library that is made up."""

  def __call__(self, x):
    return 2 * x


def swaps(choice):
  def __call__(self, x):
    log.note("made_up", ("layer_0", "scaled"), "norm", "scaled", "as a test")
    return 3 * x

  if "norm" in choice.parts:
    yield library.Swap(Scaled, "__call__", __call__)


MADE_UP = library.Library(
  "made_up", "numpy", (np.__version__,), ("norm", "loss"), swaps, "that is all"
)


@pytest.fixture(autouse=True)
def undone():
  yield
  MADE_UP.undo()


def test_apply_and_undo_reach_programs_that_were_traced_before():
  run = jax.jit(Scaled())
  own = Scaled.__call__
  assert run(1.0) == 2.0
  for _ in range(2):  # twice is as good as once
    MADE_UP.apply(None, None)
    assert run(1.0) == 3.0
  assert report() == (
    ("made_up", "layer_0/scaled", "norm", "scaled", "as a test"),
  )
  assert "numpy" in str(report()) and "layer_0/scaled" in str(report())
  MADE_UP.apply(None, ["loss"])
  assert run(1.0) == 2.0 and report() == ()
  MADE_UP.undo()
  MADE_UP.undo()
  assert Scaled.__call__ is own and run(1.0) == 2.0
  assert "nothing is swapped" in str(report())


def test_the_report_counts_layers_that_run_alike():
  for i in range(6):
    log.note("made_up", f"layer_{i}", "norm", log.OWN, "because")
  MADE_UP.undo()
  assert report() == ()
  MADE_UP.apply(None, None)
  for i in range(6):
    log.note("made_up", f"layer_{i}", "norm", log.OWN, "because")
  assert "because: layer_0, layer_1, ... layer_5 (6 layers)" in str(report())
  assert report().left_alone == report()


def test_what_is_not_wanted_is_refused_in_words(monkeypatch):
  with pytest.raises(ValueError, match=r"made_up: parts must be some of norm"):
    MADE_UP.apply(None, ["norms"])
  with pytest.raises(ValueError, match=r"made_up: parts must .*got 'norm'"):
    MADE_UP.apply(None, "norm")
  with pytest.raises(ValueError, match=r"made_up: implementation must be"):
    MADE_UP.apply("cuda", None)
  monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0.1")
  with pytest.raises(ValueError, match=r"knows the classes of numpy .* 0.0.1;"):
    MADE_UP.apply(None, None)
  assert Scaled()(1.0) == 2.0


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_is_missing_or_another_is_refused(name, monkeypatch):
  integration = getattr(integrations, name)

  def missing(distribution):
    raise importlib.metadata.PackageNotFoundError(distribution)

  monkeypatch.setattr(importlib.metadata, "version", missing)
  with pytest.raises(ValueError, match="not installed: pip install .*=="):
    integration.apply()
  monkeypatch.setattr(importlib.metadata, "version", lambda _: "999.0")
  with pytest.raises(ValueError, match=rf"integrations.{name}: .* got 999.0"):
    integration.apply()
  integration.undo()


def test_a_causal_mask_is_an_array_to_whoever_wants_one():
  tokens = jnp.array([[1, 1, 1, 0], [0, 1, 1, 1]], bool)
  array = np.asarray(tokens)[:, None, :] & np.tril(np.ones((4, 4), bool))
  window = jnp.tri(4, k=-1, dtype=bool)
  mask: Any = CausalMask(tokens)
  assert (mask.shape, mask.ndim, mask.dtype) == (array.shape, 3, bool)
  same = [
    (jnp.expand_dims(mask, -2), array[:, :, None]),
    (jnp.where(mask, 1.0, 0.0), np.where(array, 1.0, 0.0)),
    (mask & window, array & window),
    (window * mask, array * window),
    (mask | window, array | window),
    (~mask, ~array),
    (mask[:, None], array[:, None]),
    (mask.astype(jnp.int32), array.astype(np.int32)),
    (jax.jit(lambda m: m.dense())(mask), array),
  ]
  for got, wanted in same:
    np.testing.assert_array_equal(got, wanted)
  queries, keys = mask.segment_ids()
  np.testing.assert_array_equal(queries, np.ones((2, 4)))
  np.testing.assert_array_equal(keys, tokens)
  with pytest.raises(AttributeError):
    mask.no_such_method  # noqa: B018


def test_gemma_loss_wants_hidden_states():
  class Output:
    hidden_states = None

  with pytest.raises(ValueError, match="return_hidden_states=True"):
    integrations.gemma.cross_entropy(Output, {}, jnp.zeros((1, 2), int))
