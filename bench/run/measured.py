"""Times programs by the clock: device time from a profiler trace.

On a TPU the trace holds each execution as the device saw it, without the
dispatch.  Elsewhere the same code reads the host's time around each run.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout

from ..suites.program import Built, Program, bound
from ..v5e import V5E
from .row import Row

MEASURED = "measured"
_RUN = "pallas-gemma-bench-run"
_WARM_UP = 3


def measure(program: Program, runs: int = 20) -> Row:
  """Compiles a program for the device at hand and times it.

  Args:
    program: what to run.
    runs: how often, after the first few.

  Returns:
    The median; a failure gives a row with an error.
  """
  fields: dict[str, Any] = dict(
    op=program.op,
    case=program.case,
    which=program.which,
    implementation=program.implementation,
    versions=versions(),
  )
  try:
    seconds, temp_bytes = _run(program, runs)
  except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
    return Row(error=f"{type(error).__name__}: {error}"[:400], **fields)
  median = statistics.median(seconds)
  bound_cycles, bound_by = bound(program.costs)
  on_v5e = is_v5e(jax.devices()[0])
  return Row(
    method=f"{MEASURED} on {jax.devices()[0].device_kind}",
    seconds=median,
    cycles=round(median * V5E.clock_hz) if on_v5e else 0,
    bound_cycles=bound_cycles if on_v5e else 0,
    bound_by=bound_by,
    temp_bytes=temp_bytes,
    samples=tuple(seconds),
    **fields,
  )


def is_v5e(device: Any) -> bool:
  """Whether the bounds and the clock of the table are this device's."""
  return device.device_kind in ("TPU v5 lite", "TPU v5e")


def versions() -> dict[str, str]:
  """Of what a measurement depends on."""
  found = {"jax": metadata.version("jax")}
  if jax.default_backend() == "tpu":
    found["libtpu"] = metadata.version("libtpu")
  return found | {"device": jax.devices()[0].device_kind}


def _run(program: Program, runs: int) -> tuple[list[float], int]:
  """Seconds of each run, and bytes of temporaries."""
  built = program.build()
  arrays = _arrays(built)
  layouts: Any = Format(Layout.AUTO) if program.free_layouts else None
  jitted = jax.jit(built.function, in_shardings=layouts, out_shardings=layouts)
  compiled = jitted.lower(*built.specs).compile()
  arrays = jax.device_put(arrays, list(compiled.input_formats[0]))
  for _ in range(_WARM_UP):
    jax.block_until_ready(compiled(*arrays))
  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory):
      for _ in range(runs):
        with jax.profiler.TraceAnnotation(_RUN):
          jax.block_until_ready(compiled(*arrays))
    seconds = durations(pathlib.Path(directory))
  if len(seconds) != runs:
    raise ValueError(f"the trace holds {len(seconds)} runs of {runs}")
  memory: Any = compiled.memory_analysis()
  return seconds, memory.temp_size_in_bytes if memory else 0


def _arrays(built: Built) -> Sequence[jax.Array]:
  """Normal floats, made on the device, and the drawn integers."""
  keys = jax.random.split(jax.random.key(0), len(built.specs))
  return [
    jax.random.normal(key, spec.shape, jnp.float32).astype(spec.dtype)
    if value is None
    else jnp.asarray(np.asarray(value), spec.dtype)
    for key, spec, value in zip(keys, built.specs, built.values, strict=True)
  ]


def durations(directory: pathlib.Path) -> list[float]:
  """Seconds of each run in a trace: the device's if it has one."""
  (path,) = directory.rglob("*.xplane.pb")
  profile: Any = jax.profiler.ProfileData.from_file(str(path))
  planes = list(profile.planes)
  on_device = [
    event
    for plane in planes
    if plane.name.startswith("/device:TPU:")
    for event in _events(plane, line="XLA Modules")
  ]
  on_host = [
    event
    for plane in planes
    if plane.name.startswith("/host:")
    for event in _events(plane)
    if event.name == _RUN
  ]
  return [event.duration_ns * 1e-9 for event in on_device or on_host]


def _events(plane: Any, line: str | None = None) -> Iterator[Any]:
  for each in plane.lines:
    if line is None or each.name == line:
      yield from each.events
