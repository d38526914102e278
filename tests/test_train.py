"""The trainer: it learns, can be killed, and refuses what does not fit."""

import dataclasses
import importlib
import io
import itertools
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
from flax import nnx
from pallas_gemma.gemma import (
  KERNELS,
  Gemma,
  GemmaConfig,
  OptimizerConfig,
  Tokenizer,
  TrainConfig,
  UserError,
  choose_head,
  flops_per_token,
  learning_rate_schedule,
  load_checkpoint,
  loss_and_gradient,
  make_optimizer,
  read_metrics,
  token_losses,
  train,
)
from random_gemma import random_gemma
from small_gemma import TWO_LAYERS as MODEL
from small_gemma import printed as run

# The kernels have their own tests: none need be interpreted here.
pytestmark = [
  pytest.mark.no_interpreter,
  pytest.mark.usefixtures("compiled_once"),
]

STEPS = 40


def config(work_dir: pathlib.Path, **changes) -> TrainConfig:
  fixed: dict[str, Any] = dict(
    data=(pathlib.Path(__file__),),
    work_dir=work_dir,
    steps=STEPS,
    batch_size=4,
    sequence_length=16,
    evaluate_every=10,
    save_every=8,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
    model=MODEL,
  )
  return TrainConfig(**fixed | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The directory of an undisturbed run, and what it printed."""
  directory = tmp_path_factory.mktemp("runs") / "finished"
  return directory, run(config(directory))


# --- learning ---


def test_both_losses_fall_and_all_is_recorded(finished):
  directory, _ = finished
  records = read_metrics(directory)
  assert [r["step"] for r in records] == list(range(1, STEPS + 1))
  assert math.isclose(records[0]["loss"], math.log(400), rel_tol=0.05)
  assert records[-1]["loss"] < records[0]["loss"] - 0.5
  held_out = [r["held_out_loss"] for r in records if "held_out_loss" in r]
  assert len(held_out) == 4
  assert all(a > b for a, b in itertools.pairwise(held_out))
  assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert list((directory / "tensorboard").iterdir())


def test_the_start_says_on_what_with_what_and_how_much(finished, model):
  _, printed = finished
  assert f"JAX {jax.__version__}" in printed
  assert "op        rms_norm: reference (XLA), by choice" in printed
  assert "apply_rope: reference (XLA), platform is cpu" in printed
  count = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
  assert f"{count:,} parameters in float32" in printed
  assert f"{STEPS} of 64 tokens, 0 done" in printed
  # Not a terminal: plain lines, no control codes.
  assert "\x1b" not in printed and f"step 10/{STEPS}  loss" in printed


def test_a_finished_run_costs_nothing_and_changes_nothing(finished):
  directory, _ = finished
  before = (directory / "metrics.jsonl").read_bytes()
  assert run(config(directory)) == (
    f"training is complete: {STEPS} of {STEPS} steps in {directory}\n"
  )
  assert (directory / "metrics.jsonl").read_bytes() == before


def test_what_was_trained_can_be_loaded(finished):
  model, tokenizer = load_checkpoint(finished[0])
  ids = tokenizer.encode("def test_", add_bos=True)
  assert model(jnp.array([ids])).shape == (1, len(ids), 400)


# --- stopping and going on ---


def losses(directory: pathlib.Path) -> dict[int, tuple[float | None, ...]]:
  """Training and held-out loss by step; JSON keeps every bit of a float."""
  records = read_metrics(directory)
  assert len({r["step"] for r in records}) == len(records)
  keys = ("loss", "gradient_norm", "held_out_loss")
  return {r["step"]: tuple(r.get(k) for k in keys) for r in records}


def checkpoint_steps(directory: pathlib.Path) -> list[int]:
  written = directory.glob("checkpoints/*/checksums.json")
  return sorted(int(path.parent.name) for path in written)


CHILD = """
import json, pathlib, sys
from pallas_gemma.gemma import GemmaConfig, OptimizerConfig, TrainConfig, train
a = json.loads(sys.argv[1])
a["data"] = tuple(map(pathlib.Path, a["data"]))
a["work_dir"] = pathlib.Path(a["work_dir"])
a["tokenizer"] = None
a["model"] = GemmaConfig(**a["model"])
a["optimizer"] = OptimizerConfig(**a["optimizer"])
train(TrainConfig(**a))
"""


def test_killed_and_started_again_it_gives_the_same_bits(
  finished, compiled_once, tmp_path
):
  directory = tmp_path / "killed"
  settings = config(directory)
  arguments = json.dumps(dataclasses.asdict(settings), default=str)
  child = subprocess.Popen(
    [sys.executable, "-P", "-c", CHILD, arguments],
    env=os.environ
    | {
      "JAX_COMPILATION_CACHE_DIR": compiled_once,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    },
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )
  while len(checkpoint_steps(directory)) < 2 and child.poll() is None:
    time.sleep(0.002)
  child.send_signal(signal.SIGKILL)
  _, errors = child.communicate()
  assert child.returncode == -signal.SIGKILL, errors.decode()
  # At a step that no checkpoint has, with a line half written.
  newest = checkpoint_steps(directory)[-1]
  assert newest < STEPS
  with open(directory / "metrics.jsonl", "a") as file:
    lost = {"step": newest + 1, "loss": 0.0}
    file.write(f'{json.dumps(lost)}\n{{"step": {newest + 2}, "lo')

  printed = run(settings)
  assert f"{newest} done" in printed
  assert losses(directory) == losses(finished[0])
  for one, two in zip(
    *(
      jax.tree.leaves(nnx.state(load_checkpoint(d)[0], nnx.Param))
      for d in (directory, finished[0])
    ),
    strict=True,
  ):
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_and_saves(
  finished, number, tmp_path, monkeypatch, capfd
):
  loop = importlib.import_module("pallas_gemma.gemma._train.loop").Loop
  take_step = loop.take_step

  def interrupted(self):
    if self.step == 5:
      os.kill(os.getpid(), number)
    take_step(self)

  monkeypatch.setattr(loop, "take_step", interrupted)
  before = signal.getsignal(number)
  settings = config(tmp_path / "run")
  result = train(settings, console=rich.console.Console(file=io.StringIO()))
  monkeypatch.undo()
  assert result.interrupted_by == number and result.step == 6
  assert signal.getsignal(number) == before
  assert "finishing the step and saving" in capfd.readouterr().err
  assert checkpoint_steps(settings.directory)[-1] == 6
  assert (settings.directory / "loss.png").exists()
  assert list(losses(settings.directory)) == [1, 2, 3, 4, 5, 6]
  run(settings)
  assert losses(settings.directory) == losses(finished[0])


def test_a_longer_run_goes_on_from_a_finished_one(finished, tmp_path):
  longer = config(tmp_path / "run", steps=STEPS + 2, allow_change=True)
  shutil.copytree(finished[0], longer.directory)
  assert f"{STEPS} done" in run(longer)
  assert list(losses(longer.directory)) == list(range(1, STEPS + 3))


OTHER = {
  "training.seed = 0, and now training.seed = 1": dict(seed=1),
  "training.batch_size = 4, and now training.batch_size = 8": dict(
    batch_size=8
  ),
  "training.sequence_length = 16, and now": dict(sequence_length=8),
  "data.held_out = 0.1, and now data.held_out = 0.2": dict(held_out=0.2),
  "model.num_layers = 2, and now model.num_layers = 3": dict(
    model=dataclasses.replace(MODEL, num_layers=3)
  ),
  "data.documents = 1, and now data.documents = 79": dict(data=()),
}


@pytest.mark.parametrize("message", OTHER)
def test_a_directory_of_another_config_is_refused(finished, message):
  before = (finished[0] / "config.json").read_bytes()
  with pytest.raises(UserError, match=message) as error:
    run(config(finished[0], **OTHER[message]))
  assert "give another --work-dir" in str(error.value)
  assert (finished[0] / "config.json").read_bytes() == before


def test_a_directory_of_another_tokenizer_is_refused(finished, tmp_path):
  load_checkpoint(finished[0])[1].save(tmp_path / "same.model")
  same = config(finished[0], tokenizer=tmp_path / "same.model")
  assert "complete" in run(same)

  smaller = Tokenizer.train([pathlib.Path(__file__).read_text()], 390)
  smaller.save(tmp_path / "other.model")
  other = config(finished[0], tokenizer=tmp_path / "other.model")
  with pytest.raises(UserError, match="tokenizer.vocab_size = 400, and now"):
    run(other)


# --- what cannot be trained ---


def test_a_tokenizer_larger_than_the_model_is_refused(finished, tmp_path):
  small = dataclasses.replace(MODEL, vocab_size=399)
  tokenizer = finished[0] / "tokenizer.model"
  with pytest.raises(UserError, match="give --model.vocab-size 400"):
    run(config(tmp_path / "run", model=small, tokenizer=tokenizer))


def test_rows_longer_than_the_data_are_refused(tmp_path):
  long = dataclasses.replace(MODEL, context_length=10**6)
  with pytest.raises(
    UserError, match="longer than the training text, .* give "
  ):
    run(config(tmp_path / "run", model=long, sequence_length=10**6))
  assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_that_learns_no_more_stops(tmp_path):
  wild = OptimizerConfig(learning_rate=1e30, warmup_steps=0, clip_norm=1e30)
  match = r"gradient .* at step \d+; 5 steps in a row were not taken .* give a"
  with pytest.raises(UserError, match=match):
    run(config(tmp_path / "run", optimizer=wild))
  records = read_metrics(tmp_path / "run")
  assert records[-1]["skipped"] == records[-1]["skipped_in_a_row"] >= 5
  assert len(records) < 12


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(steps=0), "steps: wanted 1 or more, got 0"),
    (dict(held_out=1.0), "held_out: wanted between 0 and 1"),
    (dict(accumulation=3), "accumulation: wanted a divisor of batch_size, 4"),
    (dict(sequence_length=64), "at most the model's context_length, 32"),
    (dict(z_loss=-1.0), "z_loss: wanted 0 or more"),
  ],
)
def test_settings_are_checked_when_they_are_made(changes, message, tmp_path):
  with pytest.raises(UserError, match=message):
    config(tmp_path, **changes)


@pytest.mark.parametrize(
  "changes",
  [dict(learning_rate=0.0), dict(beta2=1.0), dict(weight_decay=-0.1)],
)
def test_optimizer_settings_are_checked_too(changes):
  with pytest.raises(UserError, match=f"{[*changes][0]}: wanted"):
    OptimizerConfig(**changes)


# --- the arithmetic ---


def batch(rng, rows: int, length: int = 16) -> dict[str, jax.Array]:
  """Rows with ever more padding, so that parts weigh differently."""
  tokens = rng.integers(4, 400, (rows, length + 1))
  real = np.arange(length) < length - 1.5 * np.arange(rows)[:, None]
  return {
    "tokens": jnp.array(tokens[:, :-1]),
    "labels": jnp.array(tokens[:, 1:]),
    "segment_ids": jnp.array(real, jnp.int32),
    "weights": jnp.array(real, jnp.float32),
  }


@pytest.fixture(scope="module")
def model():
  return random_gemma(MODEL)


losses_of = jax.jit(
  token_losses, static_argnames=("valid_vocab_size", "z_loss", "head")
)


@pytest.fixture(scope="module")
def problem(model):
  """A model's parameters, a batch of 8 rows, and its sum of losses."""
  graph, state = nnx.split(model)

  def loss_sum(params, part):
    model = nnx.merge(graph, nnx.State(params))
    return losses_of(model, part, 400).sum()

  return (nnx.to_pure_dict(state), batch(np.random.default_rng(0), 8), loss_sum)


@pytest.fixture(scope="module")
def outcomes(problem):
  """Loss and gradient by the number of passes over the batch's 8 rows."""
  params, whole, loss_sum = problem
  return {
    n: jax.jit(lambda p, b, n=n: loss_and_gradient(loss_sum, p, b, n))(
      params, whole
    )
    for n in (1, 4)
  }


def test_accumulating_is_the_whole_batch_to_rounding(outcomes):
  (loss, gradient), (wanted_loss, wanted) = outcomes[4], outcomes[1]
  # The same float32 terms in two orders: a few units in the last place of the
  # largest.
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
  for one, two in zip(
    jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True
  ):
    scale = float(jnp.abs(two).max())
    np.testing.assert_allclose(one, two, rtol=0, atol=4e-6 * scale)


def test_the_loss_is_the_mean_over_counted_tokens(problem, outcomes):
  params, whole, loss_sum = problem
  mean = float(loss_sum(params, whole)) / float(whole["weights"].sum())
  assert float(outcomes[4][0]) == pytest.approx(mean, rel=1e-6)


def test_padding_and_other_documents_do_not_matter(problem, model):
  params, whole, loss_sum = problem
  padding = whole["segment_ids"] == 0
  for name in ("tokens", "labels"):
    changed = {**whole, name: jnp.where(padding, 7, whole[name])}
    assert float(loss_sum(params, changed)) == float(loss_sum(params, whole))

  # A document's losses are those it has alone.
  alone = jax.tree.map(lambda x: x[:1, :8], whole)
  other = jax.tree.map(lambda x: x[1:2, :8], whole)
  packed = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), alone, other)
  packed["segment_ids"] = jnp.repeat(jnp.array([[1, 2]]), 8, axis=1)
  np.testing.assert_allclose(
    losses_of(model, packed, 400),
    jnp.concatenate(
      [losses_of(model, alone, 400), losses_of(model, other, 400)], 1
    ),
    rtol=1e-5,
  )


def test_rows_past_the_tokenizer_get_no_probability(problem, model):
  few = {**problem[1], "labels": problem[1]["labels"] % 100}
  before = losses_of(model, few, 100)

  @jax.jit
  def wanted(model, few):
    hidden = model.hidden_states(few["tokens"], segment_ids=few["segment_ids"])
    table = model.embedder.embedding[:100]
    return KERNELS.linear_cross_entropy(
      hidden, table, few["labels"], weights=few["weights"]
    )

  np.testing.assert_allclose(before, wanted(model, few), rtol=1e-6)


def test_a_model_trains_with_its_own_ops(problem, model):
  """Its loss is that of its `linear_cross_entropy`, whatever that is."""

  def twice(*args, **kwargs):
    return 2 * KERNELS.linear_cross_entropy(*args, **kwargs)

  ops = dataclasses.replace(KERNELS, linear_cross_entropy=twice)
  np.testing.assert_array_equal(
    losses_of(random_gemma(MODEL, ops=ops), problem[1], 400),
    2 * losses_of(model, problem[1], 400),
  )


def test_the_head_keeps_the_softmax_where_it_fits():
  settings = TrainConfig(batch_size=8, accumulation=2, sequence_length=128)
  model = nnx.eval_shape(lambda: Gemma(settings.model, rngs=nnx.Rngs(0)))
  state = 16 * sum(w.size for w in jax.tree.leaves(model))
  kept = 4 * 128 * settings.model.vocab_size * 4  # float32
  assert choose_head(settings, state + 4 * kept) == "chunked"
  assert choose_head(settings, state + 4 * kept - 1) == "recompute"
  assert choose_head(settings, None) == "recompute"
  assert (
    choose_head(dataclasses.replace(settings, head="chunked"), 1) == "chunked"
  )


@pytest.mark.parametrize("head", ["recompute", "chunked"])
def test_the_head_is_told_what_to_keep(problem, model, head):
  def loss(model):
    return token_losses(model, problem[1], 400, head=head).sum()

  jaxpr = str(jax.make_jaxpr(jax.grad(loss))(model))
  assert ("linear_cross_entropy_kept" in jaxpr) == (head == "chunked")


def test_z_loss_is_added(problem, model):
  _, whole, _ = problem
  plain = losses_of(model, whole, 400)
  logits = jax.jit(lambda m, b: m(b["tokens"], segment_ids=b["segment_ids"]))
  lse = jax.nn.logsumexp(logits(model, whole), axis=-1)
  np.testing.assert_allclose(
    losses_of(model, whole, 400, z_loss=0.1),
    plain + 0.1 * lse**2 * whole["weights"],
    rtol=1e-5,
  )


def test_the_learning_rate_rises_and_falls():
  settings = OptimizerConfig(
    learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4
  )
  rates = np.array([learning_rate_schedule(settings, 21)(i) for i in range(21)])
  np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
  assert all(a > b for a, b in itertools.pairwise(rates[4:]))
  assert rates[12] == pytest.approx(0.55) and rates[20] == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_a_schedule_too(steps):
  schedule = learning_rate_schedule(OptimizerConfig(warmup_steps=40), steps)
  rates = np.array([schedule(i) for i in range(steps)])
  assert (rates > 0).all() and (rates < 8.001e-3).all()


def test_only_weights_decay_not_the_scales_of_norms(model):
  settings = OptimizerConfig(weight_decay=0.5, warmup_steps=0)
  optimizer = make_optimizer(settings, 10)
  params = jax.tree.map(
    jnp.ones_like,
    nnx.to_pure_dict(nnx.state(model, nnx.Param)),
  )
  still = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(
    still, params
  )
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    is_norm = path[-1].key.endswith("norm")
    wanted = 0.0 if is_norm else -0.5 * settings.learning_rate
    np.testing.assert_allclose(update, wanted, rtol=1e-6)


def test_long_gradients_are_shortened():
  optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0), 10)
  params = {"w": jnp.zeros(4)}
  long, longer = ({"w": jnp.full(4, x)} for x in (10.0, 1000.0))
  first, second = (
    optimizer.update(g, optimizer.init(params), params)[0]
    for g in (long, longer)
  )
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert float(optax.tree.norm(first)) > 0


def test_model_flops_are_those_of_the_papers_sizes():
  """6 * (matrix weights with the tied head once) + 6 L T N H."""
  for model, length, gigaflops in (
    (GemmaConfig.gemma_2b(), 2048, 15.49),
    (GemmaConfig.gemma_2b(), 8192, 16.85),
    (GemmaConfig.gemma_7b(), 2048, 52.64),
    (GemmaConfig.gemma_7b(), 8192, 56.86),
  ):
    assert flops_per_token(model, length) / 1e9 == pytest.approx(
      gigaflops, abs=0.005
    )
