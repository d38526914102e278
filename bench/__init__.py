"""Times every op of the registry for TPU v5e, with one or without.

Without a TPU the compiler is asked: it prints the final program bundle by
bundle, and a bundle is a cycle.

    what to time   _program (a pass of an implementation on a problem),
                   _registry (every op's own cases)
    estimating     _compiler (compiles for a described chip), _listing and _hlo
                   (read what it prints), _machine, _scalar and _units (execute
                   it), _prefetch (values that it branches on), _estimate (the
                   sum over a program)
    running        _job and _worker (one process per compile), _sweep (many),
                   _row (a result)
    showing        _cli, _table
"""
