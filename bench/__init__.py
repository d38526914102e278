"""Times every op of the registry for TPU v5e, with one or without.

Without a TPU the compiler is asked: it prints the final program bundle by
bundle, and a bundle is a cycle.

    v5e/     a cycle model of the chip; stands alone, `estimate` is its door
    suites/  what is timed: the registry, the best that there is elsewhere, the
             model from a block to whole steps, programs of known time
    run/     one process per compile, the cache of results, and the clock
    show/    tables, comparisons and the README's report
    notebooks/  for who has a v5e: its times beside the estimates
    _cli     the command `pallas-gemma-bench`
    bench_ops, conftest: the same for pytest

To follow one number, read suites/program, run/worker, v5e/estimator and
run/row, in this order.  Arrows between the rooms point one way: show to run to
suites to v5e.

Public names are listed in `__init__.pyi`; each is imported when it is first
used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
