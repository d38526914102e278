"""One rule of precision for all ops, read from the compiled programs.

The interpreter computes every product in full and cannot see it.
"""

import pathlib

import products
import pytest
import v5e
from pallas_gemma import bench
from pallas_gemma.bench.v5e import kernel_operands

pytestmark = [pytest.mark.no_interpreter, v5e.needs_compiler]
SUITE = str(pathlib.Path(products.__file__))
# Matrix products of 128 x 128 x 128, by kernel.
PRODUCTS = {
  "plain_product": 1,
  "geglu_fwd": 2,
  "geglu_bwd": 4,
  "feed_forward_fwd": 3,
  "feed_forward_bwd": 6,
  "expert_feed_forward_fwd": 2,
  "expert_feed_forward_down_fwd": 1,
  "expert_feed_forward_bwd": 6,
  "flash_attention_fwd": 2,
  "flash_attention_bwd": 5,
  "linear_cross_entropy_fwd": 1,
  "linear_cross_entropy_bwd": 3,
}


def is_product(instruction):
  return instruction.opcode.startswith("vmatmul")


def instructions(dtype):
  """How often each kernel runs an instruction of the matrix units."""
  counts = {}
  program = next(p for p in products.programs() if p.case == dtype).build()
  operands = kernel_operands(program.function, program.specs, program.values)
  job = bench.Job(SUITE, f"products/{dtype}/fwd/pallas")
  with bench.compiler_output(job) as (folder, _):
    for name, path in bench.find_listings(folder).items():
      kernels = [kernel for kernel in PRODUCTS if kernel in name]
      if kernels:
        kernel = max(kernels, key=len)
        listing = bench.parse_listing(path.read_text(), name)
        visits = bench.count_cycles(listing, operands.get(kernel)).visits
        counts[kernel] = sum(
          times * sum(map(is_product, bundle))
          for times, bundle in zip(visits, listing.bundles, strict=True)
        )
  return counts


def test_every_op_that_multiplies_is_here():
  named = {op.name for op in products.OPS if op.pallas and multiplies(op)}
  # How often its loop runs depends on lengths, which a listing alone does not
  # have; the bar of its numbers in float32 has no room for one pass.
  named.remove("decode_attention")
  assert named == set(products.ARGUMENTS)
  assert {f"{name}_fwd" for name in named} < PRODUCTS.keys()


def multiplies(op):
  case = op.tests[0]
  return op.cost(*case.args, **case.kwargs)[0].flops > 0


def test_float32_takes_six_passes():
  """Of float32 an instruction multiplies 8 rows by 128 x 128."""
  got = instructions("float32")
  assert got == {name: 6 * 16 * count for name, count in PRODUCTS.items()}


def test_bfloat16_takes_one_pass():
  """Of bfloat16 it multiplies 16 rows.  A transposition beside the products may
  go through the matrix unit too.
  """
  got = instructions("bfloat16")
  assert got.keys() == PRODUCTS.keys()
  for name, count in PRODUCTS.items():
    assert 8 * count <= got[name] <= 8 * (count + 1), name
