from kernels._layers.weight import *
