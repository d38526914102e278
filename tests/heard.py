"""Signals that tests send arrive, however the tests were started."""

import contextlib
import signal


def heard() -> None:
  """Ends that SIGHUP, SIGINT and SIGTERM are ignored, here and in children.

  Under `nohup` the first is, and the second of a script's background job.
  Children inherit that, and one that a test ends would run for ever.  A handler
  they do not inherit: to them it is as if there had been nothing.
  """
  for name, handler in (
    ("SIGHUP", lambda *_: None),  # these tests are still not to end by it
    ("SIGINT", signal.default_int_handler),
    ("SIGTERM", signal.SIG_DFL),
  ):
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number is not None and signal.getsignal(number) == signal.SIG_IGN:
      with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(number, handler)
