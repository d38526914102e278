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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._errors import UserError

_ADDRESS = "JAX_COORDINATOR_ADDRESS"
# Milliseconds of one request to the coordination service, of many.
_WAIT = 60_000
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


class Channel:
  """Lets processes tell each other something, each time all of them.

  By the coordination service that JAX starts with them and not by devices, so
  that a thread can do it while devices take steps.  All processes must do the
  same in the same order, for each channel.

  Args:
    name: of the channel.
  """

  def __init__(self, name: str):
    self._name = name
    self._count = 0

  def gather(self, text: str) -> list[str]:
    """What each process says here, in their order."""
    if count() == 1:
      return [text]
    client, me = _client(), jax.process_index()
    self._count += 1
    client.key_value_set(self._key(self._count, me), text)
    told = [self._wait(self._key(self._count, i)) for i in range(count())]
    # All have said something now, so all have read what was said before.
    if self._count > 1:
      client.key_value_delete(self._key(self._count - 1, me))
    return told

  @contextlib.contextmanager
  def together(self, what: str) -> Iterator[None]:
    """A block that all processes come to the end of, or none.

    What another one wrote in it is there afterwards.

    Args:
      what: is done, for the message of those that did not fail.

    Raises:
      UserError: if it failed in another process, saying why.
    """
    try:
      yield
    except Exception as error:
      self.gather(str(error) or type(error).__name__)
      raise
    for i, text in enumerate(self.gather("")):
      if text:
        raise UserError(f"{what}: process {i} failed: {text}")

  def _key(self, number: int, process: int) -> str:
    return f"pallas-gemma/{self._name}/{number}/{process}"

  def _wait(self, key: str) -> str:
    """What is said by this key, however long that takes.

    If its process has died, JAX ends this one too.
    """
    while True:
      try:
        return _client().blocking_key_value_get(key, _WAIT)
      except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
          raise


def _client() -> Any:
  """JAX's end of the coordination service; it has no public name.

  Orbax, whose barriers are made of it, gives it away neither.
  """
  from jax._src import distributed

  return distributed.global_state.client


_main = Channel("main")
together = _main.together


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
