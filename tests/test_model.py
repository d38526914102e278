"""Gemma is Gemma: against a float64 twin, and against itself.

No tolerance is typed in.  The twin gives the truth; a computation may be as
wrong as `numerics` lets a kernel be beside plain jnp.
"""

import dataclasses
import functools
import importlib
import json

import gemma_oracle
import interpreter
import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
import v5e
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu
from pallas_gemma import kernels
from pallas_gemma.gemma import (
  KERNELS,
  REFERENCE,
  Gemma,
  GemmaConfig,
  describe_ops,
)
from random_gemma import random_gemma

TINY = dataclasses.replace(
  GemmaConfig.tiny(vocab_size=97),
  num_layers=2,
  width=64,
  hidden_size=96,
  context_length=64,
)
# The interpreter has its own test: in a scan, what it is not asked to run in
# place of (`platform_dependent`) fails to lower with race detection on.
pytestmark = pytest.mark.no_interpreter
HEADS = {
  "mqa": TINY,
  "gqa": dataclasses.replace(TINY, num_kv_heads=2),
  "mha": dataclasses.replace(TINY, num_heads=3, num_kv_heads=3),
}
STAGES = 2 * TINY.num_layers + 2  # the embedding, the sub-layers, the head
MAKES = [pytest.param(config, id=name) for name, config in HEADS.items()]


@functools.cache
def make(config=TINY, ops=KERNELS):
  """A model whose norms' scales are not zero, so that they are tested too."""
  return random_gemma(config, ops=ops, norms=0.3)


def random_tokens(*shape):
  # One shape for most tests, so that they share compilations.
  shape = shape or (2, 24)
  tokens = np.random.default_rng(3).integers(0, TINY.vocab_size, shape)
  return jnp.asarray(tokens, jnp.int32)


def truth(model, tokens, function=gemma_oracle.logits):
  return np.stack([function(model, row) for row in tokens])


def assert_as_good(got, plain, exact):
  """`got` is about as near to the truth as `plain` is."""
  got, plain, exact = (
    {"output": np.asarray(a, np.float64)} for a in (got, plain, exact)
  )
  numerics.assert_within_bar(got, plain, exact)


@jax.jit
def forward(model, tokens, **kwargs):
  return model(tokens, **kwargs)


@jax.jit
def hidden(model, tokens, **kwargs):
  return model.hidden_states(tokens, **kwargs)


@jax.jit
def prefill(model, tokens, lengths, cache):
  h, cache = model.prefill(tokens, lengths, cache)
  return model.logits(h), cache


@jax.jit
def decode(model, tokens, cache):
  h, cache = model.decode(tokens, cache)
  return model.logits(h), cache


def rms(error):
  return np.sqrt(np.mean(np.square(np.asarray(error, np.float64))))


def rounding(model, tokens, dtype=jnp.float32):
  """How wrong a logit may be: each stage rounds each term of its sum once."""
  rows = np.abs(truth(model, tokens, gemma_oracle.hidden_states))
  terms = rows @ np.abs(np.asarray(model.embedder.embedding[...]).T)
  return STAGES * float(jnp.finfo(dtype).eps) * terms.max()


@jax.jit
def mean_loss(model, tokens):
  losses = model.ops.linear_cross_entropy(
    model.hidden_states(tokens[:, :-1]),
    model.embedder.embedding[...],
    tokens[:, 1:],
  )
  return losses.mean()


@jax.jit
def gradients(model, tokens):
  """The gradient of every parameter, by name."""
  leaves = jax.tree.leaves_with_path(jax.grad(mean_loss)(model, tokens))
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def assert_equal_gradients(got, want):
  """Equal up to one rounding in each stage, there and back."""
  for name, gradient in want.items():
    error = rms(got[name] - gradient) / rms(gradient)
    assert error <= 2 * STAGES * np.finfo(np.float32).eps, name


def named_attention(*args, **kwargs):
  return checkpoint_name(
    REFERENCE.flash_attention(*args, **kwargs), "flash_attention_out"
  )


NAMED = dataclasses.replace(REFERENCE, flash_attention=named_attention)


def with_remat(remat):
  return make(dataclasses.replace(TINY, remat=remat), ops=NAMED)


# --- the architecture ---------------------------------------------------------


@pytest.mark.parametrize(
  "config, embedding, rest",
  [  # arXiv 2403.08295, table 2
    (GemmaConfig.gemma_2b(), 524_550_144, 1_981_884_416),
    (GemmaConfig.gemma_7b(), 786_825_216, 7_751_248_896),
  ],
)
def test_parameter_counts_of_the_paper(config, embedding, rest):
  model = nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0)))
  leaves = jax.tree.leaves(model)
  assert model.embedder.embedding.size == embedding
  assert sum(leaf.size for leaf in leaves) == embedding + rest
  assert all(leaf.dtype == jnp.float32 for leaf in leaves)


@pytest.mark.parametrize(
  "config, scale",
  [(GemmaConfig.gemma_2b(), 45.25), (GemmaConfig.gemma_7b(), 55.5)],
)
def test_embedding_scale_is_rounded_in_bfloat16(config, scale):
  one_row = dataclasses.replace(config, vocab_size=1, num_layers=1)
  model = nnx.eval_shape(lambda: Gemma(one_row, rngs=nnx.Rngs(0)))
  values = jnp.linspace(1, 2, config.width).astype(jnp.bfloat16)
  model.embedder.embedding.set_value(values.astype(jnp.float32)[None])
  rows = model.embedder.embed(jnp.zeros(1, jnp.int32))[0]
  assert rows.dtype == jnp.bfloat16 and rows[0] == scale

  def product(root):  # of bfloat16s, in bfloat16
    return (values.astype(jnp.float32) * root).astype(jnp.bfloat16)

  np.testing.assert_array_equal(rows, product(scale))
  assert not np.array_equal(rows, product(config.width**0.5))


@pytest.mark.parametrize("config", MAKES)
def test_agrees_with_the_float64_twin(config):
  model, tokens = make(config), random_tokens()
  error = np.abs(forward(model, tokens) - truth(model, tokens))
  assert error.max() <= rounding(model, tokens)


def test_the_twin_tells_tanh_from_exact_gelu():
  """And so would everything else that is compared with it."""
  exact_gelu = functools.partial(kernels.feed_forward, activation="gelu")
  wrong = dataclasses.replace(KERNELS, feed_forward=exact_gelu)
  model, tokens = make(ops=wrong), random_tokens()
  error = np.abs(forward(model, tokens) - truth(model, tokens))
  assert error.max() > 20 * rounding(model, tokens)


def test_pallas_kernels_agree_with_the_float64_twin():
  """Every kernel there is, in its place in the model, values and gradients."""
  written = {
    op.name: functools.partial(op.function, implementation="pallas")
    for op in kernels.OPS
    if op.pallas and hasattr(REFERENCE, op.name)
  }
  tokens = random_tokens()
  model = make(ops=dataclasses.replace(REFERENCE, **written))
  plain = with_remat("none")
  with pltpu.force_tpu_interpret_mode(interpreter.PARAMS):
    logits, got = forward(model, tokens), gradients(model, tokens)
  assert_as_good(logits, forward(plain, tokens), truth(plain, tokens))
  assert_equal_gradients(got, gradients(plain, tokens))


def test_bfloat16_computes_in_bfloat16():
  model = make(dataclasses.replace(TINY, dtype="bfloat16"))
  tokens = random_tokens()
  assert jax.eval_shape(hidden, model, tokens).dtype == jnp.bfloat16
  assert model.init_cache(2, 8).k.dtype == jnp.bfloat16
  logits = forward(model, tokens)
  assert logits.dtype == jnp.float32
  error = np.abs(logits - truth(model, tokens)).max()
  assert error <= rounding(model, tokens, jnp.bfloat16)


def test_cast_weights_change_nothing():
  model = make(dataclasses.replace(TINY, dtype="bfloat16"))
  tokens = random_tokens()
  cast = model.cast()
  assert cast.blocks.down[...].dtype == jnp.bfloat16
  assert model.blocks.down[...].dtype == jnp.float32
  np.testing.assert_array_equal(forward(cast, tokens), forward(model, tokens))


# --- initialisation -----------------------------------------------------------


def test_a_new_model_knows_nothing():
  """The first loss is that of a uniform guess."""
  model = Gemma(TINY, rngs=nnx.Rngs(0), ops=NAMED)
  loss = mean_loss(model, random_tokens())
  assert abs(loss - np.log(TINY.vocab_size)) < 0.3


def test_a_new_model_can_learn():
  """No gradient vanishes, as with the feed-forward of zeros once released."""
  model = Gemma(TINY, rngs=nnx.Rngs(0), ops=NAMED)
  for name, gradient in gradients(model, random_tokens()).items():
    assert rms(gradient) > 0, name


def test_same_seed_same_weights():
  one, other = (Gemma(TINY, rngs=nnx.Rngs(5)) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, one, other)
  # Layers differ from each other.
  assert not np.array_equal(one.blocks.q[0], one.blocks.q[1])


# --- segments, padding and positions ------------------------------------------


def test_packed_documents_do_not_see_each_other():
  model = make()
  tokens = random_tokens(1, 40)
  lengths = (13, 1, 13, 13)  # few shapes, so few compilations
  ids = np.repeat([1, 2, 3, 4], lengths)[None]
  packed = hidden(model, tokens, segment_ids=jnp.asarray(ids))
  ends = np.cumsum(lengths)
  documents = [tokens[:, e - n : e] for n, e in zip(lengths, ends, strict=True)]
  separate = jnp.concatenate([hidden(model, d) for d in documents], axis=1)
  exact = [truth(model, d, gemma_oracle.hidden_states) for d in documents]
  # Positions start anew; that they do is visible in the rounding alone.
  anew = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
  explicit = hidden(model, tokens, segment_ids=jnp.asarray(ids), positions=anew)
  np.testing.assert_array_equal(packed, explicit)
  assert_as_good(packed, separate, np.concatenate(exact, axis=1))


def test_padding_changes_nothing():
  model = make()
  tokens = random_tokens(1, 40)  # of shapes that the packed documents have too
  ids = jnp.ones_like(tokens).at[:, 13:].set(0)
  other = tokens.at[:, 13:].set(0)
  padded = [hidden(model, t, segment_ids=ids)[:, :13] for t in (tokens, other)]
  np.testing.assert_array_equal(*padded)
  alone = hidden(model, tokens[:, :13])
  exact = truth(model, tokens[:, :13], gemma_oracle.hidden_states)
  assert_as_good(padded[0], alone, exact)


def test_the_future_is_unseen():
  model, tokens = make(), random_tokens()
  other = tokens.at[:, 12:].set(0)
  np.testing.assert_array_equal(
    forward(model, tokens)[:, :12], forward(model, other)[:, :12]
  )


def test_only_relative_positions_matter():
  model, tokens = make(), random_tokens(1, 13)
  positions = jnp.arange(13)[None]
  plain = hidden(model, tokens)
  default = hidden(model, tokens, positions=positions)
  moved = hidden(model, tokens, positions=positions + 1000)
  stretched = hidden(model, tokens, positions=positions * 2)
  np.testing.assert_array_equal(default, plain)
  # At position 1000 a float32 angle is off by 1000 roundings.
  error = np.abs(moved - plain).max()
  assert error < 1000 * np.finfo(np.float32).eps
  assert np.abs(stretched - plain).max() > 10 * error


# --- the cache ----------------------------------------------------------------


@pytest.mark.parametrize("config", MAKES)
def test_decoding_agrees_with_the_whole_forward_pass(config):
  """Two prompts of different lengths, then one token a step to the last place
  of the cache."""
  model, tokens = make(config), random_tokens()
  lengths = np.array([14, 5])
  whole, exact = forward(model, tokens), truth(model, tokens)
  prompts = np.where(np.arange(16) < lengths[:, None], tokens[:, :16], 0)
  got, cache = prefill(
    model, jnp.asarray(prompts), jnp.asarray(lengths), model.init_cache(2, 24)
  )
  steps, rows = [got], np.arange(2)
  for step in range(24 - 14):
    token = tokens[rows, lengths + step]
    got, cache = decode(model, token, cache)
    steps.append(got)
  places = lengths[:, None] - 1 + np.arange(len(steps))
  pick = lambda a: np.asarray(a)[rows[:, None], places]  # noqa: E731
  assert_as_good(np.stack(steps, axis=1), pick(whole), pick(exact))
  np.testing.assert_array_equal(cache.lengths, lengths + 10)


def test_a_full_cache_is_left_alone():
  """Writing past the end must not move to another place."""
  # Of the shapes of the test above.
  model, tokens = make(), random_tokens()
  lengths = jnp.array([16, 16])
  _, cache = prefill(model, tokens[:, :16], lengths, model.init_cache(2, 24))
  full = dataclasses.replace(cache, lengths=jnp.full(2, 24, jnp.int32))
  _, after = decode(model, tokens[:, 0], full)
  np.testing.assert_array_equal(after.k, full.k)
  np.testing.assert_array_equal(after.v, full.v)


@jax.jit
def extend(model, tokens, cache, counts=None):
  h, cache = model.extend(tokens, cache, counts)
  return model.logits(h), cache


def test_chunks_of_unequal_rows_agree_with_the_whole_forward_pass():
  """Each row takes its own part of a chunk, from none to all of it."""
  model, tokens = make(), random_tokens()
  whole, exact = forward(model, tokens), truth(model, tokens)
  cache, rows = model.init_cache(2, 24), np.arange(2)[:, None]
  start = np.zeros(2, int)
  for counts in ((8, 3), (0, 8), (5, 1)):
    places = np.minimum(start[:, None] + np.arange(8), 23)
    got, cache = extend(model, tokens[rows, places], cache, jnp.array(counts))
    start += counts
    np.testing.assert_array_equal(cache.lengths, start)
    for row, count in enumerate(counts):
      at = places[row, :count]
      if count:
        assert_as_good(got[row, :count], whole[row, at], exact[row, at])


def test_a_long_prompt_is_read_in_chunks(monkeypatch):
  """Whole ones and a rest; what the cache held before is forgotten."""
  model, tokens = make(), random_tokens()
  lengths = jnp.array([21, 8])
  args = model, tokens[:, :21], lengths, model.init_cache(2, 24)
  want, _ = jax.jit(Gemma.prefill)(*args)
  module = importlib.import_module("pallas_gemma.gemma._model")
  monkeypatch.setattr(module, "_CHUNK", 8)
  full = dataclasses.replace(args[-1], lengths=jnp.array([9, 24]))
  chunked = jax.jit(lambda *args: Gemma.prefill(*args))
  got, cache = chunked(*args[:-1], full)
  np.testing.assert_array_equal(cache.lengths, lengths)
  error = np.abs(np.asarray(got) - want).max()
  assert error <= STAGES * np.finfo(np.float32).eps * np.abs(want).max()


def test_a_row_of_a_cache_is_read_and_replaced():
  model, tokens = make(), random_tokens()
  lengths = jnp.array([16, 9])
  _, cache = prefill(model, tokens[:, :16], lengths, model.init_cache(2, 24))
  second = cache.row(jnp.int32(1))
  assert second.k.shape[1] == 1 and second.lengths.tolist() == [9]
  swapped = cache.with_row(jnp.int32(0), second)
  assert swapped.lengths.tolist() == [9, 9]
  for got, want in ((swapped.k, cache.k), (swapped.v, cache.v)):
    np.testing.assert_array_equal(got[:, 0], want[:, 1])
    np.testing.assert_array_equal(got[:, 1], want[:, 1])


# --- memory -------------------------------------------------------------------


def test_remat_policies_give_equal_gradients():
  tokens = random_tokens()
  want = gradients(with_remat("none"), tokens)
  policies = "full", "dots", "names", "attention", "none:1,full", "full:1,none"
  for remat in (*policies, "unrolled", "unrolled:1,full"):
    assert_equal_gradients(gradients(with_remat(remat), tokens), want)


def test_remat_policies_keep_what_they_say():
  """Counted in bytes: the less is kept, the more is computed again."""
  tokens = random_tokens()

  def kept(remat):
    model = with_remat(remat)
    vjp = jax.eval_shape(lambda m: jax.vjp(lambda m: m(tokens), m)[1], model)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(vjp))

  rows = TINY.num_layers * tokens.size * 4  # bytes per float32 column
  policies = "full", "names", "dots", "none", "unrolled"
  full, names, dots, none, unrolled = map(kept, policies)
  assert names - full == rows * TINY.num_heads * TINY.head_size
  # q, k, v (of one head), out, gate and up; no gradient asks for down's.
  widths = TINY.head_size * (TINY.num_heads + 2) + TINY.width
  assert dots - full == rows * (widths + 2 * TINY.hidden_size)
  assert none > dots and unrolled > dots


# --- what runs ----------------------------------------------------------------


def test_describe_names_every_op_and_its_reason():
  for platform in ("cpu", "tpu"):
    lines = describe_ops(KERNELS, platform)
    called = [op for op in kernels.OPS if hasattr(KERNELS, op.name)]
    for op, line in zip(called, lines, strict=True):
      if op.name in ("rms_norm", "add_rms_norm"):
        why = "reference (XLA), by choice"
      elif not op.pallas:
        why = "reference (XLA), no Pallas kernel yet"
      elif platform == "tpu":
        why = "Pallas kernel, lowered for tpu"
      else:
        why = "reference (XLA), platform is cpu"
      assert line == f"{op.name}: {why}"
  assert all("by choice" in x for x in describe_ops(REFERENCE, "tpu"))
  mine = dataclasses.replace(KERNELS, rms_norm=named_attention)
  assert "own function, named_attention" in describe_ops(mine, "tpu")[0]


@v5e.needs_compiler
def test_lowered_for_tpu_it_runs_the_kernels_it_says():
  """Gemma 2B's gradient, lowered here for a TPU; nothing is computed."""
  config = dataclasses.replace(GemmaConfig.gemma_2b(), remat="names")
  model = nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0)))
  tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

  def step(model, tokens):
    return jax.grad(lambda m: m.hidden_states(tokens).astype("float32").sum())(
      model
    )

  exported = jax.export.export(jax.jit(step), platforms=["tpu"])
  module = exported(model, tokens).mlir_module()
  said = dict(line.split(": ") for line in describe_ops(KERNELS, "tpu"))
  for name in ("rms_norm", "add_rms_norm", "flash_attention", "feed_forward"):
    for kernel in (f"{name}_fwd", f"{name}_bwd"):
      assert (kernel in module) == said[name].startswith("Pallas"), kernel


# --- bad input ----------------------------------------------------------------


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(num_layers=0), "num_layers must be a positive integer, got 0"),
    (dict(width=2.0), "width must be a positive integer, got 2.0"),
    (dict(num_layers=True), "num_layers must be a positive integer"),
    (dict(num_kv_heads=3), "num_kv_heads must be a divisor of num_heads = 4"),
    (dict(head_size=15), "head_size must be even"),
    (dict(dtype="float16"), "dtype must be one of bfloat16, float32, got"),
    (
      dict(remat="some"),
      "remat must be one of none, unrolled, full, dots, names, attention, auto",
    ),
    (dict(remat="none:2,some"), "remat must be one of none, unrolled, full"),
    (dict(remat="none:2,full"), "remat must be fewer than 2 layers"),
    (dict(remat="none:0,full"), "remat must be fewer than 2 layers"),
    (dict(remat="none:x,full"), "remat must be fewer than 2 layers"),
    (dict(remat=None), "remat must be one of"),
    (dict(norm_epsilon=-1.0), "norm_epsilon must be a positive number"),
    (dict(rope_base_frequency="x"), "rope_base_frequency must be a positive"),
  ],
)
def test_wrong_configs_are_refused(change, message):
  with pytest.raises(ValueError, match=f"GemmaConfig: {message}"):
    dataclasses.replace(TINY, **change)


def test_configs_survive_json():
  config = dataclasses.replace(TINY, remat="dots")
  fields = json.loads(json.dumps(config.to_dict()))
  assert GemmaConfig.from_dict(fields) == config
  with pytest.raises(ValueError, match="unknown fields: colour"):
    GemmaConfig.from_dict(fields | {"colour": 1})
  del fields["width"]
  with pytest.raises(ValueError, match="missing fields: width"):
    GemmaConfig.from_dict(fields)


def test_wrong_calls_are_refused():
  model = make()
  tokens = random_tokens(2, 8)
  cache = model.init_cache(2, 4)
  lengths = jnp.array([8, 8])
  with pytest.raises(ValueError, match=r"hidden_states: .* \[B, T\] integers"):
    model(tokens[0])
  with pytest.raises(ValueError, match=r"got float32\[2, 8\]"):
    model(tokens.astype(jnp.float32))
  with pytest.raises(ValueError, match="at most the context length 64, got 65"):
    model(random_tokens(1, 65))
  with pytest.raises(ValueError, match="segment_ids must be"):
    model(tokens, segment_ids=jnp.ones((2, 7), jnp.int32))
  with pytest.raises(ValueError, match="length must be from 1 to .* 64"):
    model.init_cache(2, 65)
  with pytest.raises(ValueError, match="prefill: .* 4 places, got 8"):
    model.prefill(tokens, lengths, cache)
  with pytest.raises(ValueError, match="extend: .* 4 places, got 8"):
    model.extend(tokens, cache)
  with pytest.raises(ValueError, match=r"decode: tokens must be \[B\]"):
    model.decode(tokens, cache)
