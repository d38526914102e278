"""Checkpoints: a model, its tokenizer and, while training, the optimizer.

    DIR/config.json                the model's config and what else was recorded
    DIR/tokenizer.model
    DIR/checkpoints/STEP/          one step, complete:
        params/  optimizer/        arrays, by Orbax
        record.json                what the trainer recorded with it, if it did
        checksums.json             size and CRC-32 of every file above
        loss.json                  the held-out loss, once it is known

What is promised, and by which page:

    identity    whose directory it is.  config.json has a checksum of itself and
                one of tokenizer.model: neither can become another one unnoticed
    checksums   a file of a step that is missing, cut or changed is named.
                (Orbax restores an array with a flipped bit without complaint)
    arrays      arrays to and from files; what was written is read back and
                compared before it counts
    steps       which steps there are.  One is written in a hidden folder and
                gets its own by one rename when all is on disk, compared and
                summed; older ones are removed after that, the best one never.
                So at every instant there is a complete one, once there was one
    store       Checkpoints, which the trainer saves with
    told        best_step, read_record: what was said of a step
    remote      steps that are on another machine
    twin        a directory on another machine, and what this one has of it, in
                which a run works
    mirror      how that gets there: a step's checksums last
    parts       arrays of several processes: each writes what it has
    model       save_checkpoint and load_checkpoint: a whole model, in and out
"""

from __future__ import annotations

from .identity import (
  CONFIG,
  TOKENIZER,
  check_identity,
  has_identity,
  open_directory,
  read_identity,
  tokenizer_identity,
  write_identity,
)
from .mirror import Mirror
from .model import load_checkpoint, load_config, save_checkpoint
from .steps import (
  HeldOutLoss,
  complete_steps,
  set_aside_unfinished,
  unfinished_steps,
)
from .store import Checkpoints
from .told import best_step, read_losses, read_record
from .twin import twin_home

__all__ = [
  "CONFIG",
  "TOKENIZER",
  "Checkpoints",
  "HeldOutLoss",
  "Mirror",
  "best_step",
  "check_identity",
  "complete_steps",
  "has_identity",
  "load_checkpoint",
  "load_config",
  "open_directory",
  "read_identity",
  "read_losses",
  "read_record",
  "save_checkpoint",
  "set_aside_unfinished",
  "tokenizer_identity",
  "twin_home",
  "unfinished_steps",
  "write_identity",
]
