"""Times every op of the registry for TPU v5e, with one or without.

Without a TPU the compiler is asked: it prints the final program bundle by
bundle, and a bundle is a cycle.

    what to time   _program: a pass of an implementation on a problem; the
                   suites are _registry (every op's own cases), _baselines (the
                   best that there is elsewhere), _gemma (a block of the model),
                   _calibration (programs of known time)
    estimating     _compiler (compiles for a described chip), _listing and _hlo
                   (read what it prints), _machine, _scalar, _units and _copies
                   (execute it), _prefetch (values that it branches on),
                   _estimate (the sum over a program), _chip
    measuring      _measured
    running        _job and _worker (one process per compile), _sweep (many),
                   _row (a result)
    showing        _cli, _table, report; bench_ops for pytest

Each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from ._chip import V5E as V5E
  from ._chip import Chip as Chip
  from ._cli import Arguments as Arguments
  from ._cli import Choice as Choice
  from ._cli import choose as choose
  from ._cli import run as run
  from ._compiler import compile_program as compile_program
  from ._compiler import describe as describe
  from ._copies import Copies as Copies
  from ._estimate import Estimate as Estimate
  from ._estimate import estimate as estimate
  from ._job import Job as Job
  from ._listing import Instruction as Instruction
  from ._listing import Listing as Listing
  from ._listing import ListingError as ListingError
  from ._listing import find_listings as find_listings
  from ._listing import parse_listing as parse_listing
  from ._machine import Cycles as Cycles
  from ._machine import Undecidable as Undecidable
  from ._machine import count as count
  from ._measured import durations as durations
  from ._measured import measure as measure
  from ._prefetch import kernel_operands as kernel_operands
  from ._program import Built as Built
  from ._program import Program as Program
  from ._program import config_class as config_class
  from ._program import make_config as make_config
  from ._program import of_case as of_case
  from ._program import passes as passes
  from ._program import suite as suite
  from ._row import Row as Row
  from ._row import bound as bound
  from ._sweep import cache_directory as cache_directory
  from ._sweep import dumped as dumped
  from ._sweep import run_job as run_job
  from ._sweep import run_jobs as run_jobs
  from ._units import Units as Units

_HOMES = {
  "Arguments": "_cli",
  "Built": "_program",
  "Chip": "_chip",
  "Choice": "_cli",
  "Copies": "_copies",
  "Cycles": "_machine",
  "Estimate": "_estimate",
  "Instruction": "_listing",
  "Job": "_job",
  "Listing": "_listing",
  "ListingError": "_listing",
  "Program": "_program",
  "Row": "_row",
  "Undecidable": "_machine",
  "Units": "_units",
  "V5E": "_chip",
  "bound": "_row",
  "cache_directory": "_sweep",
  "choose": "_cli",
  "compile_program": "_compiler",
  "config_class": "_program",
  "count": "_machine",
  "describe": "_compiler",
  "dumped": "_sweep",
  "durations": "_measured",
  "estimate": "_estimate",
  "find_listings": "_listing",
  "kernel_operands": "_prefetch",
  "make_config": "_program",
  "measure": "_measured",
  "of_case": "_program",
  "parse_listing": "_listing",
  "passes": "_program",
  "run": "_cli",
  "run_job": "_sweep",
  "run_jobs": "_sweep",
  "suite": "_program",
}


def __getattr__(name: str) -> object:
  """Imports the module behind a public name (PEP 562)."""
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
  """The public names, imported or not."""
  return sorted(_HOMES)
