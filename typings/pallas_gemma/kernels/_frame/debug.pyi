from kernels._frame.debug import *
