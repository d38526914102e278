"""A command's options: parsed by tyro, and then what it lets pass in silence.

tyro takes an option without its values for no values, an empty text for the
folder that one is in, and of several values that are given twice the second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shutil
import typing
from collections.abc import Iterator, Sequence
from typing import TypeVar

import tyro

from ._errors import UserError

_Config = TypeVar("_Config")

_NARROWEST = 60  # characters

_RULE = re.compile("[─-]{5,}")


def parse(
  config: type[_Config], command: str, arguments: Sequence[str]
) -> _Config:
  """The options of a command.

  Args:
    config: a dataclass with a field for each.
    command: such as "pallas-gemma train".
    arguments: what follows it.

  Raises:
    UserError: for a mistake.
    SystemExit: after `--help`.
  """
  box = io.StringIO()
  try:
    with contextlib.redirect_stderr(box), _wide_enough():
      parsed = tyro.cli(config, prog=command, args=arguments)
  except SystemExit as end:
    if not end.code:
      raise  # --help
    mistake = _of_box(box.getvalue())
    if re.match("Unrecognized options: -[^-]", mistake):
      mistake += "; a value that begins with a dash is given as --option=VALUE"
  else:
    mistake = next(_mistakes(config, arguments), "")
    if not mistake:
      return parsed
  raise UserError(f"{mistake} ({command} --help lists the options)")


@contextlib.contextmanager
def _wide_enough() -> Iterator[None]:
  """Inside, the terminal has a width in which the options can be read.

  tyro makes a column of single letters in a narrow one, and in one of less than
  six characters it does not end.
  """
  chosen = os.environ.get("COLUMNS")
  if shutil.get_terminal_size().columns < _NARROWEST:
    os.environ["COLUMNS"] = str(_NARROWEST)
  try:
    yield
  finally:
    os.environ.pop("COLUMNS", None)
    if chosen is not None:
      os.environ["COLUMNS"] = chosen


def _of_box(text: str) -> str:
  """The message in a box that tyro draws.

  It has a title, and compartments divided by rules; the message is in the
  first.  Where the terminal does not show Unicode, there is a rule below the
  title.
  """
  lines = [line.strip(" │╭╮╰╯") for line in text.splitlines()][1:]
  if lines and _RULE.fullmatch(lines[0]):
    del lines[0]
  rule = next((i for i, x in enumerate(lines) if _RULE.fullmatch(x)), None)
  return " ".join(" ".join(lines[:rule]).split())


def _mistakes(config: type, arguments: Sequence[str]) -> Iterator[str]:
  """What is wrong with arguments that tyro accepts."""
  types = dict(_types_of(config))
  given: dict[str, list[str]] = {}
  for name, values in _given(arguments):
    if name in given and _is_several(types.get(name)):
      yield f"--{name}: given twice; give all its values behind one"
    given[name] = values
  for name, values in given.items():
    kind = types.get(name)
    if "" in (values if not name else [] if _is_several(kind) else values[1:]):
      yield "an empty path; give one, or leave it out"
    if _is_several(kind) and not values:
      yield f"--{name}: nothing follows it; give a value, or leave it out"
    if "Path" in str(kind) and "" in values:
      yield f"--{name}: an empty path; give one, or leave it out"
    keys: list[object] = []
    if typing.get_origin(kind) is dict:
      keys = [int(key) for key in values[::2]]
    elif _is_several(kind) and "Path" in str(kind):
      keys = [os.path.realpath(value) for value in values]
    for i, key in enumerate(keys):
      if key in keys[:i]:
        yield f"--{name}: {key} is given twice; give it once"


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
  """Each option as it is given: its name, and its values.

  First, under no name, come what stands before all of them.
  """
  option: tuple[str, list[str]] = "", []
  for argument in arguments:
    if argument.startswith("--"):
      yield option
      name, equals, value = argument[2:].partition("=")
      option = name.replace("_", "-"), [value] if equals else []
    else:
      option[1].append(argument)
  yield option


def _types_of(config: type, prefix: str = "") -> Iterator[tuple[str, object]]:
  """The options by name, such as "model.head-size", with their types."""
  types = typing.get_type_hints(config)
  for field in dataclasses.fields(config):
    name, kind = prefix + field.name.replace("_", "-"), types[field.name]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
      yield from _types_of(kind, f"{name}.")
    else:
      yield name, kind


def _is_several(kind: object) -> bool:
  """Whether an option of this type takes any number of values."""
  return typing.get_origin(kind) in (tuple, dict)
