"""`--mix`: how much of a step each of several texts gets."""

from __future__ import annotations

from .._config import LARGEST
from .._errors import UserError


def parse(text: str) -> tuple[float, float]:
  """1 and 3 of "1:3", from the first step to the last; 2 and 2 of "2".

  Raises:
    UserError: if it is neither.
  """
  parts = text.split(":")
  try:
    numbers = [float(part) for part in parts]
  except ValueError:
    numbers = []
  if len(numbers) not in (1, 2) or not all(0 <= x <= LARGEST for x in numbers):
    raise UserError(
      f"mix: wanted weights such as 2, or 1:3 for one that goes from 1 at the "
      f"first step to 3 at the last, got {text!r}"
    )
  return numbers[0], numbers[-1]


def check(weights: tuple[str, ...], texts: int) -> None:
  """Refuses weights that cannot be those of so many texts.

  Raises:
    UserError: saying why.
  """
  if not weights:
    return
  if len(weights) != texts or texts < 2:
    raise UserError(
      f"mix: wanted a weight for each of several --data, got {len(weights)} "
      f"weights for {texts}"
    )
  pairs = [parse(weight) for weight in weights]
  if not all(sum(pair[end] for pair in pairs) > 0 for end in (0, 1)):
    raise UserError("mix: wanted weights of which one is more than 0, got none")
