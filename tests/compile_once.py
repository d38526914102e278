"""Small programs are compiled once a process, whichever test asks for them.

JAX keeps a compiled program with the function that it came from: most tests
make their own, of the same few operations.
"""

import functools

from jax._src import compiler

_LARGEST = 1 << 14  # of a program's text: those of single operations, and more
_MOST = 500


def keep_small_programs():
  """Makes JAX ask here before it compiles for the CPU."""
  compile_it, kept = compiler.backend_compile_and_load, {}

  @functools.wraps(compile_it)
  def compile_or_keep(backend, module, devices, options, host_callbacks):
    args = backend, module, devices, options, host_callbacks
    text = "" if host_callbacks or backend.platform != "cpu" else str(module)
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
