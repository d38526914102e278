"""Configs that a tuner found best, as data.

`tuned/OP.json` is a list of entries, each the best config of one problem:

    {"key": {"chip": "v5e", "heads": 8, ...}, "config": {"block_q": 256, ...},
     "cycles": 7012345, "jax": "0.12.0.1", "libtpu": "0.0.50.1"}

An op says what its key is made of; lengths go in rounded up to a power of two,
batch sizes never.  A problem that is not in the table gets a config from the
op's own model of VMEM.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from . import tpu

_DIRECTORY = pathlib.Path(__file__).parents[1] / "tuned"

Key = tuple[str, Mapping[str, Any]]  # an op, and what its table is asked for
_ASKED: contextvars.ContextVar[list[Key] | None] = contextvars.ContextVar(
  "pallas_gemma_asked_keys", default=None
)


def power_of_two(length: int) -> int:
  """The length, rounded up to a power of two, as keys hold it."""
  return 1 << (length - 1).bit_length()


def tuned_config(op: str, **key: Any) -> Mapping[str, Any] | None:
  """Fields of the config tuned for `key` on this chip, None if it is not there.

  Args:
    op: the op's name, that of its table.
    **key: what the op's configs depend on: numbers, strings, booleans.
  """
  key = {"chip": tpu.chip(), **key}
  asked = _ASKED.get()
  if asked is not None:
    asked.append((op, key))
    return None
  return _configs(op).get(frozenset(key.items()))


@functools.cache
def _configs(op: str) -> dict[frozenset, Mapping[str, Any]]:
  return {frozenset(e["key"].items()): e["config"] for e in entries(op)}


# --- for the tuner ------------------------------------------------------------


@contextlib.contextmanager
def asked_keys() -> Iterator[list[Key]]:
  """Lends a list of what ops traced inside ask their tables for.

  They find nothing there, so that the list does not depend on the tables.
  """
  asked: list[Key] = []
  token = _ASKED.set(asked)
  try:
    yield asked
  finally:
    _ASKED.reset(token)


def path(op: str) -> pathlib.Path:
  """The file of an op's table, which need not be there."""
  return _DIRECTORY / f"{op}.json"


def entries(op: str) -> list[dict[str, Any]]:
  """An op's table, as the file has it."""
  return json.loads(path(op).read_text()) if path(op).exists() else []


def write_entry(op: str, entry: Mapping[str, Any]) -> pathlib.Path:
  """Puts an entry into an op's table, in place of one with its key."""
  table = [e for e in entries(op) if e["key"] != entry["key"]] + [dict(entry)]
  table.sort(key=lambda e: json.dumps(e["key"], sort_keys=True))
  lines = ",\n".join(f"  {json.dumps(e, sort_keys=True)}" for e in table)
  path(op).write_text(f"[\n{lines}\n]\n")
  _configs.cache_clear()
  return path(op)
