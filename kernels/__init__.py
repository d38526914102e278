"""Drop-in TPU kernels: the table of contents and the one registry.

Everything public is named here; every module behind it starts with `_`.

    _rms_norm       read this first: an op from its maths to its registration
    _add_rms_norm   the same kernels, with the residual addition
    _rope           also the rotation that attention does inside
    _attention      flash attention, a page at a time
    _decode         decode attention, of a KV cache
    _gated          geglu and feed_forward
    _cross_entropy  linear_cross_entropy
    _layers         a scan over layers that copies none of their weights
    _quantized      weights in int8
    _remat          what jax.checkpoint may keep of them
    _frame          what makes functions an op, the same for all: read it last

Array letters, everywhere: B batch, T query and S key length, N query and
K key/value heads, H head size, D model width, F feed-forward width,
V vocabulary.
"""

import typing as _typing
import warnings as _warnings

from ._add_rms_norm import OP as _ADD_RMS_NORM
from ._add_rms_norm import add_rms_norm as add_rms_norm
from ._add_rms_norm import (
  add_rms_norm_reference as add_rms_norm_reference,
)
from ._attention import FLASH_ATTENTION as _FLASH_ATTENTION
from ._attention import FlashAttentionConfig as FlashAttentionConfig
from ._attention import context_order as context_order
from ._attention import dot_product_attention as dot_product_attention
from ._attention import flash_attention as flash_attention
from ._attention import flash_attention_reference as flash_attention_reference
from ._cross_entropy import LINEAR_CROSS_ENTROPY as _LINEAR_CROSS_ENTROPY
from ._cross_entropy import LinearCrossEntropyConfig as LinearCrossEntropyConfig
from ._cross_entropy import Teacher as Teacher
from ._cross_entropy import TokenPredictions as TokenPredictions
from ._cross_entropy import linear_cross_entropy as linear_cross_entropy
from ._cross_entropy import (
  linear_cross_entropy_reference as linear_cross_entropy_reference,
)
from ._cross_entropy import (
  linear_soft_cross_entropy as linear_soft_cross_entropy,
)
from ._decode import DECODE_ATTENTION as _DECODE_ATTENTION
from ._decode import DecodeAttentionConfig as DecodeAttentionConfig
from ._decode import QuantizedCache as QuantizedCache
from ._decode import decode_attention as decode_attention
from ._decode import decode_attention_reference as decode_attention_reference
from ._experts import EXPERT_FEED_FORWARD as _EXPERT_FEED_FORWARD
from ._experts import ExpertBiases as ExpertBiases
from ._experts import expert_feed_forward as expert_feed_forward
from ._experts import (
  expert_feed_forward_reference as expert_feed_forward_reference,
)
from ._frame.op import Case as Case
from ._frame.op import Cost as Cost
from ._frame.op import Integers as Integers
from ._frame.op import Op as Op
from ._frame.sharding import sharding as sharding
from ._gated import FEED_FORWARD as _FEED_FORWARD
from ._gated import GEGLU as _GEGLU
from ._gated import ClampedSwiGLU as ClampedSwiGLU
from ._gated import FeedForwardConfig as FeedForwardConfig
from ._gated import FeedForwardTiles as FeedForwardTiles
from ._gated import feed_forward as feed_forward
from ._gated import feed_forward_reference as feed_forward_reference
from ._gated import geglu as geglu
from ._gated import geglu_reference as geglu_reference
from ._layers import LayerOf as LayerOf
from ._layers import ScanPart as ScanPart
from ._layers import layer_einsum as layer_einsum
from ._layers import scan_layers as scan_layers
from ._quantized import QuantizedWeight as QuantizedWeight
from ._remat import names_of as _names_of
from ._remat import products_or as _products_or
from ._rms_norm import OP as _RMS_NORM
from ._rms_norm import rms_norm as rms_norm
from ._rms_norm import rms_norm_reference as rms_norm_reference
from ._rope import OP as _APPLY_ROPE
from ._rope import Rope as Rope
from ._rope import RopeConfig as RopeConfig
from ._rope import RopeFrequencies as RopeFrequencies
from ._rope import apply_rope as apply_rope
from ._rope import apply_rope_reference as apply_rope_reference
from ._row_norm import Norm as Norm
from ._row_norm import RMSNormConfig as RMSNormConfig

# To add a kernel: one module or room, its imports above, one entry here.
OPS: tuple[Op, ...] = (
  _RMS_NORM,
  _ADD_RMS_NORM,
  _APPLY_ROPE,
  _GEGLU,
  _FEED_FORWARD,
  _EXPERT_FEED_FORWARD,
  _FLASH_ATTENTION,
  _DECODE_ATTENTION,
  _LINEAR_CROSS_ENTROPY,
)

saveable_names: tuple[str, ...] = _names_of(OPS)
"""What the kernels keep for their backward passes, as policies of
`jax.checkpoint` name it: a policy that saves (or offloads) these has no forward
kernel run again."""

save_products: _typing.Callable[..., _typing.Any] = _products_or(saveable_names)
"""For `jax.checkpoint(f, policy=save_products)`: JAX's `dots_saveable`, which
saves the results of XLA's products, and the `saveable_names` of the kernels."""

# Names of the release before, for one release.
if _typing.TYPE_CHECKING:
  from ._gated import FeedForwardTiles as Tiles  # noqa: F401
else:

  def __getattr__(name: str) -> _typing.Any:
    if name != "Tiles":
      raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _warnings.warn(
      "pallas_gemma.kernels.Tiles is called FeedForwardTiles now; the old name "
      "goes with the next release",
      DeprecationWarning,
      stacklevel=2,
    )
    return FeedForwardTiles
