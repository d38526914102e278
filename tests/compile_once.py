"""Programs for the CPU are compiled in less time.

Nearly every one runs once, on little data: most of its time goes into compiling
it.  Small ones are compiled once a process, whichever test asks: JAX keeps a
compiled program with the function that it came from, and most tests make their
own, of the same few operations.  Large ones are not optimised.  That rounds the
last digits of some tanh and rsqrt otherwise, so that it is not for small ones,
which are the plain jnp that a kernel's numbers are measured by.
"""

import functools

from jax._src import compiler

_LARGEST = 1 << 14  # of a program's text: those of single operations, and more
_MOST = 500


def compile_faster():
  """Makes JAX ask here before it compiles for the CPU."""
  compile_it, kept = compiler.backend_compile_and_load, {}

  @functools.wraps(compile_it)
  def compile_or_keep(backend, module, devices, options, host_callbacks):
    args = backend, module, devices, options, host_callbacks
    if backend.platform != "cpu":
      return compile_it(*args)
    text = str(module)
    if len(text) >= _LARGEST:
      build = options.executable_build_options
      build.debug_options.xla_backend_optimization_level = 0
    if host_callbacks or len(text) >= _LARGEST:
      return compile_it(*args)
    places = tuple(device.id for device in devices)
    key = text, places, options.SerializeAsString()
    if key not in kept:
      if len(kept) >= _MOST:
        kept.clear()
      kept[key] = compile_it(*args)
    return kept[key]

  compiler.backend_compile_and_load = compile_or_keep
