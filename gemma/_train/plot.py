"""Pictures of a run, and of several beside each other."""

from __future__ import annotations

import itertools
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.axes
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from .._arguments import path_of, several, wanted
from .._errors import UserError
from .._files import local_path, remote_url
from .metrics import Record, read_metrics
from .plot_options import Axis

# What an axis shows, by its name: the field of a record and the words for it.
_AXES: dict[Axis, tuple[str, str]] = {
  "step": ("step", "optimizer steps"),
  "tokens": ("tokens", "tokens"),
  "time": ("seconds", "time, h:mm:ss"),
}


# --- one run ---


def plot_losses(directory: pathlib.Path) -> pathlib.Path:
  """Draws loss.png of a run: losses, learning rate and gradient norm."""
  path = directory / "loss.png"
  _save(draw_run(read_metrics(directory)), path)
  return path


def draw_run(records: Sequence[Record]) -> matplotlib.figure.Figure:
  """Training loss, as it is and smoothed, with the held-out loss; below, the
  learning rate and the norm of the gradient.

  The axes below are optimizer steps, and above the losses tokens and time,
  where the records have them.
  """
  figure = matplotlib.figure.Figure(figsize=(9, 9), layout="constrained")
  losses, rate, norm = figure.subplots(
    3, sharex=True, gridspec_kw={"height_ratios": [4, 1, 1]}
  )
  for name, color, label in (
    ("total_loss", "C4", "training with z-loss"),
    ("loss", "C0", "training"),
  ):
    _raw_and_smooth(losses, *curve(records, name), color=color, label=label)
  held_out = dict(color="C1", linewidth=2, marker=".", label="held out")
  unigram = dict(color="gray", linestyle="--", label="held out, unigram")
  for name, style in (("held_out_loss", held_out), ("unigram_loss", unigram)):
    _line(losses, *curve(records, name), **style)
  _line(rate, *curve(records, "learning_rate"), color="C2")
  _raw_and_smooth(
    norm, *curve(records, "gradient_norm"), color="C3", label="gradient norm"
  )
  # The first norms can be a hundred times the later ones.
  if any(r.get("gradient_norm", 0) > 0 for r in records):
    norm.set_yscale("log")
  losses.set_ylabel("loss, nats per token")
  rate.set_ylabel("learning rate")
  norm.set(ylabel="gradient norm", xlabel=_AXES["step"][1])
  for axes in (losses, rate, norm):
    axes.grid(alpha=0.3)
  if losses.lines:
    losses.legend()
  _second_axes(losses, records)
  return figure


def _second_axes(
  losses: matplotlib.axes.Axes, records: Sequence[Record]
) -> None:
  """Tokens and time above, at the ticks of the steps."""
  place = 1.0
  for axis in ("tokens", "time"):
    field, words = _AXES[axis]
    steps, values = curve(records, field)
    if len(steps) < 2:
      continue
    above = losses.twiny()
    above.set_xlim(losses.get_xlim())
    above.spines["top"].set_position(("axes", place))
    above.xaxis.set_major_formatter(
      matplotlib.ticker.FuncFormatter(_label_of(axis, steps, values))
    )
    above.set_xlabel(words)
    place += 0.12


def _label_of(
  axis: Axis, steps: np.ndarray, values: np.ndarray
) -> Callable[[float, Any], str]:
  """What stands at a step's tick: the tokens or the time of that step."""

  def label(step: float, _: Any) -> str:
    # A picture's ends lie a little outside of its data.
    if not 0 <= step <= steps[-1]:
      return ""
    known = np.concatenate([[0], steps]), np.concatenate([[0], values])
    return format_value(axis, float(np.interp(step, *known)))

  return label


# --- several runs ---


def plot_runs(
  directories: Sequence[str | os.PathLike[str]],
  out: str | os.PathLike[str],
  axis: Axis = "step",
) -> pathlib.Path:
  """Draws training and held-out losses of runs into one picture.

  Args:
    directories: work directories of `train`, such as gs://bucket/run.
    out: the picture; its suffix says of which kind.
    axis: what the curves are drawn over.

  Raises:
    UserError: if a run has no metrics, or none over this axis, or the picture
      cannot be written.
  """
  paths = [
    pathlib.Path(path_of("run", directory))
    for directory in several("runs", directories, "work directories")
  ]
  path = local_path(out, "--out")
  if axis not in _AXES:
    raise wanted("axis", " or ".join(_AXES), axis)
  if not paths:
    raise UserError("plot: no runs; give work directories of `train`")
  runs = {
    label: _records(run, axis)
    for label, run in zip(labels(paths), paths, strict=True)
  }
  _save(draw_runs(runs, axis), path)
  return path


def draw_runs(
  runs: dict[str, list[Record]], axis: Axis
) -> matplotlib.figure.Figure:
  """A colour for each run: its training loss, raw and smoothed, above; its
  held-out loss below.
  """
  figure = matplotlib.figure.Figure(figsize=(9, 8), layout="constrained")
  training, held_out = figure.subplots(2, sharex=True, sharey=True)
  field, words = _AXES[axis]
  for i, (label, records) in enumerate(runs.items()):
    color = f"C{i % 10}"
    style = ["-", "--", ":", "-."][i // 10 % 4]  # ten colours, then again
    _raw_and_smooth(
      training,
      *curve(records, "loss", over=field),
      color=color,
      label=label,
      linestyle=style,
    )
    _line(
      held_out,
      *curve(records, "held_out_loss", over=field),
      color=color,
      label=label,
      linestyle=style,
      marker=".",
    )
  training.set_ylabel("training loss, nats per token")
  held_out.set(ylabel="held-out loss, nats per token", xlabel=words)
  for axes in (training, held_out):
    axes.grid(alpha=0.3)
    if axes.lines:
      axes.legend()
  if axis != "step":
    held_out.xaxis.set_major_formatter(
      matplotlib.ticker.FuncFormatter(lambda x, _: format_value(axis, x))
    )
  return figure


def labels(paths: Sequence[pathlib.Path]) -> list[str]:
  """The shortest ends of the paths that tell them apart.

  Raises:
    UserError: if two are the same.
  """
  whole = [
    path.parts if remote_url(path) else path.resolve().parts for path in paths
  ]
  for path, parts in zip(paths, whole, strict=True):
    if whole.count(parts) > 1:
      named = remote_url(path) or path
      raise UserError(f"run {named}: given twice; give different runs")
  length = 0
  names = [""] * len(paths)
  while length == 0 or len(set(names)) < len(names):
    length += 1
    names = [str(pathlib.Path(*parts[-length:])) for parts in whole]
  return names


def _records(path: pathlib.Path, axis: Axis) -> list[Record]:
  run = remote_url(path) or path
  if run == path and not path.is_dir():
    raise UserError(f"run {run}: no such directory")
  records = read_metrics(path)
  if not records:
    raise UserError(
      f"run {run}: no metrics.jsonl with records in it; give the work "
      "directory of `train`"
    )
  if not any(_AXES[axis][0] in record for record in records):
    raise UserError(
      f"run {run}: its records have no {_AXES[axis][0]}, as those of earlier "
      "versions; give --axis step"
    )
  return records


# --- curves ---


def curve(
  records: Sequence[Record], name: str, over: str = "step"
) -> tuple[np.ndarray, np.ndarray]:
  """Where records have both, the values of `over` and of `name`."""
  points = [
    (r[over], r[name])
    for r in records
    if _is_number(r.get(over)) and _is_number(r.get(name))
  ]
  x, y = np.array(points, float).reshape(-1, 2).T
  return x, y


def smoothed(y: np.ndarray) -> np.ndarray:
  """Of each value and its neighbours a mean, whose weights fall on both sides
  by e over a fiftieth of the curve: it lies neither above a falling curve nor
  below.
  """
  keep = math.exp(-1 / max(len(y) / 50, 5))

  def sums(values: np.ndarray) -> np.ndarray:
    return np.array(
      list(itertools.accumulate(values, lambda total, x: keep * total + x))
    )

  def both(values: np.ndarray) -> np.ndarray:
    # The value itself is in the sums of both directions.
    return sums(values) + sums(values[::-1])[::-1] - values

  return both(y) / both(np.ones(len(y)))


def format_value(axis: Axis, value: float) -> str:
  """A label of an axis: 1.2M tokens, 1:02:03."""
  if axis == "time":
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
  if axis == "tokens":
    return matplotlib.ticker.EngFormatter(sep="")(value)
  return f"{value:,.0f}"


def _is_number(value: object) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def _raw_and_smooth(
  axes: matplotlib.axes.Axes,
  x: np.ndarray,
  y: np.ndarray,
  *,
  color: str,
  label: str,
  linestyle: str = "-",
) -> None:
  _line(axes, x, y, color=color, linewidth=0.6, alpha=0.35)
  _line(axes, x, smoothed(y), color=color, label=label, linestyle=linestyle)


def _line(
  axes: matplotlib.axes.Axes, x: np.ndarray, y: np.ndarray, **style: Any
) -> None:
  if len(x) == 1:  # a line of one point is not seen
    style.setdefault("marker", ".")
  if len(x):
    axes.plot(x, y, **style)


def _save(figure: matplotlib.figure.Figure, path: pathlib.Path) -> None:
  known = figure.canvas.get_supported_filetypes()
  if path.suffix[1:].lower() not in known:
    raise UserError(
      f"picture {path}: of no kind that can be drawn; give a name that ends "
      f"in {', '.join(f'.{suffix}' for suffix in sorted(known))}"
    )
  try:
    figure.savefig(path, dpi=120)
  except OSError as error:
    raise UserError(
      f"picture {path}: cannot write: {error.strerror}"
    ) from error
