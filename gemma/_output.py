"""Printing that can neither stop nor delay what is printed about.

Output goes away: the reader of a pipe ends, a terminal is closed or held by
Ctrl-S, a disk that a log is on is full, a descriptor was never open.  What a
program does about it depends on what it is for:

- a command whose purpose is its output ends, with one line or the code of
  SIGPIPE: `standard_streams`;
- training goes on to the next step, and saves: `Output` takes text from it and
  never fails or waits.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import os
import queue
import select
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
  import rich.console

_BROKEN_PIPE = 141  # the exit code of a program that SIGPIPE ended

_NO_READER = (errno.EPIPE, errno.ECONNRESET)
_WAITING = 10_000  # texts that may wait for a reader; later ones are dropped
_PATIENCE = 2.0  # seconds that the end waits for a reader


class Output(io.TextIOBase):
  """A text stream whose writes neither fail nor wait.

  A thread writes what it is given.  What cannot be written is dropped, and
  later text is tried again: a full disk may have room by then.

  Args:
    stream: to write to; None, as Python's streams are that were never open,
      takes nothing.

  Attributes:
    gone: whether a text met a pipe or socket that nobody reads any more.
  """

  def __init__(self, stream: TextIO | None):
    self.gone = False
    self._stream = _own(stream)
    self._encoding = getattr(self._stream, "encoding", None) or "utf-8"
    # Text is written to the descriptor itself: a thread that waits inside one
    # of Python's streams holds its lock, and the program could not end.
    self._descriptor = _descriptor(self._stream)
    # Reentrant, hence safe in a signal handler, as other queues are not.
    self._queue: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
    if self._descriptor is not None:
      with contextlib.suppress(OSError, ValueError):
        self._stream.flush()  # what was printed before stands before
      threading.Thread(target=self._work, daemon=True).start()

  @property
  def encoding(self) -> str:  # type: ignore[override]  # an attribute there
    """That of the stream."""
    return self._encoding

  def isatty(self) -> bool:
    """Whether the stream is a terminal."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
      return bool(self._stream.isatty())
    return False

  def writable(self) -> bool:
    """True."""
    return True

  def write(self, text: str, /) -> int:
    """Takes `text`, and returns its length."""
    if self._descriptor is None:
      self._write_directly(text)
    elif self._queue.qsize() < _WAITING:
      self._queue.put(text)
    return len(text)

  def drain(self, seconds: float = _PATIENCE) -> None:
    """Waits until all is written, but not longer than `seconds`."""
    if self._descriptor is not None:
      written = threading.Event()
      self._queue.put(written)
      written.wait(seconds)

  def _write_directly(self, text: str) -> None:
    if self._stream is None:
      return
    try:
      self._stream.write(text)
      self._stream.flush()
    except OSError as error:
      self.gone |= error.errno in _NO_READER
    except ValueError:  # closed, or not encodable
      pass

  def _work(self) -> None:
    while True:
      item = self._queue.get()
      if isinstance(item, threading.Event):
        item.set()
      else:
        self._write_bytes(item.encode(self._encoding, "backslashreplace"))

  def _write_bytes(self, content: bytes) -> None:
    descriptor = cast(int, self._descriptor)
    while content:
      try:
        content = content[os.write(descriptor, content) :]
      except BlockingIOError:  # another program made it non-blocking
        select.select([], [descriptor], [])
      except OSError as error:
        self.gone |= error.errno in _NO_READER
        return


def _own(stream: Any) -> Any:
  """Python's own stream of one that is taken for a command's."""
  return stream.wrapped if isinstance(stream, _Stream) else stream


def _descriptor(stream: Any) -> int | None:
  """Of a stream of Python's own; None for others, which may be anything."""
  if os.name == "posix" and isinstance(stream, io.TextIOWrapper):
    with contextlib.suppress(OSError, ValueError):
      return stream.fileno()
  return None


@contextlib.contextmanager
def reporting(
  console: rich.console.Console,
) -> Iterator[tuple[rich.console.Console, Output]]:
  """The console, writing by an `Output`, and that."""
  output = Output(cast(TextIO, console.file))
  reporter = copy.copy(console)  # the caller's stays as it is
  reporter.file = cast(TextIO, output)
  try:
    yield reporter, output
  finally:
    output.drain()


def tell(text: str) -> None:
  """Writes to standard error; without waiting long, and without errors."""
  output = Output(sys.stderr)
  output.write(text)
  output.drain()


# --- the streams of a command ---


class _Unwritable(Exception):
  """Standard output has an error, but for a pipe that nobody reads."""


class _Stream:
  """A stream of Python's whose errors are those of a command."""

  def __init__(self, wrapped: TextIO):
    self.wrapped = wrapped

  def __getattr__(self, name: str) -> Any:
    return getattr(self.wrapped, name)

  def write(self, text: str) -> int:
    with self._errors():
      self.wrapped.write(text)
    return len(text)

  def flush(self) -> None:
    with self._errors():
      self.wrapped.flush()

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except BrokenPipeError:
      raise
    except OSError as error:
      raise _Unwritable(f"standard output: {error.strerror}") from error


class _ErrorStream(_Stream):
  """Of standard error: what cannot be written is dropped."""

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    with contextlib.suppress(OSError):
      yield


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
  """Inside, the first error of standard output ends the program.

  In silence and with the code of SIGPIPE if nobody reads it any more, else with
  one line and the code 2.  Errors of standard error are passed over.
  """
  _open_descriptors()
  with contextlib.ExitStack() as stack:
    # Python has None for streams that were never open; libraries expect some.
    nothing = stack.enter_context(open(os.devnull, "w"))
    out = cast(TextIO, _Stream(sys.stdout or nothing))
    err = cast(TextIO, _ErrorStream(sys.stderr or nothing))
    stack.enter_context(contextlib.redirect_stdout(out))
    stack.enter_context(contextlib.redirect_stderr(err))
    try:
      try:
        yield
      finally:
        out.flush()
    except BrokenPipeError:
      _silence()
      sys.exit(_BROKEN_PIPE)
    except _Unwritable as error:
      _silence()
      print(f"pallas-gemma: {error}", file=sys.stderr)
      sys.exit(2)


def _silence() -> None:
  """Drops what waits to be written to standard output.

  Otherwise Python would meet the same error once more when it ends.
  """
  with contextlib.suppress(AttributeError, OSError, ValueError):
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_descriptors() -> None:
  """Opens standard streams that are closed, on nothing.

  The next file that is opened would get the free number: what a library then
  prints would be written into a checkpoint.
  """
  for descriptor in range(3):
    try:
      os.fstat(descriptor)
    except OSError:
      os.open(os.devnull, os.O_RDWR)
