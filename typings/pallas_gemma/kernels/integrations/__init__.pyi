from kernels.integrations import *
from kernels.integrations import gemma as gemma
from kernels.integrations import keras_hub as keras_hub
from kernels.integrations import tunix as tunix
