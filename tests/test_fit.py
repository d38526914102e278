"""What the backward pass keeps, so that training fits a device's memory."""

import dataclasses
import importlib
import types

import jax
import pytest
from pallas_gemma.gemma import GemmaConfig, TrainConfig, UserError
from small_gemma import TWO_LAYERS

COMPILER = importlib.import_module("pallas_gemma.bench.v5e.compiler")
FIT = importlib.import_module("pallas_gemma.gemma._train.fit")
REMAT = importlib.import_module("pallas_gemma.gemma._remat")
STEP = importlib.import_module("pallas_gemma.gemma._train.step")


def settings(**changes):
  model = dataclasses.replace(TWO_LAYERS, remat="auto", hidden_size=512)
  fields = dict(model=model, batch_size=4, sequence_length=32)
  return TrainConfig(**{**fields, **changes})


@pytest.mark.parametrize("over_devices", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 18])
def test_the_fastest_that_fits_is_found(layers, over_devices):
  choices = REMAT.fastest_first(layers, over_devices)
  # Over devices a scan's stacks would be copied.
  assert choices[0] == ("unrolled" if over_devices else "none")
  for choice in choices:
    assert sum(count for _, count in REMAT.parts(choice, layers)) == layers
  for first, want in enumerate([*choices, None]):
    tried = []

    def fits(choice, first=first, tried=tried):
      tried.append(choice)
      return choices.index(choice) >= first

    assert REMAT.fastest_that(fits, layers, over_devices) == want
    assert len(tried) <= len(choices).bit_length()


@pytest.mark.no_interpreter
def test_less_is_kept_where_less_fits(monkeypatch):
  """By what XLA says that the compiled step takes."""
  sizes = {}

  def bytes_of(compile_step, config, right=FIT._bytes):
    key = config.model.remat, config.head
    if key not in sizes:  # it is the same whatever memory there is
      sizes[key] = right(compile_step, config)
    return sizes[key]

  monkeypatch.setattr(FIT, "_bytes", bytes_of)
  roomy = STEP.resolved(settings(), 1 << 34)
  assert (roomy.model.remat, roomy.head) == ("none", "chunked")
  with pytest.raises(UserError, match="even with each layer's input alone"):
    STEP.resolved(settings(), 1)
  least = sizes["full", "recompute"]
  tight = STEP.resolved(settings(), least + 1)
  assert tight.model.remat not in ("none", "auto")
  assert sizes[tight.model.remat, tight.head] <= least + 1


def test_the_gaps_of_a_heap_count_once():
  """Sizes as JAX gives them of a program for a TPU: 10 of 30 are gaps."""
  sizes = dict(
    argument_size_in_bytes=100,
    output_size_in_bytes=60,
    alias_size_in_bytes=50,
    temp_size_in_bytes=40,
  )
  for total, want in ((140, 140), (0, 150), (None, 150)):
    told = (
      sizes if total is None else {**sizes, "total_allocation_bytes": total}
    )
    memory = types.SimpleNamespace(**told)
    step = types.SimpleNamespace(memory_analysis=lambda memory=memory: memory)
    assert FIT._bytes(lambda _, step=step: step, settings()) == want
    assert COMPILER._temp_bytes(memory, 110) == want - 110


def test_without_known_memory_nothing_is_compiled():
  unknown = STEP.resolved(settings(), None)
  assert (unknown.model.remat, unknown.head) == ("none", "recompute")


@pytest.mark.parametrize("head", ["recompute", "chunked"])
def test_what_is_given_stays(head):
  model = dataclasses.replace(GemmaConfig.tiny(), remat="none:2,full")
  given = settings(model=model, head=head)
  assert STEP.resolved(given, 1) == given


def test_what_does_not_fit_the_compiler_does_not_fit():
  def compile_step(config):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

  assert FIT._bytes(compile_step, settings()) == float("inf")
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    FIT._bytes(_internal_error, settings())


def _internal_error(config):
  raise jax.errors.JaxRuntimeError("INTERNAL: a bug")
