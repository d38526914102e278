from bench.suites import gemma_decode as gemma_decode
from bench.suites import gemma_layers as gemma_layers
from bench.suites import gemma_step as gemma_step
from bench.suites import published as published
