"""How much arithmetic training takes, and how much a chip can do."""

from __future__ import annotations

from ._arguments import instance
from ._config import GemmaConfig

# bfloat16 FLOP/s of one device as JAX counts them, from Google's system
# architecture pages (cloud.google.com/tpu/docs), by `device_kind`.
_PEAK = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
}


def flops_per_token(config: GemmaConfig, sequence_length: int) -> float:
  """Model FLOPs of one training token, forward and backward.

  6 * P for the products with weights, where P counts the weights, the tied
  embedding once, as the head; and 6 * L * T * N * H for causal attention, half
  of what the full square of queries and keys would take.  What a remat policy
  computes a second time is not counted.
  """
  instance("config", config, GemmaConfig)
  heads = config.num_heads * config.head_size
  kv_heads = config.num_kv_heads * config.head_size
  attention = 2 * config.width * (heads + kv_heads)
  feed_forward = 3 * config.width * config.hidden_size
  matmul = config.vocab_size * config.width + config.num_layers * (
    attention + feed_forward
  )
  return 6 * matmul + 6 * config.num_layers * sequence_length * heads


def peak_flops(device_kind: str) -> float | None:
  """bfloat16 FLOP/s of a device, or None where no such figure is known."""
  return _PEAK.get(device_kind)
