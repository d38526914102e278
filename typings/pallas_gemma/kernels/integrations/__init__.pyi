from kernels.integrations import *
