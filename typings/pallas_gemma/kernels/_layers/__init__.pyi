from kernels._frame import *
