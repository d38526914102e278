"""Every kernel lowers for TPU, at real sizes, on a machine without one; and the
platform a computation is lowered for decides what runs.

Interpretation proves the arithmetic; lowering proves that Mosaic accepts the
block shapes, layouts and primitives.  Neither proves that it fits or is fast.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
import v5e
from pallas_gemma.kernels import OPS

pytestmark = pytest.mark.no_interpreter
KERNELS = [op for op in OPS if op.pallas]
CASES = [
  pytest.param(op, case, id=f"{op.name}-{case.name}")
  for op in KERNELS
  for case in op.tests + op.benches
]
ONE_PER_OP = [pytest.param(op, op.tests[0], id=op.name) for op in KERNELS]


def loss_gradient(function):
  """The gradient with respect to every float argument."""

  def gradient(*arrays):
    floats = [
      i for i, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.inexact)
    ]

    def loss(*values):
      filled = list(arrays)
      for i, value in zip(floats, values, strict=True):
        filled[i] = value
      outs = jax.tree.leaves(function(*filled))
      return sum(out.astype(jnp.float32).sum() for out in outs)

    return jax.grad(loss, range(len(floats)))(*(arrays[i] for i in floats))

  return gradient


def passes(op, case, implementation=None):
  function = functools.partial(op.function, implementation=implementation)
  forward = case.bind(function)
  yield "fwd", forward
  if op.cost(*case.args, **case.kwargs)[1] is not None:
    yield "bwd", loss_gradient(forward)


@pytest.mark.parametrize("op, case", CASES)
def test_lowers_for_tpu(op, case):
  for name, function in passes(op, case, "pallas"):
    exported = jax.export.export(jax.jit(function), platforms=["tpu"])
    module = exported(*case.specs).mlir_module()
    assert "tpu_custom_call" in module, name


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.parametrize("op, case", ONE_PER_OP)
def test_default_is_the_kernel_where_lowered_for_tpu(op, case):
  """Compiled for v5e on this machine, implementation=None is the kernel."""
  for name, function in passes(op, case):
    text = v5e.compile(function, *case.specs).as_text() or ""
    assert "tpu_custom_call" in text, name


@pytest.mark.parametrize("op, case", ONE_PER_OP)
def test_default_is_the_reference_elsewhere(op, case):
  for name, function in passes(op, case):
    compiled = jax.jit(function).lower(*case.specs).compile()
    text = compiled.as_text() or ""
    assert "tpu_custom_call" not in text, name
