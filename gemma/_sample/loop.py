"""The rows on the device: prompts come in, are read, and grow.

All five functions are compiled.  The state is given away to them and written in
place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._cache import Cache
from .._config import GemmaConfig
from .._model import Gemma
from .draw import draw
from .lookup import guess
from .settings import MOST_DRAFTED, Settings

CHUNK = MOST_DRAFTED + 1  # tokens of a row that `run` draws at most


@dataclasses.dataclass(frozen=True)
class State:
  """B rows with room for S tokens.

  Attributes:
    tokens: [B, S] int32, of which the first `known` of each row mean something.
    known: [B] int32.
    prompts: [B] int32: how many of them are the prompt's.
    ends: [B] int32: as many as `known` may become.
    done: [B] bool: whether the row has ended, or has never begun.
    keys: [B, n] uint32: the words of each row's random key.
    cache: of the tokens read.  A row that is not done has read all it knows but
      the last, between calls; for one that is done the length is 0, so that
      attention has nothing to read.
    seen: [B, V] bool: which tokens a row has; None if nothing asks.
    counts: [B, V] int32: how often a row has drawn each; None if nothing asks.
  """

  tokens: jax.Array
  known: jax.Array
  prompts: jax.Array
  ends: jax.Array
  done: jax.Array
  keys: jax.Array
  cache: Cache
  seen: jax.Array | None
  counts: jax.Array | None


jax.tree_util.register_dataclass(
  State,
  data_fields=[field.name for field in dataclasses.fields(State)],
  meta_fields=[],
)


class Drawn(NamedTuple):
  """What a call of `run` has added to each row.

  Attributes:
    counts: [B] int32: how many tokens.
    tokens: [B, CHUNK] int32, of which the first `counts` mean something.
    logprobs: [B, CHUNK] float32, likewise.
    done: [B] bool: whether the row has ended.
  """

  counts: jax.Array
  tokens: jax.Array
  logprobs: jax.Array
  done: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "batch", "length"))
def empty(
  config: GemmaConfig,
  settings: Settings,
  keys: jax.Array,
  *,
  batch: int,
  length: int,
) -> State:
  """No prompts yet; `keys` only tells how many words a key has."""
  numbers = jnp.zeros(batch, jnp.int32)
  words = batch, config.vocab_size
  return State(
    tokens=jnp.zeros((batch, length), jnp.int32),
    known=numbers,
    prompts=numbers,
    ends=numbers,
    done=jnp.ones(batch, bool),
    keys=jnp.zeros((batch, keys.shape[-1]), jnp.uint32),
    cache=Cache.empty(config, batch, length),
    seen=jnp.zeros(words, bool) if settings.uses_seen else None,
    counts=jnp.zeros(words, jnp.int32) if settings.uses_counts else None,
  )


@functools.partial(jax.jit, donate_argnames="state")
def admit(
  state: State,
  row: jax.Array,
  prompt: jax.Array,
  length: jax.Array,
  end: jax.Array,
  key: jax.Array,
) -> State:
  """A prompt takes a row; nothing of it is read yet.

  Args:
    state: of which the row is done.
    row: its index.
    prompt: [S] int32, right-padded.
    length: of the prompt.
    end: as many tokens as the row may have in the end.
    key: [n] uint32.
  """
  cache, seen, counts = state.cache, state.seen, state.counts
  if seen is not None:
    places = jnp.where(jnp.arange(prompt.size) < length, prompt, seen.shape[1])
    mine = jnp.zeros(seen.shape[1], bool).at[places].set(True, mode="drop")
    seen = seen.at[row].set(mine)
  if counts is not None:
    counts = counts.at[row].set(0)
  return State(
    tokens=state.tokens.at[row].set(prompt),
    known=state.known.at[row].set(length),
    prompts=state.prompts.at[row].set(length),
    ends=state.ends.at[row].set(end),
    done=state.done.at[row].set(False),
    keys=state.keys.at[row].set(key),
    cache=dataclasses.replace(cache, lengths=cache.lengths.at[row].set(0)),
    seen=seen,
    counts=counts,
  )


@functools.partial(jax.jit, donate_argnames="state")
def end(state: State, ended: np.ndarray) -> State:
  """Ends the rows, [B] bool, that the host wants to end; others stay."""
  lengths = jnp.where(ended, 0, state.cache.lengths)
  cache = dataclasses.replace(state.cache, lengths=lengths)
  return dataclasses.replace(state, done=state.done | ended, cache=cache)


@functools.partial(jax.jit, static_argnames="size", donate_argnames="state")
def read(
  model: Gemma, state: State, row: jax.Array | None, *, size: int
) -> State:
  """Reads up to `size` more tokens of a prompt, but never its last.

  Args:
    model: whose cache it is.
    state: with room in the cache for `size` more tokens.
    row: which; None is all of them, none of which has drawn a token yet.
    size: compiled in.
  """
  mine = state if row is None else _only(state, row)
  cache = mine.cache
  places = cache.lengths[:, None] + jnp.arange(size, dtype=jnp.int32)
  places = jnp.minimum(places, cache.size - 1)
  chunk = jnp.take_along_axis(mine.tokens, places, axis=1)
  left = jnp.where(mine.done, 0, mine.known - 1 - cache.lengths)
  _, cache = model.extend(chunk, cache, jnp.clip(left, 0, size))
  if row is not None:
    cache = state.cache.with_row(row, cache)
  return dataclasses.replace(state, cache=cache)


def _only(state: State, row: jax.Array) -> State:
  """One row of what `read` needs."""

  def one(x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, row, 1)

  return dataclasses.replace(
    state,
    tokens=one(state.tokens),
    known=one(state.known),
    done=one(state.done),
    cache=state.cache.row(row),
  )


@functools.partial(jax.jit, donate_argnames="state")
def run(
  model: Gemma,
  state: State,
  settings: Settings,
  most: jax.Array,
  is_waiting: jax.Array,
) -> tuple[State, Drawn]:
  """Steps, until a row has drawn `most` tokens or all have ended.

  Args:
    model: whose cache it is.
    state: every row of which is done, or has read its prompt but the last
      token.
    settings: how to draw.
    most: int32, from settings.speculate + 1 to CHUNK.
    is_waiting: bool, whether a prompt waits: then the first row that ends is
      the end.
  """
  start, idle = state.known, state.done

  def goes_on(carry: tuple[State, jax.Array]) -> jax.Array:
    state, _ = carry
    room = most - jnp.max(state.known - start)
    makes_room = is_waiting & jnp.any(state.done & ~idle)
    return (room > settings.speculate) & ~jnp.all(state.done) & ~makes_room

  def step(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
    return _step(model, *carry, settings, start)

  logprobs = jnp.zeros((start.size, CHUNK), jnp.float32)
  state, logprobs = jax.lax.while_loop(goes_on, step, (state, logprobs))
  places = start[:, None] + jnp.arange(CHUNK, dtype=jnp.int32)
  places = jnp.minimum(places, state.cache.size - 1)
  tokens = jnp.take_along_axis(state.tokens, places, axis=1)
  return state, Drawn(state.known - start, tokens, logprobs, state.done)


def _step(
  model: Gemma,
  state: State,
  logprobs: jax.Array,
  settings: Settings,
  start: jax.Array,
) -> tuple[State, jax.Array]:
  """Reads each row's last known token, and a guess; draws what follows."""
  guesses = settings.speculate
  last = jnp.maximum(state.known - 1, 0)
  chunk = jnp.take_along_axis(state.tokens, last[:, None], axis=1)
  guessed = jnp.full_like(chunk, -1)  # what no token is
  if guesses:
    following = guess(state.tokens, last + 1, guesses)
    chunk = jnp.concatenate([chunk, following], axis=1)
    guessed = jnp.concatenate([following, guessed], axis=1)
  hidden, cache = model.extend(chunk, state.cache)
  logits = model.logits(hidden.swapaxes(0, 1))

  def draw_one(carry, x):
    state, logprobs, is_right = carry
    logits, guessed = x
    keys = jax.random.wrap_key_data(state.keys)
    keys = jax.vmap(jax.random.fold_in)(keys, state.known - state.prompts)
    token, logprob = draw(logits, keys, settings, state.seen, state.counts)
    grows = is_right & ~state.done
    logprobs = _put(logprobs, state.known - start, logprob, grows)
    state = _add(state, token, grows, settings.stops)
    return (state, logprobs, is_right & (token == guessed)), None

  (state, logprobs, _), _ = jax.lax.scan(
    draw_one,
    (state, logprobs, jnp.ones_like(state.done)),
    (logits, guessed.swapaxes(0, 1)),
    unroll=not guesses,  # of one token: there is nothing to repeat
  )
  # A guess that was wrong is in the cache, but past its length.
  lengths = jnp.where(state.done, 0, state.known - 1)
  cache = dataclasses.replace(cache, lengths=lengths)
  return dataclasses.replace(state, cache=cache), logprobs


def _add(
  state: State,
  token: jax.Array,
  grows: jax.Array,
  stops: jax.Array | np.ndarray,
) -> State:
  """One more token in each row that grows."""
  rows, seen, counts = jnp.arange(grows.size), state.seen, state.counts
  if seen is not None:
    seen = seen.at[rows, token].max(grows)
  if counts is not None:
    counts = counts.at[rows, token].add(grows.astype(jnp.int32))
  known = state.known + grows
  is_stop = jnp.any(token[:, None] == stops, axis=1)
  return dataclasses.replace(
    state,
    tokens=_put(state.tokens, state.known, token, grows),
    known=known,
    done=state.done | grows & (is_stop | (known >= state.ends)),
    seen=seen,
    counts=counts,
  )


def _put(
  x: jax.Array, places: jax.Array, new: jax.Array, chosen: jax.Array
) -> jax.Array:
  """x [B, n] with one new number in each chosen row."""
  places = jnp.where(chosen, places, x.shape[1])  # out of bounds: dropped
  return x.at[jnp.arange(places.size), places].set(new, mode="drop")
