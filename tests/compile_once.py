"""Programs for the CPU are compiled in less time.

Nearly every one runs once, on little data: most of its time goes into compiling
it.  Small ones are compiled once a process, whichever test asks: JAX keeps a
compiled program with the function that it came from, and most tests make their
own, of the same few operations.  Those of the model are large, and not
optimised.  That rounds some last digits of tanh and rsqrt otherwise, so kernels
and the plain jnp that their numbers are measured by are.

What comes before, to lower a program, begins with a context of MLIR's with all
dialects loaded: 4 ms each time.  Programs share theirs.
"""

import contextlib
import functools
import os
import re

import jax
from jax._src import compiler
from jax._src.interpreters import mlir

_LARGEST = 1 << 14  # of a program's text: those of single operations, and more
_MOST = 500
_LOWERED = 100  # with a context, which holds on to every type it was asked for

_unoptimised = False


@contextlib.contextmanager
def without_optimisation():
  """Programs are not optimised, here and in processes that are started."""
  global _unoptimised
  jax.devices()  # XLA has read its flags, which are others' from here on
  flags = os.environ["XLA_FLAGS"]
  os.environ["XLA_FLAGS"] = re.sub("(optimization_level=)1", r"\g<1>0", flags)
  _unoptimised = True
  try:
    yield
  finally:
    _unoptimised = False
    os.environ["XLA_FLAGS"] = flags


def compile_faster():
  """Makes JAX ask here before it compiles for the CPU."""
  compile_it, kept = compiler.backend_compile_and_load, {}

  @functools.wraps(compile_it)
  def compile_or_keep(backend, module, devices, options, host_callbacks):
    args = backend, module, devices, options, host_callbacks
    if backend.platform != "cpu":
      return compile_it(*args)
    if _unoptimised:
      build = options.executable_build_options
      build.debug_options.xla_backend_optimization_level = 0
    text = "" if host_callbacks else str(module)
    if not 0 < len(text) < _LARGEST:
      return compile_it(*args)
    places = tuple(device.id for device in devices)
    key = text, places, options.SerializeAsString()
    if key not in kept:
      if len(kept) >= _MOST:
        kept.clear()
      kept[key] = compile_it(*args)
    return kept[key]

  compiler.backend_compile_and_load = compile_or_keep


def lower_faster():
  """Makes JAX lower a hundred programs with one context, not with one each."""
  make, context, uses = mlir.make_ir_context, None, 0

  @functools.wraps(make)
  def make_or_share():
    nonlocal context, uses
    if uses % _LOWERED == 0:
      context = make()
    uses += 1
    return context

  mlir.make_ir_context = make_or_share
