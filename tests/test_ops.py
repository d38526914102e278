"""Every op in the registry agrees with its reference, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numerics
import pytest
from pallas_gemma.kernels import OPS


def cases_of(ops):
  return [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op in ops
    for case in op.tests
  ]


CASES = cases_of(OPS)
KERNEL_CASES = cases_of(op for op in OPS if op.pallas)


def has_gradient(op, case):
  return op.cost(*case.args, **case.kwargs)[1] is not None


def draws_of(case):
  """So many that no gradient is judged by fewer than eight numbers."""
  floats = filter(numerics.is_float, case.sample())
  fewest = min(array.size for array in floats if array.size)
  return [case.sample(seed) for seed in range(-(-8 // fewest))]


@pytest.mark.parametrize("op, case", KERNEL_CASES)
def test_kernel_agrees_with_reference(op, case):
  kernel = functools.partial(op.function, implementation="pallas")
  numerics.assert_agrees(
    case.bind(kernel),
    case.bind(op.reference),
    *draws_of(case),
    softmax=op.through_softmax,
    grad=has_gradient(op, case),
  )


@pytest.mark.no_interpreter
@pytest.mark.parametrize("op, case", CASES)
def test_default_off_tpu_is_the_reference(op, case):
  """On a CPU, implementation=None gives the reference's own numbers."""
  arrays = case.sample()
  run = numerics.value_and_gradients
  run = run if has_gradient(op, case) else numerics.values
  got = run(case.bind(op.function), arrays, jit=True)
  want = run(case.bind(op.reference), arrays, jit=True)
  numerics.assert_within_bar(got, want, want, softmax=op.through_softmax)


@pytest.mark.parametrize("op, case", KERNEL_CASES)
def test_gradient_runs_the_kernel(op, case):
  """No silent fallback: both passes call our own named kernels."""
  if not has_gradient(op, case):
    return
  function = functools.partial(op.function, implementation="pallas")

  def loss(arrays):
    outs = jax.tree.leaves(case.bind(function)(*arrays))
    return sum(out.astype(jnp.float32).sum() for out in outs)

  arrays = case.sample()
  jaxpr = str(jax.make_jaxpr(jax.grad(loss, allow_int=True))(arrays))
  assert f"{op.name}_fwd" in jaxpr and f"{op.name}_bwd" in jaxpr


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS])
def test_implementation_is_validated(op):
  case = op.tests[0]
  arrays = case.sample()
  with pytest.raises(ValueError, match=f"{op.name}: implementation must be"):
    case.bind(functools.partial(op.function, implementation="cuda"))(*arrays)
  if not op.pallas:
    kernel = functools.partial(op.function, implementation="pallas")
    with pytest.raises(NotImplementedError, match=op.name):
      case.bind(kernel)(*arrays)


@pytest.mark.parametrize("op, case", CASES)
def test_reference_runs_in_float64(op, case):
  with jax.enable_x64(True):
    arrays = numerics.widened(case.sample())
    outs = jax.tree.leaves(case.bind(op.reference)(*arrays))
  dtypes = {out.dtype for out in outs} - {jnp.dtype(jnp.int8)}
  assert dtypes == {jnp.dtype(jnp.float64)}
