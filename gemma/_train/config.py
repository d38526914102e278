"""What a training run can be told."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Annotated, Literal

import tyro

from .._arguments import make_fields
from .._config import LARGEST, GemmaConfig
from .._data.remote import Remote
from .._errors import UserError
from .._files import local_path, remote_url
from .._remote import place_of
from .._seeds import A_SEED, is_seed
from .mesh import parse
from .mix import check as check_mix
from .profile import window_of

PathOrUrl = Annotated[
  pathlib.Path | str | None, tyro.conf.arg(metavar="{None}|PATH|URL")
]
"""Of this machine or, as in gs://bucket/run, another one; a path afterwards."""


def _require(condition: bool, field: str, wanted: str, got: object) -> None:
  if not condition:
    raise UserError(f"{field}: wanted {wanted}, got {got}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW with warm-up, cosine decay, and clipping by the global norm.

  Attributes:
    learning_rate: the highest, reached after the warm-up.
    final_learning_rate: the lowest, reached by a cosine at the last step.
    warmup_steps: steps in which the learning rate rises from near 0.
    beta1: decay per step of the running mean of the gradient.
    beta2: decay per step of the running mean of the squared gradient.
    epsilon: added to the root of the mean square, the divisor of an update.
    weight_decay: share of a weight taken away per step, times the learning
      rate; the scales of norms are spared.
    clip_norm: a gradient whose global norm is larger is scaled to this norm.

  Raises:
    UserError: for a value that cannot train.
  """

  learning_rate: float = 8e-3
  final_learning_rate: float = 4e-4
  warmup_steps: int = 40
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0

  def __post_init__(self) -> None:
    """Checks the values."""
    make_fields(self)
    for field in ("learning_rate", "epsilon"):
      value = getattr(self, field)
      _require(0 < value <= LARGEST, field, "more than 0, and finite", value)
    clips = 0 < self.clip_norm <= LARGEST or self.clip_norm == math.inf
    _require(
      clips, "clip_norm", "more than 0, or inf for no clipping", self.clip_norm
    )
    for field in ("final_learning_rate", "warmup_steps", "weight_decay"):
      value = getattr(self, field)
      _require(0 <= value <= LARGEST, field, "0 or more, and finite", value)
    for field in ("beta1", "beta2"):
      value = getattr(self, field)
      _require(0 <= value < 1, field, "from 0 to below 1", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """Train a Gemma on text, or go on where an earlier run stopped.

  Attributes:
    data: text files, and folders read whole: plain text, .jsonl, .json, .csv,
      .tsv, .ipynb, .html, also as .gz, .bz2 or .xz; .parquet and .arrayrecord.
      On this machine, or where fsspec finds it: gs://, s3://, https://.
      Default: the documentation that comes with Python (pydoc_data.topics, some
      480,000 characters).
    mix: how much of each step each of --data gets, by a weight for each, such
      as 2 1; or 2:1 1:1 for weights that go from the first step to the last on
      a line.  Default: by the amount of text, in one order.
    text_field: the field of JSON and JSONL objects, and the column of .csv,
      .tsv and .parquet, that holds the text.  None: these, .ipynb and .html are
      text as they stand, but for .parquet.
    cache_dir: token ids of the text go here, and another run on the same text
      finds them (2 to 4 bytes a token; may be deleted).  If it can only be
      read, what is new goes to work_dir.  Default: $PALLAS_GEMMA_CACHE,
      $XDG_CACHE_HOME/pallas-gemma or ~/.cache/pallas-gemma.
    work_dir: checkpoints, metrics and loss.png go here, and a run found here
      is continued.  On this machine, or where fsspec writes: gs://bucket/run,
      s3://; then the run works in the cache, and each checkpoint is uploaded.
      Default: runs/NAME, after the first of --data.
    tokenizer: a SentencePiece tokenizer.model, for example Gemma's, on this
      machine or as in gs://bucket/tokenizer.model.  Default: one of
      --model.vocab-size pieces, learnt from the training text.
    steps: optimizer steps in all, those of earlier runs included.
    batch_size: rows per step.
    accumulation: passes per step, each over batch_size / accumulation rows, to
      save memory; the gradient is that of the whole batch.
    sequence_length: tokens per row.
    mesh: devices along the axes pods, data and fsdp, which split the rows of a
      pass, context, which splits the tokens of a row (ring attention; a
      sequence_length that 2 x context divides), and model, which splits heads
      and feed-forward columns, such as fsdp=4,model=2; fsdp and context
      split weights and moments too, so that each device holds a part of them.
      Or a preset: v5e-1, v5e-4, v5e-8, v5e-16, v5e-256, and the Gemma report's
      report-2b and report-7b.  "auto": fsdp over all
      devices that divide the rows, model over the rest.
    distributed: join the processes of other hosts, as the machine knows them
      (a TPU pod, Slurm, ...), or as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
      and JAX_PROCESS_ID say; where these are set it is so by itself.
    seed: of the initial weights, the held-out choice and the order of rows;
      from 0 to 2^63 - 1.
    held_out: share of the text to evaluate on and never train on, up to 134
      million characters.
    head: what the loss keeps for its backward pass on a TPU: "recompute"
      nothing of the vocabulary's size, "chunked" the softmax of all tokens of a
      pass, for a quarter less arithmetic in the head; "auto" the latter if it
      takes at most a quarter of the memory that weights, moments and gradient
      leave free.
    z_loss: weight of the squared log-normaliser in the training loss; PaLM
      used 1e-4.
    skip_spikes: a step whose gradient's norm is more than so many times its
      running mean is not taken; None takes it.  One whose loss or gradient is
      no finite number is never taken.
    max_skipped: after so many steps in a row that were not taken the run saves
      and stops, and leaves their batches in the work directory.
    profile: START:STOP, such as 10:20: what the devices do from the step after
      the 10th to the 20th goes to work_dir/profile, for TensorBoard or
      Perfetto.
    evaluate_every: steps between evaluations on the held-out text; there is one
      at the end too.
    eval_batches: batches of held-out text in each evaluation, the same every
      time; "auto" as many as take about 5 % of the time of training, but at
      least one; "all" every one, which takes as long as the text is large.
    save_every: steps between checkpoints; there is one at the end too, and on
      Ctrl-C, SIGTERM, SIGHUP, or when nobody reads the output any more.
    save_in_background: go on while a checkpoint is written, from a copy in the
      host's memory.
    keep: checkpoints kept, the newest, besides the one of the lowest held-out
      loss.  A new one is complete before an older one is removed, so the disk
      must hold one more.
    allow_change: go on, when a run is resumed, with other settings of the
      optimizer, the loss or the number of steps than it had.
    optimizer: its settings.
    model: its sizes.

  Raises:
    UserError: for a value that cannot train.
  """

  data: tuple[pathlib.Path, ...] = ()
  mix: tuple[str, ...] = ()
  text_field: str | None = "text"
  cache_dir: pathlib.Path | None = None
  work_dir: PathOrUrl = None
  tokenizer: PathOrUrl = None
  steps: int = 320
  batch_size: int = 8
  accumulation: int = 1
  sequence_length: int = 128
  mesh: str = "auto"
  distributed: bool = False
  seed: int = 0
  held_out: float = 0.1
  head: Literal["auto", "recompute", "chunked"] = "auto"
  z_loss: float = 0.0
  skip_spikes: float | None = None
  max_skipped: int = 5
  profile: str | None = None
  evaluate_every: int = 40
  eval_batches: int | Literal["auto", "all"] = "auto"
  save_every: int = 80
  save_in_background: bool = True
  keep: int = 3
  allow_change: bool = False
  optimizer: OptimizerConfig = OptimizerConfig()
  model: GemmaConfig = GemmaConfig.tiny()

  def __post_init__(self) -> None:
    """Checks the values."""
    _require(is_seed(self.seed), "seed", A_SEED, self.seed)
    make_fields(self)
    for name in ("work_dir", "tokenizer", "cache_dir"):
      path = getattr(self, name)
      if path is None:
        continue
      if name == "cache_dir":
        local_path(path, name)
      elif place := place_of(path, name):
        place.check(written=name == "work_dir")
    for path in self.data:
      if url := remote_url(path):
        Remote(url).check()
    for field in (
      *("steps", "batch_size", "accumulation", "sequence_length"),
      *("evaluate_every", "save_every", "keep", "max_skipped"),
    ):
      value = getattr(self, field)
      _require(value >= 1, field, "1 or more", value)
      _require(value < 1 << 31, field, "less than 2^31", value)
    _require(
      self.eval_batches in ("auto", "all")
      or (type(self.eval_batches) is int and self.eval_batches >= 1),
      "eval_batches",
      '1 or more, "auto" or "all"',
      self.eval_batches,
    )
    _require(
      0 < self.held_out < 1, "held_out", "between 0 and 1", self.held_out
    )
    _require(
      0 <= self.z_loss < math.inf,
      "z_loss",
      "0 or more, and finite",
      self.z_loss,
    )
    _require(
      self.skip_spikes is None or 1 < self.skip_spikes <= LARGEST,
      "skip_spikes",
      "more than 1, and finite, or None",
      self.skip_spikes,
    )
    if self.profile is not None:
      start, _ = window_of(self.profile)
      _require(start < self.steps, "profile", "a step of the run", self.profile)
    parse(self.mesh)
    check_mix(self.mix, len(self.data))
    _require(
      self.batch_size % self.accumulation == 0,
      "accumulation",
      f"a divisor of batch_size, {self.batch_size}",
      self.accumulation,
    )
    _require(
      self.sequence_length <= self.model.context_length,
      "sequence_length",
      f"at most the model's context_length, {self.model.context_length}",
      self.sequence_length,
    )

  @property
  def directory(self) -> pathlib.Path:
    """work_dir, or the default made from the name of the data."""
    if self.work_dir is not None:
      return pathlib.Path(self.work_dir)
    name = self.data[0].resolve().stem if self.data else "python-docs"
    return pathlib.Path("runs") / (name or "data")
