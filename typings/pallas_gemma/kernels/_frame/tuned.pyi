from kernels._frame.tuned import *
