from kernels.integrations.nnx import *
