"""Where the tests run, and a guard on what they import."""

import atexit
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import inspect
import os
import pathlib
import shutil
import sys
import tempfile

import heard

# Before jax is imported: the tests want a CPU even where libtpu is installed,
# eight of it for the meshes, and libtpu as a compiler without a TPU to query.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# The compiler's log says how it cuts programs for the instruction memory.
os.environ["LIBTPU_INIT_ARGS"] = (
  os.environ.get("LIBTPU_INIT_ARGS", "") + " --vmodule=overlay_partitioner=10"
)
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "0")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "0")
# In the interpreter the two cores of all eight devices wait for each
# other, in threads of XLA's pool.  By default it has one for each device, and
# they would wait for ever.
os.environ.setdefault("NPROC", "64")
# The tests run in as many processes as there are cores, which NumPy's threads
# would only take from each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Nearly every program here runs once, on little data: most time goes into
# compiling it for the CPU, where these ask for less; `compile_once`, for less
# still.
COMPILE_FASTER = [
  "--xla_backend_optimization_level=1",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_parallel_codegen_split_count=1",
]
# XLA's former code generator takes half the time of today's.  JAX 0.12 has it
# no more, nor its flag, and XLA ends the process at a flag it does not know.
# It needs the fusion passes: without them (`xla_disable_hlo_passes`), what it
# makes of attention is wrong.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  COMPILE_FASTER += ["--xla_cpu_use_fusion_emitters=false"]
# XLA may drop a rounding to bfloat16 between two fused operations; here it must
# not, or a compiled reference would not be the plain jnp that it specifies.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_allow_excess_precision=false",
    *COMPILE_FASTER,
  ]
)


import compile_once  # noqa: E402
import hypothesis  # noqa: E402
import interpreter  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
import v5e  # noqa: E402
from jax.experimental.compilation_cache.compilation_cache import (  # noqa: E402
  reset_cache,
)
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

# The same examples on every run, however slow the machine, and no shrinking: in
# the interpreter an example takes seconds.
hypothesis.settings.register_profile(
  "interpreter",
  derandomize=True,
  deadline=None,
  database=None,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
  phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)
hypothesis.settings.load_profile("interpreter")

# Not the user's own, which may hold what another version has written.
os.environ["PALLAS_GEMMA_CACHE"] = tempfile.mkdtemp(prefix="pallas-gemma-")
atexit.register(
  shutil.rmtree, os.environ["PALLAS_GEMMA_CACHE"], ignore_errors=True
)

heard.heard()
compile_once.compile_faster()
compile_once.lower_faster()
interpreter.evaluate_op_by_op()
interpreter.copy_words_too()


def pytest_configure():
  """Takes the checkout off sys.path, where `python -m pytest` puts it.

  There our folders would answer to `import kernels` and `import gemma` in
  place of the PyPI packages of those names.
  """
  root = pathlib.Path(__file__).resolve().parents[1]
  sys.path[:] = [p for p in sys.path if pathlib.Path(p).resolve() != root]


def pytest_collection_finish():
  """What is imported by now stays: Python need not search it for garbage."""
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Keeps tests that share what is expensive in one process, and first.

  The other processes would compute it again: the runs of the trainer, and what
  is expected of the mutants' problems.  All other tests go, one at a time, to
  where there is room, so that all processes end together.
  """
  from xdist.scheduler import LoadScopeScheduling

  class Scheduling(LoadScopeScheduling):  # it starts with the largest scopes
    def _split_scope(self, nodeid):
      module, name = nodeid.split("::", 1)
      if module.endswith(("test_train.py", "test_cli.py", "test_operands.py")):
        return module
      test = name.split("[")[0]
      of_mutants = "mutant" in test or test.endswith("_die")
      return f"{module}::mutants" if of_mutants else nodeid

  return Scheduling(config, log)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_end_with_their_module():
  """They add up to gigabytes, and no other module calls them."""
  yield
  jax.clear_caches()


@pytest.fixture
def kernels_without_bodies():
  """For `v5e.around_kernels`."""
  with v5e.kernels_without_bodies():
    yield


@pytest.fixture(autouse=True, scope="module")
def models_are_not_optimised(request):
  """But kernels are, whose numbers count to the last digit, if not marked."""
  of_models = "pallas_gemma.gemma" in inspect.getsource(request.module)
  leaves_out = of_models or request.node.get_closest_marker("unoptimised")
  with (
    compile_once.without_optimisation()
    if leaves_out
    else contextlib.nullcontext()
  ):
    yield


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
  """The folder of compiled programs: all runs of a module have the same."""
  names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs")
  before = [getattr(jax.config, f"jax_{name}") for name in names]
  cache = str(tmp_path_factory.mktemp("compiled"))
  for name, value in zip(names, (cache, 0.0), strict=True):
    jax.config.update(f"jax_{name}", value)
  reset_cache()  # or it goes on as the first compilation found it
  yield cache
  for name, value in zip(names, before, strict=True):
    jax.config.update(f"jax_{name}", value)
  reset_cache()


@pytest.fixture(scope="module")
def traced_once():
  """Runs whose steps are the same program have the same functions."""
  loop = importlib.import_module("pallas_gemma.gemma._train.loop")
  make = functools.cache(loop.make_steps)
  others = dict(data=(), work_dir=None, eval_batches="auto", allow_change=False)
  others |= dict(
    cache_dir=None, profile=None, max_skipped=1, mix=(), save_in_background=True
  )
  others |= dict.fromkeys(("evaluate_every", "save_every", "keep"), 1)

  def make_steps(config, valid_vocab_size, layout):
    same = dataclasses.replace(config, **others)
    return make(same, valid_vocab_size, layout)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "make_steps", make_steps)
    yield


@pytest.fixture(autouse=True)
def tpu_or_interpreter(request):
  """Kernels run on the TPU if there is one, else in JAX's TPU interpreter."""
  on_tpu = jax.default_backend() == "tpu"
  if on_tpu or request.node.get_closest_marker("no_interpreter"):
    yield
  else:
    with pltpu.force_tpu_interpret_mode(interpreter.PARAMS):
      yield
