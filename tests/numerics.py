"""The numerics bar: how wrong a kernel may be.

Relative, after flash-attention's tests: the reference in float64 is the truth,
the reference in the working dtype is what plain jnp would have given, and the
kernel may be at most so many times as wrong as plain jnp is.
"""

import eager
import jax
import jax.numpy as jnp
import numpy as np

MAX_SLACK = 2.0
RMS_SLACK = 1.5
SOFTMAX_GRADIENT_SLACK = 3.0


def is_float(array):
  return jnp.issubdtype(array.dtype, jnp.floating)


def value_and_gradients(function, *draws, jit=False):
  """Outputs, then the gradient of every float argument, as float64 numpy.

  The cotangents are random, the same for every implementation.  Each draw is a
  list of arrays; the results of several are stacked.

  With `jit`, the whole is compiled once for all draws.  Plain jnp is not: it is
  to be wrong by its own roundings alone.
  """
  floats = [i for i, a in enumerate(draws[0]) if is_float(a)]

  def run(arrays):
    def of_floats(*values):
      filled = list(arrays)
      for i, value in zip(floats, values, strict=True):
        filled[i] = value
      return tuple(jax.tree.leaves(function(*filled)))

    outs, vjp = jax.vjp(of_floats, *(arrays[i] for i in floats))
    rng = np.random.default_rng(1)
    cotangents = tuple(
      jnp.asarray(rng.standard_normal(out.shape, np.float32), out.dtype)
      for out in outs
    )
    named = {f"output {i}": out for i, out in enumerate(outs)}
    return named | {
      f"gradient of argument {i}": g
      for i, g in zip(floats, vjp(cotangents), strict=True)
    }

  return _stacked(jax.jit(run) if jit else eager.op_by_op(run), draws)


def values(function, *draws, jit=False):
  """As `value_and_gradients`, without the gradients."""

  def run(arrays):
    outs = jax.tree.leaves(function(*arrays))
    return {f"output {i}": out for i, out in enumerate(outs)}

  return _stacked(jax.jit(run) if jit else eager.op_by_op(run), draws)


def _stacked(run, draws):
  results = [run(list(arrays)) for arrays in draws]
  return {
    name: np.stack([np.asarray(r[name], np.float64) for r in results])
    for name in results[0]
  }


def widened(arrays):
  """The same numbers in float64; call under `jax.enable_x64`."""
  return [
    jax.device_put(np.asarray(a, np.float64)) if is_float(a) else a
    for a in arrays
  ]


def max_abs(error):
  return np.abs(error).max(initial=0.0)


def rms(error):
  return np.sqrt(np.mean(error * error)) if error.size else 0.0


def assert_within_bar(got, plain, truth, softmax=False):
  """Every output and gradient of `got` meets the bar.

  The floor of two float32 ulps of the value's own norm lets a result differ
  where plain jnp happens to be exact.
  """
  assert got.keys() == plain.keys() == truth.keys()
  for name, exact in truth.items():
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(got[name][~finite], exact[~finite], name)
    e = np.where(finite, exact, 0)
    g, p = (np.where(finite, a[name], 0) for a in (got, plain))
    through_softmax = softmax and "gradient" in name
    for norm, slack in ((max_abs, MAX_SLACK), (rms, RMS_SLACK)):
      slack = SOFTMAX_GRADIENT_SLACK if through_softmax else slack
      bar = slack * norm(p - e) + 2 * np.finfo(np.float32).eps * norm(e)
      error = norm(g - e)
      assert error <= bar, (
        f"{name}: {norm.__name__} error {error:.3g} exceeds {bar:.3g} "
        f"({slack} times plain jnp's, plus two float32 ulps)"
      )


def expected(reference, *draws, grad=True):
  """What plain jnp gives, and the truth: the same for an op and its mutants."""
  run = value_and_gradients if grad else values
  with jax.enable_x64(True):
    truth = run(reference, *map(widened, draws))
  return run(reference, *draws), truth


def assert_agrees(function, reference, *draws, softmax=False, grad=True):
  """`function` meets the bar set by `reference` on these arrays.

  With several draws the norms are taken over all of them: the error of a few
  numbers is a matter of luck, for the kernel and for plain jnp.
  """
  plain, truth = expected(reference, *draws, grad=grad)
  run = value_and_gradients if grad else values
  assert_within_bar(run(function, *draws, jit=True), plain, truth, softmax)
