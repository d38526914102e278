"""Rotary position embedding (RoPE).

Maths, for a head x in R^H at position p, with h = H / 2 and 0 <= i < h:

    angle_i  = p / base_frequency^(i / h)       float32, whatever x's dtype
    y_i      = x_i     cos(angle_i) - x_(i+h) sin(angle_i)
    y_(i+h)  = x_(i+h) cos(angle_i) + x_i     sin(angle_i)

The backward is the same rotation by -angle; nothing is saved but p.  Of the
plain form above, these are the others, alone or together:

    frequencies    angle_i = p f_i, with any f in R^F, which may go by several
                   streams of positions; if F < h, h is F in the above, and the
                   elements from 2 F on stay; y may be multiplied by a number
    interleaved    the elements 2 i and 2 i + 1 are a pair, not i and i + h
    phases         sin and cos [T, F] are given, and no positions

Traffic: x read once, y written once, in both directions; positions are 4 bytes
per token.  A few flops per element: bound by HBM.  On v5e, q of Gemma 2B for 8
sequences of 8192 (256 MiB in bfloat16) takes 983,040 cycles at 819 GB/s.  The
phases are computed in the kernel, once per token for all its heads: the sine
and cosine hide behind the copies, while a table of them, float32 [T, H], would
add an eighth to the traffic at 8 heads.

Tiling: tokens, flattened over the batch, by heads.

           heads x H
        +-------------+
        |  tile 0, 0  | rows     grid = (ceil(B T / rows), ceil(N / heads))
        +-------------+          positions come as [1, rows], tokens in lanes,
        |  tile 1, 0  |          and are transposed into sublanes
        +-------------+

Read: frequencies (and their numbers), hugging_face (by a model's
configuration), spec (the problem, the reference), tiles, kernel (of both
passes), door, op, apart (for attention).
"""

from .apart import rotated_apart as rotated_apart
from .door import as_rope as as_rope
from .frequencies import RopeFrequencies as RopeFrequencies
from .kernel import rotated as rotated
from .op import OP as OP
from .op import apply_rope as apply_rope
from .spec import Arrays as Arrays
from .spec import Problem as Problem
from .spec import Rope as Rope
from .spec import apply_rope_reference as apply_rope_reference
from .spec import phases_of as phases_of
from .spec import rope_timescale as rope_timescale
from .tiles import RopeConfig as RopeConfig
