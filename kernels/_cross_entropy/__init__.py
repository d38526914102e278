"""Linear projection onto a vocabulary and cross-entropy, without the logits.

Maths, for a row x in R^D with label y and weight w, over the table E [V, D]:

    z_v  = x . E_v + b_v,   then  cap * tanh(z_v / cap)  with a soft cap
    lse  = log(sum_v exp(z_v))                     v < valid_vocab_size
    loss = w * (lse - z_y + z_loss * lse^2)

    dz_v = w * dloss * ((1 + 2 z_loss lse) exp(z_v - lse) - [v = y])
    dx   = sum_v dz_v E_v,   dE_v = sum over rows of dz_v x,   db_v = of dz_v

With smoothed labels (1 - s) z_y + s mean_v z_v stands for z_y, and s / V is
subtracted from every exp(z_v - lse) beside (1 - s) [v = y].

Traffic: a pass reads x and E once, the backward pass writes both gradients
once; nothing of size R V exists.  Four matrix products of 2 R V D flops, one of
them the logits again in the backward pass ("recompute"), or three, if the
exponentials stay in HBM between the passes ("chunked", R V numbers of x's
dtype).  On v5e, R 2048, D 2048 and V 256128 in bfloat16 take 65,568,768 cycles
for four and 49,176,576 for three, and their traffic 6 million, which hides
behind them from a few hundred rows on: bound by the MXU.

Tiling: x stays in VMEM, and so does dx, in float32; the table streams by in
blocks of the vocabulary.  A block meets all rows, `chunk` by `chunk`; its
gradient is complete then, and leaves.  Logits are [vocab_block, rows], so that
a sum over the vocabulary needs no cross-lane traffic.

                  rows (all in VMEM, in chunks)
                +------+------+------+------+
   vocabulary   |  z = E x^T  ->  softmax   |   forward: max, sum and label's
   block    --> |      |      |      |      |   logit of each row, online
                +------+------+------+------+   backward: dz, dx^T += E^T dz,
   next block   |                           |   then dE = dz x

A head [D, V] is transposed block by block in VMEM, where E^T is needed for dx
in any case; its gradient is transposed on its way out.

More rows than fit take turns in blocks, each of which adds to dE in HBM.

Read in this order:

    spec      the arrays, what is static, the reference in plain jnp
    tiles     the config, and the choice of one
    memory    the model of VMEM that it goes by
    forward   the statistics of every row: maximum, sum, logit of the label
    backward  both gradients in one kernel; its records have their own page
    bias      of the logits, in both
    door      what the public function is given, checked
    labels    those that are not vocabulary, an error under `checkify`
    soft      soft targets, by XLA
    op        from the statistics to the loss, the public function, the cases
"""

from .op import LINEAR_CROSS_ENTROPY as LINEAR_CROSS_ENTROPY
from .op import linear_cross_entropy as linear_cross_entropy
from .soft import Teacher as Teacher
from .soft import linear_soft_cross_entropy as linear_soft_cross_entropy
from .spec import TokenPredictions as TokenPredictions
from .spec import (
  linear_cross_entropy_reference as linear_cross_entropy_reference,
)
from .tiles import LinearCrossEntropyConfig as LinearCrossEntropyConfig
