"""Gated units: geglu, and the whole feed-forward block around it.

Maths, for rows x in R^D, weights Wg, Wu [D, F] and Wd [F, D], activation a:

    gate = x Wg,   up = x Wu
    h    = a(gate) * up             geglu: GeGLU, SwiGLU or ReGLU by a
    y    = h Wd                     feed_forward

and with an RMSNorm and the residual, as a transformer's block has them,

    h = a(norm(x) Wg) * (norm(x) Wu)
    y = x + h Wd

The backward pass of feed_forward starts from dy, that of geglu from dh:

    dh    = dy Wd^T
    dgate = dh * up * a'(gate)
    dup   = dh * a(gate)

    dx    = dgate Wg^T + dup Wu^T
    dWg   = x^T dgate,   dWu = x^T dup,   dWd = h^T dy

With a norm, x in the last two lines is norm(x), dx is the gradient of norm(x),
and x's own follows from it, see `_row_norm.py`; the residual adds dy to that.
Shazeer, arXiv 2002.05202; Gemma, arXiv 2403.08295 section 2.

Traffic: both ops are bound by the matrix unit at thousands of rows.

                  matmuls forward    backward, gate and up
                                     kept    computed again
    geglu                2             4           6
    feed_forward         3             6           8

Nothing of size [rows, F] is written but geglu's own result and what is kept for
the backward pass: a tile of gate, up, h, dgate and dup lives in VMEM while all
products that need it are taken.  For that, some arrays are read again:

    geglu                 x once for every F tile, the weights once
    geglu with a norm     x once, the weights once for every row tile
    feed_forward          x once, the weights once for every row tile: 1.6 GiB
                          for 8192 rows of Gemma 2B in row tiles of 1024, a
                          quarter of what HBM moves in the time of the products
    backward of both      the weights and their gradients once; x, dy and twice
                          the float32 dx for every F tile: 6.9 GiB for those
                          rows in F tiles of 512, half of what HBM moves

Tiling: a grid step has a row tile of x and an F tile of the weights; D is never
cut.  The last tile of either kind may hang over the end.

               D                    cols                    D
          +---------+          +----+----+----+        +---------+
     rows |  x  i   |        D | Wg | Wu |  j |   cols |  Wd  j  |
          +---------+          +----+----+----+        +---------+

The numbers are the order of grid steps:

    geglu                 geglu with a norm,      backward of both
                          feed_forward
            j=0 j=1 j=2           j=0 j=1 j=2             j=0 j=1 j=2
           +---+---+---+         +---+---+---+           +---+---+---+
      i=0  | 0 | 2 | 4 |    i=0  | 0 | 1 | 2 |      i=0  | 0 | 2 | 4 |
           +---+---+---+         +---+---+---+           +---+---+---+
      i=1  | 1 | 3 | 5 |    i=1  | 3 | 4 | 5 |      i=1  | 1 | 3 | 5 |
           +---+---+---+         +---+---+---+           +---+---+---+
    weights stay for      x, its norm and the     weights and the sums of
    all row tiles         sum y stay for all      their gradients stay for
                          F tiles                 all row tiles

Read in this order:

    spec.py        the references in plain jnp, and the records of an op
    stack.py       weights of all layers, or of experts, in one array
    visits.py      which rows of its tile a grid step computes
    activation.py  the activations and their derivatives
    layout.py      how weights lie in memory, and the products that makes
    config.py      FeedForwardConfig
    tiles.py       which tiles fit VMEM
    forward.py     the forward kernel
    backward.py    the backward kernel, and backward_blocks.py its call
    sums.py        how it sums the weights' gradients in VMEM
    travel.py      how it sums dx in HBM
    prefetch.py    how both get the weights of experts in time
    door.py        what the public functions are given
    forms.py       the forms of weights and biases among it
    op.py          the public functions, meshes, registration
"""

from .activation import ClampedSwiGLU as ClampedSwiGLU
from .config import FeedForwardConfig as FeedForwardConfig
from .config import FeedForwardTiles as FeedForwardTiles
from .op import FEED_FORWARD as FEED_FORWARD
from .op import GEGLU as GEGLU
from .op import feed_forward as feed_forward
from .op import geglu as geglu
from .spec import feed_forward_reference as feed_forward_reference
from .spec import geglu_reference as geglu_reference
