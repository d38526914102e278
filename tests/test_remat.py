"""Under `jax.checkpoint` a kernel's products are done again, or are kept.

JAX's `dots_saveable` keeps the results of XLA's products alone.  What the ops
keep for their backward passes has names; `kernels.saveable_names` has them all,
and the policy `kernels.save_products` keeps them beside XLA's.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
import v5e
from pallas_gemma import kernels
from pallas_gemma.kernels import OPS

pytestmark = pytest.mark.no_interpreter
policies = jax.checkpoint_policies
NAMED = [
  pytest.param(op, id=op.name)
  for op in OPS
  if any(name.startswith(f"{op.name}_") for name in kernels.saveable_names)
]
POLICIES = {
  "names": policies.save_only_these_names(*kernels.saveable_names),
  "products": kernels.save_products,
  "offload": policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(kernels.saveable_names),
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


def equations(jaxpr):
  """Those of a program, the ones inside its loops and calls among them.

  JAX 0.10 keeps kernels whose results nothing reads; XLA does not.
  """

  def is_jaxpr(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")

  read = {v for e in jaxpr.eqns for v in e.invars if not hasattr(v, "val")}
  read |= {v for v in jaxpr.outvars if not hasattr(v, "val")}
  for equation in jaxpr.eqns:
    if not read & {*equation.outvars}:
      continue
    yield equation
    if equation.primitive.name != "pallas_call":
      inner = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
      for value in filter(is_jaxpr, inner):
        yield from equations(getattr(value, "jaxpr", value))


def gradient(op, case, policy, *, loop=False, square=False, mode=None):
  """The gradient through a checkpointed op, or through three in a loop.

  Args:
    op: the op.
    case: its problem.
    policy: what may be kept.
    loop: whether the op runs in a scan.
    square: whether what follows the op, inside the checkpoint, reads the op's
      result for its own gradient.
    mode: of the op's gradient, None for the default.
  """
  config = op.modes[mode](*case.args, **case.kwargs) if mode else None
  function = case.bind(
    functools.partial(op.function, implementation="pallas", config=config)
  )

  def run(*arrays):
    floats = [i for i, a in enumerate(arrays) if a.dtype != jnp.int32]

    def block(total, *values):
      filled = list(arrays)
      for i, value in zip(floats, values, strict=True):
        filled[i] = value
      out = jax.tree.leaves(function(*filled))[0].astype(jnp.float32)
      return total + (out**2 if square else out).sum()

    def loss(*values):
      kept = jax.checkpoint(block, policy=policy)
      if not loop:
        return kept(jnp.float32(0), *values)

      def step(total, _):
        return kept(total, *values), None

      return jax.lax.scan(step, jnp.float32(0), length=3)[0]

    return jax.grad(loss, range(len(floats)))(*(arrays[i] for i in floats))

  return run


def kernels_of(op, case, policy, **options):
  """How many forward and backward kernels the program has."""
  traced = jax.make_jaxpr(gradient(op, case, policy, **options))(*case.specs)
  calls = [
    str(equation.params["name"])
    for equation in equations(traced.jaxpr)
    if equation.primitive.name == "pallas_call"
  ]
  return tuple(
    sum(call.startswith(f"{op.name}_{which}") for call in calls)
    for which in ("fwd", "bwd")
  )


@pytest.mark.parametrize("op", NAMED)
def test_xlas_policy_has_the_forward_kernel_run_twice(op):
  case = op.tests[0]
  assert kernels_of(op, case, policies.dots_saveable) == (2, 1)
  assert kernels_of(op, case, None) == (2, 1)


@pytest.mark.parametrize("loop", [False, True], ids=["alone", "in_a_loop"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("op", NAMED)
def test_the_forward_kernel_runs_once(op, policy, loop):
  for mode in (None, *op.modes):
    counts = kernels_of(op, op.tests[0], POLICIES[policy], loop=loop, mode=mode)
    assert counts == (1, 1), mode


@pytest.mark.parametrize("op", NAMED)
def test_also_where_what_follows_reads_the_result(op):
  counts = kernels_of(op, op.tests[0], kernels.save_products, square=True)
  assert counts == (1, 1)


@pytest.mark.parametrize("op", NAMED)
def test_the_names_are_those_that_programs_have(op):
  found = set()
  problems = [(case, None) for case in op.tests]
  problems += [(op.tests[0], mode) for mode in op.modes]
  for case, mode in problems:
    program = gradient(op, case, None, mode=mode)
    traced = jax.make_jaxpr(program)(*case.specs)
    found |= {
      equation.params["name"]
      for equation in equations(traced.jaxpr)
      if equation.primitive.name == "name"
    }
  own = {n for n in kernels.saveable_names if n.startswith(f"{op.name}_")}
  assert own and {n for n in found if n.startswith(f"{op.name}_")} == own


def test_products_of_xla_are_kept_too():
  def loss(x, w):
    policy = kernels.save_products
    return jax.checkpoint(lambda x: jnp.tanh(x @ w).sum(), policy=policy)(x)

  x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
  traced = jax.make_jaxpr(jax.grad(loss))(x, x)
  names = [e.primitive.name for e in equations(traced.jaxpr)]
  assert names.count("dot_general") == 2


@v5e.needs_compiler
@v5e.around_kernels
@pytest.mark.parametrize("op", NAMED)
def test_what_is_kept_can_lie_in_the_hosts_memory(op):
  """In S(5), where it goes from the forward loop and comes back from."""
  program = gradient(op, op.tests[0], POLICIES["offload"], loop=True)
  text = v5e.compile(program, *op.tests[0].specs).as_text() or ""
  calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
  assert len(calls) == 2 and "S(5)" in text
