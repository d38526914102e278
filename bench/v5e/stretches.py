"""What of a listing's bundles has to be executed, and stretches of plain ones.

Most of a listing is stretches of bundles without branches and copies.  How long
one takes depends on the state of the units alone, and a loop soon finds them in
a state that it found them in before: what the stretch did then is remembered,
and is done again without looking at its bundles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

from .listing import Instruction
from .units import State


@dataclasses.dataclass(frozen=True)
class Bundle:
  """What of a bundle has to be executed.

  Attributes:
    phis: loop variables, which take their values first.
    steps: everything else, in order.
    scalar: those of the steps that change the scalars alone.
    timed: those that take time, whatever the scalars are.
    is_plain: whether there is nothing else, and no predicate on what is timed.
  """

  phis: list[Instruction]
  steps: list[Callable[[], None]]
  scalar: list[Callable[[], None]]
  timed: list[Callable[[], None]]
  is_plain: bool


@dataclasses.dataclass(frozen=True)
class Stretch:
  """Plain bundles one after the other.

  Attributes:
    scalar: what they do to the scalars.
    timed: what takes time, each after so many bundles since the one before.
    rest: bundles from the last of these on.
    seen: by the state of the units before: the cycles that it took, those of
      them that waited for room and for results, and the state after.
  """

  scalar: list[Callable[[], None]]
  timed: list[tuple[int, Callable[[], None]]]
  rest: int
  seen: dict[State, tuple[int, int, int, State]] = dataclasses.field(
    default_factory=dict
  )

  @classmethod
  def of(cls, bundles: list[Bundle]) -> Stretch:
    """The stretch of bundles, all of them plain."""
    scalar = [step for bundle in bundles for step in bundle.scalar]
    timed, gap = [], 0
    for bundle in bundles:
      for step in bundle.timed:
        timed.append((gap, step))
        gap = 0
      gap += 1
    return cls(scalar, timed, gap)


def ends_of_stretches(code: list[Bundle], cuts: Collection[int]) -> list[int]:
  """For each bundle, where the plain ones from it on end; itself for none.

  Args:
    code: the bundles.
    cuts: where a stretch has to end in any case.
  """
  ends: list[int] = []
  end = len(code)
  for pc in reversed(range(len(code))):
    end = end if code[pc].is_plain else pc
    ends.append(end)
    end = pc if pc in cuts else end
  return ends[::-1]


def runs_of_idle(code: list[Bundle], cuts: Collection[int]) -> list[int]:
  """For each bundle, how many from it on have nothing to execute.

  Args:
    code: the bundles.
    cuts: as for `ends_of_stretches`.
  """
  ahead: list[int] = []
  run = 0
  for pc in reversed(range(len(code))):
    run = 0 if code[pc].phis or code[pc].steps else run + 1
    ahead.append(run)
    run = 0 if pc in cuts else run
  return ahead[::-1]
