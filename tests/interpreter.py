"""JAX's TPU interpreter, set up to catch what hardware would not forgive."""

import threading

import jax
import jax.core
from jax.experimental.pallas import tpu as pltpu

# Two cores, so that a grid axis wrongly declared "parallel" gives wrong sums;
# unwritten memory reads as NaN and out-of-bounds reads raise by default.
PARAMS = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True)


def compile_kernels_once():
  """Gives an older JAX the cache that JAX 0.12 has.

  It compiles a kernel anew for every call, every device and every core.
  """
  if jax.__version_info__ >= (0, 12):
    return
  from jax._src.pallas.mosaic.interpret import thread_map

  def evaluate(jaxpr, consts, *args):
    jax.core.eval_jaxpr(jaxpr, consts, *args)

  jitted, lock = jax.jit(evaluate, static_argnums=0), threading.Lock()

  def run(jaxpr, consts, *args):
    with lock:  # the first thread compiles, the others find it done
      compiled = jitted.trace(jaxpr, consts, *args).lower().compile()
    compiled(consts, *args)

  thread_map._run_jaxpr = run
