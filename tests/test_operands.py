"""What a kernel is given is read where it lies, also if the same jit made it.

A BlockSpec may say that an operand is in HBM, and the compiler may still put it
into VMEM: an array that the same jit makes for the kernel, and never reads
again, is a candidate, and so is every other operand of that kernel.  Copies out
of it must then be copies within VMEM.  Since libtpu 0.0.43 some are not: they
take an address in VMEM for one in HBM, and read what is there, such as zeros
(github.com/jax-ml/jax/issues/39744; 0.0.52 still does).  No interpreter shows
it, but the program does: an operand is `inlined_call_operand.vmem`, and its
register comes back as the HBM side of a copy.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import v5e
from pallas_gemma.bench.v5e import (
  compile_program,
  environment,
  parse_listing,
)
from pallas_gemma.kernels import OPS

pytestmark = [pytest.mark.no_interpreter, v5e.needs_compiler]
KERNELS = [op for op in OPS if op.pallas]

# Scalar instructions that make an address from another one.
_ADDRESS = {"scalar_lea", "sshll", "sadd", "smov", "sphi", "int_to_ptr"}
_ADDRESS |= {"scalar_select"}
_SPACES = {"hbm", "vmem", "smem"}
_REGISTER = re.compile(r"%\w+")


def operands(listing):
  """The memory of each operand, by the register of its address."""
  return {
    instruction.dest: instruction.opcode.partition(".")[2]
    for bundle in listing.bundles
    for instruction in bundle
    if instruction.opcode.startswith("inlined_call_operand")
  }


def misread(listing):
  """Copies that take an operand's address for one in another memory."""
  found = set()
  # A register may have several sources, by way of loops: hence sets.
  spaces = {r: {space} for r, space in operands(listing).items()}
  before = None
  while before != (before := sum(map(len, spaces.values()))):
    for instruction in (i for bundle in listing.bundles for i in bundle):
      name = instruction.opcode.partition(".")[0]
      if name in _ADDRESS and instruction.dest:
        values = [*instruction.operands, *instruction.keywords.values()]
        sources = [r for v in values for r in _REGISTER.findall(v)]
        known = [spaces.get(source, set()) for source in sources]
        own = spaces.setdefault(instruction.dest, set())
        spaces[instruction.dest] = own.union(*known)
      elif name == "dma":
        for side in _SPACES & instruction.keywords.keys():
          for register in _REGISTER.findall(instruction.keywords[side]):
            if spaces.get(register, set()) & (_SPACES - {side}):
              found.add(f"{instruction.opcode}, {side}={register}")
  return found


# What libtpu 0.0.50.1 makes of the program, shortened.
WRONG = """
     0   :  { %s95 = smov [#allocation3]  ;;  %s120 = inlined_call_operand.{} \
[shape: f32[2,256], index: 0, kind: input, shape index: {{}}] /* operand 0 */ }
   0x1   :  { %s11 = sshll.u32 %s120, 4  ;;  %s12 = int_to_ptr.hbm \
[resolvable:$true] %s11 }
   0x3   :  { %18 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s12, \
/*size_in_granules=*/32, /*vmem=*/%s95, /*dst_syncflagno=*/[#allocation4] }
   0x4   :  { %91 = dma.done.wait [#allocation4], 32 }
"""


@pytest.mark.parametrize("space, count", [("vmem", 1), ("hbm", 0)])
def test_a_copy_from_the_wrong_memory_is_noticed(space, count):
  text = WRONG.replace("operand.{}", f"operand.{space}")
  assert len(misread(parse_listing(text))) == count


def programs():
  """Functions and the specs of their arguments: each op and its gradients, on
  arrays that the same program makes and whose results it uses.
  """
  for op in KERNELS:
    for case in op.tests[:2]:  # the second is ragged, in most
      yield functools.partial(forward, op, case), case.specs
      if op.cost(*case.args, **case.kwargs)[1] is not None:
        yield functools.partial(gradient, op, case, None), case.specs
    first = op.tests[0]
    for mode in op.modes.values():
      config = mode(*first.args, **first.kwargs)
      yield functools.partial(gradient, op, first, config), first.specs


def forward(op, case, *arrays, config=None):
  function = functools.partial(
    op.function, implementation="pallas", config=config
  )
  made = [2 * array for array in arrays]
  return jax.tree.map(lambda out: out + 1, case.bind(function)(*made))


def gradient(op, case, config, *arrays):
  floats = [i for i, a in enumerate(arrays) if a.dtype != jnp.int32]

  def loss(*values):
    filled = list(arrays)
    for i, value in zip(floats, values, strict=True):
      filled[i] = value
    outs = forward(op, case, *filled, config=config)
    return sum(
      (out.astype(jnp.float32) ** 2).sum() for out in jax.tree.leaves(outs)
    )

  return jax.grad(loss, range(len(floats)))(*(arrays[i] for i in floats))


@pytest.fixture(scope="module")
def listings(tmp_path_factory):
  """Those of every kernel, from one process whose compiler prints them.

  Programs overwrite nothing of each other's here: files begin with a number.
  """
  folder = tmp_path_factory.mktemp("listings")
  variables = environment(folder)
  tests = str(pathlib.Path(__file__).parent)
  variables["PYTHONPATH"] = os.pathsep.join(
    [tests, *filter(None, [os.environ.get("PYTHONPATH")])]
  )
  command = [sys.executable, "-P", __file__]
  done = subprocess.run(command, env=variables, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = {}
  for path in folder.glob("*-final_bundles.txt"):
    if "schedule-analysis" not in path.name:
      found[path.name] = parse_listing(path.read_text(), path.name)
  return found


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in KERNELS])
def test_operands_made_in_the_same_jit_are_read_where_they_lie(op, listings):
  own = re.compile(rf"-(?:\w*_)?(?<!add_){op.name}_(?:fwd|bwd)")
  kernels = {k: v for k, v in listings.items() if own.search(k)}
  assert any("fwd" in name for name in kernels)
  # Else there is nothing to misread, and this test proves nothing.
  assert any("vmem" in operands(v).values() for v in kernels.values())
  wrong = {name: misread(listing) for name, listing in kernels.items()}
  assert not any(wrong.values()), wrong


if __name__ == "__main__":
  for function, specs in programs():
    compile_program(function, specs)
