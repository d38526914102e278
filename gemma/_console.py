"""The process around a command: its streams, and what JAX will look for.

To be used before JAX is imported.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import sys

_GOOGLE = "0x1ae0"  # the vendor of TPUs, as PCI numbers vendors

# Any of these is the user's own choice of devices.
_CHOICES = (
  *("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_FORCE_TPU_INIT"),
  *("PJRT_NAMES_AND_LIBRARY_PATHS", "TPU_LIBRARY_PATH", "TPU_NAME"),
)
_OTHERS = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd")  # GPUs


def open_streams() -> None:
  """Lets a console take any text: what it cannot show comes as \\uXXXX.

  Without that a text would end in a UnicodeEncodeError at its first such
  character.
  """
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="backslashreplace")


def text_of(argument: str) -> str:
  """An argument as UTF-8, whatever encoding the locale has.

  Where that is ASCII, Python makes a lone surrogate of each byte of the others.
  They stay where they are no UTF-8; who encodes the text refuses them.
  """
  try:
    argument.encode()
  except UnicodeEncodeError:
    pass
  else:
    return argument
  try:
    return os.fsencode(argument).decode()
  except UnicodeError:
    return argument


def spare_the_search_for_a_tpu() -> None:
  """Where libtpu is installed and no TPU is, has JAX use the CPU.

  JAX would ask libtpu, which looks for the computers of a TPU by the network
  and prints a dozen lines of what it does not find.  Where there is a TPU, or
  a GPU, or the user has chosen, nothing is changed.
  """
  if "jax" in sys.modules or any(os.environ.get(name) for name in _CHOICES):
    return
  if importlib.util.find_spec("libtpu") is None or has_tpu():
    return
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  if plugins or any(glob.glob(pattern) for pattern in _OTHERS):
    return
  os.environ["JAX_PLATFORMS"] = "cpu"


def has_tpu() -> bool:
  """Whether this machine has a TPU: a device file, or a card of Google's."""
  if glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"):
    return True
  for folder in glob.glob("/sys/bus/pci/devices/*"):
    with contextlib.suppress(OSError):
      vendor, kind = (
        pathlib.Path(folder, name).read_text().strip()
        for name in ("vendor", "class")
      )
      # Google's network cards and disks are in every machine of its cloud.
      if vendor == _GOOGLE and kind[:4] not in ("0x01", "0x02"):
        return True
  return False
