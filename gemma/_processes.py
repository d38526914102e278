"""Several processes that work on one thing, one on each host.

All of them run the same program on the same input, in step.  The first one
alone prints, and writes what is not in parts.  JAX calls what this needs
"multi-controller": https://docs.jax.dev/en/latest/multi_process.html.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._errors import UserError

_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_NUMBERS = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start(wanted: bool, environment: Mapping[str, str] = os.environ) -> None:
  """Joins the other processes, if there are to be any, before JAX is used.

  Args:
    wanted: by the user.  Where they are is known by the machine, as on a TPU
      pod, or by Slurm, Open MPI and others; see `jax.distributed.initialize`.
    environment: where JAX_COORDINATOR_ADDRESS says that there are others, then
      JAX_NUM_PROCESSES and JAX_PROCESS_ID how many, and which one this is.

  Raises:
    UserError: if they cannot be found or joined.
  """
  address = environment.get(_ADDRESS)
  if not (wanted or address) or jax.distributed.is_initialized():
    return
  given: dict[str, Any] = {}
  if address:
    numbers = [environment.get(name, "") for name in _NUMBERS]
    if not all(number.isdecimal() for number in numbers):
      if any(numbers) or not wanted:
        raise UserError(
          f"{_ADDRESS} is {address}: wanted numbers in {_NUMBERS[0]} and "
          f"{_NUMBERS[1]} too, got {numbers[0] or 'none'} and "
          f"{numbers[1] or 'none'}"
        )
    else:
      given = dict(
        coordinator_address=address,
        num_processes=int(numbers[0]),
        process_id=int(numbers[1]),
      )
  # JAX's own handler of SIGTERM would stand in the way of the trainer's.
  jax.config.update("jax_enable_preemption_service", False)
  # Of CPUs; there is no other of theirs that is compiled in everywhere.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(**given)
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f"distributed: cannot join the other processes: {error}; set {_ADDRESS} "
      f"(host:port of the first one), {' and '.join(_NUMBERS)}"
    ) from error


def count() -> int:
  """How many there are."""
  # One that was not started as one of several need not look for devices, which
  # takes long.
  return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
  """Whether this is the one that prints and writes."""
  return count() == 1 or jax.process_index() == 0


def all_agree(is_fine: bool) -> bool:
  """Whether all processes say so; each waits for all others."""
  if count() == 1:
    return is_fine
  return bool(multihost_utils.process_allgather(np.asarray(is_fine)).all())


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
  """A block that all processes come to the end of, or none.

  What another one wrote in it is there afterwards.

  Args:
    what: is done, for the message of those that did not fail.

  Raises:
    UserError: if it failed in another process.
  """
  try:
    yield
  except Exception:
    all_agree(False)
    raise
  if not all_agree(True):
    raise UserError(f"{what}: another process failed; see what it says")


class Poll:
  """Lets all processes know what one of them was told, at the same time."""

  def __init__(self) -> None:
    self._several = count() > 1
    self._asked: jax.Array | None = None
    if self._several:
      mesh = Mesh(np.array(jax.devices()), ("all",))
      self._each = NamedSharding(mesh, PartitionSpec("all"))
      nowhere = NamedSharding(mesh, PartitionSpec())
      self._highest = jax.jit(jnp.max, out_shardings=nowhere)

  def __call__(self, number: int) -> int:
    """The highest number of all processes, each of which must call this.

    Of several it is that of the call before, so that no device waits for one:
    the answer was computed while there was other work.
    """
    if not self._several:
      return number
    before = self._asked
    mine = np.full(len(jax.local_devices()), number, np.int32)
    self._asked = self._highest(
      jax.make_array_from_process_local_data(self._each, mine)
    )
    return 0 if before is None else int(before)
