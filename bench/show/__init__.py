"""Showing results.

table        on the terminal
files        results/*.json
compare      earlier results beside those of now
calibration  the cycle model beside what is known from elsewhere
problems     rows by what they compute, ours beside the best of the others
report       the tables of README.md and results/README.md: `python -m` runs it
plots        the plots beside them
"""
