"""The feed-forward of a mixture of experts, of rows sorted by their experts.

Maths: group_sizes [E] says how many of the rows x [T, D] are each expert's, one
expert's after the other's.  For a row of expert e, activation a:

    gate = x Wg_e + bg_e,   up = x Wu_e + bu_e
    h    = a(gate) * up
    y    = h Wd_e + bd_e

Shazeer et al., arXiv 1701.06538; sorted rows without a capacity that could drop
any: Gale et al., MegaBlocks, arXiv 2211.15841.

The kernels are those of the feed-forward, `_gated`, whose weights are in a
stack: a grid step is given the weights of the expert that its rows belong to.
A tile of rows in which one expert's end and the next one's begin is computed
for both (`_gated/visits.py`).

    forward     geglu's kernel for h, and once more, without a gate, for y: both
                read each expert's weights once, where the kernel of both
                products would read them for every tile of its rows
    backward    feed_forward's kernel, whose tiles of weights and of their
                gradients stay for all rows of an expert

Tiling: row tiles of 512, of which the 128 rows of a part are computed at once,
and F tiles, the outer dimension of the grid, as those of geglu and of the
backward pass of feed_forward.

In a scan over layers the weights are [L, E, D, F], of which the kernels are
given the whole and the layer's index: a step's blocks are those of its expert
in the layer (`_gated/stack.py`).  Every expert has a visit, so that of the
stack's gradient every block of the layer is written.

Traffic: bound by the matrix unit where experts have hundreds of rows, else by
their weights, which are read once in either pass.  h is written and read again,
[T, F]; gate and up are kept for the backward pass, or computed again, as in
`feed_forward`.

    spec.py    the specification in plain jnp
    door.py    what the public function is given
    op.py      the kernels' calls, meshes, the public function, registration
"""

from .op import EXPERT_FEED_FORWARD as EXPERT_FEED_FORWARD
from .op import expert_feed_forward as expert_feed_forward
from .op import expert_feed_forward_reference as expert_feed_forward_reference
from .spec import ExpertBiases as ExpertBiases
