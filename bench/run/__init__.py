"""Running what is timed, one process per compile.

row       a program's time, as it is kept and written; the result of a job
job       what a process is asked to do, and the name of its result
sources   the files that a number depends on, for that name
worker    the process: builds, estimates, prints its result
sweep     many jobs, and the cache of their results
measured  by the clock instead, where there is a TPU
"""
