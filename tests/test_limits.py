"""What is too large for a kernel is refused in words; all else compiles.

Attention, whose keys may be more than VMEM holds, has a module of its own.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
import test_lowering
import v5e
from pallas_gemma import kernels

pytestmark = [pytest.mark.no_interpreter, v5e.needs_compiler]


def problem(op, size, dtype):
  """The op's arguments at its width, or head size, `size`."""

  def array(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, dtype)

  scale, tokens = array(size, dtype=jnp.float32), array(64, size)
  up, down = array(size, 256), array(256, size)
  return {
    "rms_norm": (tokens, scale),
    "add_rms_norm": (tokens, tokens, scale),
    "apply_rope": (array(1, 256, 8, size), array(1, 256, dtype=jnp.int32)),
    "geglu": (tokens, up, up),
    "feed_forward": (tokens, up, up, down),
    "linear_cross_entropy": (
      array(256, size),
      array(1024, size),
      array(256, dtype=jnp.int32),
    ),
  }[op]


def passes(op, size, dtype):
  function = functools.partial(getattr(kernels, op), implementation="pallas")
  specs = problem(op, size, dtype)
  forward = functools.partial(v5e.compile, function)
  gradient = functools.partial(
    v5e.compile, test_lowering.loss_gradient(function)
  )
  return (lambda: forward(*specs)), (lambda: gradient(*specs))


@pytest.mark.parametrize(
  "op, size, dtype",
  [
    ("rms_norm", 262_144, jnp.bfloat16),
    ("rms_norm", 196_608, jnp.float32),
    ("add_rms_norm", 196_608, jnp.bfloat16),
    ("add_rms_norm", 131_072, jnp.float32),
    ("apply_rope", 4096, jnp.bfloat16),
    ("apply_rope", 4096, jnp.float32),
    ("geglu", 16_384, jnp.bfloat16),
    ("linear_cross_entropy", 8192, jnp.float32),
  ],
)
def test_the_largest_compile(op, size, dtype):
  _, gradient = passes(op, size, dtype)
  assert "tpu_custom_call" in (gradient().as_text() or "")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
  "op, size",
  [
    ("rms_norm", 1_048_576),
    ("add_rms_norm", 524_288),
    ("apply_rope", 8192),
    ("geglu", 131_072),
    ("feed_forward", 65_536),
    ("linear_cross_entropy", 65_536),
  ],
)
def test_larger_ones_are_refused_in_words(op, size, dtype):
  for run in passes(op, size, dtype):
    with pytest.raises(ValueError, match=f"{op}: .*VMEM.* = {size}"):
      run()
