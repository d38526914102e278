"""The one kind of error that is the user's to fix."""

from __future__ import annotations


class UserError(ValueError):
  """Something outside the program is wrong: one line names it and the fix.

  The command line prints the message without a traceback and exits with 2;
  every other exception is a bug and keeps its traceback.
  """
