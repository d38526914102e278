from bench.v5e import *
