"""The trainer, from the command line to one optimizer step.

`pallas-gemma train` reads its options into a `TrainConfig` and calls `train`.
What happens then, and where to read it:

    config      what a run can be told: TrainConfig, OptimizerConfig
    trainer     train(config), the whole run in twenty lines:
    |-- work      the directory: locked, and if it is on another machine, a twin
    |-- run       before the first step: text, tokenizer, packed rows, and the
    |   |         directory, which is made, or checked if it is resumed
    |   |-- .._data   files -> documents -> token ids -> rows
    |   |-- mesh, layout   how it is spread over devices, and what lies where
    |   |-- record    what a run is made with, and how it differs when resumed
    |   `-- evaluate  on which of the held-out text it is evaluated
    |-- loop      take_step(): the batch of this step, one training step, and
    |   |         the checkpoint and evaluation that are due
    |   |-- .._data   training_batches(...)(step), evaluation_batches(...)
    |   `-- step      loss, its gradient, the update of the parameters; compiled
    |       |-- optimizer   AdamW, clipping and the learning rate, from optax
    |       `-- guard       steps that are not taken: NaN, spikes
    |-- times     where the time goes; tokens per second, MFU
    |-- profile   traces some steps
    |-- place     batches to the devices, each process's rows alone
    |-- metrics   the record of each step: metrics.jsonl, TensorBoard
    |-- plot      pictures of the records: loss.png, and `pallas-gemma plot`
    |-- progress  what the terminal shows
    |-- inspect   `pallas-gemma inspect`: what lies where
    `-- interrupt Ctrl-C and `kill`, noted and obeyed after the step

Checkpoints are those of `.._checkpoint`, the model that of `.._model`; neither
knows of the trainer.  All that it prints goes through `.._output`, and one
process at a time works in a directory, by `.._lock`.

Of several processes (`.._processes`), one on each host, all do this in step.

Every step is a function of the parameters and the optimizer state before it and
of the batch, and the batch is a function of the seed and the step's number.
Hence a run that was killed and started again gives the same losses, bit by bit,
as a run that was not.

The package imports nothing by itself: the command line needs only `config` to
print its help, and that takes no JAX.
"""
