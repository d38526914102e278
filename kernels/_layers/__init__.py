"""A scan over layers whose large weights stay where they are.

A model that scans over its layers has each weight stacked, [L, ...].  A scan
slices the stack at every step, and XLA fuses the slice into its own products.
A kernel reads an array that lies in memory, so for a kernel XLA copies the
slice first; and in the backward pass it copies each layer's gradient once more,
into the gradient of the stack.  For a layer of Gemma 2B that is 1.6 GB, a
seventeenth of the time of the layer.

`scan_layers` is `jax.lax.scan` without these copies.  In place of a slice the
body gets a `LayerOf`: the stack and the index of the layer, by which the kernel
finds its blocks.  For the gradient it works so:

    forward     x -> layer 0 -> layer 1 -> ... -> layer L-1 -> y
                W ---------------- ports ------------------->  dropped

    backward   dx <- layer 0 <- layer 1 <- ... <- layer L-1 <- dy
               dW <---------------- ports -------------------  not set

The stack itself is taken for a constant.  Beside it goes a port, a second name
for it that each layer passes on as it is, so that costs nothing.  But
backwards, what a layer is given as the cotangent of its port is the gradient of
the whole stack, so far as it is known; the layer's kernel writes its own part
into it, in place.  Each layer does so exactly once, so it begins as memory that
is not set.

With what a kernel keeps for its backward pass it is the other way round.  A
scan would copy it into a stack, and backwards out of it.  Here a store goes
from layer to layer, into which each layer's kernel writes its own part.
Backwards, what goes from layer to layer as the cotangent of the store is the
store itself, as the last layer left it, so that each layer's kernel can read:

    forward    not set -> layer 0 -> ... -> layer L-1 -> store
    backward   dropped <- layer 0 <- ... <- layer L-1 <- store

An op that is given no `LayerOf`, as attention, finds such stores by itself, in
the room that a layer has while it is traced: `_frame/room.py`.

Read in this order:

    scan.py     scan_layers
    weight.py   LayerOf, what the body gets in place of a weight
    product.py  layer_einsum, where a product is XLA's and not a kernel's
    turns.py    where ports and stores begin, turn back and end
"""

from .product import layer_einsum as layer_einsum
from .scan import ScanPart as ScanPart
from .scan import scan_layers as scan_layers
from .weight import LayerOf as LayerOf
