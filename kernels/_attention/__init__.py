"""Flash attention: multi-query, grouped-query and multi-head.

Maths, for one query row q of head n, with the keys k_j and values v_j of the
kv head n // (N / K), over the keys j that the masks leave visible:

    s_j = scale * q . k_j,   then  cap * tanh(s_j / cap)  with a soft cap
    lse = log(sum_j exp(s_j))
    p_j = exp(s_j - lse)
    o   = sum_j p_j v_j                        0 where no key is visible

    di   = do . o - dlse                       backward (arXiv 2205.14135)
    ds_j = p_j (do . v_j - di)                 times 1 - (s_j / cap)^2
    dq   = scale * sum_j ds_j k_j
    dk_j = scale * sum ds_j q,   dv_j = sum p_j do     over its group

Visible, from query i to key j (positions in the arrays, not `rope`'s):

    is_causal                        j <= i
    local_window_size=(left, right)  i - left <= j <= i + right, both inclusive
    segment_ids                      equal, and not 0 (padding)
    mask                             as it says
    chunk_size                       i // chunk_size == j // chunk_size
    prefix_lengths                   j < prefix, beside is_causal
    query_offset                     i is the query's index plus it
    sinks                            one more key, of value 0
    dropout_rate                     p_j 0 or over 1 - rate, lse as without it
    bias                             s_j + bias, whose gradient is ds_j
    alibi_slopes                     s_j - slope |i - j|, see `alibi`

Traffic: q, k, v and o once, and backward these, do, dq, dk and dv once; lse is
one float32 per row, di is recomputed.  With T^2 / 2 visible pairs of H = 256
the causal forward at T = 8192 does 4,096 flops per byte and is bound by the
MXU: 2 matmuls forward, 5 backward.

Tiling: the kernels see rows, the G = N / K query heads of a kv head side by
side; how they lie in memory is the caller's choice, and nothing is moved.  The
keys of a kv head stay in VMEM while the grid, (B K, ceil(T / block_q)), walks
over its blocks of queries; of row-major arrays those of two kv heads, which
have a step each at every block.  A causal forward, with block_q = 2 block_kv:

            block_kv
            +---+                  d  the diagonal, first: each group of rows as
    block_q |ddd|                     far as it sees, in whole registers, masked
            |ddd|ddd               f  the keys before it: a loop without masks
            +---+---+---+
            |fff|fff|ddd|          Windows and unaligned shapes add loops with
            |fff|fff|ddd|ddd       masks at the ends.  With segment ids, blocks
            +---+---+---+---+      from the first to the last that can share an
                                   id are masked.  The rest costs nothing.

Read in this order; each page stands on those before it:

    shapes     the shapes in which a caller may have the arrays
    spec       the arrays and the problem
    positions  which keys a query sees by position
    arguments  both, of a public function's arguments
    reference  what is computed
    layout     queries and keys in memory, and the order of rows
    memory     what fits VMEM
    tiles      tile sizes, and what one kernel call is
    spans      more keys than one call holds
    rotation   where RoPE is applied, if it is part of a problem
    finite     what is not a number, behind a mask
    heads      which kv heads a device needs, over a mesh
    stores     what lies in stacks, in a scan over layers
    masks      a mask that is an array
    blocks     which keys a block of queries meets, and the mask
    bias       an array that is added to the logits
    alibi      logits that fall with the distance
    operands   segment ids and positions, as the kernels have them
    dropout    which weights are dropped
    nothing    queries that see no key
    softmax    its steps in a forward kernel, those of decode attention too
    words      copies of [B, T, N, H] as it is, two heads at a time
    pairs      what comes and goes around a grid step of two kv heads
    forward    the kernel
    departure  how dk and dv leave for HBM
    backward_refs  what it is given
    backward   the kernel
    door       what the public functions are given, checked
    op         the public function and its registration
    problems   what it costs; those of tests and of models
    dot_product  `jax.nn.dot_product_attention`, by this op
    ring_order an order of tokens for devices that share a sequence
    ring       attention over these devices
    ring_parts one step of it
"""

from .dot_product import dot_product_attention as dot_product_attention
from .op import FLASH_ATTENTION as FLASH_ATTENTION
from .op import flash_attention as flash_attention
from .reference import flash_attention_reference as flash_attention_reference
from .ring_order import context_order as context_order
from .tiles import FlashAttentionConfig as FlashAttentionConfig
