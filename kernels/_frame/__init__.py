"""The machinery that every op shares, told once.  Read it last.

tpu.py       what a v5e is, and the few helpers that follow from it
kernel.py    `kernel_op`: three functions become an op that JAX can
             differentiate, map, split over a mesh and lower for any platform
check.py     the public door: what comes becomes what an op takes, or is refused
sharding.py  which mesh axis splits which dimension; `sharding(mesh, rules)`
manual.py    what JAX asks of code inside a `shard_map`
derivative.py  a linear function by two programs: the backward kernel in reverse
             mode, plain jnp in forward mode
rule.py      a function with a derivative of its own
mapped.py    a kernel under vmap
lowering.py  what is known only when a program is lowered
switches.py  JAX's switches, where an op must not follow them
tuned.py     configs that a tuner found best
op.py        the registry's record of an op, its cases and costs
"""
