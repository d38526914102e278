"""What a reader sees of an HTML page."""

from __future__ import annotations

import html.parser
import re
from collections.abc import Iterable

_UNSEEN = frozenset("script style template noscript svg math".split())
_BLOCKS = frozenset(
  "address article aside blockquote body br caption dd details div dl dt "
  "fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 header hr html li "
  "main nav ol p pre section summary table tbody td tfoot th thead title tr "
  "ul".split()
)
_SPACE = re.compile(r"[ \t\r\n\f]+")


def visible_text(pieces: Iterable[str]) -> str:
  """The text of a page: tags and what they hide are gone, blocks are lines.

  White space is one space, but for what `<pre>` holds.
  """
  page = _Page()
  for piece in pieces:
    page.feed(piece)
  page.close()
  lines = (line.strip() for line in "".join(page.parts).split("\n"))
  # A line of <pre> keeps its spaces: they were written as no-break marks.
  text = "\n".join(line for line in lines if line)
  return text.replace(_KEPT_SPACE, " ").replace(_KEPT_LINE, "\n")


# Stand for the white space of <pre> until the rest is cleaned: two characters
# that Unicode reserves for a program's own use.
_KEPT_SPACE, _KEPT_LINE = "\ufdd0", "\ufdd1"


class _Page(html.parser.HTMLParser):
  """Collects text; a newline where a block begins or ends."""

  def __init__(self) -> None:
    super().__init__(convert_charrefs=True)
    self.parts: list[str] = []
    self._unseen = 0
    self._pre = 0

  def handle_starttag(self, tag: str, attrs: object) -> None:
    """A tag opens."""
    self._unseen += tag in _UNSEEN
    self._pre += tag == "pre"
    if tag in _BLOCKS:
      self.parts.append("\n")

  def handle_startendtag(self, tag: str, attrs: object) -> None:
    """A tag that closes itself, such as <br/>."""
    if tag in _BLOCKS:
      self.parts.append("\n")

  def handle_endtag(self, tag: str) -> None:
    """A tag closes."""
    if tag in _UNSEEN:
      self._unseen = max(self._unseen - 1, 0)
    if tag == "pre":
      self._pre = max(self._pre - 1, 0)
    if tag in _BLOCKS:
      self.parts.append("\n")

  def handle_data(self, data: str) -> None:
    """Text between tags."""
    if self._unseen:
      return
    if self._pre:
      kept = data.replace("\r\n", "\n").replace("\n", _KEPT_LINE)
      self.parts.append(kept.replace(" ", _KEPT_SPACE))
    else:
      self.parts.append(_SPACE.sub(" ", data))
