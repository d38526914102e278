"""Two processes that are threads, and tell each other what processes would."""

import importlib
import threading
from typing import Any

from pallas_gemma.gemma import UserError

Channel: Any = importlib.import_module("pallas_gemma.gemma._processes").Channel


class Lockstep(Channel):
  """What they tell each other.

  Args:
    like: another channel of the same threads.

  Attributes:
    own: its `index` says which of them a thread is.
  """

  def __init__(self, like: "Lockstep | None" = None):
    super().__init__("threads")
    self.barrier, self.told = threading.Barrier(2, timeout=30), ["", ""]
    self.own: threading.local = like.own if like else threading.local()

  def gather(self, text):
    self.told[self.own.index] = text
    self.barrier.wait()
    told = list(self.told)
    self.barrier.wait()
    return told

  def run(self, work) -> list[str]:
    """Does it in both; what they say of their errors."""
    errors = ["", ""]

    def one(index: int) -> None:
      self.own.index = index
      try:
        work(index)
      except UserError as error:
        errors[index] = str(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    return errors

  def replace(self, patch, module) -> None:
    """Makes a module believe that these are its processes."""
    patch.setattr(module, "_channel", self)
    patch.setattr(module, "together", Lockstep(self).together)
    patch.setattr(module, "count", lambda: 2)
    patch.setattr(module, "is_first", lambda: self.own.index == 0)
