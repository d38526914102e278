"""Showing results.

table        on the terminal
files        results/*.json
compare      earlier results beside those of now
beside       times of now beside those of results/*.json
calibration  the cycle model beside what is known from elsewhere
published    the same for kernels of other packages, which these measured
problems     rows by what they compute, ours beside the best of the others
report       the tables of README.md and results/README.md: `python -m` runs it
plots        the plots beside them
"""
