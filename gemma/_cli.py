"""The command `pallas-gemma`.

JAX and other slow imports are inside the commands, so that `--help` and a
mistyped option are answered at once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from ._console import open_streams, spare_the_search_for_a_tpu, text_of
from ._errors import UserError
from ._output import standard_streams, tell

if TYPE_CHECKING:
  from rich.status import Status

  from ._sample.sampler import Sampler
  from ._train.config import TrainConfig

_USAGE = """\
usage: pallas-gemma COMMAND [OPTIONS]

A small Gemma, trained and sampled with hand-written Pallas kernels on a TPU
and with plain JAX elsewhere.

commands:
  train    train on text files, or on Python's documentation; resumes by itself
  sample   continue a prompt from a checkpoint
  plot     draw the losses of runs beside each other
  inspect  show a model's arrays, and where they lie on a mesh of devices

`pallas-gemma COMMAND --help` lists the options of a command;
`pallas-gemma --version` says what is installed.
"""

_MISUSE = 2  # the exit code for what the user can mend

# Fields of `SampleConfig` that are not arguments of the call of a `Sampler`.
_OF_THE_SAMPLER = ("checkpoint", "prompt", "step", "batch_size", "weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """Continue prompts from a checkpoint, shown as the text grows.

  Attributes:
    checkpoint: work directory of `train`, such as gs://bucket/run, or directory
      of `save_checkpoint`.
    prompt: texts to continue; one that begins with a dash as --prompt=-TEXT.
      Default: one empty text, the beginning of a document.
    step: which of its checkpoints: a number, or best for that of the lowest
      held-out loss.  Default: the newest.
    max_new_tokens: tokens to add at most.  Default: 200, or as many as the
      model's context has room for.
    temperature: 0 takes the likeliest token each time, 1 follows the model's
      probabilities.
    top_k: draw among that many likeliest tokens only.
    top_p: draw among the likeliest tokens that together have this
      probability.
    min_p: draw among tokens at least so many times as likely as the likeliest;
      None for all.
    repetition_penalty: above 1 makes tokens of the prompt and of the new text
      less likely: divides their logits where positive, multiplies them where
      negative.
    presence_penalty: is subtracted from the logits of tokens of the new text.
    frequency_penalty: is subtracted from a token's logit for each time that it
      is in the new text.
    logit_bias: ids, and what is added to their logits, such as 108 -2.5 109 1;
      -inf for never.
    seed: of the draws, from 0 to 2^63 - 1; the same seed gives the same text.
    stop: texts before which a continuation ends, such as '.' or, in a shell,
      $'\\n\\n'.
    speculate: tokens that are guessed at each step, from what followed in the
      text where its last tokens stood before.  The text is the same; where it
      repeats itself it comes faster.
    batch_size: prompts that are continued at the same time, at most.
    weights: int8 halves what weights are read and kept, for a text that differs
      a little; None computes with the checkpoint's own.
  """

  checkpoint: pathlib.Path
  prompt: tuple[str, ...] = ("",)
  step: int | Literal["best"] | None = None
  max_new_tokens: int | None = None
  temperature: float = 0.8
  top_k: int | None = None
  top_p: float | None = 0.95
  min_p: float | None = None
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
  seed: int = 0
  stop: tuple[str, ...] = ()
  speculate: int = 0
  batch_size: int = 32
  weights: Literal["int8"] | None = None


def main(arguments: Sequence[str] | None = None) -> NoReturn:
  """Runs a command and exits.

  With 0 when done, 2 for what the user can mend, 128 + its number if a signal
  interrupted it, 141 if nobody reads what it prints any more.
  """
  open_streams()
  with standard_streams():
    _main(arguments)


def _main(arguments: Sequence[str] | None) -> NoReturn:
  name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
  if name in ("", "-h", "--help"):
    print(_USAGE, end="", file=sys.stdout if name else sys.stderr)
    sys.exit(0 if name else _MISUSE)
  if name == "--version":
    print(_versions())
    sys.exit(0)
  if name not in _COMMANDS:
    _fail(f"unknown command {name!r}; give one of {', '.join(_COMMANDS)}")
  # absl and asyncio log the traceback of an exception before they raise it;
  # the user would read every error twice.
  for library in ("absl", "asyncio"):
    logging.getLogger(library).setLevel(logging.CRITICAL)
  spare_the_search_for_a_tpu()
  try:
    sys.exit(_COMMANDS[name](rest))
  except UserError as error:
    _fail(str(error))
  except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package in ("", "pallas_gemma"):
      raise
    _fail(f"{package} is not installed; pip install 'pallas-gemma[gemma]'")
  except KeyboardInterrupt:
    print("\npallas-gemma: interrupted", file=sys.stderr)
    sys.exit(130)


def _versions() -> str:
  """Of this package, and of what it runs on."""
  from importlib import metadata

  found = [("Python", platform.python_version())]
  for package in ("jax", "jaxlib", "libtpu"):
    try:
      found.append((package, metadata.version(package)))
    except metadata.PackageNotFoundError:  # libtpu is not everywhere
      continue
  rest = ", ".join(f"{name} {version}" for name, version in found)
  return f"pallas-gemma {metadata.version('pallas-gemma')} ({rest})"


def _fail(message: str) -> NoReturn:
  print(f"pallas-gemma: {' '.join(message.split())}", file=sys.stderr)
  sys.exit(_MISUSE)


# --- the commands ---


def _train(arguments: list[str]) -> int:
  from ._options import parse
  from ._train.config import TrainConfig

  config = parse(TrainConfig, "pallas-gemma train", arguments)

  from ._train.interrupt import ended_at_once

  with ended_at_once():
    return _train_and_sample(config)


def _train_and_sample(config: TrainConfig) -> int:
  from ._processes import count, is_first
  from ._train.metrics import perplexity
  from ._train.trainer import train
  from ._train.work import local_home, shown

  _keep_compiled(local_home(config))
  result = train(config)
  if not is_first():
    return 128 + (result.interrupted_by or -128)
  if result.interrupted_by is not None:
    saved = f"after step {result.step}, which is saved"
    tell(
      f"pallas-gemma: stopped {saved if result.step else 'before a step'}; "
      "give the same command to go on\n"
    )
    return 128 + result.interrupted_by
  if result.held_out_loss is not None and result.unigram_loss is not None:
    print(
      f"held-out perplexity {perplexity(result.held_out_loss):,.1f}; guessing "
      f"by frequency alone (unigram): {perplexity(result.unigram_loss):,.1f}"
    )
  if count() == 1:  # several would all have to load it
    print(f"\na sample from {shown(config)}:\n")
    _print_samples(SampleConfig(checkpoint=result.directory))
  print(
    f"\nfor more: pallas-gemma sample --checkpoint {shown(config)} "
    "--prompt 'The'"
  )
  return 0


def _sample(arguments: list[str]) -> int:
  from ._options import parse

  config = parse(SampleConfig, "pallas-gemma sample", arguments)
  config = dataclasses.replace(
    config,
    prompt=tuple(map(text_of, config.prompt)),
    stop=tuple(map(text_of, config.stop)),
  )
  if os.access(config.checkpoint, os.W_OK):
    _keep_compiled(config.checkpoint)
  _print_samples(config)
  return 0


def _plot(arguments: list[str]) -> int:
  from ._options import parse
  from ._train.plot_options import PlotConfig

  config = parse(PlotConfig, "pallas-gemma plot", arguments)

  from ._train.plot import plot_runs

  print(f"drawn in {plot_runs(config.runs, config.out, config.axis)}")
  return 0


def _inspect(arguments: list[str]) -> int:
  from ._options import parse
  from ._train.inspect import InspectConfig, described

  for line in described(
    parse(InspectConfig, "pallas-gemma inspect", arguments)
  ):
    print(line)
  return 0


def _keep_compiled(directory: pathlib.Path) -> None:
  """Keeps compiled programs in `directory`, so that the next start is faster.

  In a folder for each machine, since code that was compiled for one processor
  may not run on another.  If the user has chosen a cache
  (JAX_COMPILATION_CACHE_DIR), that one is used.
  """
  import jax

  option = "jax_compilation_cache_dir"
  if getattr(jax.config, option) is None:
    path = directory.absolute() / "compiled" / platform.node()
    jax.config.update(option, str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _print_samples(config: SampleConfig) -> None:
  """Prints prompts and continuations; the first one piece by piece."""
  from ._checkpoint import load_checkpoint
  from ._sample.sampler import Sampler

  with _waiting() as waiting:
    waiting.update("loading ...")
    model, tokenizer = load_checkpoint(config.checkpoint, step=config.step)
    if config.weights == "int8":
      model = model.quantize()
    sampler = Sampler(model, tokenizer, batch_size=config.batch_size)
    asked = _asked(config, sampler)
    sampler.check(list(config.prompt), **asked)
    waiting.update("compiling ...")
    has_begun = False

    def stream(index: int, piece: str) -> None:
      nonlocal has_begun
      if index == 0:
        if not has_begun:
          has_begun = True
          waiting.stop()
          print(config.prompt[0], end="")
        print(piece, end="", flush=True)

    if not waiting.console.is_terminal:
      stream(0, "")
    completions = sampler(list(config.prompt), stream=stream, **asked)
    stream(0, "")
  print()
  for prompt, completion in zip(
    config.prompt[1:], completions[1:], strict=True
  ):
    print(f"---\n{prompt}{completion.text}")


def _asked(config: SampleConfig, sampler: Sampler) -> dict[str, Any]:
  """The arguments of the sampler's call."""
  asked = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name not in _OF_THE_SAMPLER
  }
  if config.max_new_tokens is None:
    encode = sampler.tokenizer.encode
    longest = max(len(encode(text, add_bos=True)) for text in config.prompt)
    asked["max_new_tokens"] = max(min(200, sampler.max_length - longest), 1)
  return asked


def _waiting() -> Status:
  """Says on a terminal what is waited for, and nothing elsewhere."""
  from rich.console import Console
  from rich.status import Status

  console = Console(stderr=True)
  console.quiet = not console.is_terminal
  return Status("", console=console, spinner="line")


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
  "train": _train,
  "sample": _sample,
  "plot": _plot,
  "inspect": _inspect,
}
