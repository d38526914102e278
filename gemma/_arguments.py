"""Arguments from Python: one of a wrong kind is named in a sentence.

The command line makes every option what its type says; who calls from Python
may give anything.  Without this a text in place of a list of paths would be
read letter by letter, and a number of NumPy's would end a run when it is first
written down as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import numbers
import os
import pathlib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, TypeVar

from ._errors import UserError

_T = TypeVar("_T")

_WORDS: dict[Any, str] = {
  int: "a whole number",
  float: "a number",
  bool: "True or False",
  str: "a text",
  pathlib.Path: "a path",
  type(None): "None",
  Mapping: "a dict",
  Collection: "a list",
}
_SEVERAL = {pathlib.Path: "paths", str: "texts"}


class _WrongError(Exception):
  """A value is not of a type."""


def wanted(name: str, what: str, got: object) -> UserError:
  """The error about an argument."""
  return UserError(f"{name}: wanted {what}, got {_short(got)}")


def make_fields(
  config: Any, error: Callable[[str, str, Any], Exception] = wanted
) -> None:
  """Makes the fields of a frozen dataclass what their annotations say.

  A list becomes a tuple, a text a path, a number of NumPy's one of Python's.

  Args:
    config: the dataclass, as the caller filled it.
    error: of a field's name, what it must be and what it is.

  Raises:
    Exception: `error` of the first field that is of another kind.
  """
  kinds = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    value, kind = getattr(config, field.name), kinds[field.name]
    try:
      made = _made(value, kind)
    except _WrongError:
      raise error(field.name, _words(kind), value) from None
    if made is not value:
      object.__setattr__(config, field.name, made)


def instance(name: str, value: Any, kind: type[_T]) -> _T:
  """The value, if it is one of `kind`.

  Raises:
    UserError: if it is not.
  """
  if not isinstance(value, kind):
    raise wanted(name, _words(kind), value)
  return value


def whole(name: str, value: Any, least: int, most: int) -> int:
  """The value, if it is a whole number in these bounds.

  Raises:
    UserError: if it is not.
  """
  with contextlib.suppress(_WrongError):
    if least <= (number := _made(value, int)) <= most:
      return number
  raise wanted(name, f"a whole number from {least} to {most}", value)


def several(name: str, value: Iterable[_T], what: str) -> list[_T]:
  """The items of what is no single text or path.

  Raises:
    UserError: if it is one, or has no items.
  """
  try:
    return list(_items(value))
  except _WrongError:
    raise wanted(name, f"a list of {what}", value) from None


def path_of(name: str, value: Any) -> str | os.PathLike[str]:
  """The path, if it is one.

  Raises:
    UserError: if it is not.
  """
  if not isinstance(value, str | os.PathLike):
    raise wanted(name, "a path", value)
  return value


def _made(value: Any, kind: Any) -> Any:
  origin, parts = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    for part in parts:
      # What may be a path is one: "" would be the folder one is in.
      if not (part is str and pathlib.Path in parts):
        with contextlib.suppress(_WrongError):
          return _made(value, part)
    raise _WrongError
  if origin is Literal:
    fits = any(type(value) is type(x) and value == x for x in parts)
  elif origin is tuple:
    return tuple(_made(item, parts[0]) for item in _items(value))
  elif kind in _MAKERS:
    return _MAKERS[kind](value)
  else:
    fits = isinstance(value, origin or kind)
  if not fits:
    raise _WrongError
  return value


def _items(value: Any) -> Iterable:
  if isinstance(value, str | bytes) or not isinstance(value, Iterable):
    raise _WrongError
  return value


def _bool(value: Any) -> bool:
  # NumPy's is no instance of Python's.
  if type(value).__name__ not in ("bool", "bool_"):
    raise _WrongError
  return bool(value)


def _int(value: Any) -> int:
  if not isinstance(value, numbers.Integral) or isinstance(value, bool):
    raise _WrongError
  return value if type(value) is int else int(value)


def _float(value: Any) -> float:
  if not isinstance(value, numbers.Real) or isinstance(value, bool):
    raise _WrongError
  return value if isinstance(value, int) else float(value)


def _path(value: Any) -> pathlib.Path:
  if isinstance(value, pathlib.Path):
    return value
  if not isinstance(value, str | os.PathLike) or not os.fspath(value):
    raise _WrongError
  return pathlib.Path(value)


_MAKERS: dict[Any, Callable[[Any], Any]] = {
  bool: _bool,
  int: _int,
  float: _float,
  pathlib.Path: _path,
}


def _words(kind: Any) -> str:
  origin, parts = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    named = [p for p in parts if not (p is str and pathlib.Path in parts)]
    *others, last = map(_words, named)
    return f"{', '.join(others)} or {last}"
  if origin is Literal:
    return " or ".join(map(repr, parts))
  if origin is tuple:
    return f"a list of {_SEVERAL[parts[0]]}"
  name = (origin or kind).__name__
  article = "an" if name[0] in "AEIOU" else "a"
  return _WORDS.get(origin or kind, f"{article} {name}")


def _short(value: object) -> str:
  text = " ".join(repr(value).split())
  return text if len(text) <= 60 else f"a {type(value).__name__}"
