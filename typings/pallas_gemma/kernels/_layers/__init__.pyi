from kernels._layers import *
