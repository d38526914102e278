"""The machinery that every op shares, told once.  Read it last.

tpu.py       what a v5e is, and the few helpers that follow from it
kernel.py    `kernel_op`: three functions become an op that JAX can
             differentiate, map, split over a mesh and lower for any platform
sharding.py  which mesh axis splits which dimension; `sharding(mesh, rules)`
check.py     the refusals at the public door
tuned.py     configs that a tuner found best
op.py        the registry's record of an op, its cases and costs
"""
