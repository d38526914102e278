"""Configs that a tuner found best, as data.

`tuned/OP.json` is a list of entries, each the best config of one problem:

    {"key": {"chip": "v5e", "heads": 8, ...}, "config": {"block_q": 256, ...},
     "cycles": 7012345, "jax": "0.12.0.1", "libtpu": "0.0.50.1"}

An op says what its key is made of; lengths go in rounded up to a power of two,
batch sizes never.  A problem that is not in the table gets a config from the
op's own model of VMEM.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

_DIRECTORY = pathlib.Path(__file__).parent / "tuned"
_CHIPS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e"}


def chip() -> str:
  """Short name of the chip to compile for: that of the mesh, else v5e."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  kind = device.device_kind if device is not None else "TPU v5 lite"
  return _CHIPS.get(kind, kind)


def power_of_two(length: int) -> int:
  """The length, rounded up to a power of two, as keys hold it."""
  return 1 << (length - 1).bit_length()


def tuned_config(op: str, **key: Any) -> Mapping[str, Any] | None:
  """Fields of the config tuned for `key` on this chip, None if it is not there.

  Args:
    op: the op's name, that of its table.
    **key: what the op's configs depend on: numbers, strings, booleans.
  """
  return _table(op).get(_frozen({"chip": chip(), **key}))


@functools.cache
def _table(op: str) -> dict[frozenset, Mapping[str, Any]]:
  path = _DIRECTORY / f"{op}.json"
  entries = json.loads(path.read_text()) if path.exists() else []
  return {_frozen(entry["key"]): entry["config"] for entry in entries}


def _frozen(key: Mapping[str, Any]) -> frozenset:
  return frozenset(key.items())
