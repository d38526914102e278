"""Showing results.

table        on the terminal
files        results/*.json
compare      earlier results beside those of now
calibration  the cycle model beside what is known from elsewhere
report       the README's table and plots: `python -m` runs it
"""
