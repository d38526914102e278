"""Why a file has no text that can be read."""

from __future__ import annotations

from typing import Any


class NotText(Exception):
  """A file has no text that can be read.

  Args:
    reason: in a few words, the same for all files of this kind.
    where: the place in this file, and what was found there.
    advice: what the user can do.
  """

  def __init__(
    self, reason: str, where: str = "", advice: str = "give UTF-8 text files"
  ):
    super().__init__(f"{reason}{where}; {advice}")
    self.reason = reason
    self.where = where


def field_of(record: Any, field: str, where: str) -> str:
  """The text of a record: itself, or its field.

  Raises:
    NotText: if it has none.
  """
  if isinstance(record, str):
    return record
  if not isinstance(record, dict) or field not in record:
    kind = type(record).__name__
    has = names_of(record) if isinstance(record, dict) else f"a JSON {kind}"
    raise NotText(
      f"no field {field!r}",
      f" in {where} (it has: {has})",
      "give --text-field one of its fields",
    )
  text = record[field]
  if text is None:
    return ""
  if not isinstance(text, str):
    raise NotText(
      f"field {field!r} is not text",
      f" in {where} (but {type(text).__name__})",
      "give --text-field another field",
    )
  return text


def names_of(record: dict[str, Any]) -> str:
  """Its fields, for a message."""
  return ", ".join(record)[:200] or "nothing"
