"""What a run records, and the pictures drawn from it."""

import dataclasses
import importlib
import io
import itertools
import json
import pathlib
import time

import jax
import numpy as np
import pytest
import rich.console
from flax import nnx
from pallas_gemma.gemma import (
  Gemma,
  TrainConfig,
  UserError,
  main,
  plot_runs,
  read_metrics,
  train,
)
from small_gemma import ONE_LAYER as MODEL

plot, metrics, steps = (
  importlib.import_module(f"pallas_gemma.gemma._train.{name}")
  for name in ("plot", "metrics", "step")
)

pytestmark = pytest.mark.no_interpreter

SETTINGS = TrainConfig(
  data=(pathlib.Path(__file__),),
  steps=4,
  batch_size=4,
  sequence_length=16,
  evaluate_every=3,
  model=MODEL,
)


def run(directory: pathlib.Path, **changes) -> list[dict]:
  settings = dataclasses.replace(SETTINGS, work_dir=directory, **changes)
  train(settings, console=rich.console.Console(file=io.StringIO()))
  return read_metrics(directory)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Without and with a z-loss."""
  root = tmp_path_factory.mktemp("runs")
  run(root / "plain")
  run(root / "with_z", z_loss=0.1, accumulation=2)
  return root


# --- what is recorded ---


def test_the_z_loss_stands_apart(runs):
  plain, with_z = (read_metrics(runs / name) for name in ("plain", "with_z"))
  for record in plain:
    assert "z_loss" not in record and "total_loss" not in record
  for record in with_z:
    assert record["z_loss"] > 0
    total = record["loss"] + record["z_loss"]
    assert record["total_loss"] == pytest.approx(total, rel=1e-6)
  # The same weights, the same batch.
  assert with_z[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
  # The gradient is that of the sum.
  assert with_z[0]["gradient_norm"] != plain[0]["gradient_norm"]
  assert abs(with_z[-1]["loss"] - plain[-1]["loss"]) > 1e-6


def test_the_parts_of_the_loss_are_those_of_the_logits():
  settings = dataclasses.replace(SETTINGS, z_loss=0.1, accumulation=2)
  settings = dataclasses.replace(settings, head="recompute")
  rng = np.random.default_rng(0)
  weights = np.arange(16) < rng.integers(4, 17, (4, 1))
  tokens, labels = rng.integers(4, 400, (2, 4, 16), np.int32)
  batch = {
    "tokens": tokens,
    "labels": labels,
    "segment_ids": weights.astype(np.int32),
    "weights": weights.astype(np.float32),
  }
  model = Gemma(MODEL, rngs=nnx.Rngs(settings.seed))
  logits = model(tokens, segment_ids=batch["segment_ids"])
  lse = jax.nn.logsumexp(logits, axis=-1)
  labelled = np.take_along_axis(np.asarray(logits), labels[..., None], -1)
  wanted = {
    "loss": (lse - labelled[..., 0])[weights].mean(),
    "z_loss": 0.1 * (lse**2)[weights].mean(),
  }
  wanted["total_loss"] = wanted["loss"] + wanted["z_loss"]
  params, state = steps.fresh_state(settings)
  measured = steps.make_steps(settings, 400)[0](params, state, batch)[2]
  assert measured.pop("gradient_norm") > 0
  assert measured.pop("parameter_norm") > 0
  assert not measured.pop("skipped") | measured.pop("skipped_in_a_row")
  assert measured.keys() == wanted.keys()
  for name, value in wanted.items():
    assert float(measured[name]) == pytest.approx(float(value), rel=1e-5)


def test_showing_the_z_loss_costs_no_second_head():
  ids = jax.ShapeDtypeStruct((4, 16), "int32")
  batch = dict.fromkeys(("tokens", "labels", "segment_ids"), ids)
  weights = jax.ShapeDtypeStruct((4, 16), "float32")

  def flops(z_loss: float) -> float:
    settings = dataclasses.replace(
      SETTINGS,
      z_loss=z_loss,
      head="recompute",
      model=dataclasses.replace(MODEL, vocab_size=4000),
    )
    arguments = jax.eval_shape(lambda: steps.fresh_state(settings))
    step = steps.make_steps(settings, 400)[0]
    lowered = step.lower(*arguments, {**batch, "weights": weights})
    # Quickly made code: what XLA merges, it merges all the same.
    quick = {"xla_backend_optimization_level": 0}
    return lowered.compile(quick).cost_analysis()["flops"]

  # Of the three products of the head, a fourth would be a third more.
  assert flops(1e-4) < 1.02 * flops(0.0)


def test_every_record_has_tokens_and_time(runs):
  records = read_metrics(runs / "plain")
  assert [r["tokens"] for r in records] == [64, 128, 192, 256]
  for name in ("time", "seconds"):
    assert all(a[name] <= b[name] for a, b in itertools.pairwise(records))
  assert abs(records[-1]["time"] - time.time()) < 3600
  assert records[0]["seconds"] >= 0
  assert "tokens_per_second" in records[-1]


def test_time_between_two_calls_is_not_of_the_run(tmp_path):
  for step, gap in ((1, 0.0), (2, 0.2)):
    time.sleep(gap)
    with metrics.Metrics(tmp_path, step=step - 1) as records:
      records.write({"step": step})
  one, two = read_metrics(tmp_path)
  assert two["time"] - one["time"] >= 0.2
  assert one["seconds"] <= two["seconds"] < one["seconds"] + 0.2


def test_lines_that_are_no_records_are_left_out(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1, "loss": 2.0}\n[]\n3\n{"loss": 1}\n\xff\n{"st')
  assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
  assert read_metrics(path) == []  # a file is no run


# --- pictures ---


def lines(axes) -> dict[str, tuple[list[float], list[float]]]:
  """The curves that the legend names."""
  return {
    str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
    for line in axes.lines
    if not str(line.get_label()).startswith("_")
  }


def records(steps: int, **more) -> list[dict]:
  return [
    {
      "step": step,
      "loss": 5.0 + (-1) ** step,
      "gradient_norm": 1.0,
      "learning_rate": 1e-3,
      "tokens": 1000 * step,
      "seconds": 60.0 * step,
      **more,
    }
    for step in range(1, steps + 1)
  ]


def test_a_run_is_drawn_with_its_axes():
  figure = plot.draw_run(records(400, held_out_loss=3.0, unigram_loss=4.0))
  losses, rate, norm, *others = figure.axes
  drawn = lines(losses)
  assert set(drawn) == {"training", "held out", "held out, unigram"}
  raw = losses.lines[0]
  assert list(raw.get_ydata())[:2] == [4.0, 6.0], "raw, beside the smoothed one"
  assert all(abs(y - 5.0) < 0.2 for y in drawn["training"][1][50:])
  assert drawn["held out"] == (list(range(1, 401)), [3.0] * 400)
  assert list(rate.lines[0].get_ydata()) == [1e-3] * 400
  assert list(norm.lines[0].get_ydata()) == [1.0] * 400
  figure.canvas.draw()
  above = {axes.get_xlabel(): axes for axes in others}
  assert set(above) == {"tokens", "time, h:mm:ss"}
  for words, wanted in (("tokens", "200k"), ("time, h:mm:ss", "3:20:00")):
    assert wanted in [t.get_text() for t in above[words].get_xticklabels()]


def test_the_z_loss_is_drawn_apart():
  losses = plot.draw_run(records(3, z_loss=0.5, total_loss=5.5)).axes[0]
  drawn = lines(losses)
  assert drawn["training with z-loss"][1] == pytest.approx([5.5] * 3)
  assert drawn["training"][1] == pytest.approx([4.6, 4.7, 4.6], abs=0.1)


@pytest.mark.parametrize(
  "old",
  [
    [],
    [{"step": 1}],
    [{"step": 1, "loss": 2.0}],
    [{"step": i, "loss": float("nan"), "gradient_norm": 0.0} for i in (1, 2)],
    [{"step": i, "loss": 3.0, "tokens": 5, "seconds": 0.0} for i in (1, 2)],
  ],
)
def test_any_records_can_be_drawn(old, tmp_path):
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, old)))
  picture = plot.plot_losses(tmp_path)
  assert picture.read_bytes().startswith(b"\x89PNG")


def test_smoothing_lags_not_and_keeps_what_is_constant():
  np.testing.assert_allclose(plot.smoothed(np.full(100, 2.5)), 2.5)
  falling = np.linspace(9, 1, 1000)
  smooth = plot.smoothed(falling)
  assert (smooth[1:] < smooth[:-1]).all()
  np.testing.assert_allclose(smooth[300:700], falling[300:700], atol=1e-4)
  np.testing.assert_allclose(smooth, falling, atol=0.2)
  noise = np.random.default_rng(0).normal(size=1000)
  assert plot.smoothed(noise).std() < 0.25
  for few in ([], [3.0]):
    assert list(plot.smoothed(np.array(few))) == few


@pytest.mark.parametrize(
  "axis, last", [("step", 4), ("tokens", 256), ("time", None)]
)
def test_runs_are_compared(runs, axis, last):
  names = ["plain", "with_z"]
  both = {name: read_metrics(runs / name) for name in names}
  training, held_out = plot.draw_runs(both, axis).axes
  for axes, name in ((training, "loss"), (held_out, "held_out_loss")):
    drawn = lines(axes)
    assert list(drawn) == names
    for label, (x, y) in drawn.items():
      wanted = [r[name] for r in both[label] if name in r]
      assert len(x) == len(y) == len(wanted)
      assert x[-1] == (last or both[label][-1]["seconds"])
      if axes is held_out:
        assert y == wanted
  colors = [training.lines[2 * i + 1].get_color() for i in range(2)]
  assert colors[0] != colors[1]


@pytest.mark.parametrize(
  "paths, wanted",
  [
    (["/a/x", "/a/y"], ["x", "y"]),
    (["/a/x", "/b/x"], ["a/x", "b/x"]),
    (["/a/x/1", "/b/x/1", "/b/y/1"], ["a/x/1", "b/x/1", "b/y/1"]),
    (["/a", "/b/a"], ["/a", "b/a"]),
  ],
)
def test_labels_tell_runs_apart(paths, wanted):
  assert plot.labels([pathlib.Path(p) for p in paths]) == wanted


# --- the command ---


def command(capfd, *arguments) -> tuple[object, str, str]:
  with pytest.raises(SystemExit) as end:
    main(["plot", *map(str, arguments)])
  out, err = capfd.readouterr()
  return end.value.code, out, err


@pytest.mark.parametrize(
  "out, begins",
  [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")],
)
def test_the_command_draws(runs, out, begins, tmp_path, capfd):
  path = tmp_path / out
  both = runs / "plain", runs / "with_z"
  code, said, err = command(capfd, *both, "--out", path)
  assert (code, said, err) == (0, f"drawn in {path}\n", "")
  assert path.read_bytes().startswith(begins)


def test_the_picture_has_a_default_name(runs, tmp_path, monkeypatch, capfd):
  monkeypatch.chdir(tmp_path)
  assert command(capfd, runs / "plain", "--axis", "time")[0] == 0
  assert (tmp_path / "losses.png").exists()


def old_run(path: pathlib.Path) -> pathlib.Path:
  (path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
  return path


MISTAKES = {
  "none": (lambda d, run: [], "runs"),
  "missing": (lambda d, run: [d / "x"], "x: no such directory"),
  "a file": (lambda d, run: [run / "loss.png"], "loss.png: no such directory"),
  "no run": (lambda d, run: [run, d], "no metrics.jsonl with records in it"),
  "twice": (lambda d, run: [run, run], "given twice"),
  "remote": (
    lambda d, run: ["memory://b/run"],
    "memory://b/run: no metrics.jsonl with records in it",
  ),
  "no such kind": (
    lambda d, run: [run, "--out", d / "a.doc"],
    "a.doc: of no kind that can be drawn; give a name that ends in ",
  ),
  "no kind": (lambda d, run: [run, "--out", d / "a"], "a: of no kind"),
  "unwritable": (
    lambda d, run: [run, "--out", d / "x" / "a.png"],
    "a.png: cannot write: No such file or directory",
  ),
  "no tokens": (
    lambda d, run: [old_run(d), "--axis", "tokens"],
    "its records have no tokens",
  ),
  "no axis": (lambda d, run: [run, "--axis", "x"], "--axis"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, runs, tmp_path, capfd):
  arguments, message = MISTAKES[mistake]
  code, out, err = command(capfd, *arguments(tmp_path, runs / "plain"))
  assert (code, out) == (2, "") and err.count("\n") == 1
  assert message in err


def test_the_function_raises_what_the_command_says(runs, tmp_path):
  with pytest.raises(UserError, match="no runs"):
    plot_runs([], tmp_path / "a.png")
  path = plot_runs([str(runs / "plain")], str(tmp_path / "a.png"))
  assert path == tmp_path / "a.png" and path.exists()
