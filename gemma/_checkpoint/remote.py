"""Steps that are on another machine: which there are, and fetching them.

They lie there as `steps` says, but for what needs renames: a step's files come
one by one, its checksums last, and they go in the other order.  So one without
checksums is no step: it is on its way, or was left half by a killed process.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping

from .._data.cache import Cache, default_directory
from .._errors import UserError
from .._files import write_atomically
from .._remote import Place
from .checksums import CHECKSUMS, checksums_in, problem_of
from .identity import CONFIG, TOKENIZER
from .steps import LOSS, STEP, loss_in, lowest

FOLDER = "checkpoints"
_TRIES = 5


def step_name(step: int) -> str:
  """The step's folder there."""
  return f"{FOLDER}/{step}"


def remote_steps(place: Place) -> tuple[dict[int, bytes], list[int]]:
  """The checksums of each complete step; and the steps that are not complete.

  Checksums that are cut were on their way, too.  If they are damaged, what they
  say is not known, but that the step was complete; who fetches it is told.
  """
  complete, rest = {}, []
  for name in place.listed(FOLDER):
    if not STEP.fullmatch(name):
      continue
    mark = place.read(f"{FOLDER}/{name}/{CHECKSUMS}")
    if mark is not None and mark.rstrip().endswith(b"}"):
      complete[int(name)] = mark
    else:
      rest.append(int(name))
  return dict(sorted(complete.items())), sorted(rest)


def remote_loss(place: Place, step: int) -> float | None:
  """As `read_losses`, of one step."""
  name = f"{step_name(step)}/{LOSS}"
  content = place.read(name)
  return None if content is None else loss_in(content, f"{place}/{name}")


def remote_losses(place: Place) -> dict[int, float]:
  """As `read_losses`."""
  complete, _ = remote_steps(place)
  losses = {step: remote_loss(place, step) for step in complete}
  return {step: x for step, x in losses.items() if x is not None}


def fetch(
  place: Place,
  step: int,
  mark: bytes,
  folder: pathlib.Path,
  only: tuple[str, ...] = (),
) -> None:
  """Brings a step to this machine, but for files that are there already.

  Args:
    place: has it.
    step: its number.
    mark: its checksums.
    folder: of the step here, which is complete afterwards.
    only: the beginnings of the files' names that are wanted; all by default.

  Raises:
    UserError: if a file is not what its checksum says.
    FileNotFoundError: if one is not there.
  """
  there = step_name(step)
  fix = f"delete {place}/{there} to use an earlier step"
  try:
    known = checksums_in(mark)
  except ValueError as error:
    raise UserError(
      f"checkpoint {place}/{there}/{CHECKSUMS}: damaged; {fix}"
    ) from error
  wanted = {n: k for n, k in known.items() if n.startswith(only or "")}
  missing = [n for n, k in wanted.items() if problem_of(folder / n, k)]
  place.download({f"{there}/{name}": folder / name for name in missing})
  for name in missing:
    if problem := problem_of(folder / name, wanted[name]):
      raise UserError(f"checkpoint {place}/{there}/{name}: {problem}; {fix}")
  folder.mkdir(parents=True, exist_ok=True)
  if (loss := place.read(f"{there}/{LOSS}")) is not None:
    (folder / LOSS).write_bytes(loss)
  if only:  # it is complete without the others
    mark = json.dumps(wanted, indent=2).encode()
  write_atomically(folder / CHECKSUMS, mark)


def choose_remote(
  place: Place, complete: Mapping[int, bytes], wanted: int | str | None
) -> int:
  """The step that is meant, as `choose_step`.

  Raises:
    UserError: if there is none.
  """
  known = ", ".join(map(str, complete)) or "none"
  if isinstance(wanted, int):
    if wanted in complete:
      return wanted
    raise UserError(
      f"checkpoint {place}: no complete step {wanted}; it has {known}"
    )
  if wanted == "best":
    losses = {step: remote_loss(place, step) for step in complete}
    best = lowest({s: x for s, x in losses.items() if x is not None})
    if best is None:
      raise UserError(
        f"checkpoint {place}: no step has a held-out loss, so none is the "
        f"best; it has {known}"
      )
    return best
  if wanted is not None:
    raise UserError(f'step: wanted a number or "best", got {wanted!r}')
  if not complete:
    raise UserError(f"checkpoint {place}: no complete step; it has none")
  return max(complete)


@contextlib.contextmanager
def fetched(
  place: Place, wanted: int | str | None, only: tuple[str, ...]
) -> Iterator[tuple[pathlib.Path, int]]:
  """A directory of this machine with one step of it, and the step's number.

  It does not stay: it is in the cache as long as the context lasts.

  Args:
    place: a work directory.
    wanted: as `choose_step` takes it.
    only: as `fetch` takes it.

  Raises:
    UserError: if there is no such step, or it is damaged.
  """
  try:
    cache = Cache(default_directory())
  except OSError as error:
    raise UserError(
      f"cache {default_directory()}: cannot write: {error}; set "
      "PALLAS_GEMMA_CACHE to a folder with room for a checkpoint"
    ) from error
  with cache.scratch() as directory:
    for name in (CONFIG, TOKENIZER):
      content = place.read(name)
      if content is None:
        raise UserError(
          f"checkpoint {place}: no {name}; give the place that `train` wrote to"
        )
      (directory / name).write_bytes(content)
    yield directory, _fetch_one(place, wanted, only, directory / FOLDER)


def _fetch_one(
  place: Place,
  wanted: int | str | None,
  only: tuple[str, ...],
  folder: pathlib.Path,
) -> int:
  """Brings the step that is meant into a folder; its number."""
  lost: FileNotFoundError | None = None
  for _ in range(_TRIES):
    complete, _ = remote_steps(place)
    step = choose_remote(place, complete, wanted)
    try:
      fetch(place, step, complete[step], folder / str(step), only)
    except FileNotFoundError as error:
      lost = error  # a trainer that runs may have removed it meanwhile
    else:
      return step
  raise UserError(
    f"checkpoint {place}: a file of a step is missing: {lost}; delete the step "
    "to use an earlier one"
  ) from lost
