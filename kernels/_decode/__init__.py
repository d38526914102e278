"""Decode attention: the newest queries of each row against a KV cache.

Maths: as flash attention, where row b of the cache holds lengths[b] valid keys,
the last T of which belong to the T queries.  Query t stands at position

    i = lengths[b] - T + t

and sees the keys j <= i, from i - left on with a window (left, right).  The T
new keys and values may come along: then they are written to their places in the
cache, which stays where it is.

Traffic: the valid part of the cache is read once for each block of queries, for
all query heads together; at T = 1 that is 2 N / K flops per byte: bound by HBM.
On v5e, 32 rows of 8192 tokens of Gemma 2B, 256 MiB in bfloat16, take 491,520
cycles; with lengths from 256 to 8192, half of it.

Tiling: a row of the cache, whose heads lie side by side for each token, is read
as K keys a token, block by block, into slots of VMEM that are used in turn.

    rows of the cache            slots of VMEM, some blocks ahead
    0  [ 0 ][ 1 ][ 2 ][ 3 ]      [ 2 ] in work
    1  [ 0 ][ 1 ]        ---->   [ 3 ] on its way
    2  [ 0 ][ 1 ][ 2 ]           [ 0 ] of the next row, on its way
                                 [ 1 ] may be on its way back, with a new key

What comes next does not stop at the end of a row: HBM never waits.  The queries
of all N heads meet all K keys of a token at once, and those of other kv heads
are hidden, which costs the matrix unit K times the work and the clock nothing,
while HBM takes longer than both.  Where queries are many, or where the heads of
a cache lie apart in HBM, each kv head is a row of its own.

Read: spec (the problem), cache (how a cache lies in memory), tiles, stream (the
copies), rotate (RoPE), append (the new keys), attend (a block of keys), forward
(the kernel), apart (heads, as it takes them), devices, door, op.
"""

from .cache import QuantizedCache as QuantizedCache
from .op import DECODE_ATTENTION as DECODE_ATTENTION
from .op import decode_attention as decode_attention
from .op import decode_attention_reference as decode_attention_reference
from .tiles import DecodeAttentionConfig as DecodeAttentionConfig
