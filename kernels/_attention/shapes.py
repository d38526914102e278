"""The shapes in which a caller may have q, k, v and out."""

from __future__ import annotations

from typing import Any, Literal

# By the legend's letters; the last is heads side by side.  Where none is said,
# the shape is "BTNH", and XLA is free to lay it out.
LayoutName = Literal["BTNH", "BNTH", "BT(NH)"]


def to_btnh(x: Any, layout: LayoutName | None, head_size: int | None) -> Any:
  """A caller's array of queries or keys as [B, T, N, H]."""
  if layout == "BNTH":
    return x.swapaxes(1, 2)
  if layout == "BT(NH)":
    assert head_size is not None
    return x.reshape(*x.shape[:2], x.shape[2] // head_size, head_size)
  return x


def from_btnh(x: Any, layout: LayoutName | None) -> Any:
  """The inverse."""
  if layout == "BNTH":
    return x.swapaxes(1, 2)
  return x.reshape(*x.shape[:2], -1) if layout == "BT(NH)" else x


def shape_in(
  shape: tuple[int, int, int, int], layout: LayoutName | None
) -> tuple[int, ...]:
  """The shape of what `from_btnh` makes of [B, T, N, H]."""
  b, t, n, h = shape
  if layout == "BNTH":
    return b, n, t, h
  return (b, t, n * h) if layout == "BT(NH)" else shape
