"""Work on many blocks, in threads, with results in order.

Threads, not processes: NumPy and SentencePiece let others run while they work,
so all cores are busy.  There is nothing to start that could be left over when
the program ends, and Ctrl-C waits for no more than the blocks at hand.
"""

from __future__ import annotations

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_In = TypeVar("_In")
_Out = TypeVar("_Out")


# More would need more memory, and would wait for Python.
_MOST_WORKERS = 16


def usable_cores() -> int:
  """The cores this process may run on."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def in_order(
  work: Callable[[_In], _Out], items: Iterable[_In]
) -> Iterator[_Out]:
  """`map(work, items)`, in threads; a few items ahead of what is taken."""
  workers = min(usable_cores(), _MOST_WORKERS)
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    waiting: collections.deque[concurrent.futures.Future[_Out]]
    waiting = collections.deque()
    try:
      for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > 2 * workers:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      for future in waiting:
        future.cancel()
