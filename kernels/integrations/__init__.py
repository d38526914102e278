"""One line for the libraries that people have: their classes, these kernels.

    from pallas_gemma.kernels.integrations import gemma, report

    gemma.apply()       # before the model is traced
    ...                 # the library as ever: its parameters, its checkpoints
    print(report())     # what runs in each layer, and why not
    gemma.undo()

A module of this package is named after the library it serves, and imports that
library only when `apply` is called: `kernels/` alone still needs JAX alone.

    gemma      Gemma 1, 2 and 3 of DeepMind's `gemma`
    tunix      Llama 3 and Qwen 3 of Google's `tunix`
    keras_hub  Gemma 1 and 2, Llama 3 and Qwen 3 of `keras_hub`, on JAX
    maxtext    the dense models of Google's `maxtext`, Llama and Qwen among them

`nnx` and `linen` are modules for `flax`, to build models of; importing them
imports flax.

What a layer asks that the kernels do not serve, such as a KV cache, adapters or
attention weights to look at, stays the library's own code, and `report` says so
with the reason.  Nothing else changes: neither parameters nor their names, nor
their sharding annotations.

    _library      read this first: what apply and undo do
    _log          what report says
    _mask         masks that are still known for what they are
    _nnx          what libraries on flax.nnx have in common
    _tunix_loss   the losses of tunix without logits
    _weights      what the modules of nnx and of linen have in common
    _parts        a norm, an attention, a feed-forward, of a library's arrays
"""

from . import gemma as gemma
from . import keras_hub as keras_hub
from . import maxtext as maxtext
from . import tunix as tunix
from ._log import Layer as Layer
from ._log import Report as Report
from ._log import report as report
from ._mask import CausalMask as CausalMask
