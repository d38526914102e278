"""What a training run shows: never cut, and no time that is not training's."""

import importlib
import io
import re

import pytest
import rich.console

progress = importlib.import_module("pallas_gemma.gemma._train.progress")
pytestmark = pytest.mark.no_interpreter


class Clock:
  """Seconds that pass only when a test says so."""

  def __init__(self, monkeypatch):
    self.now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)

  def show(self, shown, step, seconds, **record):
    self.now += seconds
    shown.show({"step": step, "loss": 3.21, **record})


@pytest.fixture
def clock(monkeypatch):
  return Clock(monkeypatch)


def console(width=100, **options):
  return rich.console.Console(file=io.StringIO(), width=width, **options)


def written(out):
  assert isinstance(out.file, io.StringIO)
  return out.file.getvalue()


def line_of(shown, width):
  out = console(width)
  shown._console.width = width
  out.print(shown._line())
  return written(out).rstrip("\n")


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 200])
def test_the_step_is_never_cut(width, clock):
  shown = progress.Progress(0, 200_000, console(width, force_terminal=True))
  waiting = line_of(shown, width)
  assert "step 0/200000" in waiting and len(waiting) <= width
  assert ("compiling, 0:00" in waiting) == (width >= 40)
  for step in range(123_454, 123_457):
    clock.show(shown, step, 1, tokens_per_second=12_345.0, held_out_loss=3.0)
  for step in range(123_457, 123_460):
    clock.show(shown, step, 1, tokens_per_second=12_345.0)
  line = line_of(shown, width)
  assert line.startswith("step 123459/200000")
  assert len(line) <= width and "\n" not in line
  # What matters most comes first.
  order = ["step", "left", "loss", "held-out", "tokens/s", "━"]
  shows = [part in line for part in order]
  assert shows[:2] == [True, width >= 40]
  if width == 200:
    assert all(shows)


@pytest.mark.parametrize(
  "seconds, want",
  [
    (0.4, "0:00"),
    (34, "0:34"),
    (12 * 60 + 5, "12:05"),
    (3599.6, "1 h 0 min"),
    (489 * 60 + 33, "8 h 10 min"),
    (20.17 * 3600, "20 h 10 min"),
    (47.99 * 3600, "47 h 59 min"),
    (76 * 3600, "3 d 4 h"),
    (1e9, "11,574 d 2 h"),
  ],
)
def test_durations_are_of_two_units(seconds, want):
  assert progress.duration(seconds) == want


def left(shown):
  return re.findall(r"(\S.*) left", "".join(shown._left()))


def test_time_left_has_neither_compilation_nor_evaluations(clock):
  shown = progress.Progress(0, 100, console())
  clock.show(shown, 1, 300.0)  # compiles
  assert left(shown) == []
  clock.show(shown, 2, 2.0)
  assert left(shown) == ["3:16"]
  clock.show(shown, 3, 500.0, held_out_loss=3.0)  # is evaluated
  assert left(shown) == ["3:14"]
  clock.show(shown, 4, 70.0)
  clock.show(shown, 5, 2.0)
  assert left(shown) == ["3:10"]
  clock.show(shown, 6, 60.0)  # was saved between
  clock.show(shown, 7, 2.0)
  assert left(shown) == ["3:06"]


def test_time_left_where_every_step_is_evaluated(clock):
  shown = progress.Progress(0, 10, console())
  for step in (1, 2, 3):
    clock.show(shown, step, 5.0, held_out_loss=3.0)
  assert left(shown) == ["0:35"]
  clock.show(shown, 10, 5.0, held_out_loss=3.0)
  assert left(shown) == []


def test_a_resumed_run_counts_its_own_steps(clock):
  shown = progress.Progress(50, 100, console())
  clock.show(shown, 51, 90.0)
  clock.show(shown, 53, 4.0)  # two steps
  assert left(shown) == ["1:34"]


def test_a_file_gets_lines_that_say_what_is_waited_for(clock):
  out = console(40)
  with progress.Progress(0, 200, out) as shown:
    assert written(out) == "compiling the first step ...\n"
    clock.show(shown, 1, 60.0)
    clock.show(shown, 2, 1.0)
    clock.show(shown, 3, 15.0)
  lines = written(out).splitlines()
  assert lines[1] == "step   1/200  loss 3.210"
  assert lines[2].startswith("step   3/200  loss 3.210  ")


def test_a_terminal_says_what_else_is_waited_for(clock):
  shown = progress.Progress(0, 9, console())
  clock.show(shown, 1, 1.0)
  shown.waits_for("evaluating")
  clock.now += 75
  assert line_of(shown, 60) == "- step 1/9  evaluating, 1:15"
  clock.show(shown, 2, 1.0)
  assert line_of(shown, 60).startswith("step 2/9  ")


@pytest.mark.parametrize("encoding, bar", [("utf-8", "━"), ("ascii", "#")])
def test_a_terminal_draws_what_it_can(encoding, bar, clock):
  raw = io.BytesIO()
  file = io.TextIOWrapper(raw, encoding=encoding)  # a wrong character raises
  out = rich.console.Console(file=file, width=90, force_terminal=True)
  with progress.Progress(0, 4, out) as shown:
    assert not raw.getvalue().decode(encoding).count("\n\n")
    for step in (1, 2, 3):
      clock.show(shown, step, 1.0)
    shown._live.refresh()
    file.flush()
  file.flush()
  text = raw.getvalue().decode(encoding)
  assert "compiling" in text and "step 3/4  0:01 left" in text and bar in text


def test_a_run_with_more_steps_than_asked_for_says_so():
  assert progress.completed(3, 3) == "training is complete: 3 of 3 steps"
  assert progress.completed(9, 3) == (
    "training is complete: 9 steps are done, more than the 3 that were asked "
    "for,"
  )
