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

from .. import v5e
from .job import MARK, Job
from .row import Result, Row

_WORKER = f"{__package__}.worker"


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
  done: Callable[[Job, Result], None] = lambda job, result: None,
) -> list[Result]:
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
      # Here, not in the pool: Python 3.11 cannot parse in several threads.
      path = cache / f"{job.digest()}.json" if cache else None
      futures.append(pool.submit(_cached, job, timeout, path, done))
    try:
      return [future.result() for future in futures]
    except KeyboardInterrupt:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _cached(
  job: Job,
  timeout: float,
  path: pathlib.Path | None,
  done: Callable[[Job, Result], None],
) -> Result:
  if path and path.exists():
    result = Result.from_json(json.loads(path.read_text()))
  else:
    result = run_job(job, timeout)
    # A timeout or a lack of memory may pass; what the compiler refuses stays.
    if path and not result.transient:
      path.parent.mkdir(parents=True, exist_ok=True)
      partial = path.with_suffix(f".{os.getpid()}")
      partial.write_text(json.dumps(result.to_json()))
      partial.replace(path)
  done(job, result)
  return result


def run_job(job: Job, timeout: float = 900.0) -> Result:
  """Runs one job in a process of its own."""
  with tempfile.TemporaryDirectory(prefix="pallas-gemma-") as directory:
    folder = pathlib.Path(directory)
    try:
      process = subprocess.run(
        _worker_command(job),
        env=v5e.environment(folder, ask_compiler=job.ask_compiler),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
      )
    except subprocess.TimeoutExpired:
      return _failure(job, f"gave up after {timeout:.0f} s", transient=True)
    stderr = process.stderr + v5e.compiler_log(folder)
  if result := _result(process.stdout):
    return result
  killed = process.returncode < 0
  return _failure(job, _reason(stderr, process.returncode), transient=killed)


def _result(stdout: str) -> Result | None:
  """What a worker printed, None if it ended before."""
  for line in stdout.splitlines():
    if line.startswith(MARK):
      return Result.from_json(json.loads(line.removeprefix(MARK)))
  return None


def _worker_command(job: Job) -> list[str]:
  """The command line that runs a job."""
  return [sys.executable, "-P", "-m", _WORKER, json.dumps(job.to_json())]


def _reason(stderr: str, code: int) -> str:
  """The line of a traceback that says what happened."""
  lines = [line.strip() for line in stderr.splitlines() if line.strip()]
  for line in reversed(lines):
    head, colon, _ = line.partition(": ")
    if colon and head.rpartition(".")[2].endswith(("Error", "Exception")):
      return line[:400]
  last = lines[-1][:400] if lines else "no output"
  return f"the compiler ended the process (code {code}): {last}"


def _failure(job: Job, error: str, *, transient: bool) -> Result:
  op, case, which, implementation = job.key.split("/")
  row = Row(
    op=op,
    case=case,
    which=which,
    implementation=implementation,
    error=error,
    config=job.config,
  )
  return Result(row, transient=transient)


@contextlib.contextmanager
def compiler_output(
  job: Job, timeout: float = 900.0
) -> Iterator[tuple[pathlib.Path, Row]]:
  """Runs a job; lends its row, and the folder that its compiler printed into.

  Raises:
    subprocess.CalledProcessError: if the job fails.
  """
  with tempfile.TemporaryDirectory(prefix="pallas-gemma-") as directory:
    folder = pathlib.Path(directory)
    process = subprocess.run(
      _worker_command(job),
      env=v5e.environment(folder, ask_compiler=job.ask_compiler),
      capture_output=True,
      text=True,
      errors="replace",
      check=True,
      timeout=timeout,
    )
    result = _result(process.stdout)
    assert result is not None  # the last thing that a worker does
    yield folder, result.row
