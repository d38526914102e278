"""A Gemma to train, sample and take apart: the table of contents.

    model      GemmaConfig, Gemma, Cache, Ops, KERNELS, REFERENCE
    text       Tokenizer
    sampling   Sampler, Completion
    storage    save_checkpoint, load_checkpoint, Checkpoints, best_step,
               read_record
    data       read_corpus, split_documents, tokenize, pack, training_batches
    training   TrainConfig, train, TrainResult, read_metrics, plot_runs; and
               its parts:
               OptimizerConfig, make_optimizer, learning_rate_schedule,
               token_losses, loss_and_gradient, flops_per_token
    errors     UserError, for what the user can mend

Where to begin: `_model.py` for the architecture, `_train/__init__.py` for how a
training run goes, `_sample/__init__.py` for how text is continued.

The names and their modules are listed once, in `__init__.pyi` (SPEC 1).  Each
name is imported when it is first used: `import pallas_gemma.gemma` is quick,
and `pallas-gemma --help` does not wait for JAX.
"""

from __future__ import annotations


def _needs(error: ModuleNotFoundError, who: str) -> ModuleNotFoundError | None:
  """The error with its remedy, or None if it is a mistake of this package."""
  package = (error.name or "").partition(".")[0]
  if package in ("", "pallas_gemma"):
    return None
  return ModuleNotFoundError(
    f"{who} needs {package!r}, which is not installed: "
    "pip install 'pallas-gemma[gemma]'",
    name=error.name,
  )


try:
  import lazy_loader
except ModuleNotFoundError as error:
  raise _needs(error, __name__) or error from error

_import, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
  """Imports the module behind a public name (PEP 562)."""
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  try:
    return _import(name)
  except ModuleNotFoundError as error:
    raise _needs(error, f"{__name__}.{name}") or error from error
