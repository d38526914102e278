from bench.report import *
