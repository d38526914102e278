"""Runs many jobs, each in a process of its own, and keeps their results."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from . import _compiler
from ._job import MARK, Job
from ._row import Row

_WORKER = f"{__package__}._worker"


def cache_directory() -> pathlib.Path:
  """Where results are kept: XDG_CACHE_HOME, or ~/.cache."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base) / "pallas-gemma" / "bench"


def run_jobs(
  jobs: Iterable[Job],
  *,
  workers: int = 1,
  timeout: float = 900.0,
  cache: pathlib.Path | None = None,
  done: Callable[[Job, dict[str, Any]], None] = lambda job, row: None,
) -> list[dict[str, Any]]:
  """The result of every job, in order.

  A job that fails gives a row with an error; it ends no other job.

  Args:
    jobs: what to run.
    workers: processes at a time.
    timeout: seconds after which a job is given up.
    cache: folder of earlier results, None for none.
    done: called with each job and its result as it ends.
  """
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    futures = []
    for job in jobs:
      futures.append(pool.submit(_cached, job, timeout, cache, done))
    try:
      return [future.result() for future in futures]
    except KeyboardInterrupt:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _cached(job, timeout, cache, done) -> dict[str, Any]:
  path = cache / f"{job.digest()}.json" if cache else None
  if path and path.exists():
    result = json.loads(path.read_text())
  else:
    result = run_job(job, timeout)
    # A timeout or a lack of memory may pass; what the compiler refuses stays.
    if path and not result.get("transient"):
      path.parent.mkdir(parents=True, exist_ok=True)
      partial = path.with_suffix(f".{os.getpid()}")
      partial.write_text(json.dumps(result))
      partial.replace(path)
  done(job, result)
  return result


def run_job(job: Job, timeout: float = 900.0) -> dict[str, Any]:
  """Runs one job in a process; returns its row as JSON holds it."""
  with tempfile.TemporaryDirectory(prefix="pallas-gemma-") as directory:
    dump = pathlib.Path(directory)
    try:
      process = subprocess.run(
        worker_command(job, dump),
        env=_compiler.environment(dump, static=job.static),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
      )
    except subprocess.TimeoutExpired:
      return _failure(job, f"gave up after {timeout:.0f} s", transient=True)
  for line in process.stdout.splitlines():
    if line.startswith(MARK):
      return json.loads(line.removeprefix(MARK))
  killed = process.returncode < 0
  return _failure(
    job, _reason(process.stderr, process.returncode), transient=killed
  )


def worker_command(job: Job, dump: pathlib.Path) -> list[str]:
  """The command line that runs a job."""
  return [
    sys.executable,
    "-P",
    "-m",
    _WORKER,
    json.dumps(job.to_json()),
    str(dump),
  ]


def _reason(stderr: str, code: int) -> str:
  """The line of a traceback that says what happened."""
  lines = [line.strip() for line in stderr.splitlines() if line.strip()]
  for line in reversed(lines):
    head, colon, _ = line.partition(": ")
    if colon and head.rpartition(".")[2].endswith(("Error", "Exception")):
      return line[:400]
  last = lines[-1][:400] if lines else "no output"
  return f"the compiler ended the process (code {code}): {last}"


def _failure(job: Job, error: str, *, transient: bool) -> dict[str, Any]:
  op, case, which, implementation = job.key.split("/")
  row = Row(
    op=op,
    case=case,
    which=which,
    implementation=implementation,
    error=error,
    config=job.config,
  )
  return row.to_json() | {"transient": transient}


@contextlib.contextmanager
def dumped(job: Job, timeout: float = 900.0) -> Iterator[pathlib.Path]:
  """Runs a job and lends the folder that its compiler printed into."""
  with tempfile.TemporaryDirectory(prefix="pallas-gemma-") as directory:
    dump = pathlib.Path(directory)
    subprocess.run(
      worker_command(job, dump),
      env=_compiler.environment(dump, static=job.static),
      capture_output=True,
      check=True,
      timeout=timeout,
    )
    yield dump
