"""What `pallas-gemma plot` can be told."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

import tyro

Axis = Literal["step", "tokens", "time"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotConfig:
  """Draw the losses of runs into one picture, a colour for each.

  Attributes:
    runs: work directories of `train`, also on other machines, such as
      gs://bucket/run; a run that is still training will do.
    out: the picture; its suffix says of which kind: png, svg, pdf.
    axis: what the curves are drawn over: optimizer steps, tokens trained on, or
      time spent, of which runs of earlier versions have steps alone.
  """

  runs: tyro.conf.Positional[tuple[pathlib.Path, ...]]
  out: pathlib.Path = pathlib.Path("losses.png")
  axis: Axis = "step"
