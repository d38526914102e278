"""JAX's TPU interpreter, set up to catch what hardware would not forgive."""

import dataclasses
import functools
import inspect
import threading

import eager
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jax._src import core
from jax._src.state import types as state
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Two cores, so that a grid axis wrongly declared "parallel" gives wrong sums;
# unwritten memory reads as NaN and out-of-bounds reads raise by default.
PARAMS = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True)


def evaluate_op_by_op():
  """A kernel runs once: to compile it would take longer than all its ops.

  Neither what a core does is compiled, nor what brings it there, nor the
  program around it: but for the devices of a mesh, which wait for each other.
  In a loop of the program, a kernel is a single call out of it.
  """
  from jax._src import pjit
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as module
  from jax._src.pallas.mosaic.interpret import thread_map

  thread_map._run_jaxpr = eager.evaluate
  compiled = pjit._pjit_call_impl_python
  interpret = module.interpret_pallas_call
  here = threading.local()

  def call_jit(*args, jaxpr, **params):
    # A loop of what is evaluated comes back here, as a program of its own.
    within = getattr(here, "evaluates", False)
    alone = not within and _on_one_device(args, params)
    if not (alone and _is_interpreted(jaxpr.jaxpr)):
      return compiled(*args, jaxpr=jaxpr, **params)
    here.evaluates = True
    try:
      results = eager.evaluate(jaxpr.jaxpr, jaxpr.consts, *args)
    # What the interpreter finds, a race or a read out of bounds, is the error
    # of a program, as where that is compiled: tests ask for it by this type.
    except Exception as error:
      raise jax.errors.JaxRuntimeError(str(error)) from error
    finally:
      here.evaluates = False
    return [*map(jax.device_put, results)], None, None, []

  def call_kernel(params, *args):
    if not params["interpret"]:
      return None
    params = dict(params)
    settings = params.pop("interpret")
    call = functools.partial(interpret, interpret_params=settings, **params)
    jaxpr = _traced(call, args)
    return eager.evaluate(jaxpr.jaxpr, jaxpr.consts, *args)

  pjit._pjit_call_impl_python = call_jit
  eager.EXACT["pallas_call"] = call_kernel

  @functools.wraps(interpret)
  def interpret_pallas_call(*args, out_avals, **params):
    function = functools.partial(interpret, out_avals=out_avals, **params)
    if core.get_axis_env().axis_sizes:
      return function(*args)
    jaxpr = _traced(function, args)
    call = functools.partial(eager.evaluate, jaxpr.jaxpr, jaxpr.consts)
    outs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in out_avals]
    return jax.experimental.io_callback(call, outs, *args, ordered=True)

  module.interpret_pallas_call = interpret_pallas_call


def _traced(function, args):
  shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
  return jax.make_jaxpr(function)(*shapes)


def _on_one_device(args, params):
  placed = (getattr(x, "sharding", None) for x in args)
  return (
    params["ctx_mesh"].empty
    and not any(
      map(_is_given, (*params["in_shardings"], *params["out_shardings"]))
    )
    and all(s is None or len(s.device_set) == 1 for s in placed)
  )


def _is_given(sharding):
  return isinstance(sharding, jax.sharding.Sharding)


def _is_interpreted(jaxpr):
  """Whether a kernel of it goes to the interpreter, and nothing to a mesh."""
  equations = {eqn.primitive.name: eqn for eqn in _equations(jaxpr)}
  kernel = equations.get("pallas_call")
  return bool(
    kernel and kernel.params["interpret"] and "shard_map" not in equations
  )


def _equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    if eqn.primitive.name != "pallas_call":
      for inner in core.jaxprs_in_params(eqn.params):
        yield from _equations(inner)


def copy_words_too():
  """Teaches the interpreter the copies of words that hardware makes.

  `ref.bitcast(uint32)` of bfloat16 [..., N, H] in HBM has rows of the words
  that two heads share, [..., N / 2, H].  JAX's interpreter copies between
  arrays of one dtype alone: it is given both heads, as an index of the ref.
  """
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as module

  load, save = map(inspect.unwrap, (module.get, module.store))

  def get(*args, **kwargs):
    at, in_words = _heads_of_words(args[5])
    token, x = load(*args[:5], at, *args[6:], **kwargs)
    if in_words:
      low, high = (x[..., n, :].view(np.uint16) for n in range(2))
      x = low | high.astype(np.uint32) << 16
    return token, x

  def store(*args, **kwargs):
    at, in_words = _heads_of_words(args[5])
    x = args[6]
    if in_words:
      halves = [(x >> shift).astype(np.uint16) for shift in (0, 16)]
      x = np.stack(halves, axis=-2).view(jnp.bfloat16)
    return save(*args[:5], at, x, *args[7:], **kwargs)

  module.get, module.store = map(module.fail_on_exception, (get, store))


def _heads_of_words(transforms):
  """Both heads of a row of words, and whether it was one."""
  if not transforms or not isinstance(transforms[0], state.BitcastTransform):
    return transforms, False
  _, indexer = transforms
  *outer, row, lanes = indexer.indices
  *sizes, rows, width = indexer.shape
  return (
    dataclasses.replace(
      indexer,
      indices=(*outer, pl.Slice(2 * int(row), 2, 1), lanes),
      shape=(*sizes, 2 * rows, width),
    ),
  ), True
