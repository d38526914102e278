"""A Gemma to train, sample and take apart: the table of contents.

    model      GemmaConfig, Gemma, Cache, Ops, KERNELS, REFERENCE
    text       Tokenizer
    sampling   Sampler, Completion
    storage    save_checkpoint, load_checkpoint, Checkpoints
    data       read_corpus, split_documents, tokenize, pack, training_batches
    training   TrainConfig, train, TrainResult, read_metrics; and its parts:
               OptimizerConfig, make_optimizer, learning_rate_schedule,
               token_losses, loss_and_gradient, flops_per_token
    errors     UserError, for what the user can mend

Each name is imported when it is first used: `import pallas_gemma.gemma` is
quick, and `pallas-gemma --help` does not wait for JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from ._checkpoint import Checkpoints as Checkpoints
  from ._checkpoint import load_checkpoint as load_checkpoint
  from ._checkpoint import save_checkpoint as save_checkpoint
  from ._cli import main as main
  from ._config import GemmaConfig as GemmaConfig
  from ._data import Corpus as Corpus
  from ._data import Document as Document
  from ._data import Rows as Rows
  from ._data import Split as Split
  from ._data import evaluation_batches as evaluation_batches
  from ._data import pack as pack
  from ._data import read_corpus as read_corpus
  from ._data import split_documents as split_documents
  from ._data import tokenize as tokenize
  from ._data import training_batches as training_batches
  from ._data import unigram_loss as unigram_loss
  from ._errors import UserError as UserError
  from ._flops import flops_per_token as flops_per_token
  from ._metrics import read_metrics as read_metrics
  from ._model import Cache as Cache
  from ._model import Gemma as Gemma
  from ._optimizer import learning_rate_schedule as learning_rate_schedule
  from ._optimizer import make_optimizer as make_optimizer
  from ._sampler import Completion as Completion
  from ._sampler import Sampler as Sampler
  from ._step import choose_head as choose_head
  from ._step import loss_and_gradient as loss_and_gradient
  from ._step import token_losses as token_losses
  from ._tokenizer import Tokenizer as Tokenizer
  from ._train import TrainResult as TrainResult
  from ._train import train as train
  from ._train_config import OptimizerConfig as OptimizerConfig
  from ._train_config import TrainConfig as TrainConfig
  from .ops import KERNELS as KERNELS
  from .ops import REFERENCE as REFERENCE
  from .ops import Ops as Ops
  from .ops import describe_ops as describe_ops

_HOMES = {
  "Cache": "_model",
  "Checkpoints": "_checkpoint",
  "Completion": "_sampler",
  "Corpus": "_data",
  "Document": "_data",
  "Gemma": "_model",
  "GemmaConfig": "_config",
  "KERNELS": "ops",
  "Ops": "ops",
  "OptimizerConfig": "_train_config",
  "REFERENCE": "ops",
  "Rows": "_data",
  "Sampler": "_sampler",
  "Split": "_data",
  "Tokenizer": "_tokenizer",
  "TrainConfig": "_train_config",
  "TrainResult": "_train",
  "UserError": "_errors",
  "choose_head": "_step",
  "describe_ops": "ops",
  "evaluation_batches": "_data",
  "flops_per_token": "_flops",
  "learning_rate_schedule": "_optimizer",
  "load_checkpoint": "_checkpoint",
  "loss_and_gradient": "_step",
  "main": "_cli",
  "make_optimizer": "_optimizer",
  "pack": "_data",
  "read_corpus": "_data",
  "read_metrics": "_metrics",
  "save_checkpoint": "_checkpoint",
  "split_documents": "_data",
  "token_losses": "_step",
  "tokenize": "_data",
  "train": "_train",
  "training_batches": "_data",
  "unigram_loss": "_data",
}


def __getattr__(name: str) -> object:
  """Imports the module behind a public name (PEP 562)."""
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  try:
    module = importlib.import_module(f".{_HOMES[name]}", __name__)
  except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package in ("", "pallas_gemma"):
      raise  # a mistake of ours, not a package to install
    raise ModuleNotFoundError(
      f"{__name__}.{name} needs {package!r}, which is not installed: "
      "pip install 'pallas-gemma[gemma]'",
      name=error.name,
    ) from error
  return getattr(module, name)


def __dir__() -> list[str]:
  """The public names, imported or not."""
  return sorted(_HOMES)
