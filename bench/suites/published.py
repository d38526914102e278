"""Kernels of other packages whose time on a v5e their authors published.

Their own kernels at their own shapes, so that `show.calibration` can put the
cycle model's estimate beside a measurement.  Each package is wanted in the very
version that was measured, and is imported only where it is installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from pallas_gemma.kernels import Cost

from .program import Built, Pass, Program


@dataclasses.dataclass(frozen=True)
class Source:
  """Who measured, what, and how; with a compiler that is not ours.

  Attributes:
    package: its name on PyPI.
    version: the one that was measured.
    module: what it is imported as.
    file: where the numbers are.
    machine: what it ran on, with which versions.
    timing: how the time was taken.
    dispatch_ms: of each time, what the host takes to start the program.
    dispatch: where that number comes from.
  """

  package: str
  version: str
  module: str
  file: str
  machine: str
  timing: str
  dispatch_ms: float
  dispatch: str

  @property
  def name(self) -> str:
    """The package and its version, `pallas-forge-0.1.2`."""
    return f"{self.package}-{self.version}"

  @property
  def installed(self) -> bool:
    """Whether the version that was measured is at hand."""
    try:
      return metadata.version(self.package) == self.version
    except metadata.PackageNotFoundError:
      return False

  @property
  def command(self) -> str:
    """How to get it, whatever version of JAX it asks for."""
    return f"pip install --no-deps {self.package}=={self.version}"


PALLAS_FORGE = Source(
  package="pallas-forge",
  version="0.1.2",
  module="pallas_forge",
  file="notebooks/05_reproduce_figures.ipynb of github.com/linhkid/"
  "pallas-forge, commit 090510b; its outputs",
  machine="Colab v5e-1",
  timing="Median of 15 runs by the host's clock, each waited for; dispatch "
  "included",
  dispatch_ms=0.15,
  dispatch="XLA's product of 2048 took 0.24 ms, of which the chip needs 0.087",
)
GDN2_PALLAS = Source(
  package="gdn2-pallas",
  version="0.1.1",
  module="atomic_ops",
  file="README.md, Benchmarks",
  machine="One chip of a Kaggle v5e-8; JAX 0.11.1, libtpu 0.0.46.1",
  timing="Mean of 2 repeats of 4 runs by the host's clock, each waited for; "
  "dispatch included",
  dispatch_ms=0.1,
  dispatch="assumed",
)
DELTANET_TPU = Source(
  package="deltanet-tpu",
  version="0.1.0",
  module="deltanet_tpu",
  file="benchmarks/results/public_shapes_v5e.json of the source distribution",
  machine="One chip of a v5e; JAX 0.11.2, libtpu 0.0.48",
  timing="Median of 20 runs by the host's clock, each waited for; dispatch "
  "included",
  dispatch_ms=0.19,
  dispatch="its decoding step takes 0.242 ms if each is waited for, 0.052 if "
  "100 are queued",
)
SOURCES = (PALLAS_FORGE, GDN2_PALLAS, DELTANET_TPU)


@dataclasses.dataclass(frozen=True)
class Measurement:
  """A program, the milliseconds that were published for it, and by whom."""

  program: Program
  ms: float
  source: Source


def programs() -> Iterator[Program]:
  """The programs that were measured, of packages installed or not."""
  for measurement in measurements():
    yield measurement.program


def measurements() -> Iterator[Measurement]:
  """All that were found published."""
  yield from _pallas_forge()
  yield from _gdn2_pallas()
  yield from _deltanet_tpu()


# --- programs -----------------------------------------------------------------


def _measurement(
  source: Source,
  problem: str,
  ms: float,
  load: Callable[[], Callable[..., Any]],
  specs: tuple[jax.ShapeDtypeStruct, ...],
  *,
  flops: int = 0,
  which: Pass = "fwd",
  implementation: str | None = None,
) -> Measurement:
  """A program of a package and its time.

  Args:
    source: the package.
    problem: what is computed, and of which sizes: "OP/CASE".
    ms: as published.
    load: imports the package and gives the function of the arrays.
    specs: of the arrays.
    flops: of the matrix unit, at least, where that is simple to say.
    which: whether the function computes gradients too.
    implementation: what to call it if not after the package.
  """
  op, _, case = problem.partition("/")
  size = sum(s.dtype.itemsize * math.prod(s.shape) for s in specs)
  program = Program(
    op=op,
    case=case,
    which=which,
    implementation=implementation or source.name,
    build=lambda: Built(_for_tpu(load()), specs, (None,) * len(specs)),
    costs=(Cost(flops, size),),
    needs=source.module,
  )
  return Measurement(program, ms, source)


def _arrays(
  *shapes: tuple[int, ...], dtype: Any = jnp.float32
) -> tuple[jax.ShapeDtypeStruct, ...]:
  return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


def _for_tpu(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function, traced as where there is a TPU.

  These packages ask JAX for its devices, and interpret their kernels where none
  is a TPU, though the program be compiled for one.
  """

  def traced(*arrays: jax.Array) -> Any:
    with contextlib.ExitStack() as stack:
      stack.enter_context(mock.patch("jax.default_backend", lambda: "tpu"))
      if PALLAS_FORGE.installed:
        name = "pallas_forge._compat.is_tpu_available"
        stack.enter_context(mock.patch(name, lambda: True))
      return function(*arrays)

  return traced


# --- pallas-forge -------------------------------------------------------------

_SIZE = 2048
_COLUMNS = (128, 256, 512)
_MATMULS = {  # block_m, block_k: the time for each block_n of _COLUMNS
  (64, 128): (2.665, 1.588, 1.007),
  (64, 256): (1.693, 1.092, 0.770),
  (64, 512): (1.143, 0.794, 0.681),
  (128, 128): (1.603, 0.972, 0.694),
  (128, 256): (1.020, 0.693, 0.530),
  (128, 512): (0.754, 0.553, 0.457),
  (256, 128): (0.974, 0.646, 0.496),
  (256, 256): (0.713, 0.520, 0.416),
  (256, 512): (0.552, 0.437, 0.380),
  (512, 128): (0.668, 0.488, 0.389),
  (512, 256): (0.538, 0.400, 0.387),
  (512, 512): (0.476, 0.373, 0.318),
}


def _pallas_forge() -> Iterator[Measurement]:
  make = functools.partial(_measurement, PALLAS_FORGE, flops=2 * _SIZE**3)
  arrays = functools.partial(_arrays, dtype=jnp.bfloat16)
  square = arrays(*((_SIZE, _SIZE),) * 2)
  yield make(
    f"matmul/{_SIZE}",
    0.24,
    lambda: jnp.matmul,
    square,
    implementation="xla",
  )
  for (rows, inner), times in _MATMULS.items():
    for columns, ms in zip(_COLUMNS, times, strict=True):
      blocks = dict(block_m=rows, block_k=inner, block_n=columns)
      yield make(
        f"matmul/{_SIZE}_{rows}x{inner}x{columns}",
        ms,
        functools.partial(_forge, "tiled_matmul", **blocks),
        square,
      )
  rows, d, f = 2048, 4096, 11008
  yield make(
    f"swiglu/{rows}x{d}x{f}",
    4.22,
    functools.partial(_forge, "fused_swiglu", block_m=128, block_n=256),
    arrays((rows, d), (d, f), (d, f)),
    flops=4 * rows * d * f,
  )
  tokens = (4, 2048, 4096)
  yield make(
    "add_rms_norm/4x2048x4096",
    0.89,
    functools.partial(_forge, "fused_rmsnorm_residual"),
    arrays(tokens, tokens, tokens[-1:]),
    flops=0,
  )


def _forge(name: str, **blocks: int) -> Callable[..., Any]:
  package = importlib.import_module(PALLAS_FORGE.module)
  return functools.partial(getattr(package, name), **blocks)


# --- gdn2-pallas --------------------------------------------------------------


def _gdn2_pallas() -> Iterator[Measurement]:
  times: tuple[tuple[str, int, int, Pass, float], ...] = (
    ("KAGGLE_MEDIUM", 1, 1024, "fwd+bwd", 5.92),
    ("KAGGLE_SMALL", 4, 2048, "fwd+bwd", 30.86),
    ("KAGGLE_MEDIUM", 8, 4096, "fwd", 102.08),
    ("KAGGLE_MEDIUM", 8, 4096, "fwd+bwd", 175.20),
  )
  heads, h = 6, 128
  for preset, b, t, which, ms in times:
    yield _measurement(
      GDN2_PALLAS,
      f"gated_delta/{b}x{t}x{heads}_{preset.lower()}",
      ms,
      functools.partial(_gated_delta, preset, which),
      _arrays(*((b, t, heads, h),) * 6, (b, heads, h, h)),
      which=which,
    )


def _gated_delta(preset: str, which: Pass) -> Callable[..., Any]:
  package = importlib.import_module(GDN2_PALLAS.module)
  config = getattr(package, preset)

  def forward(*arrays: jax.Array) -> Any:
    *qkvwbg, h0 = arrays
    return package.gdn2_pallas_forward_trainable(
      *qkvwbg, qkvwbg[0].shape[-1] ** -0.5, h0=h0, config=config
    )

  def loss(*arrays: jax.Array) -> jax.Array:
    out, state = forward(*arrays)
    return jnp.sum(out**2) + jnp.sum(state**2)

  return (
    forward if which == "fwd" else jax.value_and_grad(loss, tuple(range(7)))
  )


# --- deltanet-tpu -------------------------------------------------------------

_TOKENS = 8192
# The function, heads of keys and of values, heads of the gates where they are
# one number a head, and the times forward and with gradients.
_LAYERS = {
  "gdn2": ("chunk_gdn2", 12, 24, None, 6.413, 14.428),
  "qwen3_5_2b": ("chunk_gdn", 16, 16, 16, 7.256, 17.084),
  "qwen3_5_4b": ("chunk_gdn", 16, 32, 32, 15.925, 37.033),
  "kimi_linear": ("chunk_kda", 32, 32, None, 15.973, 36.701),
}


def _deltanet_tpu() -> Iterator[Measurement]:
  for case, (name, keys, values, gates, *times) in _LAYERS.items():
    k = (1, _TOKENS, keys, 128)
    v = (1, _TOKENS, values, 128)
    gate = (1, _TOKENS, gates or keys, 1)
    last = {
      "chunk_gdn2": (k, k, v),
      "chunk_gdn": (gate, gate),
      "chunk_kda": (k, gate),
    }[name]
    passes: tuple[Pass, ...] = ("fwd", "fwd+bwd")
    for which, ms in zip(passes, times, strict=True):
      yield _measurement(
        DELTANET_TPU,
        f"delta_rule/{case}_{_TOKENS}",
        ms,
        functools.partial(_delta_rule, name, which),
        _arrays(k, k, v, *last),
        which=which,
      )


def _delta_rule(name: str, which: Pass) -> Callable[..., Any]:
  package = importlib.import_module(DELTANET_TPU.module)
  forward = functools.partial(getattr(package, name), precision="bf16")

  def both(*arrays: jax.Array) -> Any:
    def loss(*arrays: jax.Array) -> jax.Array:
      return jnp.sum(forward(*arrays))

    return jax.value_and_grad(loss, tuple(range(len(arrays))))(*arrays)

  return forward if which == "fwd" else both
