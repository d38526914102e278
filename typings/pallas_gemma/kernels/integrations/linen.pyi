from kernels.integrations.linen import *
