"""A file system of another machine that fails, or whose user is killed."""

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Killed(BaseException):
  """The process ends here: nothing that it does afterwards has an effect."""


class Faulty(MemoryFileSystem):
  """fsspec's memory, whose nth change fails.

  A file whose writing fails is there with half of its content.
  """

  protocol = "faulty"
  store: dict = {}
  pseudo_dirs = [""]
  # Changes so far; after how many it fails, and with what; whether all that
  # follows fails too.
  changes = 0
  limit: int | None = None
  error: BaseException = OSError("the network is gone")
  lasts = True
  unreachable = False

  @classmethod
  def reset(cls) -> None:
    cls.store.clear()
    cls.pseudo_dirs[:] = [""]
    cls.changes, cls.limit, cls.lasts = 0, None, True
    cls.unreachable = False

  @classmethod
  def fails_after(cls, limit: int, error: BaseException, lasts=True) -> None:
    cls.changes, cls.limit, cls.error, cls.lasts = 0, limit, error, lasts

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.replace("faulty://", "memory://"))

  def _change(self) -> bool:
    """Counts; whether this one is to fail."""
    cls = type(self)
    if cls.unreachable:
      raise PermissionError("no credentials")
    cls.changes += 1
    if cls.limit is None or cls.changes <= cls.limit:
      return False
    if cls.lasts or cls.changes == cls.limit + 1:
      if cls.changes > cls.limit + 1:
        raise cls.error
      return True
    return False

  def pipe_file(self, path, value, mode="overwrite", **kwargs):
    fails = self._change()
    kept = value[: len(value) // 2] if fails else value
    super().pipe_file(path, kept, mode=mode, **kwargs)
    if fails:
      raise self.error

  def put_file(self, lpath, rpath, *args, **kwargs):
    with open(lpath, "rb") as file:
      self.pipe_file(rpath, file.read())

  def _rm(self, path):
    if self._change():
      raise self.error
    super()._rm(path)

  rm_file = _rm

  def ls(self, path, detail=True, **kwargs):
    if self.unreachable:
      raise PermissionError("no credentials")
    return super().ls(path, detail, **kwargs)

  def cat_file(self, path, *args, **kwargs):
    if self.unreachable:
      raise PermissionError("no credentials")
    return super().cat_file(path, *args, **kwargs)


fsspec.register_implementation("faulty", Faulty, clobber=True)
