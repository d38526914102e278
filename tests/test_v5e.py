"""What a program looks like around its kernels does not depend on their bodies.

Most tests of copies, collectives and memory rest on this: they compile kernels
without bodies (`v5e.around_kernels`), in a tenth of the time.
"""

import re

import jax
import jax.numpy as jnp
import pytest
import v5e
from pallas_gemma.kernels import Norm, Rope, feed_forward, flash_attention

pytestmark = [pytest.mark.no_interpreter, v5e.needs_compiler]
T, N, H, D, F = 512, 2, 128, 256, 512


def block(x, w_qkv, w_out, gate, up, down, scale):
  """With copies, products and temporaries between kernels."""
  q, k, v = (jnp.einsum("BTD,DNH->BTNH", x, w) for w in w_qkv)
  rope = Rope(jnp.arange(T)[None])
  attended = flash_attention(q, k, v, is_causal=True, rope=rope, layout="BTNH")
  x += jnp.einsum("BTNH,NHD->BTD", attended, w_out)
  return feed_forward(x, gate, up, down, norm=Norm(scale), residual=True)


def compiled():
  def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  shapes = (3, D, N, H), (N, H, D), (D, F), (D, F), (F, D), (D,)
  specs = spec(1, T, D), spec(1, T, D), *(spec(*s) for s in shapes)

  def both(dy, *arrays):
    y, vjp = jax.vjp(block, *arrays)
    return y, vjp(dy)

  return v5e.compile(both, *specs)


def instructions(program):
  """Its optimised HLO, but for what a kernel is made of and where from."""
  parts = r", (?:metadata|backend_config|custom_call_config)=\{.*"
  lines = [line for line in program.as_text().splitlines() if " = " in line]
  return [re.sub(parts, "", line) for line in lines]


def test_bodies_do_not_matter():
  whole = compiled()
  with v5e.kernels_without_bodies():
    hollow = compiled()
  assert instructions(hollow) == instructions(whole)
  assert len(instructions(whole)) > 50
  memory, code = zip(*map(sizes, (whole, hollow)), strict=True)
  assert memory[0] == memory[1]
  assert code[1] < code[0] / 2  # the rest is that of products


def sizes(program):
  """Its memory for arguments, results and temporaries; for its code."""
  found = program.memory_analysis()
  parts = "argument", "output", "alias", "temp"
  of_arrays = [getattr(found, f"{part}_size_in_bytes") for part in parts]
  return of_arrays, found.generated_code_size_in_bytes
