"""Why a file has no text that can be read."""

from __future__ import annotations

import codecs
import contextlib
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


# In this order: one of UTF-32 begins with one of UTF-16.
_OTHER_MARKS = {
  codecs.BOM_UTF32_LE: "UTF-32",
  codecs.BOM_UTF32_BE: "UTF-32",
  codecs.BOM_UTF16_LE: "UTF-16",
  codecs.BOM_UTF16_BE: "UTF-16",
}


def refuse_other_unicode(beginning: bytes) -> None:
  """Encodings whose units are 2 or 4 bytes, with a mark or without.

  PowerShell writes UTF-16 into a file that something is sent to, and databases
  export it without a mark.
  """
  marks = (n for mark, n in _OTHER_MARKS.items() if beginning.startswith(mark))
  found = next(marks, None) or _without_mark(beginning[:_ENOUGH])
  if found is not None:
    advice = "convert it to UTF-8"
    raise NotText(f"{found}, not UTF-8 text", advice=advice)


# Bytes: of fewer no encoding is told, and more are not looked at.
_FEW, _ENOUGH = 8, 1024


def _without_mark(beginning: bytes) -> str | None:
  """The encoding whose zeros lie where Latin letters and blanks have them."""
  size = len(beginning)
  if size < _FEW or beginning.count(0) * 4 < size:
    return None
  for name in ("UTF-32", "UTF-16"):
    for encoding in (f"{name}-LE", f"{name}-BE"):
      with contextlib.suppress(UnicodeDecodeError):
        # One that may end within a character.
        text = codecs.getincrementaldecoder(encoding)().decode(beginning)
        latin = sum(c < "\u0100" for c in text)
        readable = all(c.isprintable() or c.isspace() for c in text)
        if readable and 2 * latin > len(text):
          return name
  return None
